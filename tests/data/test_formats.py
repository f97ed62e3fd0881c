"""Forms of data that people have: each is read as the documentation says, or refused in one line."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, compose, write_jsonl
from data_rows import each, load, preferred, texts

from w2sg.config.check import check
from w2sg.data import sources
from w2sg.data.messages import Message
from w2sg.data.sources import local
from w2sg.errors import ConfigError, UserError

PAGE = (ROOT / "docs" / "data.md").read_text()
SHOWN = re.findall(r"```jsonl\n(.*?)```\n(\w+), the first: `(.*?)`\n", PAGE, re.S)


def user(text) -> dict:
    return {"role": "user", "content": text}


def said(text) -> dict:
    return {"role": "assistant", "content": text}


def many(make, count: int = 12) -> list[dict]:
    return [make(k) for k in range(count)]


def read(tmp_path: Path, rows: list[dict], **changes):
    return load(write_jsonl(tmp_path / "rows.jsonl", rows), **changes)


def test_every_example_of_the_page_is_found():
    assert len(SHOWN) == PAGE.count("```jsonl") > 20


@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_forms_are_read_as_the_page_says(tmp_path, number):
    lines, kind, first = SHOWN[number]
    file = tmp_path / "rows.jsonl"
    file.write_text(lines)
    source = local(str(file))
    found = [source.parse(row) for rows in source.pools.values() for _, row in rows]
    assert {example.kind for example in found} == {kind}
    example = found[0]
    assert example.texts[example.answer if kind == "pairs" else 0] == json.loads(first)
    assert all(text.startswith(example.prompt.text) for text in example.texts)
    if kind == "classes":
        assert [e.answer for e in found] == [1, 0]


def test_options_of_the_hub_are_not_read_for_local_files(tmp_path):
    rows = many(lambda k: {"prompt": f"q {k}", "chosen": "a", "rejected": "b"})
    notes = read(tmp_path, rows, subset="main", revision="v2").report["notes"]
    assert [note.split(" is ")[0] for note in notes] == ["dataset.subset=main", "dataset.revision=v2"]


def test_messages_stay_messages(tmp_path):
    quote = "Go on:\n\nHuman: hi\n\nAssistant: fine\n\nSystem: obey"
    rows = many(lambda k: {"prompt": [user(f"{k} {quote}")], "chosen": [said("good")], "rejected": [said("bad")]})
    tables = read(tmp_path, rows)
    prompts = {p for t in each(tables) for p in t.prompts}
    assert {p.messages for p in prompts} == {(Message("user", f"{k} {quote}"),) for k in range(12)}
    assert tables.report["dropped"] == {}


def test_a_text_prompt_is_one_message_whatever_its_replies_quote(tmp_path):
    quote = "See:\n\nHuman: hi\n\nAssistant: "
    rows = many(lambda k: {"prompt": f"q {k}", "chosen": f"{quote}good", "rejected": f"{quote}bad"})
    tables = read(tmp_path, rows)
    assert {p.text for t in each(tables) for p in t.prompts} == {f"\n\nHuman: q {k}\n\nAssistant:" for k in range(12)}
    assert preferred(tables.test)[0].endswith(f"Assistant: {quote}good")


def test_a_reply_that_begins_like_its_prompt_is_whole(tmp_path):
    tables = read(tmp_path, many(lambda k: {"prompt": f"Hi {k}", "chosen": f"Hi {k}, yes", "rejected": f"Hi {k}. no"}))
    assert "\n\nHuman: Hi 3\n\nAssistant: Hi 3, yes" in texts(tables)
    assert "12 of 12 begin with their prompt's text" in tables.report["read_as"]["rows.jsonl"]


def test_one_prompt_in_two_forms_stays_in_one_split(tmp_path):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "a.jsonl", many(lambda k: {"prompt": f"q {k}", "chosen": "a", "rejected": "b"}))
    rows = many(lambda k: {"prompt": [user(f"q {k}")], "chosen": [said("c")], "rejected": [said("d")]})
    write_jsonl(tmp_path / "d" / "b.jsonl", rows)
    tables = load(tmp_path / "d")
    names = [{p.text for p in t.prompts} for t in each(tables)]
    assert sum(map(len, names)) == len(set.union(*names)) == 12


def test_lists_as_python_text_are_refused(tmp_path):
    rows = many(lambda k: {"chosen": str([user(f"q {k}"), said("a")]), "rejected": str([user(f"q {k}"), said("b")])})
    with pytest.raises(UserError, match=r"column chosen is a list of messages written as Python text; save .* \.jsonl"):
        read(tmp_path, rows)
    one = {"chosen": [user("q"), said("a")], "rejected": str([user("q"), said("b")])}
    rows = [*many(lambda k: {"chosen": [user(f"q {k}"), said("a")], "rejected": [user(f"q {k}"), said("b")]}), one]
    assert (
        "rows.jsonl:13: rejected is a list of messages written as Python"
        in read(tmp_path, rows).report["dropped"]["malformed"]
    )


def test_lists_as_json_text_are_messages(tmp_path):
    talk = lambda k, a: json.dumps([user(f"q {k}"), said(a)])  # noqa: E731
    tables = read(tmp_path, many(lambda k: {"prompt": f"q {k}", "chosen": talk(k, "a"), "rejected": talk(k, "b")}))
    assert "\n\nHuman: q 3\n\nAssistant: a" in texts(tables)
    assert tables.report["notes"] == []


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({"role": "user", "content": [{"type": "image", "image": "x"}]}, "a message with image, of which only text"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "video"}]}, "a message with video"),
        ({"role": "tool", "content": "x"}, r"unknown role 'tool' \(tools are not read"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}, "a message with tool_calls"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, "a message with reasoning_content"),
        ({"role": "user", "content": None}, "a message without text"),
        ({"content": "x"}, "not a list of messages|unknown role None"),
    ],
)
def test_turns_that_are_no_text_are_named(tmp_path, turn, why):
    rows = many(lambda k: {"prompt": [user(f"q {k}")], "chosen": [said("a")], "rejected": [said("b")]})
    rows[3] = rows[3] | {"prompt": [user("q"), turn, user("and?")]}
    assert re.search(f"^1, first at rows.jsonl:4: ({why})", read(tmp_path, rows).report["dropped"]["malformed"])


def test_parts_of_text_are_joined_and_empty_keys_of_tables_ignored(tmp_path):
    turn = {
        "role": "user",
        "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
        "tool_calls": None,
    }
    rows = many(lambda k: {"prompt": [turn, said("ok"), user(str(k))], "chosen": [said("a")], "rejected": [said("b")]})
    assert "\n\nHuman: one two\n\nAssistant: ok\n\nHuman: 4\n\nAssistant: a" in texts(read(tmp_path, rows))


def test_columns_have_other_names(tmp_path):
    rows = many(lambda k: {"ask": f"q {k}", "good": "a", "bad": "b", "chosen": "x", "who": 1})
    tables = read(tmp_path, rows, columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert "\n\nHuman: q 3\n\nAssistant: a" in texts(tables)
    assert tables.report["notes"] == ["rows.jsonl: columns that are not read: chosen, who"]
    with pytest.raises(UserError, match=r"dataset\.columns\.prompt: rows\.jsonl has no column 'aks'; it has ask, good"):
        read(tmp_path, rows, columns={"prompt": "aks", "chosen": "good", "rejected": "bad"})
    with pytest.raises(
        UserError,
        match=r"has the columns ask, good, bad, chosen, who: a reply without its rejected one.*dataset\.columns",
    ):
        read(tmp_path, rows)
    labels = read(tmp_path, many(lambda k: {"t": f"t {k}", "y": k % 2}), columns={"text": "t", "label": "y"})
    assert labels.test.kind == "classes"


@pytest.mark.parametrize("columns", ["{promt: q}", "[a]", "{prompt: 3}", "{}"])
def test_fields_that_are_not_are_refused(tmp_path, columns):
    with pytest.raises(ConfigError, match=r"dataset\.columns"):
        check(
            compose("dataset=local", f"dataset.path={tmp_path}", f"dataset.columns={columns}", "weak=bow", "strong=bow")
        )


def test_scores_that_contradict_their_names_are_counted(tmp_path):
    rows = many(
        lambda k: {"prompt": f"q {k}", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 4 + k % 3}
    )
    tables = read(tmp_path, rows)
    assert tables.report["notes"] == [
        "rows.jsonl: 4 of 12 pairs with equal scores",
        "rows.jsonl: 4 of 12 pairs whose chosen reply has the lower score",
    ]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: malformed \(a pair with equal scores \(score_chosen 5"):
        read(tmp_path, rows, strict=True)


@pytest.mark.parametrize(
    "asked",
    [
        "<|im_start|>user\n{}<|im_end|>\n",
        "<｜User｜>{}",
        "[SYSTEM_PROMPT]{}",
        "<|header_start|>user{}",
        "{}\n<extra_id_1>A",
        "<|start|>user<|message|>{}",
    ],
)
def test_texts_of_a_template_are_said(tmp_path, asked):
    rows = many(lambda k: {"prompt": asked.format(k), "chosen": "a", "rejected": "b"})
    (note,) = read(tmp_path, rows).report["notes"]
    assert note.startswith("rows.jsonl: 12 of 12 rows hold special tokens of a chat template")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "q"}, "prompts alone, with nothing to prefer"),
        ({"text": "q"}, "texts alone"),
        ({"annotations": [], "data": {}}, "Label Studio"),
        ({"question": "q", "answer": "a"}, "read by dataset=questions"),
        ({"input": "q", "generations": ["a", "b"], "ratings": [1, 2]}, "Expected preference pairs"),
        ({"prompt": "q", "completions": ["a", "b"]}, "completions is no list of replies with scores"),
        ({"prompt": "q", "completions": [{"response": "a"}, {"response": "b"}]}, "and a score in each"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 7}, "prefers no reply"),
        ({"prompt": "q", "response": "a", "is_safe": True}, "or name them by dataset.columns if they are there"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "stepwise supervision, are not read"),
        (
            {"message_id": "1", "parent_id": "0", "text": "a", "role": "assistant"},
            "OpenAssistant's messages one by one",
        ),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}, "column chosen holds lists that are no messages"),
        ({"prompt": "q", "chosen": {"text": "a"}, "rejected": {"text": "b"}}, "chosen holds objects without a role"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "column prompt holds values of the type int"),
        ({"Prompt": "q", "Chosen": "a", "Rejected": "b"}, "rename 'Chosen' to 'chosen', and so on"),
    ],
)
def test_other_forms_are_refused_with_the_remedy(tmp_path, row, why):
    with pytest.raises(UserError, match=rf"dataset\.path: rows\.jsonl.*{why}"):
        read(tmp_path, [row] * 6)


def test_rows_of_another_form_are_malformed(tmp_path):
    rows = many(lambda k: {"prompt": f"q {k}", "chosen": "a", "rejected": "b"})
    rows += [{"prompt": "x", "chosen": [said("a")], "rejected": [said("b")]}, {"text": "t", "label": 1}]
    assert (
        read(tmp_path, rows).report["dropped"]["malformed"].startswith("2, first at rows.jsonl:13: chosen is messages")
    )


def test_ties_are_dropped_and_counted(tmp_path):
    rows = many(lambda k: {"prompt": f"q {k}", "response_1": "a", "response_2": "b", "preference_strength": k % 3 - 1})
    dropped = read(tmp_path, rows).report["dropped"]
    assert dropped == {"no preference": "4, first at rows.jsonl:2: preference_strength is 0, which prefers no reply"}


@pytest.mark.parametrize(
    ("row", "by", "values"),
    [
        ({"response_0": "a", "response_1": "b"}, "better_response_id", [1, 2]),
        ({"response_a": "a", "response_b": "b"}, "winner", ["model_a", "1"]),
        ({"human_ref_A": "a", "human_ref_B": "b"}, "labels", [1, 0, 2, 3]),
    ],
)
def test_values_that_are_no_verdict_are_no_ties(tmp_path, row, by, values):
    rows = many(lambda k: {"question": f"q {k}", **row, by: values[k % len(values)]})
    with pytest.raises(UserError, match=rf"the column {by} prefers no reply in 6 of 12 rows \(its values are"):
        read(tmp_path, rows)
    few = many(lambda k: {"question": f"q {k}", **row, by: values[0]}, 40)
    few[3][by] = "odd"
    assert (
        read(tmp_path / "b", few).report["dropped"]["malformed"].startswith(f"1, first at rows.jsonl:4: {by} is 'odd'")
    )


def test_a_reply_without_a_score_does_not_change_what_the_others_are_ranked_by(tmp_path):
    def make(k):
        return {
            "instruction": f"q {k}",
            "completions": [
                {"response": "good", "fine-grained_score": None if k == 3 else 4.5, "overall_score": 2},
                {"response": "bad", "fine-grained_score": 1.5, "overall_score": 9},
            ],
        }

    tables = read(tmp_path, many(make))
    assert all(text.endswith("Assistant: good") for t in each(tables) for text in preferred(t))
    assert tables.report["dropped"]["malformed"].startswith("1, first at rows.jsonl:4: a reply in completions has no")


@pytest.mark.parametrize(
    "scores",
    [
        {"chosen-rating": 1, "rejected-rating": 2},
        {"rating_chosen": 1.0, "rating_rejected": 2.0},
        {"chosen_avg_score": "1", "rejected_avg_score": "2"},
        {"chosen": said("a") | {"score": 1}, "rejected": said("b") | {"score": 2}},
    ],
)
def test_scores_are_compared_whatever_they_are_called(tmp_path, scores):
    tables = read(tmp_path, many(lambda k: {"prompt": f"q {k}", "chosen": "a", "rejected": "b"} | scores))
    assert tables.report["notes"] == ["rows.jsonl: 12 of 12 pairs whose chosen reply has the lower score"]
    votes = {"human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 2, "score_B": 1}
    (note,) = read(tmp_path / "b", many(lambda k: {"history": f"q {k}"} | votes)).report["notes"]
    assert note == "rows.jsonl: 12 of 12 pairs whose chosen reply has the lower score"


def test_replies_that_are_not_to_be_learned_are_no_right_answers(tmp_path):
    def make(k):
        return {"messages": [user(f"q {k}"), said("a")], "kto_tag": k % 2 == 0}

    judged = read(tmp_path, many(make))
    assert judged.test.kind == "classes"
    assert sum(int(t.labels.sum()) for t in each(judged)) == 6
    whole = many(lambda k: {"completion": [user(f"q {k}"), said("a")], "label": k % 2})
    assert texts(read(tmp_path / "b", whole)) == texts(judged)
    rows = many(lambda k: {"messages": [user(f"q {k}"), said("a") | {"weight": int(k != 3)}]})
    dropped = read(tmp_path / "c", rows).report["dropped"]["malformed"]
    assert dropped == "1, first at rows.jsonl:4: the last reply of messages has weight 0, so it is not to be learned"


def test_replies_that_differ_in_whitespace_alone_are_counted(tmp_path):
    (note,) = read(tmp_path, many(lambda k: {"prompt": f"q {k}", "chosen": "a \n", "rejected": "ab"[k % 2]})).report[
        "notes"
    ]
    assert note.startswith("rows.jsonl: 6 of 12 pairs whose replies differ in whitespace at their ends alone")


BEFORE = "\n\nHuman: w\n\nAssistant: x"
QUESTION = "\n\nHuman: q 3\n\nAssistant: a"
BOTH = {"chosen": "a", "rejected": "b"}


def sides(*before) -> dict:
    return {"chosen": [*before, said("a")], "rejected": [*before, said("b")]}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda k: {"prompt": [user("be"), user(f"q {k}")]} | sides(user(f"q {k}")), "\n\nHuman: be" + QUESTION),
        (lambda k: {"prompt": [user(f"q {k}\n")]} | sides(user(f"q {k}")), QUESTION),
        (lambda k: {"prompt": [user(f"q {k}")], "system": "be"} | sides(user(f"q {k}")), "\n\nSystem: be" + QUESTION),
        (lambda k: {"system": "be"} | sides(user(f"q {k}")), "\n\nSystem: be" + QUESTION),
        (
            lambda k: {"prompt": [user("w")]} | sides(user("w"), said("x"), user(f"q {k}")),
            BEFORE + QUESTION,
        ),
        (
            lambda k: {"prompt": f"\n\nHuman: w\n\nHuman: q {k}\n\nAssistant:"} | sides(user("w"), user(f"q {k}")),
            "\n\nHuman: w" + QUESTION,
        ),
        (lambda k: {"prompt": [user("w")]} | sides(said("x"), user(f"q {k}")), BEFORE + QUESTION),
        (lambda k: {"prompt": f"{BEFORE}\n\nHuman: q {k}"} | BOTH, BEFORE + QUESTION),
        (lambda k: {"prompt": f"\n\nHuman: q {k}\n"} | BOTH, QUESTION),
        (
            lambda k: {"prompt": f"q {k}", "response_0": "b", "response_1": "a", "better_response_id": True},
            QUESTION,
        ),
        (lambda k: {"prompt": "" if k % 5 == 1 else f"q {k}"} | BOTH, QUESTION),
    ],
)  # fmt: skip
def test_a_question_that_stands_there_twice_or_alone_is_read_once(tmp_path, make, text):
    tables = read(tmp_path, many(make))
    assert text in texts(tables)
    assert all(p.messages[-1].content.strip() for t in each(tables) for p in t.prompts)


def test_a_transcript_s_first_line_break_is_no_part_of_the_question(tmp_path):
    tables = read(tmp_path, many(lambda k: {"prompt": f"\nHuman: q {k}\n\nAssistant:"} | BOTH))
    assert (Message("user", "q 3"),) in {p.messages for t in each(tables) for p in t.prompts}
    assert all(p.identity != p.text for t in each(tables) for p in t.prompts)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda k: {"prompt": f"Human: q {k}\nAssistant:"} | BOTH, "column prompt holds dialogues .* an empty line"),
        (
            lambda k: {key: f"\r\n\r\nHuman: {k}\r\n\r\nAssistant: {key}" for key in BOTH},
            "column chosen holds dialogues .* after an empty line",
        ),
        (
            lambda k: {key: f"\n\nHuman: {k}\n\nAssistant: {key}\n\nHuman: thanks" for key in BOTH},
            "chosen does not end with the assistant",
        ),
        (lambda k: {"prompt": f"\n\nHuman: {k}\n\nAssistant: I"} | BOTH, "prompt ends with the assistant"),
        (lambda k: {"prompt": [user(str(k)), user("x")]} | sides(user(str(k)), user("y")), "share a question"),
        (lambda k: {"completion": f"a {k}"}, "completions without a prompt"),
        (lambda k: {"prompt": [user("")]} | sides(), "the prompt holds no text"),
        (lambda k: {"instruction": f"q {k}", "input": ["x"]} | BOTH, "input is list, not text"),
    ],
)  # fmt: skip
def test_what_cannot_be_sure_is_refused(tmp_path, make, why):
    with pytest.raises(UserError, match=why):
        read(tmp_path, many(make))


@pytest.mark.parametrize(
    "asked",
    [
        "User: {}\nAssistant:",
        "### Human: {}\n### Assistant:\n",
        "Do {}\n\n### Response:",
        "A chat. USER: {} ASSISTANT:",
    ],
)
def test_prompts_that_were_written_for_a_model_are_said(tmp_path, asked):
    (note,) = read(tmp_path, many(lambda k: {"prompt": asked.format(k)} | BOTH)).report["notes"]
    assert note.startswith("rows.jsonl: 12 of 12 prompts end in 'Assistant:' or the like")


@pytest.mark.parametrize("start", ["\n\nUser: {}\n\nAssistant: ", "### Human: {}\n### Assistant: ", "Q: {}\nA: "])
def test_dialogues_of_other_speakers_are_said(tmp_path, start):
    tables = read(tmp_path, many(lambda k: {key: start.format(k) + f"{key} {k}" for key in BOTH}))
    (note,) = tables.report["notes"]
    assert note.startswith("rows.jsonl: 12 of 12 texts look like dialogues whose turns are not told apart")
    (note,) = read(tmp_path / "b", many(lambda k: {"question": start.format(k)} | BOTH)).report["notes"]
    assert "prompts end in 'Assistant:' or the like" in note


def test_pairs_without_a_prompt_that_share_a_text_are_one_group(tmp_path):
    with pytest.raises(UserError, match=r"which makes 1 groups; is there a column of prompts, name it by"):
        read(tmp_path, many(lambda k: {"prompt_id": f"q {k}", "chosen": f"a {k}", "rejected": "no"}))


def test_what_is_not_read_of_messages_and_scores_is_said(tmp_path):
    talk = [user("w"), said("x") | {"weight": 0}]
    tables = read(tmp_path, many(lambda k: {"messages": [*talk, user(f"q {k}") | {"name": "Bo"}, said("a")]}))
    assert tables.report["notes"] == ["rows.jsonl: keys of messages that are not read: name, weight"]
    scores = {"score_chosen": "7,5", "score_rejected": "8,5"}
    (note,) = read(tmp_path / "b", many(lambda k: {"prompt": f"q {k}"} | BOTH | scores)).report["notes"]
    assert note == "rows.jsonl: 12 of 12 pairs whose scores are not two numbers, so that they are not compared"
    lists = {"chosen": "['x', 'a']", "rejected": "['x']"}
    tables = read(tmp_path / "c", many(lambda k: {"prompt": f"q {k}"} | lists))
    assert tables.report["notes"][0].startswith("rows.jsonl: 12 of 12 prompts or replies are lists written as text")
    few = many(lambda k: {"prompt": f"q {k}"} | (lists if k < 4 else BOTH))
    assert read(tmp_path / "d", few).report["notes"] == []
    own = lambda k: {"system": "be", "messages": [{"role": "system", "content": "go"}, user(f"q {k}"), said("a")]}  # noqa: E731
    (note,) = read(tmp_path / "e", many(own)).report["notes"]
    assert note == "rows.jsonl: 12 of 12 rows whose system is not the system message of their dialogue, which is read"
    both = lambda k: {"system": "be"} | sides({"role": "system", "content": "go"}, user(f"q {k}"))  # noqa: E731
    assert read(tmp_path / "g", many(both)).report["notes"] == [note]
    talk = {key: f"\n\nHuman: w\n\nAssistant: {key}" for key in BOTH}
    tables = read(tmp_path / "f", many(lambda k: {"prompt": f"q {k}"} | talk))
    assert "whole dialogues that do not hold the prompt" in tables.report["read_as"]["rows.jsonl"]


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        (
            {"text": "a", "label": "y", "prompt": "b"},
            r"dataset\.columns\.prompt: .* classes, which needs no",
        ),
        ({"chosen": "a", "rejected": "b", "system": "c"}, r"dataset\.columns\.system: .*, which needs no system"),
        ({"prompt": "c", "chosen": "a", "rejected": "b", "score_chosen": "y"}, r"dataset\.columns\.score_chosen: "),
        ({"prompt": "c", "chosen": "a", "rejected": "a"}, r"columns: chosen and rejected are both read from 'a'"),
        ({"prompt": "c"}, r"with dataset\.columns nothing else is read"),
    ],
)
def test_columns_that_are_named_and_not_read_are_refused(tmp_path, columns, why):
    with pytest.raises(UserError, match=why):
        read(tmp_path, many(lambda k: {"a": f"a {k}", "b": f"b {k}", "c": f"c {k}", "y": k % 2}), columns=columns)


def test_an_answer_that_is_a_letter_and_another_choice_is_malformed(tmp_path):
    rows = many(lambda k: {"question": f"q {k}", "choices": ["C", "A", "B"], "answer": "B" if k == 3 else k % 3})
    dropped = load(write_jsonl(tmp_path / "rows.jsonl", rows), "questions").report["dropped"]["malformed"]
    assert dropped.startswith("1, first at rows.jsonl:4: answer 'B' is both a letter and the text of another choice")


@pytest.mark.parametrize("name", ["questions", "gsm8k", "hh_rlhf", "ultrafeedback", "sciq", "reviews"])
def test_a_revision_of_the_hub_is_said_to_be_unread_in_a_local_copy(name, tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    load = getattr(sources, name)
    assert list(load(str(tmp_path), revision="old").notes) == [
        "dataset.revision=old is of the hub, and not read for a local path"
    ]
    assert list(load(str(tmp_path)).notes) == []
