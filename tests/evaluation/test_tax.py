"""The alignment tax: the likeliest letter against tilted logits worked out by hand, replies against answers."""

import json

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from runs import decode_arguments
from runs import run_decoder as run

from w2sg.data.dialogue import Chat
from w2sg.errors import UserError
from w2sg.evaluation.alignment_tax import normalised, read_questions
from w2sg.reports.sections.alignment_tax import AlignmentTax

BARE = ["method.judge.model=null", "method.evaluation.surprise=false", "method.evaluation.prompts=2"]
CHOICES = [
    {"question": f"which word is {k}?", "choices": ["good", "bad", "wise", "cold"][: 2 + k % 3], "answer": k % 2}
    for k in range(12)
]


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(pairs_folder, models):
    return decode_arguments(pairs_folder, models)


def test_answers_are_places_letters_or_choices(tmp_path):
    rows = [{"question": f"{k}?", "choices": ["x", "yes", "z"], "answer": a} for k, a in enumerate([1, "B", "yes"])]
    found = read_questions(write_jsonl(tmp_path / "q.jsonl", rows))
    assert found.right.tolist() == [1, 1, 1]
    assert found.choices.tolist() == [3, 3, 3]
    assert found.answers[0] == {"b", "yes", "b yes"}
    assert found.prompts.texts[0].text.startswith("\n\nHuman: 0?\n\nA. x\nB. yes\nC. z\n\nAnswer")


def test_a_choice_that_is_a_letter_is_meant_as_a_choice(tmp_path):
    rows = [{"question": "?", "choices": ["B", "A"], "answer": "A"}]
    assert read_questions(write_jsonl(tmp_path / "q.jsonl", rows)).right.tolist() == [1]


def test_a_reply_that_names_a_letter_means_that_choice_and_a_line_ends_at_its_end(tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [
        {"question": "one\u2028two?", "choices": ["A", "C", "B"], "answer": 1},
        {"question": "x\x85?", "answer": "y"},
    ]
    file.write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions(file).answers == [{"b", "b c"}]
    file.write_text(json.dumps(rows[1], ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(read_questions(file).prompts) == 1


@pytest.mark.parametrize(
    ("reply", "right"),
    [("42", True), (" **42**. ", True), ("-42", False), ("42 apples", False), ("4 2", False), ("(42)", True)],
)
def test_a_reply_is_right_where_it_is_the_answer_and_no_more(tmp_path, reply, right):
    found = read_questions(write_jsonl(tmp_path / "q.jsonl", [{"question": "6 times 7?", "answer": 42}]))
    assert (normalised(reply) in found.answers[0]) is right


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("{", "line 2 of .* is not JSON"),
        ({"answer": "x"}, "line 2 of .* has no question"),
        ({"question": "b?"}, "line 2 of .*answer must be a text or a number"),
        ({"question": "b?", "answer": "..."}, "line 2 of .*answer must be a text or a number"),
        ({"question": "b?", "choices": ["x"], "answer": 0}, "line 2 of .*between 2 and 26"),
        ({"question": "b?", "choices": ["x", "X "], "answer": 0}, "line 2 of .*different choices"),
        ({"question": "b?", "choices": ["x", "y"], "answer": 2}, "line 2 of .*answer must be a choice"),
        ({"question": "b?", "choices": ["x", "y"], "answer": "C"}, "line 2 of .*answer must be a choice"),
        ({"question": "b?", "choices": "xy", "answer": 0}, "line 2 of .*list of texts"),
        ({"question": "a?", "answer": "y"}, "line 2 of .*asks what line 1 asks"),
        ({"question": "b?", "choices": ["x", "y"], "answer": 0}, "split the file"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, second, said):
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": "a?", "answer": "x"}])
    file.write_text(file.read_text() + (second if isinstance(second, str) else json.dumps(second)) + "\n")
    with pytest.raises(UserError, match=said):
        read_questions(file)


def test_a_file_without_questions_is_said_before_any_work(arguments, tmp_path):
    with pytest.raises(UserError, match=r"method\.evaluation\.tax: .* cannot be read"):
        run(arguments, tmp_path, "eft", f"method.evaluation.tax={tmp_path / 'none.jsonl'}")
    assert not list((tmp_path / "store").glob("*"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(tmp_path / "empty.jsonl")


# -- accuracies -------------------------------------------------------------------------------------------------------


def test_letters_are_scored_by_the_tilted_logits(arguments, models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write_jsonl(tmp_path / "q.jsonl", CHOICES)
    content = run(arguments, tmp_path, "eft", f"method.evaluation.tax={file}", "decoder.beta=3.0", *BARE)
    found = content["decoding"]["tax"]
    assert found["kind"] == "multiple choice"
    loaded = {name: AutoModelForCausalLM.from_pretrained(models[name]).eval() for name in models}
    chat = Chat(AutoTokenizer.from_pretrained(models["strong"]))
    questions, right = read_questions(file), {"plain": [], "eft": []}
    for prompt, count, answer in zip(questions.prompts.texts, questions.choices, questions.right, strict=True):
        letters = chat.replies(list("ABCD"[:count]))
        ids = torch.from_numpy(np.append(chat.prompts([prompt])[0], letters[0][:-1]))[None]
        with torch.no_grad():
            logits = {name: model(ids).logits[0, -1] for name, model in loaded.items()}
        places = [int(row[-1]) for row in letters]
        right["plain"].append(int(logits["strong"][places].argmax()) == answer)
        tilted = logits["strong"] + 3.0 * (logits["weak"] - logits["untuned"])
        right["eft"].append(int(tilted[places].argmax()) == answer)
    scored = found["scored"]
    for name, own in right.items():
        assert scored["accuracy"][name]["value"] == pytest.approx(np.mean(own))
    assert scored["difference"]["value"] == pytest.approx(np.mean(right["eft"]) - np.mean(right["plain"]))
    assert scored["difference"]["low"] <= scored["difference"]["value"] <= scored["difference"]["high"]
    assert 0 < scored["p"] <= 1
    assert set(found["decoded"]["accuracy"]) == {"plain", "eft"}
    assert "Alignment tax" in (tmp_path / "eft" / "report.html").read_text()


@pytest.mark.slow
def test_replies_are_held_against_the_answers(arguments, tmp_path):
    """Asked again for what it replied, a greedy decoder is right each time; a search has no letters to score."""
    rows = [{"question": f"say something about {k}", "answer": "nothing that it says"} for k in range(4)]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    typed = [f"method.evaluation.tax={file}", *BARE]
    found = run(arguments, tmp_path, "sampling", "decoder.temperature=0.0", *typed)["decoding"]["tax"]
    assert found["decoded"]["accuracy"]["plain"]["value"] == 0
    assert "difference" not in found["decoded"]
    from transformers import AutoTokenizer

    from w2sg.training.stage_values import load_tensors

    (stage,) = (tmp_path / "store").glob("tax-plain-*")
    ids, values = load_tensors(stage)
    config = json.loads((tmp_path / "sampling" / "report.json").read_text())["config"]
    chat = Chat(AutoTokenizer.from_pretrained(config["strong"]["name"]))
    parts = np.split(values["values"].numpy()[:, 0].astype(int), np.cumsum(values["sizes"].numpy())[:-1])
    said = {i.split(":")[0]: chat.text(part) for i, part in zip(ids, parts, strict=True)}
    questions = read_questions(file)
    rows = [
        row | {"answer": said[i] if k else "not this"}
        for k, (row, i) in enumerate(zip(rows, questions.prompts.ids, strict=True))
        if normalised(said[i])
    ]
    again = run(
        arguments,
        tmp_path,
        "search",
        f"method.evaluation.tax={write_jsonl(file, rows)}",
        *BARE,
        "decoder.temperature=0.3",
    )
    assert set(again["decoding"]["tax"]["decoded"]["accuracy"]) == {"plain", "search"}
    assert "scored" not in again["decoding"]["tax"]
    greedy = run(arguments, tmp_path, "sampling", "decoder.temperature=0.0", *typed, name="again")["decoding"]["tax"]
    assert greedy["decoded"]["accuracy"]["plain"]["value"] == pytest.approx((len(rows) - 1) / len(rows))


def test_a_loss_is_said():
    sure = {"accuracy": {}, "difference": {"value": -0.2, "low": -0.3, "high": -0.1}, "p": 0.01}
    unsure = {"accuracy": {}, "difference": {"value": -0.2, "low": -0.3, "high": 0.1}, "p": 0.4}
    tax = {"kind": "multiple choice", "decoded": unsure, "scored": sure}
    (line,) = AlignmentTax().warnings({"decoding": {"tax": tax}})
    assert line.startswith("alignment tax: 0.200 [0.100, 0.300]")
    assert "scored" in line
