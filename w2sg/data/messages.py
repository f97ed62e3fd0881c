"""Dialogues as messages. A transcript is parsed for its turns once, where it is read, and by nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System):")
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
SPEAKERS = {role: name for name, role in ROLES.items()}
LAST_TURN = "\n\nAssistant:"
MARK = re.compile(r"\n{2,}(?=(?:Human|Assistant|System):)")


class Message(NamedTuple):
    """What one speaker says: ``role`` is user, assistant or system."""

    role: str
    content: str


@dataclass(frozen=True)
class Dialogue:
    """A dialogue up to where a reply is to follow.

    Attributes:
        text: as "Human: ... Assistant:", for models without a chat template; "" where there is no prompt.
        messages: for those with one.
    """

    text: str
    messages: tuple[Message, ...]

    @staticmethod
    def of_text(text: str) -> Dialogue:
        """A transcript, or a text without turns as one message of the user; the text stays as it is."""
        return Dialogue(text, parse(text))

    @staticmethod
    def of_messages(messages: Iterable[Message | tuple[str, str]]) -> Dialogue:
        """Messages as they are, whatever they quote."""
        messages = tuple(Message(*message) for message in messages)
        return Dialogue(transcript(messages) + LAST_TURN, messages)

    @cached_property
    def plain(self) -> bool:
        """Whether the text alone says what the messages are."""
        if parse(self.text) != self.messages:
            return False
        # whitespace alone before the first turn once hid it, so what was made of such texts is not to be used again
        first = TURN.split(self.text)[0].strip()
        return not (first and TURN.match(self.text.lstrip()))

    @cached_property
    def identity(self) -> str:
        """What hashes are taken of: the text, and the messages where it would be parsed otherwise."""
        return self.text if self.plain else f"{self.text}\0{json.dumps(self.messages)}"


def parse(text: str) -> tuple[Message, ...]:
    """A "Human: ... Assistant:" dialogue as messages, the last of them the user's if it ends in "Assistant:".

    Neighbouring turns of one speaker are joined, since most templates want the roles to alternate. Text without turns
    is one message of the user.

    >>> parse("\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: Bye\\n\\nAssistant:")[1:]
    (Message(role='assistant', content='Hello'), Message(role='user', content='Bye'))
    """
    before, *parts = TURN.split(text.lstrip())
    if not parts:
        return (Message("user", text.strip()),)
    turns = [Message("user", before.strip())]
    turns += [Message(ROLES[who], what.strip()) for who, what in zip(parts[::2], parts[1::2], strict=True)]
    return joined(turns) or (Message("user", ""),)


def joined(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The same with neighbouring messages of one role in one, and without those that say nothing."""
    turns: list[Message] = []
    for message in messages:
        if turns and turns[-1].role == message.role:
            turns[-1] = Message(message.role, f"{turns[-1].content}\n\n{message.content}".strip())
        elif message.content:
            turns.append(message)
    return tuple(turns)


def transcript(messages: Iterable[Message | tuple[str, str]]) -> str:
    """Messages as a "Human: ... Assistant: ..." dialogue."""
    return "".join(f"\n\n{SPEAKERS[role]}: {content}" for role, content in messages)


def instruction(prompt: Dialogue) -> str:
    """A prompt as AlpacaEval knows it: one question as it is, a longer dialogue as text up to its last question.

    >>> instruction(Dialogue.of_text("\\n\\nHuman: Hi there\\n\\nAssistant:"))
    'Hi there'
    >>> instruction(Dialogue.of_text("\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: Bye\\n\\nAssistant:"))
    'Human: Hi\\n\\nAssistant: Hello\\n\\nHuman: Bye'
    """
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return transcript(prompt.messages).removeprefix("\n\n")


def unmarked(text: str) -> str:
    """Text to stand inside a turn of a dialogue: a speaker's mark in it must begin no turn of its own.

    >>> unmarked("a\\n\\n\\nHuman: b")
    'a\\nHuman: b'
    """
    return MARK.sub("\n", text)
