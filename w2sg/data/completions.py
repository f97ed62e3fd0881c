"""Prompts with their replies as rows of tokens whose log-probabilities are read at the replies alone.

One example is a prompt with n replies (2 for a preference pair, 1 for supervised fine-tuning). Packed, an example is
``prompt | reply | reply`` in one stretch, the replies not seeing each other, and several examples share a row; the
first token of every reply is predicted from the last position of the prompt. The last token of a reply predicts nothing
that is asked for, so no forward reads it.

Shapes: b examples, n replies in each, B rows, L tokens in the longest row, M reply tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from w2sg.data.masks import PADDING


@dataclass(frozen=True)
class Completions:
    """Token ids of prompts and replies, in the order of their examples.

    Attributes:
        prompts: [N] ids of each prompt, at least one.
        replies: [N] ids of the n replies of each, at least one, with the end token where the reply is finished.
        columns: [N] a number or more for each token of each reply ([length, K]), in the order of the replies; None
            where nothing is known of them.
        packed: False gives each reply a row of its own, for backbones that cannot keep two texts in a row apart.
    """

    prompts: list[np.ndarray]
    replies: list[tuple[np.ndarray, ...]]
    columns: list[np.ndarray] | None = None
    packed: bool = True

    @cached_property
    def sizes(self) -> np.ndarray:
        """[N, n] tokens of each reply."""
        return np.array([[len(reply) for reply in replies] for replies in self.replies], np.int64)

    @cached_property
    def _prompt_sizes(self) -> np.ndarray:
        return np.array([len(prompt) for prompt in self.prompts], np.int64)

    @cached_property
    def useful(self) -> np.ndarray:
        """[N] tokens that a forward has to read for each example."""
        read = (self.sizes - 1).sum(1)
        return read + self._prompt_sizes * (1 if self.packed else self.sizes.shape[1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] what an example costs in a padded batch."""
        if self.packed:
            return self.useful
        return (self._prompt_sizes + self.sizes.max(1) - 1) * self.sizes.shape[1]

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def content(self) -> str:
        """A hash of all ids and of where replies begin: what log-probabilities of these rows hang on."""
        state = hashlib.sha256()
        for prompt, replies in zip(self.prompts, self.replies, strict=True):
            for part in (prompt, *replies):
                state.update(len(part).to_bytes(8, "big") + np.ascontiguousarray(part, np.int64).tobytes())
        return state.hexdigest()[:16]

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]:
        """One micro-batch.

        Returns:
            ``input_ids``, ``position_ids``: [B, L]; ``example``, ``part``: [B, L], what may see what
            (`w2sg.data.masks.sight`), only where rows are packed; ``source``: [M] the place in the flattened
            [B * L] whose state predicts each reply token; ``targets``: [M] that token; ``owner``: [M] its reply,
            example * n + j; ``sizes``: [b, n]; ``columns``: [M, K] where there are any.
        """
        stretches = self._stretches(index)
        rows = _bins([len(ids) for ids, *_ in stretches]) if self.packed else [[k] for k in range(len(stretches))]
        longest = max(sum(len(stretches[k][0]) for k in row) for row in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        positions, example, part = np.zeros_like(ids), np.full_like(ids, PADDING), np.full_like(ids, PADDING)
        source: dict[int, np.ndarray] = {}
        for r, row in enumerate(rows):
            at = 0
            for k in row:
                tokens, places, parts, predicting = stretches[k]
                span = slice(at, at + len(tokens))
                ids[r, span], positions[r, span], part[r, span], example[r, span] = tokens, places, parts, k
                source[k] = predicting + r * longest + at
                at += len(tokens)
        n = self.sizes.shape[1]
        sizes = self.sizes[np.asarray(index)]
        batch = {
            "input_ids": ids,
            "position_ids": positions,
            "source": np.concatenate([source[k] for k in range(len(stretches))]),
            "targets": np.concatenate([reply for i in index for reply in self.replies[i]], dtype=np.int64),
            "owner": np.repeat(np.arange(len(index) * n), sizes.ravel()),
            "sizes": sizes,
        }
        if self.packed:
            batch |= {"example": example, "part": part}
        if self.columns is not None:
            batch["columns"] = np.concatenate([self.columns[i] for i in index]).astype(np.float32)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _stretches(self, index: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Runs of tokens that stay together: ids, positions, parts (0 the prompt, j + 1 reply j), predicting places."""
        stretches = []
        for i in index:
            prompt = self.prompts[i]
            before = len(prompt)
            groups = [self.replies[i]] if self.packed else [(reply,) for reply in self.replies[i]]
            for replies in groups:
                ids, places = [prompt], [np.arange(before)]
                parts, predicting = [np.zeros(before, np.int64)], []
                start = before
                for j, reply in enumerate(replies):
                    size = len(reply) - 1
                    ids.append(reply[:-1])
                    places.append(np.arange(before, before + size))
                    parts.append(np.full(size, j + 1))
                    predicting.append(np.concatenate([[before - 1], np.arange(start, start + size)]))
                    start += size
                stretches.append(tuple(map(np.concatenate, (ids, places, parts, predicting))))
        return stretches

    def take(self, index: np.ndarray) -> Completions:
        """The examples ``index``, in that order."""
        columns = None if self.columns is None else [self.columns[i] for i in index]
        return Completions([self.prompts[i] for i in index], [self.replies[i] for i in index], columns, self.packed)


def _bins(lengths: Sequence[int]) -> list[list[int]]:
    """Rows no longer than the longest stretch, filled first-fit from the longest down."""
    room = max(lengths)
    rows: list[list[int]] = []
    left: list[int] = []
    for k in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        row = next((r for r, free in enumerate(left) if free >= lengths[k]), None)
        if row is None:
            rows.append([])
            left.append(room)
            row = len(rows) - 1
        rows[row].append(k)
        left[row] -= lengths[k]
    return rows


def per_reply(values: Tensor, owner: Tensor, sizes: Tensor) -> Tensor:
    """Sums of [M] token values over each reply: [b, n]."""
    sums = torch.zeros(sizes.numel(), dtype=values.dtype, device=values.device)
    return sums.index_add(0, owner, values).view(sizes.shape)


@dataclass(frozen=True)
class Encoded:
    """What `encode_rows` made of a set of examples.

    Attributes:
        completions: the rows that fit.
        kept: [K] their places among the examples.
        dropped: reason -> ids of the others.
        truncated: replies that lost tokens on the right, and so have no end.
    """

    completions: Completions
    kept: np.ndarray
    dropped: dict[str, list[str]]
    truncated: int


def encode_rows(
    ids: Sequence[str],
    prompts: Sequence[np.ndarray],
    replies: Sequence[tuple[np.ndarray, ...]],
    finished: Sequence[tuple[bool, ...]],
    end: int | Sequence[tuple[int, ...]],
    max_length: int,
) -> Encoded:
    """Prompts and replies as rows of at most ``max_length`` tokens each.

    A finished reply gets the end token (one for all, or each its own); one that was cut off, or is cut here on the
    right, never does, so that nothing teaches a model to stop in the middle. Examples whose prompt leaves no room,
    whose replies are empty, or whose replies are identical are dropped and counted.
    """
    kept, dropped, truncated = [], {}, 0
    kept_prompts, kept_replies = [], []
    ends = [(end,) * len(texts) for texts in replies] if isinstance(end, int) else end
    for i, (prompt, texts, ended, last) in enumerate(zip(prompts, replies, finished, ends, strict=True)):
        room = max_length - len(prompt)
        reason = None
        if not len(prompt):
            reason = "prompt refused by the chat template"
        elif room < 1:
            reason = "prompt longer than max_length"
        elif any(len(reply) == 0 for reply in texts):
            reason = "empty reply"
        elif len(texts) > 1 and len({(tuple(reply.tolist()), e) for reply, e in zip(texts, ended, strict=True)}) == 1:
            reason = "identical replies"
        whole = [
            np.append(reply, token).astype(np.int32) if e else reply
            for reply, e, token in zip(texts, ended, last, strict=True)
        ]
        cut = tuple(np.asarray(reply[:room], np.int32) for reply in whole)
        if reason is None and len(cut) > 1 and all(np.array_equal(cut[0], other) for other in cut[1:]):
            reason = "identical once cut to max_length"
        if reason is not None:
            dropped.setdefault(reason, []).append(ids[i])
            continue
        truncated += sum(len(a) < len(b) for a, b in zip(cut, whole, strict=True))
        kept.append(i)
        kept_prompts.append(np.asarray(prompt, np.int32))
        kept_replies.append(cut)
    return Encoded(Completions(kept_prompts, kept_replies), np.array(kept, np.int64), dropped, truncated)
