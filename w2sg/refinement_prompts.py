"""What the strong model reads when it refines an answer: exemplars and a question as one dialogue.

Prompts are "Human: ... Assistant:" dialogues, as everywhere. Questions and answers stand in them on one line each
(the authors' code strips newlines, too), so that no text in a context can begin a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from w2sg.data.dialogue import messages
from w2sg.data.sources import LAST_TURN, transcript
from w2sg.errors import UserError

NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}


def flat(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())


def question_of(prompt: str) -> str:
    """A prompt on one line: a single question without its turn, a longer dialogue with all its speakers.

    >>> question_of("\\n\\nHuman: What\\nis it?\\n\\nAssistant:")
    'What is it?'
    """
    turns = messages(prompt)
    if len(turns) == 1:
        return flat(turns[0]["content"])
    return flat(" ".join(f"{NAMES[turn['role']]}: {turn['content']}" for turn in turns))


def dialogue(system: str, user: str) -> str:
    """A prompt of a system message ("" for none) and a question.

    Raises:
        UserError: a text in it reads as a turn of the dialogue.
    """
    turns = [{"role": "system", "content": system.strip()}] if system.strip() else []
    turns.append({"role": "user", "content": user.strip()})
    text = transcript(turns) + LAST_TURN
    if messages(text) != turns:
        raise UserError(
            f"refine: a template begins a turn of its own ('Human:' after an empty line, say): {text.strip()[:80]!r}"
        )
    return text


def instructed(prompt: str, instruction: str | None) -> str:
    """A prompt with an instruction before it, which may be part of what it had."""
    if not instruction:
        return prompt
    return transcript([{"role": "system", "content": instruction.strip()}, *messages(prompt)]) + LAST_TURN


def block(exemplars: Sequence[tuple[str, str]], template: str) -> str:
    """Questions and answers, one after the other."""
    return "".join(template.format(question=question_of(q), answer=flat(a)) for q, a in exemplars).strip()


def in_context(prompt: str, exemplars: Sequence[tuple[str, str]], exemplar: str, query: str, placement: str) -> str:
    """Exemplars (prompt, answer) and then the question; without exemplars the question alone."""
    shown, asked = block(exemplars, exemplar), query.format(question=question_of(prompt))
    return dialogue(shown, asked) if placement == "system" else dialogue("", f"{shown}\n\n{asked}")


def inference(exemplars: Sequence[tuple[str, str]], exemplar: str, infer: str) -> str:
    """Exemplars, and what is asked about all of them."""
    return dialogue("", infer.format(exemplars=block(exemplars, exemplar)))


def first_sentence(text: str) -> str:
    """A concept as it is put into a context: the first line that says something."""
    return next((line for line in map(flat, text.splitlines()) if line), "")


def fitting(
    exemplars: Sequence[tuple[str, str]], make: Callable[[Sequence[tuple[str, str]]], str], fits: Callable[[str], bool]
) -> tuple[str, int]:
    """A context that fits, and how many exemplars it has: the last ones are left out one by one where it is too long.

    A prompt that does not fit without any is given back all the same, for whoever writes to leave out and count.
    """
    for count in range(len(exemplars), -1, -1):
        text = make(exemplars[:count])
        if count == 0 or fits(text):
            return text, count
    raise AssertionError("unreachable")
