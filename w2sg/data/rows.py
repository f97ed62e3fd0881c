"""Texts to packed rows of tokens, and rows to length-grouped batches.

One example is one row: the tokens that its texts have in common at the start, then what each text has of its own.
For a preference pair that is ``prompt + chosen + rejected``; the two replies see the prompt and themselves, not each
other, so both rewards come out of one forward over fewer tokens, and they are what two separate forwards would give.

Shapes: B rows in a batch, L tokens in its longest row, n texts in an example (2 for pairs, 1 for classification).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2sg.data.masks import PADDING, START

PREFIX = START  # segment of the shared tokens; text j is segment j + 1, and filling at the end of a row is PADDING


class ByPlace:
    """Rows of a reading stage that are looked up by their places, which is all that a batch of them holds.

    Args:
        lengths: [N] what each costs in a padded batch; rows of like length belong together.
        counted: whether these are the tokens that a forward has to read; those that are written are counted then.

    Attributes:
        useful: [N] tokens that are known to be read. sizes: [N, 0]: no given token's log-probability is.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, counted: bool = False):
        self.lengths = np.asarray(lengths, np.int64)
        self.useful = self.lengths if counted else np.zeros_like(self.lengths)
        self.sizes = np.zeros((len(lengths), 0), np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]:
        """``row``: [b] the places."""
        return {"row": torch.as_tensor(np.asarray(index))}


@dataclass(frozen=True)
class Rows:
    """Packed token rows of one table, in the table's order.

    Attributes:
        tokens: [N] per row, the shared tokens followed by the own tokens of each text.
        shared: [N] how many tokens at the start of each row belong to all its texts.
        sizes: [N, n] tokens that each text has of its own.
        truncated: how many texts lost tokens on the left to ``max_length``.
        packed: False gives each text a row of its own, for backbones that cannot keep two texts in a row apart.
    """

    tokens: Sequence[np.ndarray]
    shared: np.ndarray
    sizes: np.ndarray
    truncated: int
    packed: bool = True

    @cached_property
    def useful(self) -> np.ndarray:
        """[N] tokens that a forward has to read for each example."""
        return self.shared * (1 if self.packed else self.sizes.shape[1]) + self.sizes.sum(1)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] what an example costs in a padded batch; examples of like length belong together."""
        if self.packed:
            return self.useful
        return (self.shared + self.sizes.max(1)) * self.sizes.shape[1]

    def __len__(self) -> int:
        return len(self.tokens)

    def notes(self, share: bool) -> dict[str, Any]:
        """What a report says of them.

        Args:
            share: whether texts were to share rows.
        """
        apart = share and not self.packed
        return {"truncated_texts": self.truncated, **({"rows": "one for each text"} if apart else {})}

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]:
        """Pad the rows ``index`` on the right into one batch.

        Returns:
            ``input_ids``, ``position_ids``, ``segments``: [B, L]; ``ends``: [B, n] where each text's last token stands.
            A position is the token's place in its own text, so no text can tell that it shares a row. Where rows are
            not packed the first three are [B * n, L], the texts of an example in neighbouring rows.
        """
        if not self.packed:
            return self._collate_separately(index)
        longest = int(self.lengths[index].max())
        n = self.sizes.shape[1]
        ids = np.zeros((len(index), longest), np.int64)
        positions = np.zeros_like(ids)
        segments = np.full_like(ids, PADDING)
        ends = np.zeros((len(index), n), np.int64)
        for row, i in enumerate(index):
            shared, start = self.shared[i], self.shared[i]
            ids[row, : len(self.tokens[i])] = self.tokens[i]
            positions[row, :shared] = np.arange(shared)
            segments[row, :shared] = PREFIX
            for j, size in enumerate(self.sizes[i]):
                positions[row, start : start + size] = np.arange(shared, shared + size)
                segments[row, start : start + size] = j + 1
                start += size
                ends[row, j] = start - 1 if size else shared - 1  # a text may be no more than the shared start
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "segments": torch.from_numpy(segments),
            "ends": torch.from_numpy(ends),
        }

    def _collate_separately(self, index: Sequence[int]) -> dict[str, Tensor]:
        n = self.sizes.shape[1]
        texts = []
        for i in index:
            parts = np.split(self.tokens[i][self.shared[i] :], np.cumsum(self.sizes[i])[:-1])
            texts += [np.concatenate([self.tokens[i][: self.shared[i]], part]) for part in parts]
        lengths = np.array([len(text) for text in texts])
        ids = np.zeros((len(texts), lengths.max()), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        filling = place >= lengths[:, None]
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(np.where(filling, 0, place)),
            "segments": torch.from_numpy(np.where(filling, PADDING, 1)),
            "ends": torch.from_numpy(lengths.reshape(-1, n) - 1),
        }


def cut_left(ids: Sequence[int], most: int, first: Sequence[int] = ()) -> Sequence[int]:
    """The last tokens of a text, after those that every text begins with (without which some models read nothing well).

    Args:
        most: tokens that there may be. first: those that stand before every text, in front of which nothing is cut.

    >>> cut_left([1, 5, 6, 7, 8], 3, [1])
    [1, 7, 8]
    """
    if len(ids) <= most:
        return ids
    size = len(first)
    if size and size < most and list(ids[:size]) == list(first):
        return [*first, *ids[len(ids) - most + size :]]
    return ids[len(ids) - most :]


def pack(
    texts: Sequence[tuple[str, ...]],
    encode: Callable[[list[str]], list[list[int]]],
    max_length: int,
    packed: bool = True,
    first: Sequence[int] = (),
) -> Rows:
    """Tokenise whole texts and lay each example out as one row.

    Every text is tokenised by itself and loses tokens on the left where it is too long, as in the published protocol;
    what is shared is found afterwards among the tokens, so sharing cannot change a token.

    Args:
        texts: [N] tuples of n texts.
        encode: texts to token ids, special tokens included, without truncation of its own.
        max_length: tokens that a text may have; the last ones are kept.
        packed: False gives each text a row of its own.
        first: tokens that stand before every text; a text that is cut keeps them.
    """
    n = len(texts[0])
    flat = encode([text for example in texts for text in example])
    rows = _Joined(flat, np.zeros(len(texts), np.int64), n, max_length, first)
    sizes, truncated = np.zeros((len(texts), n), np.int64), 0
    for i in range(len(texts)):
        truncated += sum(len(ids) > max_length for ids in map(flat.__getitem__, range(i * n, i * n + n)))
        parts = rows.parts(i)
        if packed and n > 1:
            rows.shared[i] = _common_prefix(parts)
        sizes[i] = [len(part) - rows.shared[i] for part in parts]
    return Rows(rows, rows.shared, sizes, truncated, packed)


@dataclass(frozen=True)
class _Joined(Sequence[np.ndarray]):
    """Rows that are put together when they are read, so that tokens are held once, or not at all where they are mapped.

    Attributes:
        flat: [N * n] ids of the texts, nothing cut off.
        shared: [N] tokens that the n texts of an example begin with.
    """

    flat: Sequence[Sequence[int]]
    shared: np.ndarray
    n: int
    max_length: int
    first: Sequence[int]

    def __len__(self) -> int:
        return len(self.shared)

    def parts(self, row: int) -> list[np.ndarray]:
        """The texts of an example, cut."""
        ids = (self.flat[row * self.n + j] for j in range(self.n))
        return [np.asarray(cut_left(x, self.max_length, self.first), np.int32) for x in ids]

    def __getitem__(self, row: int) -> np.ndarray:
        whole, *others = self.parts(row)
        return np.concatenate([whole, *(part[self.shared[row] :] for part in others)]) if others else whole


def _common_prefix(parts: list[np.ndarray]) -> int:
    shortest = min(len(part) for part in parts)
    differs = np.zeros(shortest, bool)
    for part in parts[1:]:
        differs |= parts[0][:shortest] != part[:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def epoch_plan(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, window: int = 50) -> list[np.ndarray]:
    """The global batches of one epoch: shuffled, then grouped by length inside windows of ``window`` batches.

    The same on every device and after every restart: a function of its arguments alone.

    Returns:
        Index arrays of ``batch_size`` rows (the last one may be smaller), in the order in which they are trained on.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window * batch_size):
        part = order[start : start + window * batch_size]
        part = part[np.argsort(-lengths[part], kind="stable")]
        pieces = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        batches += [pieces[i] for i in random.permutation(len(pieces))]
    return batches


def token_plan(
    lengths: np.ndarray, max_tokens: int | None, max_rows: int | None = None, world: int = 1
) -> list[np.ndarray]:
    """Batches for reading every row once, the longest first.

    Args:
        max_tokens: once padded, on each device (or a single row); None for no limit. max_rows: on each device.
        world: devices that share a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        rows = len(order) if max_tokens is None else max(1, max_tokens * world // longest)
        rows = rows if max_rows is None else min(rows, max_rows * world)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def costs_of(lengths: np.ndarray, batch: np.ndarray, world: int) -> np.ndarray:
    """[b] tokens of each row of a device, once padded: the most of the rows at that place on any device.

    >>> costs_of(np.array([7, 5, 3, 2]), np.array([0, 1, 2, 3]), world=2)
    array([7, 3])
    """
    if world == 1:
        return lengths[batch]
    shares = [lengths[split_by_rank(batch, rank, world)[0]] for rank in range(world)]
    return np.max(shares, axis=0)


def split_by_rank(batch: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """This device's rows of a global batch and their weights.

    Every device gets the same number of rows; where the batch does not divide, a row is repeated with weight 0.
    """
    share = -(-len(batch) // world)
    mine = batch[rank::world]
    weight = np.ones(share, np.float32)
    weight[len(mine) :] = 0.0
    filling = np.repeat(batch[:1], share - len(mine))
    return np.concatenate([mine, filling]), weight
