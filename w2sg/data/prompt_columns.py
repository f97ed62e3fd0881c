"""What comes before a reply, and what a form of data is: the columns that it reads, and how."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from w2sg.data.examples import NO_PROMPT, Example, pair
from w2sg.data.files import Row
from w2sg.data.messages import LAST_TURN, TURN, Dialogue, Message, transcript
from w2sg.data.turns import BEGINS, kind_of, majority, messages_of, refuse_kinds, refuse_loose

Sample = list[Row]
EXPECTS = (
    "preference pairs {chosen, rejected} as 'Human: ... Assistant: ...' dialogues or lists of {role, content}, "
    "{prompt, chosen, rejected}, or classes {text, label} (docs/data.md has all forms; other names: "
    "dataset.columns={prompt: ..., chosen: ..., rejected: ...})"
)
PROMPTS = ("prompt", "question", "instruction", "query", "input", "history", "conversations")
SYSTEMS = ("system", "system_prompt")
OTHER_SYSTEM = "rows whose {} is not the system message of their dialogue, which is read"


@dataclass
class Form:
    """How the rows of one file are read.

    Attributes:
        words: what they are taken for, for the report. example: of one row. reads, needs: columns.
        within: keys of messages that it reads.
        counts: of what a reader should know, as rows are read. strict: by an example's id, why it is not to be trusted.
    """

    words: str
    example: Callable[[Row], Example]
    reads: set[str]
    needs: set[str] = field(default_factory=set)
    within: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    strict: dict[str, str] = field(default_factory=dict)

    def watch(self, look: Callable[[Row, Example], None]) -> None:
        """Look at every example as it is read."""
        example = self.example

        def watched(row: Row) -> Example:
            made = example(row)
            look(row, made)
            return made

        self.example = watched


class Tie(ValueError):
    """A row without a preference."""


def number(value: Any) -> float | None:
    """A cell as a finite number, None where it is none."""
    try:
        finite = math.isfinite(float(value)) and not isinstance(value, bool)
    except (TypeError, ValueError):
        return None
    return float(value) if finite else None


@dataclass
class PromptColumns:
    """The columns of one file that hold what comes before a reply, and how they are read.

    Attributes:
        column: of the prompt; None where there is none. kind: of its cells. system, more, history: columns beside it.
    """

    column: str | None
    kind: str = "nothing"
    system: str | None = None
    more: str | None = None
    history: str | None = None

    @staticmethod
    def of(sample: Sample, common: set[str], where: str, names: tuple[str, ...] = PROMPTS) -> PromptColumns:
        column = _first(names, common)
        if column is None:
            return PromptColumns(None)
        kind = majority(row.get(column) for row in sample)
        refuse_kinds(kind, column, where)
        if kind == "text":
            cells = [row[column] for row in sample if isinstance(row.get(column), str)]
            refuse_loose(cells, column, where)
            if 2 * sum(bool(TURN.match(cell.lstrip())) for cell in cells) > len(cells):
                kind = "dialogue"  # of one turn, which needs no "Assistant:" behind it
        keys = {key for row in sample for key in row}
        more = "input" if column == "instruction" and "input" in keys else None
        history = "history" if column != "history" and "history" in keys else None
        return PromptColumns(column, kind, _first(SYSTEMS, keys), more, history)

    @staticmethod
    def beside(sample: Sample) -> PromptColumns:
        """What stands beside messages that hold their prompt."""
        return PromptColumns(None, system=system_of(sample))

    @property
    def columns(self) -> set[str]:
        return {name for name in (self.column, self.system, self.more, self.history) if name}

    def before(self, row: Row) -> tuple[Message, ...]:
        """The system message and earlier turns."""
        turns = []
        if self.system and row.get(self.system):
            turns.append(Message("system", text_of(row, self.system)))
        if self.history and row.get(self.history):
            turns += _turns(row[self.history], self.history)
        return tuple(turns)

    def text(self, row: Row) -> str:
        text = text_of(row, self.column)
        more = row.get(self.more) if self.more else None
        return f"{text}\n{text_of(row, self.more)}" if more and str(more).strip() else text

    def messages(self, row: Row) -> tuple[Message, ...]:
        """The prompt as messages, with what stands before it."""
        if self.kind in ("messages", "json"):
            turns = self._unanswered(messages_of(row[self.column], self.column))
        elif self.kind == "dialogue":
            turns = self._transcript(row).messages
        else:
            turns = (Message("user", self.text(row)),)
        return (*self.before(row), *turns)

    def _unanswered(self, turns: tuple[Message, ...]) -> tuple[Message, ...]:
        if turns[-1].role == "assistant":
            raise ValueError(f"{self.column} ends with the assistant")
        return turns

    def dialogue(self, row: Row) -> Dialogue:
        if self.column is None:
            return NO_PROMPT
        if self.kind in ("messages", "json") or self.before(row):
            return Dialogue.of_messages(self.messages(row))
        text = self.text(row)
        if self.kind == "dialogue":
            return self._transcript(row)
        return Dialogue(transcript([("user", text)]) + LAST_TURN, (Message("user", text.strip()),))

    def _transcript(self, row: Row) -> Dialogue:
        """A dialogue as text; where it stops after the question, the reply's turn is begun."""
        text = self.text(row)
        if not BEGINS.match(text):
            raise ValueError(f"{self.column} is no dialogue ('Human: ... Assistant:'), as others of the file are")
        self._unanswered(Dialogue.of_text(text).messages)
        return Dialogue.of_text(text if text.rstrip().endswith(LAST_TURN) else text.rstrip() + LAST_TURN)

    def pair(self, row: Row, chosen: str, rejected: str) -> Example:
        """A pair of replies."""
        prompt = self.dialogue(row)
        if self.column is None or (self.kind == "dialogue" and prompt.text == self.text(row)):
            return pair(prompt, prompt.text + chosen, prompt.text + rejected)
        texts = (f"{prompt.text} {reply}" for reply in (chosen, rejected))
        if self.kind != "text" or self.before(row):
            return pair(prompt, *texts)
        spaced = f"{prompt.text} "  # by which such pairs were always known, so that splits stay
        return pair(prompt, *texts, known=spaced if prompt.plain else None)


def _first(names: tuple[str, ...], keys: set[str]) -> str | None:
    return next((name for name in names if name in keys), None)


def system_of(sample: Sample) -> str | None:
    """The column of system messages."""
    return _first(SYSTEMS, {key for row in sample for key in row})


def text_of(row: Row, key: str) -> str:
    """A cell that is text."""
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__}, not text")
    return value


def _turns(value: Any, name: str) -> list[Message]:
    """Earlier turns: messages, or pairs of a question and its answer."""
    if kind_of(value) in ("messages", "json"):
        return list(messages_of(value, name))
    if isinstance(value, list) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in value
    ):
        return [Message(role, text) for turn in value for role, text in zip(("user", "assistant"), turn, strict=True)]
    raise ValueError(f"{name} is neither a list of messages nor of pairs [question, answer]")
