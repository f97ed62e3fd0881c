"""One example as it was read: a preference pair, a text with its class, or a question with its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from w2sg.data.messages import LAST_TURN, Dialogue, Message
from w2sg.data.table import digest

NO_PROMPT = Dialogue.of_text("")


@dataclass(frozen=True)
class Example:
    """One example as it was read.

    Attributes:
        kind: ``pairs``, ``classes`` or ``answers``.
        prompt: what is answered; all texts share its text as their start.
        texts: whole texts, in an order that says nothing of the answer; one for a class or an answered question.
        answer: which text is preferred (pairs), or the class; 0 for answers.
        group: rows of one group stay in one split.
        difficulty: where the dataset says it.
        subset: which part of its data it is of, where the dataset says that.
    """

    kind: str
    prompt: Dialogue
    texts: tuple[str, ...]
    answer: int
    id: str
    group: str
    difficulty: float = math.nan
    subset: str = ""


def pair(prompt: Dialogue, chosen: str, rejected: str, known: str | None = None) -> Example:
    """A preference pair of whole texts. They are ordered by hash, so a text's place does not give the answer away.

    Args:
        known: what the prompt is known by in hashes, where that is not its identity.
    """
    texts = tuple(sorted((chosen, rejected), key=lambda text: (digest(text), text)))
    identity = digest("pair", prompt.identity if known is None else known, *texts)
    group = prompt.text if known is None else known
    return Example("pairs", prompt, texts, texts.index(chosen), identity, group or identity)


def labelled(text: str, label: int, prompt: str = "") -> Example:
    """A text with its class; ``prompt`` groups texts that must not be split."""
    return Example("classes", NO_PROMPT, (text,), label, digest("class", text), prompt or text)


def answered(question: str | Dialogue, answer: str) -> Example:
    """A question, a whole dialogue as text up to "Assistant:", or a dialogue, with its right answer."""
    if isinstance(question, Dialogue):
        prompt = question
    elif question.endswith(LAST_TURN):
        prompt = Dialogue.of_text(question)
    else:
        prompt = Dialogue.of_messages([Message("user", question.strip())])
    text = f"{prompt.text} {answer.strip()}"
    same = (text,) if prompt.plain else (prompt.identity, text)
    return Example("answers", prompt, (text,), 0, digest("answer", *same), prompt.text)
