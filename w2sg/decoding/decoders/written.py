"""One reply of a decoder, and the two forms in which the store keeps many: a table of numbers, or text.

The table is for models that write here. A server gives text alone, so its answers are kept as JSON.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.data.dialogue import Chat
from w2sg.decoding.search import BEAM, POOL, Hypothesis, Result

FATES = ("", "reached", "complete", "longest")  # by their numbers in the table
# Columns of the table, one row a token. From CANDIDATE on they say the same at each token of a reply.
TOKEN, LOG_P, DRAFTED, CANDIDATE, VALUE, FINISHED, FATE, STRONG_READ, GUIDE_READ, ROUNDS, POOLED = range(11)
COLUMNS = 11
NOTHING = -1  # in place of a token


@dataclass(frozen=True)
class Written:
    """One reply to one prompt, with how it came about.

    Attributes:
        tokens: [n] ids of the strong model, with the one that ended the reply; None where a server wrote the text.
        log_probabilities: [n] that the strong model gave its tokens; None as above.
        text: None where it is that of the tokens.
        finished: it came to an end by itself, and not to the longest that is allowed.
        value: the guide's. rounds: of a search, or turns of a small model. rule: by which a search chose it.
        strong_read, guide_read: tokens read by the strong model and by each small one, the prompt's included. The
            stage counts them, so that no decoder has to.
        counted_by: who counted them where a server writes: ``server`` or ``tokenizer``.
        drafted: [n] bool, which tokens a small model wrote; None for none of them.
        fate: of a draft, one of `FATES`.
        trace: every round of a search, as `w2sg.decoding.search.Result` has it.
        candidates: the others that it was chosen from, best first.
    """

    tokens: np.ndarray | None = None
    log_probabilities: np.ndarray | None = None
    text: str | None = None
    finished: bool = False
    value: float = 0.0
    strong_read: float = 0.0
    guide_read: float = 0.0
    counted_by: str = ""
    drafted: np.ndarray | None = None
    fate: str = ""
    rounds: int = 0
    rule: str = BEAM
    trace: list[list[dict[str, Any]]] = field(default_factory=list)
    candidates: tuple[Written, ...] = ()

    @property
    def pooled(self) -> bool:
        """Whether a search had let it fall out of the beam before it chose it."""
        return self.rule != BEAM

    @property
    def draft(self) -> int:
        """How many tokens a small model wrote."""
        return 0 if self.drafted is None else int(self.drafted.sum())

    @property
    def beginning(self) -> np.ndarray:
        """[n] bool, the tokens of the draft that the reply begins with."""
        return np.logical_and.accumulate(np.zeros(len(self.tokens), bool) if self.drafted is None else self.drafted)

    @classmethod
    def of(cls, result: Result, with_candidates: bool = False) -> Written:
        """The best reply of a search, and the rest of its beam if that is to be kept."""

        def reply(h: Hypothesis) -> Written:
            logs = None if h.log_probabilities is None else h.log_probabilities[:, 0]
            return cls(h.tokens, logs, h.text, h.finished, h.value, rounds=result.rounds, rule=result.rule)

        rest = [h for h in result.beam if h is not result.best] if with_candidates else []
        return replace(reply(result.best), trace=result.trace, candidates=tuple(map(reply, rest)))

    def as_said(self, chat: Chat, given: int) -> tuple[Written, bool | None]:
        """The reply as its reader sees it: cut where a string ends it, and without a thought before it.

        Args:
            chat: of the strong model. given: first tokens in which no such string is looked for.

        Returns:
            The reply, and whether its thought came to an end; None where there was none.
        """
        tokens, _ = chat.cut(self.tokens, given)
        begins, closed = chat.thought(tokens), chat.said(tokens).closed
        kept = slice(begins, len(tokens))
        drafted = None if self.drafted is None else self.drafted[kept]
        tokens = tokens[begins:]
        reply = replace(
            self,
            tokens=tokens,
            log_probabilities=self.log_probabilities[kept],
            text=chat.text(tokens),
            finished=closed and (self.finished or not len(tokens)),
            drafted=drafted,
        )
        return reply, closed if begins else None

    def as_heard(self, chat: Chat) -> tuple[Written, bool | None]:
        """The same of a text: the reply without a thought, and the tokens that it has in this chat, with its end."""
        parts = chat.heard(self.text)
        finished = self.finished and parts.closed
        ids = chat.replies([parts.reply], [finished])[0]
        tokens = np.append(ids if parts.reply.strip() else ids[:0], np.full(int(finished), chat.end))
        reply = replace(self, tokens=tokens, text=parts.reply, finished=finished)
        return reply, parts.closed if parts.thought or not parts.closed else None


# ---------------------------------------------------------------------------------------------------------------------
# As a table of numbers
# ---------------------------------------------------------------------------------------------------------------------


def pack(reply: Written) -> np.ndarray:
    """The rows [T, 11] of a reply and of its candidates, one a token.

    A reply without tokens has a row of `NOTHING`, for it has a value and a cost, too.
    """
    parts = []
    for number, one in enumerate((reply, *reply.candidates)):
        size = len(one.tokens)
        part = np.zeros((max(1, size), COLUMNS))
        part[:, TOKEN] = one.tokens if size else NOTHING
        part[:size, LOG_P] = np.nan if one.log_probabilities is None else one.log_probabilities
        part[:size, DRAFTED] = 0 if one.drafted is None else one.drafted
        part[:, CANDIDATE], part[:, VALUE], part[:, FINISHED] = number, one.value, one.finished
        part[:, FATE], part[:, ROUNDS], part[:, POOLED] = FATES.index(one.fate), one.rounds, one.pooled
        part[:, STRONG_READ], part[:, GUIDE_READ] = reply.strong_read, reply.guide_read
        parts.append(part)
    return np.concatenate(parts)


def unpack(table: np.ndarray) -> Written:
    """The reply that `pack` made rows [T, 11] of."""
    starts = np.flatnonzero(np.diff(table[:, CANDIDATE], prepend=-1.0))
    replies = []
    for part in np.split(table, starts[1:]):
        facts, part = part[0], part[part[:, TOKEN] != NOTHING]
        replies.append(
            Written(
                tokens=part[:, TOKEN].astype(np.int64),
                log_probabilities=part[:, LOG_P],
                finished=bool(facts[FINISHED]),
                value=float(facts[VALUE]),
                strong_read=float(facts[STRONG_READ]),
                guide_read=float(facts[GUIDE_READ]),
                drafted=part[:, DRAFTED].astype(bool),
                fate=FATES[int(facts[FATE])],
                rounds=int(facts[ROUNDS]),
                rule=POOL if facts[POOLED] else BEAM,
            )
        )
    return replace(replies[0], candidates=tuple(replies[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# As text
# ---------------------------------------------------------------------------------------------------------------------


def pack_text(reply: Written, size: Callable[[str], int], seconds: float) -> dict[str, Any]:
    """A server's answer as JSON.

    Args:
        size: tokens of a text. seconds: that the answer took.
    """
    candidates = [
        {"text": one.text, "finished": one.finished, "value": one.value, "tokens": size(one.text)}
        for one in (reply, *reply.candidates)
    ]
    about = {name: getattr(reply, name) for name in ("strong_read", "guide_read", "counted_by", "rule", "pooled")}
    about |= {"seconds": seconds, "rounds": reply.rounds, "value": reply.value, "trace": reply.trace}
    return about | {"candidates": candidates}


def unpack_text(row: dict[str, Any]) -> Written:
    """The reply that `pack_text` made an answer of."""
    shared = {name: row[name] for name in ("strong_read", "guide_read", "counted_by", "rule", "rounds")}
    replies = [
        Written(text=one["text"], finished=one["finished"], value=one["value"], **shared) for one in row["candidates"]
    ]
    return replace(replies[0], trace=row["trace"], candidates=tuple(replies[1:]))


def to_file(answers: dict[str, Any]) -> bytes:
    """Answers by the ids of their prompts, as bytes that are the same each time."""
    return gzip.compress(json.dumps(answers, ensure_ascii=False, allow_nan=False).encode(), 6, mtime=0)


def from_file(file: Path) -> dict[str, Any]:
    """What `to_file` wrote."""
    return json.loads(gzip.decompress(file.read_bytes()))
