"""Prompts, replies to them, and pairs of replies: joined by the prompt's id, never by position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.data.table import Table, digest
from w2sg.losses.logprobs import log_ratio


@dataclass(frozen=True)
class Prompts:
    """Prompts without repetition.

    Attributes:
        name: of the split they come from.
        ids: [P] content hashes.
        texts: [P] the prompts themselves, as they stand in the data.
    """

    name: str
    ids: list[str]
    texts: list[Dialogue]

    def __len__(self) -> int:
        return len(self.ids)

    def content_hash(self) -> str:
        """Of all prompts."""
        return digest(*(prompt.identity for prompt in self.texts))

    def first(self, count: int | None) -> Prompts:
        """The first ones (None: all): a random choice that stays the same, since tables are in an order by hash."""
        return Prompts(self.name, self.ids[:count], self.texts[:count])

    def take(self, index: Sequence[int] | np.ndarray) -> Prompts:
        """The prompts at the places ``index``, in that order."""
        return Prompts(self.name, [self.ids[k] for k in index], [self.texts[k] for k in index])


def prompts_of(table: Table) -> Prompts:
    """The prompts of a table, each once."""
    prompts = list(dict.fromkeys(table.prompts))
    return Prompts(table.name, [prompt_id(prompt) for prompt in prompts], prompts)


def prompt_id(prompt: Dialogue) -> str:
    """The content hash by which everything about a prompt is joined."""
    return digest("prompt", prompt.identity)


@dataclass(frozen=True)
class Replies:
    """What was written to prompts.

    Attributes:
        ids: [N] prompt ids. prompts: [N] prompts. texts: [N] replies without special tokens.
        finished: [N] False for a reply that was cut off.
        sample: [N] which of its prompt's samples it is. group: [N] which settings it was written with.
        tokens: [N] token ids, with the one that ended the reply; None for replies that came as text.
        log_probabilities: [N] of [length, m] by the models that wrote it.
        fingerprint: of the tokenizer of ``tokens``.
        key: where they came from, for cache keys.
    """

    ids: list[str]
    prompts: list[Dialogue]
    texts: list[str]
    finished: np.ndarray
    sample: np.ndarray
    group: np.ndarray
    key: dict[str, Any]
    tokens: list[np.ndarray] | None = None
    log_probabilities: list[np.ndarray] | None = None
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Sequence[int] | np.ndarray) -> Replies:
        """The rows ``index``, in that order."""
        index = np.asarray(index, np.int64)
        lists = {
            name: None if (column := getattr(self, name)) is None else [column[i] for i in index]
            for name in ("ids", "prompts", "texts", "tokens", "log_probabilities")
        }
        arrays = {name: getattr(self, name)[index] for name in ("finished", "sample", "group")}
        return replace(self, **lists, **arrays)

    def of_group(self, group: int) -> Replies:
        """The replies written with one of several settings."""
        return self.take(np.flatnonzero(self.group == group))

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each reply, its end included."""
        return np.array([len(row) for row in self.tokens], np.int64)

    def implicit_rewards(self) -> np.ndarray:
        """[N] log pi_r - log pi_0 of each reply, summed over its tokens; DPO's implicit reward but for beta."""
        return np.array([float(log_ratio(row[:, 0], row[:, 1]).sum()) for row in self.log_probabilities])

    def written_by(self, chat: Chat) -> bool:
        """Whether their token ids are there as a model with this chat template and tokenizer wrote them."""
        return self.tokens is not None and self.fingerprint == chat.fingerprint

    def encode(self, chat: Chat) -> list[np.ndarray]:
        """Token ids for a model, without an end: as they were written where its tokenizer wrote them, else anew."""
        if not self.written_by(chat):
            return chat.replies(self.texts, self.finished)
        stop = set(chat.stop)
        return [row[:-1] if len(row) and int(row[-1]) in stop else row for row in self.tokens]

    def ends(self, chat: Chat) -> list[int]:
        """[N] the token that ends each reply where it is finished: the one that was written, else the chat's own."""
        if not self.written_by(chat):
            return [chat.end] * len(self)
        stop = set(chat.stop)
        return [int(row[-1]) if len(row) and int(row[-1]) in stop else chat.end for row in self.tokens]


@dataclass(frozen=True)
class ReplyPairs:
    """A chosen and a rejected reply to each prompt, row by row.

    Attributes:
        ids: [N] of the pairs; of gold pairs those of their table, else those of their prompts.
        dropped: reason -> how many were left out.
    """

    ids: list[str]
    chosen: Replies
    rejected: Replies
    key: dict[str, Any]
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def gold_pairs(table: Table) -> ReplyPairs:
    """The pairs of a table, the preferred reply chosen.

    Raises:
        UserError: its rows are no pairs.
    """
    table.needs_labels(pairs=True)
    better = np.where(table.labels == 0, table.first, 1 - table.first)
    key, ids = {"gold": table.label_hash()}, [prompt_id(prompt) for prompt in table.prompts]
    finished, zeros = np.ones(len(table), bool), np.zeros(len(table), np.int64)
    texts = [[table.reply(row, which) for row, which in enumerate(side)] for side in (better, 1 - better)]
    sides = (Replies(ids, list(table.prompts), side, finished, zeros, zeros, key) for side in texts)
    return ReplyPairs(list(table.ids), *sides, key)


def concatenate(parts: Sequence[Replies]) -> Replies:
    """Replies one after another, the part as their group."""
    joined = {name: [x for part in parts for x in getattr(part, name)] for name in ("ids", "prompts", "texts")}
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("finished", "sample")}
    group = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Replies(**joined, **arrays, group=group, key={"parts": [part.key for part in parts]})


def join_pairs(chosen: Replies, rejected: Replies) -> ReplyPairs:
    """Pairs by prompt id; prompts with one reply only, an empty one, or two equal ones are dropped and counted.

    Args:
        chosen, rejected: at most one reply to each prompt.
    """
    for side in (chosen, rejected):
        if len(set(side.ids)) < len(side):
            raise ValueError("a prompt has more than one reply, so which to pair is not said")
    place = {i: row for row, i in enumerate(rejected.ids)}
    dropped: Counter[str] = Counter()
    rows: list[tuple[int, int]] = []
    for row, i in enumerate(chosen.ids):
        other = place.pop(i, None)
        if other is None:
            dropped["no rejected reply"] += 1
        elif not chosen.texts[row].strip():
            dropped["empty chosen reply"] += 1
        elif not rejected.texts[other].strip():
            dropped["empty rejected reply"] += 1
        elif chosen.texts[row].strip() == rejected.texts[other].strip():
            dropped["identical replies"] += 1
        else:
            rows.append((row, other))
    if place:
        dropped["no chosen reply"] += len(place)
    a, b = (np.array(x, np.int64) for x in (zip(*rows, strict=True) if rows else ((), ())))
    key = {"chosen": chosen.key, "rejected": rejected.key}
    return ReplyPairs([chosen.ids[i] for i in a], chosen.take(a), rejected.take(b), key, dict(dropped))


def best_and_worst(replies: Replies, rewards: np.ndarray, key: dict[str, Any]) -> ReplyPairs:
    """Of each prompt's samples the one with the highest reward as chosen, that with the lowest as rejected.

    Prompts whose samples are all the same text, and those with fewer than two, are dropped and counted; empty samples
    do not take part.
    """
    groups: dict[str, list[int]] = {}
    for row, i in enumerate(replies.ids):
        if replies.texts[row].strip():
            groups.setdefault(i, []).append(row)
    best, worst, dropped = [], [], Counter()
    for rows in groups.values():
        if len({replies.texts[row] for row in rows}) < 2:
            dropped["identical samples"] += 1
            continue
        order = sorted(rows, key=lambda row: (rewards[row], row))
        if replies.texts[order[0]] == replies.texts[order[-1]] or rewards[order[0]] == rewards[order[-1]]:
            dropped["equal rewards"] += 1
            continue
        best.append(order[-1])
        worst.append(order[0])
    if missing := len(set(replies.ids)) - len(groups):
        dropped["empty samples"] += missing
    chosen, rejected = replies.take(best), replies.take(worst)
    return ReplyPairs(chosen.ids, chosen, rejected, key, dict(dropped))
