"""What reasoning models write before their reply: a thought between two tags, which is no part of the reply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Thoughts = Literal["strip", "keep", "refuse"]
TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
OPEN = re.compile("|".join(map(re.escape, TAGS)))
# a thought that the prompt opened is saved without its first tag: then the last one stands on a line of its own
CLOSED_ALONE = re.compile(rf"^[ \t]*(?:{'|'.join(map(re.escape, TAGS.values()))})[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Said:
    """A reply and the thought before it.

    Attributes:
        thought: with its tags; "" where there is none. reply: what comes after. closed: False where the text ends
            inside its thought, so that there is no reply.
    """

    thought: str
    reply: str
    closed: bool = True


def split(text: str) -> Said:
    """A text as thought and reply. Only what it begins with is a thought; a reply may speak of tags.

    >>> split("<think>Hm.</think>\\n\\nYes.").reply
    'Yes.'
    >>> split("<think>Hm.").closed
    False
    >>> split("Write <think> and </think>.").thought
    ''
    """
    at = 0
    while tag := OPEN.match(text, at + _space(text, at)):
        close = TAGS[tag[0]]
        end = text.find(close, tag.end())
        if end < 0:
            return Said(text, "", closed=False)
        at = end + len(close)
    if not at and (tag := CLOSED_ALONE.search(text)) and not OPEN.search(text[: tag.start()]):
        at = tag.end()
    return Said(text[:at], text[at:].strip()) if at else Said("", text)


def left_open(text: str) -> str | None:
    """The tag that a text ends after without its thought being closed, with the whitespace after it; else None."""
    places = [tag for tag in OPEN.finditer(text) if TAGS[tag[0]] not in text[tag.end() :]]
    if not places or text[places[-1].end() :].strip():
        return None
    return text[places[-1].start() :]


def closing(opened: str) -> str:
    """What closes an empty thought that a text has opened, so that a reply may follow.

    Args:
        opened: the tag with the whitespace after it.
    """
    close = TAGS[opened.strip()]
    if close.startswith("["):
        return close
    return ("\n" if opened.endswith("\n") else "") + close + "\n\n"


def empty(text: str) -> bool:
    """Whether a text is thoughts without content, tags and whitespace alone."""
    parts = split(text)
    tags = [*TAGS, *TAGS.values()]
    inside = re.sub("|".join(map(re.escape, tags)), "", parts.thought)
    return bool(parts.thought) and not inside.strip() and not parts.reply.strip()


def _space(text: str, at: int) -> int:
    return len(text[at:]) - len(text[at:].lstrip())
