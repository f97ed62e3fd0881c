"""What a model reads is what its own template writes: over templates of many models and every kind of tokenizer."""

import datetime
from functools import cache

import chat_forms
import pytest
from chat_forms import EMPTY, MAKERS, MAY_THINK, OPENING, TEMPLATES

from w2sg.data.dialogue import Chat, TextChat
from w2sg.data.messages import Dialogue, Message
from w2sg.data.template import Template
from w2sg.data.thoughts import split
from w2sg.data.tokens import beginning, ids_after, ids_of
from w2sg.errors import UserError

REPLIES = ["good.", "' fine", "bad 5\n\nfair?"]
PROMPT = Dialogue.of_text("\n\nHuman: warm or cold?\n\nAssistant:")
ASKED = [*PROMPT.messages]


@cache
def _tokenizer(kind, special=True):
    return chat_forms.tokenizer_of(kind, None, special)


def chat_of(template, kind="byte_level", special=True, **options):
    tokenizer = _tokenizer(kind, special)
    tokenizer.chat_template = template
    return Chat(tokenizer, **options)


def ids_by_template(chat, turns, **variables):
    """Without anything of w2sg's."""
    return list(
        chat.tokenizer.apply_chat_template(
            [turn._asdict() for turn in turns], tokenize=True, return_dict=False, **variables
        )
    )


def written(chat, ids):
    return chat.tokenizer.decode(list(map(int, ids)), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "spanning"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_reply_and_end_are_the_template_s_own(name, kind):
    template, end = TEMPLATES[name]
    chat = chat_of(template, kind)
    assert chat.tokenizer.convert_ids_to_tokens(chat.end) == (end or "</s>")
    assert chat.end in chat.stop
    (prompt,) = chat.prompts([PROMPT])
    for reply in REPLIES:
        text = chat.form.dialogue(ASKED, reply)
        theirs = ids_of(chat.tokenizer, [text])[0]
        ours = [*prompt, *chat.replies([reply], [True])[0], chat.end]
        assert ours == theirs[: len(ours)]
        assert chat.text(chat.replies([reply])[0]) == reply
        for part in (ours, [*prompt, *chat.replies([reply])[0]]):
            assert "warm or cold?" in written(chat, part)
            assert reply in written(chat, part)
        if "strftime" not in template and not name.startswith("parts"):
            assert theirs == ids_by_template(chat, [*ASKED, Message("assistant", reply)])


def test_a_token_that_reaches_from_prompt_to_reply_is_taken_apart():
    for name in ("vicuna", "deepseek_v2"):
        chat = chat_of(TEMPLATES[name][0], "spanning")
        (prompt,), text = chat.prompts([PROMPT]), chat.form.dialogue(ASKED, "good.")
        ours = [*prompt, *chat.replies(["good."])[0], chat.end]
        assert ours != ids_of(chat.tokenizer, [text])[0]
        assert written(chat, ours) == written(chat, ids_of(chat.tokenizer, [text])[0])


@pytest.mark.parametrize("kind", MAKERS)
def test_replies_without_a_template_go_on_the_prompt(kind):
    """No space but the one that the dialogue has."""
    chat = chat_of(None, kind)
    whole = ids_of(chat.tokenizer, [f"{PROMPT.text} good bad"], special=True)[0]
    ours = [*chat.prompts([PROMPT])[0], *chat.replies(["good bad"])[0]]
    assert written(chat, ours) == written(chat, whole)
    if kind != "spanning":
        assert ours == whole
    plain = TextChat(_tokenizer(kind), "roles")
    ours = written(plain, [*plain.prompts([PROMPT])[0], *plain.replies(["good bad"])[0]])
    assert ours.endswith("[User]\nwarm or cold?\n\n[Assistant]\ngood bad")


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama3_date", "qwen3"])
def test_models_that_were_right_read_the_same_ids_as_before(name):
    """Prompts by apply_chat_template and replies by themselves, so that no stage of theirs has another key."""
    chat = chat_of(TEMPLATES[name][0], "gpt4", variables={"enable_thinking": False})
    given = {"enable_thinking": False, "date_string": "26 Jul 2024", "add_generation_prompt": True}
    assert chat.prompts([PROMPT])[0].tolist() == ids_by_template(chat, ASKED, **given)
    for reply in (*REPLIES, "naïve 🙂 text", "x = {'a': 1}\n    y", "...", "1. one\n2. two"):
        alone = ids_of(chat.tokenizer, [reply])[0]
        assert chat.replies([reply])[0].tolist() == chat.replies([reply], [True])[0].tolist() == alone


# -- what is refused, and what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}nothing",
        "{% for m in messages %}{{ m.text }}{% endfor %}<|assistant|>",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content",
        "{% for m in messages %}{{ m.content[:8] }}<|end|>{% endfor %}",  # of parts, it would write Python's list
    ],
)
def test_a_template_that_shows_no_question_is_refused(template):
    with pytest.raises(UserError, match=r"shows nothing of a question.*chat_template=FILE"):
        chat_of(template)


def test_a_message_that_the_template_leaves_out_is_not_lost():
    """The system message is read with the first question; an answer that is not shown makes the prompt refused."""
    chat = chat_of(TEMPLATES["vicuna"][0])
    system = Dialogue.of_text("System: be kind\n\nHuman: warm or cold?\n\nAssistant:")
    assert "USER: be kind\n\nwarm or cold?" in written(chat, chat.prompts([system])[0])
    users = chat_of("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    assert any("shows no replies" in note for note in users.notes)
    with pytest.raises(UserError, match="does not show a message of the assistant: 'Yes'"):
        users.prompts([Dialogue.of_text("\n\nHuman: q\n\nAssistant: Yes\n\nHuman: r\n\nAssistant:")])
    with pytest.raises(UserError, match="does not show a message of the assistant"):
        users.dialogue(PROMPT, "good")


def test_an_end_that_is_no_token_is_said():
    chat = chat_of("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n### End\n{% endfor %}")
    assert chat.end == chat.tokenizer.eos_token_id
    assert any("'\\n### End\\n', which is no token" in note for note in chat.notes)


def test_a_last_reply_without_an_end_is_said():
    chat = chat_of(TEMPLATES["chatml"][0].replace("<|im_end|>", "{% if not loop.last %}<|im_end|>{% endif %}", 1))
    assert chat.end == chat.tokenizer.eos_token_id
    assert any("writes nothing after a last reply" in note for note in chat.notes)


def test_a_prompt_that_dialogues_do_not_go_on_from_is_said():
    template = TEMPLATES["chatml"][0].replace("<|im_start|>assistant\n{%", "<|im_start|>model\n{%")
    (note,) = chat_of(template).notes
    assert "goes on otherwise than it prompts" in note
    assert "model" in note
    assert "assistant" in note


def test_a_template_that_draws_at_random_is_refused():
    template = TEMPLATES["chatml"][0].replace("{% for", "{{ range(1000) | random }}{% for", 1)
    with pytest.raises(UserError, match="another prompt each time"):
        chat_of(template)


@pytest.mark.parametrize(
    "clock",
    [
        "{{ strftime_now('%d %b %Y %H:%M:%S') }}",
        "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% endif %}",
        "{{ date_string if date_string is defined else strftime_now('%d %B %Y') }}",
        "{{ datetime.now() if datetime is defined else 'no clock' }}",
    ],
)
def test_clocks_stand_still(clock, monkeypatch):
    from transformers.utils import chat_template_utils

    found = set()
    for year in (2031, 2042):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, year=year):
                return cls(year, 3, 4, 5, 6, 7)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        chat = chat_of(clock + TEMPLATES["chatml"][0])
        found.add((tuple(chat.prompts([PROMPT])[0]), chat.dialogue(PROMPT, "good"), chat.fingerprint))
    assert len(found) == 1
    assert "2031" not in found.pop()[1]


def test_variables_are_the_template_s():
    on, off = (chat_of(MAY_THINK, variables=v) for v in (None, {"enable_thinking": False}))
    assert written(on, on.prompts([PROMPT])[0]).endswith("assistant\n")
    assert written(off, off.prompts([PROMPT])[0]).endswith(f"assistant\n{EMPTY}")
    assert on.fingerprint != off.fingerprint


# -- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", OPENING)
def test_an_open_thought_is_closed_before_a_reply_that_has_none(name, special):
    chat = chat_of(OPENING[name], special=special)
    (prompt,) = chat.prompts([PROMPT])
    assert written(chat, prompt).count("<think>") == written(chat, prompt).count("</think>") == 1
    assert written(chat, prompt).endswith("</think>\n\n")
    assert written(chat, chat.replies(["good."])[0]) == "good."
    assert any("closed thought" in note for note in chat.notes)
    with pytest.raises(UserError, match=r"opens a thought.*thoughts=strip"):
        chat_of(OPENING[name], thoughts="refuse")


@pytest.mark.parametrize("name", [*OPENING, "qwen3"])
def test_kept_thoughts_are_part_of_replies(name):
    template = OPENING[name] if name in OPENING else TEMPLATES[name][0]
    chat = chat_of(template, thoughts="keep", special=False)
    (prompt,) = chat.prompts([PROMPT])
    opened = written(chat, prompt).endswith(("<think>\n", "<think>"))
    assert opened == (name in OPENING)
    for reply, after in (
        ("<think>\nwarm\n</think>\n\ngood.", "warm\n</think>\n\ngood."),
        ("good.", "</think>\n\ngood."),
    ):
        (ids,) = chat.replies([reply], [True])
        whole = written(chat, [*prompt, *ids])
        assert whole.count("<think>") == whole.count("</think>") == 1
        assert whole.endswith(after)
        assert split(chat.text(ids)).reply == "good."


@pytest.mark.parametrize("empty", ["<think></think>", "<think>\n</think>\n", "<think> </think> "])
def test_an_open_thought_is_closed_as_the_template_does_where_it_does(empty):
    opening = OPENING["open_chatml"]
    own = opening.replace("{{ m.content }}", "{% if m.role == 'assistant' %}" + empty + "{% endif %}{{ m.content }}", 1)
    chat = chat_of(own)
    (prompt,) = chat.prompts([PROMPT])
    ours = [*prompt, *chat.replies(["good."], [True])[0], chat.end]
    assert written(chat, ours) == chat.form.dialogue(ASKED, "good.").removesuffix("\n")
    assert ours == ids_of(chat.tokenizer, [chat.form.dialogue(ASKED, "good.")])[0][: len(ours)]


def test_a_space_before_a_reply_is_the_reply_s_wherever_prompts_end():
    """A generation prompt that ends in a line break, where dialogues have a space (OpenChat, Falcon)."""
    template = "{% for m in messages %}<|{{ m.role }}|>: {{ m.content }}<|end|>{% endfor %}" + (
        "{% if add_generation_prompt %}<|assistant|>:\n{% endif %}"
    )
    chat = chat_of(template)
    (prompt,), (reply,) = chat.prompts([PROMPT]), chat.replies(["good."], [True])
    theirs = ids_of(chat.tokenizer, [chat.form.dialogue(ASKED, "good.")])[0]
    assert [*prompt, *reply, chat.end] == theirs
    assert chat.text(reply) == "good."


def test_qwen3_reads_its_own_empty_thought():
    """Its prompt ends before a thought that its dialogues have."""
    chat = chat_of(TEMPLATES["qwen3"][0])
    assert written(chat, chat.prompts([PROMPT])[0]).endswith(f"<|im_start|>assistant\n{EMPTY}")
    history = Dialogue.of_text("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: warm?\n\nAssistant:")
    assert written(chat, chat.prompts([history])[0]).count("<think>") == 1


@pytest.mark.parametrize(
    ("text", "reply", "closed"),
    [
        ("good", "good", True),
        ("<think>\nhm\n</think>\n\ngood", "good", True),
        ("  <think></think>good", "good", True),
        ("<think>hm", "", False),
        ("<think>", "", False),
        ("hm\n</think>\n\ngood", "good", True),
        ("<think>a</think>\n<think>b</think>\ngood", "good", True),
        ("[THINK]hm[/THINK]good", "good", True),
        ("<|START_THINKING|>hm<|END_THINKING|>good", "good", True),
        ("Write <think> before and </think> after.", "Write <think> before and </think> after.", True),
        ("The tag </think> ends it.", "The tag </think> ends it.", True),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_thoughts_are_no_part_of_a_reply(text, reply, closed, special):
    said = split(text)
    assert (said.reply, said.closed) == (reply, closed)
    chat = chat_of(TEMPLATES["chatml"][0], special=special)
    ids = [*ids_of(chat.tokenizer, [text])[0], chat.end]
    told = chat.said(ids)
    if special and not said.thought:
        return  # special tokens in the middle of a text are shown in none
    assert (told.reply, told.closed) == (reply, closed)
    begins = chat.thought(ids)
    assert chat.text(ids[begins:]) == reply
    assert bool(begins) == bool(said.thought)
    if not closed:
        assert begins == len(ids)
    assert chat.text(chat.replies([text])[0]) == reply
    if said.thought:
        strict = chat_of(TEMPLATES["chatml"][0], special=special, thoughts="refuse")
        for act in (lambda: strict.said(ids), lambda: strict.replies([text])):
            with pytest.raises(UserError, match="thoughts=refuse"):
                act()
    keeping = chat_of(TEMPLATES["chatml"][0], special=special, thoughts="keep")
    assert keeping.text(ids) == text.strip()


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_texts_go_on_as_they_stand_in_the_whole(kind):
    tokenizer = _tokenizer(kind)
    first = ids_of(tokenizer, ["good"])[0]
    for text, ids in zip(
        (" bad", "?", "\n\nwarm"), ids_after(tokenizer, "good", (" bad", "?", "\n\nwarm")), strict=True
    ):
        decode = lambda row: tokenizer.decode(row, clean_up_tokenization_spaces=False)  # noqa: E731
        assert decode([*first, *ids]) == decode(ids_of(tokenizer, [f"good{text}"])[0])
    assert beginning(tokenizer) == ([] if kind == "byte_level" else [tokenizer.bos_token_id])


def test_the_form_of_a_template_is_found():
    for name, roles in {
        "parts": {"user", "system", "assistant"},
        "parts_of_users": {"user", "system"},
        "chatml": set(),
    }.items():
        tokenizer = _tokenizer("byte_level")
        tokenizer.chat_template = TEMPLATES[name][0]
        assert Template(tokenizer).parts == roles
