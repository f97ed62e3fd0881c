"""What the strong model reads when it refines an answer: exemplars and a question as one dialogue.

Questions and answers stand in it on one line each (the authors' code strips newlines, too).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from w2sg.data.messages import Dialogue, Message, joined
from w2sg.errors import UserError

NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}


def flat(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())


def question_of(prompt: Dialogue) -> str:
    """A prompt on one line: a single question without its turn, a longer dialogue with all its speakers.

    >>> question_of(Dialogue.of_text("\\n\\nHuman: What\\nis it?\\n\\nAssistant:"))
    'What is it?'
    """
    if len(prompt.messages) == 1:
        return flat(prompt.messages[0].content)
    return flat(" ".join(f"{NAMES[role]}: {content}" for role, content in prompt.messages))


def dialogue(system: str, user: str) -> Dialogue:
    """A prompt of a system message ("" for none) and a question.

    Raises:
        UserError: a text in it reads as a turn of the dialogue.
    """
    turns = [Message("system", system.strip())] if system.strip() else []
    prompt = Dialogue.of_messages([*turns, Message("user", user.strip())])
    if not prompt.plain:  # a model without a template would read it as one
        raise UserError(
            "refine: a template begins a turn of its own ('Human:' after an empty line, say): "
            f"{prompt.text.strip()[:80]!r}"
        )
    return prompt


def instructed(prompt: Dialogue, instruction: str | None) -> Dialogue:
    """A prompt with an instruction before it, which may be part of what it had."""
    if not instruction:
        return prompt
    whole = Dialogue.of_messages([Message("system", instruction.strip()), *prompt.messages])
    return Dialogue(whole.text, joined(whole.messages))


def block(exemplars: Sequence[tuple[Dialogue, str]], template: str) -> str:
    """Questions and answers, one after the other."""
    return "".join(template.format(question=question_of(q), answer=flat(a)) for q, a in exemplars).strip()


def in_context(
    prompt: Dialogue, exemplars: Sequence[tuple[Dialogue, str]], exemplar: str, query: str, placement: str
) -> Dialogue:
    """Exemplars (prompt, answer) and then the question; without exemplars the question alone."""
    shown, question = block(exemplars, exemplar), query.format(question=question_of(prompt))
    return dialogue(shown, question) if placement == "system" else dialogue("", f"{shown}\n\n{question}")


def inference(exemplars: Sequence[tuple[Dialogue, str]], exemplar: str, infer: str) -> Dialogue:
    """Exemplars, and what is asked about all of them."""
    return dialogue("", infer.format(exemplars=block(exemplars, exemplar)))


def first_sentence(text: str) -> str:
    """A concept as it is put into a context: the first line that says something."""
    return next((line for line in map(flat, text.splitlines()) if line), "")


def fitting(
    exemplars: Sequence[tuple[Dialogue, str]],
    make: Callable[[Sequence[tuple[Dialogue, str]]], Dialogue],
    fits: Callable[[Dialogue], bool],
) -> tuple[Dialogue, int]:
    """A context that fits, and how many exemplars it has: the last ones are left out one by one where it is too long.

    A prompt that does not fit without any is given back all the same, for whoever writes to leave out and count.
    """
    for count in range(len(exemplars), -1, -1):
        text = make(exemplars[:count])
        if count == 0 or fits(text):
            return text, count
    raise AssertionError("unreachable")
