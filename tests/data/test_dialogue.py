"""Dialogues as messages, and messages as one model's tokens."""

import numpy as np
import pytest
from conftest import WORDS
from dialogues import CHATML, END, LLAMA, PROMPT, STRICT, tokenizer_of

from w2sg.data.dialogue import DATE, Chat
from w2sg.data.messages import Dialogue, parse
from w2sg.errors import UserError

UNLIKE = (  # questions end otherwise than replies do
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'user' %}<|end_header_id|>{% else %}<|im_end|>{% endif %}{% endfor %}"
)


def id_of(chat: Chat, token: str) -> int:
    return chat.tokenizer.convert_tokens_to_ids(token)


of = Dialogue.of_text


def whole(chat: Chat, ids) -> str:
    return chat.tokenizer.decode(list(map(int, ids)))


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        (PROMPT, [("user", "Hi"), ("assistant", "Hello"), ("user", "warm or cold?")]),
        ("Human: Hi\n\nAssistant:", [("user", "Hi")]),
        ("\n\nHuman: Hi\n\nAssistant: ", [("user", "Hi")]),
        ("\n\nHuman: one\n\nHuman: two\n\nAssistant:", [("user", "one\n\ntwo")]),
        ("Human: q\n\nAssistant:a\n\nAssistant:b\n\nHuman:r", [("user", "q"), ("assistant", "a\n\nb"), ("user", "r")]),
        ("\n\nHuman: q\n\nAssistant:\n\nHuman: r\n\nAssistant:", [("user", "q\n\nr")]),
        ("System: be kind\n\nHuman: Hi\n\nAssistant:", [("system", "be kind"), ("user", "Hi")]),
        ("\n\nHuman: a\nHuman: b\n\nAssistant:", [("user", "a\nHuman: b")]),
        ("\n\nHuman: two\n\nparagraphs\n\nAssistant:", [("user", "two\n\nparagraphs")]),
        ("What is it?\n", [("user", "What is it?")]),
        ("Context.\n\nHuman: Hi\n\nAssistant:", [("user", "Context.\n\nHi")]),
        ("He said Human: no", [("user", "He said Human: no")]),
        ("\n\nHumans: no", [("user", "Humans: no")]),
        ("", [("user", "")]),
        ("\n\nHuman:\n\nAssistant:", [("user", "")]),
    ],
)  # fmt: skip
def test_a_dialogue_is_its_turns(prompt, turns):
    assert list(parse(prompt)) == turns


def test_a_reply_may_quote_a_dialogue():
    """Only prompts are parsed: what a reply says of Humans is its text."""
    reply = "Write:\n\nHuman: Hi\n\nAssistant: Hello"
    for template in (None, CHATML, LLAMA):
        chat = Chat(tokenizer_of(template))
        assert chat.text(chat.replies([reply])[0]) == reply
        assert chat.dialogue(of(PROMPT), reply).count(reply) == 1


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_template_reads_the_dialogue_as_it_stands():
    chat = Chat(tokenizer_of())
    assert chat.tokenizer.bos_token_id == chat.tokenizer.eos_token_id == chat.end == 0
    assert chat.stop == [0]
    ids = chat.prompts([of(PROMPT), of("Human: q\n\nAssistant:")])
    assert [whole(chat, row) for row in ids] == [PROMPT, "Human: q\n\nAssistant:"]
    assert all(row.dtype == np.int64 for row in ids)
    assert whole(chat, chat.replies(["good"])[0]) == " good"
    assert 0 not in np.concatenate([*ids, *chat.replies(["good words"])])
    assert chat.dialogue(of(PROMPT), "warm") == PROMPT + " warm"


def test_there_is_one_space_between_prompt_and_reply():
    """A {prompt, chosen, rejected} file is read as prompts that end in a space; without one, replies begin with it."""
    chat = Chat(tokenizer_of())
    with_space, without = chat.prompts([of("\n\nHuman: q\n\nAssistant: "), of("\n\nHuman: q\n\nAssistant:")])
    assert with_space.tolist() == without.tolist()


def test_a_beginning_of_text_comes_once():
    """Fault 1: a template that writes it, and a tokenizer that adds it to every text."""
    for adds_bos in (False, True):
        chat = Chat(tokenizer_of(LLAMA, bos="<|begin_of_text|>", adds_bos=adds_bos))
        start = id_of(chat, "<|begin_of_text|>")
        ids = chat.prompts([of(PROMPT), of("Hi")])
        assert all(row[0] == start and (row == start).sum() == 1 for row in ids)
        assert not any(start in row for row in chat.replies(["good", "bad"]))
    plain = Chat(tokenizer_of(bos="<|begin_of_text|>", adds_bos=True))
    start = id_of(plain, "<|begin_of_text|>")
    for text in ("Hi", "<|begin_of_text|>Hi"):  # the data may bring one, too
        assert plain.prompts([of(text)])[0].tolist() == [
            start,
            *plain.tokenizer("Hi", add_special_tokens=False)["input_ids"],
        ]
    assert not any(start in row for row in plain.replies(["good"]))


def test_a_template_is_written_up_to_the_reply():
    chat = Chat(tokenizer_of(CHATML))
    wanted = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    wanted += "<|im_start|>user\nwarm or cold?<|im_end|>\n<|im_start|>assistant\n"
    assert whole(chat, chat.prompts([of(PROMPT)])[0]) == wanted
    assert id_of(chat, "<|im_start|>") in chat.prompts([of(PROMPT)])[0]
    assert chat.dialogue(of(PROMPT), "warm") == wanted + "warm<|im_end|>\n"
    assert whole(chat, chat.replies([" good \n"])[0]) == "good"


def test_the_date_is_pinned():
    chat = Chat(tokenizer_of(LLAMA, bos="<|begin_of_text|>"))
    assert f"Today: {DATE}" in whole(chat, chat.prompts([of("Hi")])[0])
    assert f"Today: {DATE}" in chat.dialogue(of("Hi"), "Hello")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, END),
        (CHATML, "<|im_end|>"),
        (LLAMA, "<|eot_id|>"),
        (STRICT, "<|im_end|>"),
        (UNLIKE, "<|im_end|>"),
        ("{{ messages[0]['content'] }}", END),
    ],
)
def test_the_end_of_a_turn_is_found(template, end):
    chat = Chat(tokenizer_of(template))
    assert chat.end == id_of(chat, end)
    assert chat.stop == sorted({chat.end, chat.tokenizer.eos_token_id})


def test_a_tokenizer_without_any_end_is_refused():
    with pytest.raises(UserError, match="eos_token"):
        Chat(tokenizer_of(bos=None, eos=None))
    chat = Chat(tokenizer_of(CHATML, bos=None, eos=None))
    assert chat.stop == [chat.end]


def test_a_template_that_refuses_system_messages_reads_them_with_the_first_question():
    chat = Chat(tokenizer_of(STRICT))
    system = "System: be kind\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    wanted = "<|im_start|>user\nbe kind\n\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    wanted += "<|im_start|>user\nBye<|im_end|>\n"
    assert whole(chat, chat.prompts([of(system)])[0]) == wanted + "<|im_start|>model\n"
    # a judge reads the same dialogue
    assert chat.dialogue(of(system), "Bye") == wanted + "<|im_start|>assistant\nBye<|im_end|>\n"
    for prompt in ("\n\nAssistant: Hello\n\nHuman: Hi\n\nAssistant:", "System: alone"):
        with pytest.raises(UserError, match="template refuses a prompt"):
            chat.prompts([of(prompt)])
    assert id_of(Chat(tokenizer_of(CHATML)), "<|im_start|>") in Chat(tokenizer_of(CHATML)).prompts([of(system)])[0]


@pytest.mark.parametrize("template", [None, CHATML])
def test_no_token_spans_the_boundary(template):
    chat = Chat(tokenizer_of(template))
    count = lambda text: len(chat.tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    assert count("good") < count("go") + count("od")  # as one text they would merge
    text = "\n\nHuman: q\n\nAssistant: go"
    prompt, reply = chat.prompts([of(text)])[0], chat.replies(["od"])[0]
    assert whole(chat, reply) == ("od" if template else " od")
    assert chat.replies(["bad", "od"])[1].tolist() == reply.tolist()
    assert whole(chat, prompt).endswith("<|im_start|>assistant\n" if template else text)


@pytest.mark.parametrize("template", [None, CHATML, LLAMA])
def test_replies_come_back_as_text(template):
    chat = Chat(tokenizer_of(template))
    texts = ["good", "Two\n\nparagraphs,  two  spaces.", "naïve 🙂 text", "x = {'a': 1}\n    y", "' quoted ' , . !"]
    for text, ids in zip(texts, chat.replies(texts), strict=True):
        assert chat.text(ids) == text
        assert chat.text([*ids, chat.end]) == text  # without the token that ended it
        assert chat.replies([chat.text(ids)])[0].tolist() == ids.tolist()
    assert chat.text([chat.end]) == ""
    assert chat.replies([""])[0].dtype == np.int64


def test_fingerprints_are_of_vocabulary_template_and_ends():
    prints = [
        Chat(tokenizer_of()).fingerprint,
        Chat(tokenizer_of(CHATML)).fingerprint,
        Chat(tokenizer_of(STRICT)).fingerprint,  # of the same end as the one before
        Chat(tokenizer_of(LLAMA)).fingerprint,
        Chat(tokenizer_of(words=[*WORDS[::-1], "another", "other"])).fingerprint,
        Chat(tokenizer_of(eos="<|im_end|>")).fingerprint,
        Chat(tokenizer_of(adds_bos=True)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    used = Chat(tokenizer_of(CHATML))
    used.prompts([of(PROMPT)])
    used.replies(["good"])
    used.dialogue(of(PROMPT), "x")
    assert used.fingerprint == Chat(tokenizer_of(CHATML)).fingerprint == prints[1]
