"""What models read is looked at: lost texts, templated data, cut beginnings, pairs that are one text once cut."""

import numpy as np
import pytest
from chat_forms import OPENING, TEMPLATES, tokenizer_of
from conftest import save_tiny_model
from model_folders import spec

from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.data.rows import cut_left, pack
from w2sg.data.table import Table
from w2sg.errors import UserError
from w2sg.models.reading import Reading, kept
from w2sg.models.source import Source, find
from w2sg.models.tokenizer_files import load_tokenizer, read_template
from w2sg.reports.sections.provenance import Reading as ReadingSection

PROMPT = Dialogue.of_text("\n\nHuman: warm or cold?\n\nAssistant:")


def table_of(texts):
    zeros = np.zeros(len(texts), np.int64)
    ids = [str(k) for k in range(len(texts))]
    return Table("test", "pairs", 2, ids, [PROMPT] * len(texts), [tuple(pair) for pair in texts], zeros, zeros)


def source_of(tokenizer, most=64):
    source = Source(spec(max_length=most), {})
    source.tokenizer = tokenizer
    return source


def read(source, table):
    reading = Reading()
    reading.texts(source, table, source.encode([text for pair in table.texts for text in pair]))
    return reading


@pytest.mark.parametrize(
    ("ids", "most", "first", "left"),
    [
        ([1, 5, 6, 7, 8], 3, [1], [1, 7, 8]),
        ([1, 5, 6], 3, [1], [1, 5, 6]),
        ([5, 6, 7, 8], 3, [1], [6, 7, 8]),  # a text without it
        ([1, 2, 5, 6, 7], 3, [1, 2], [1, 2, 7]),
        ([1, 5, 6], 1, [1], [6]),
        ([5, 6, 7], 2, [], [6, 7]),
    ],
)
def test_a_text_that_is_cut_keeps_its_beginning(ids, most, first, left):
    assert list(cut_left(ids, most, first)) == left
    (tokens,) = pack([("x",)], lambda _: [ids], most, first=first).tokens
    assert tokens.tolist() == left


def test_beginnings_are_those_of_the_tokenizer():
    spaced, plain = (source_of(tokenizer_of(kind)) for kind in ("prepend", "byte_level"))
    assert spaced.first == [spaced.tokenizer.bos_token_id]
    assert plain.first == []


def test_pairs_that_are_one_text_once_cut_are_said():
    texts = [(f"{k} good" + " warm" * 40, f"{k} bad" + " warm" * 40) for k in range(3)] + [("good", "bad")]
    reading = read(source_of(tokenizer_of("prepend"), 16), table_of(texts))
    assert reading.cut["x", "test", 16] == {"texts": 8, "cut": 6, "alike": 3}
    assert any("3 of 4 pairs of test are one text once they are cut to max_length=16" in line for line in reading.lines)
    assert not read(source_of(tokenizer_of("prepend"), 512), table_of(texts)).lines


def test_a_tokenizer_that_knows_no_word_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(UserError, match=r"100% of the tokens.*unknown.*tokenizer files are complete"):
        read(source_of(empty), table_of([("good warm", "bad cold")]))
    spaced = source_of(tokenizer_of("unigram"))
    with pytest.raises(UserError, match="tokenizer"):
        read(spaced, table_of([("これは本です", "それは木です")]))
    assert kept("Good, warm!", "good warm") == kept("é", "e\u0301") == 1.0
    assert kept("abcd", "ab") == 0.5


def test_data_that_are_templated_already_are_said():
    chat = Chat(tokenizer_of("byte_level", TEMPLATES["chatml"][0]))
    written = chat.dialogue(PROMPT, "good")
    reading = read(source_of(chat.tokenizer), table_of([(written, "bad")]))
    assert any("special tokens of the model's own (first '<|im_start|>')" in line for line in reading.lines)
    prompt, own = Dialogue.of_messages([("user", written)]), Reading()
    own.chats(chat, [prompt], chat.prompts([prompt]))
    assert any("1 of 1 texts hold special tokens" in line for line in own.lines)
    for clean in ("good", "<think>\nwarm\n</think>\n\ngood"):
        own = Reading()
        own.chats(chat, [PROMPT], chat.prompts([PROMPT]), [clean], chat.replies([clean]), [True])
        assert own.lines == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_said_of_templates_that_are_right(name):
    chat, reading = Chat(tokenizer_of("prepend", TEMPLATES[name][0])), Reading()
    reading.chats(chat, [PROMPT], chat.prompts([PROMPT]), ["good."], chat.replies(["good."], [True]), [True])
    assert [line for line in reading.lines if "not what its chat template writes" in line] == []
    assert "warm or cold?" in reading.examples[chat.name, "prompts with replies"][0]


def test_a_prompt_or_reply_that_is_not_what_was_given_is_refused():
    chat, reading = Chat(tokenizer_of("byte_level", TEMPLATES["chatml"][0])), Reading()
    (prompt,), (reply,) = chat.prompts([PROMPT]), chat.replies(["good warm clear"])
    with pytest.raises(UserError, match="loses what a text says"):
        reading.chats(chat, [Dialogue.of_text("kind fuzzy boxes jump quick")], [prompt[:2]])
    with pytest.raises(UserError, match="loses what a text says"):
        reading.chats(chat, [PROMPT], [prompt], ["good warm clear"], [reply[:1]], [True])
    chat._lead = "zzz"
    wrong = Reading()
    wrong.chats(chat, [PROMPT], [prompt], ["good"], chat.replies(["good"]), [True])
    assert any("not what its chat template writes" in line for line in wrong.lines)
    chat.stop = []
    with pytest.raises(UserError, match="none that decoding stops at"):
        reading.chats(chat, [PROMPT], [prompt])


def test_closed_thoughts_are_said_once():
    chat, reading = Chat(tokenizer_of("byte_level", OPENING["r1"])), Reading()
    for _ in range(2):
        reading.chats(chat, [PROMPT], chat.prompts([PROMPT]), ["good."], chat.replies(["good."]), [True])
    (line,) = reading.lines
    assert "closed thought stands in every prompt" in line
    reading.thoughts("plain", 3, 1)
    assert "3 replies begin with a thought" in reading.lines[-1]
    assert "1 of them end inside it" in reading.lines[-1]


def test_the_page_shows_what_was_read():
    reading, content = Reading(), {"warnings": []}
    reading._cut("m<b>", "test", 16, 200, 3, 0)
    reading.examples["m<b>", "prompts"] = ["<|im_start|>user\nx<script>", "another"]
    reading.into(content)
    page = ReadingSection().html(content)
    assert "&lt;|im_start|&gt;user" in page
    assert page.count("<h3>") == 1
    assert page.count("<pre class=said ") == 2
    assert "3 (1.5%)" in page
    assert "<script>" not in page
    assert "m<b>" not in page
    assert ReadingSection().html({}) == ""


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer files.*tokenizer.json"):
        _ = find(spec(name=str(folder)), "strong").tokenizer
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load_tokenizer(str(folder))


def test_short_texts_that_are_mostly_special_tokens_are_not_taken_for_lost_ones():
    asked = "<|start_header_id|>user<|end_header_id|>{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    reading = read(
        source_of(tokenizer_of("byte_level")), table_of([(asked.format("a") + x, asked.format("b")) for x in "cd"])
    )
    (line,) = reading.lines
    assert "4 of 4 texts hold special tokens of the model's own" in line


def test_a_template_of_a_file_is_the_model_s(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    assert not find(spec(name=str(folder)), "strong").chat.template
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}={{ m.content }}!{% endfor %}{{ variant }}")
    own = {"name": str(folder), "chat_template": str(file), "chat_template_kwargs": {"variant": "good"}}
    chat = find(spec(**own), "strong").chat
    assert "user=warm or cold?!" in chat.tokenizer.decode(chat.prompts([PROMPT])[0])
    assert chat.form._render(PROMPT.messages, True) == "user=warm or cold?!good"
    for name, why in {"missing": "No such file", "empty": "is empty"}.items():
        (tmp_path / "empty").write_text(" \n")
        with pytest.raises(UserError, match=f"chat_template: the file .*{why}"):
            read_template(str(tmp_path / name))
        with pytest.raises(UserError, match=f"chat_template: the file .*{why}"):  # before any work
            find(spec(name=str(folder), chat_template=str(tmp_path / name)), "strong").check_texts()
