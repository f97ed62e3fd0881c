"""Attention to what many rows share: its keys and values are kept, and read, once for all of them.

Known as bifurcated (arXiv 2403.08845) or shared-prefix attention (Hydragen, 2402.05099): the replies of a prompt are
many questions to the same keys, so their scores are one matrix product. In a beam search there are two levels, the
prompt and what a beam has written before its last fork. The softmax goes over all levels together, so nothing changes
but the order of summation.

Shapes: G groups of rows that share, R the most rows of a group, B rows, H heads of keys, N queries of each such head
and row, L new tokens, P columns that are shared, Q columns after them, D width of a head.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2sg.decoding import waits

NAME = "w2sg_shared_prefix"
SCORES = 2**28  # that are held at once: the queries of a long chunk take turns
_now: contextvars.ContextVar[Levels] = contextvars.ContextVar("levels")


class Prefix:
    """Keys and values that rows share, and the rows that go on from them.

    Args:
        layers: keys and values of each layer, [G, H, P, D] each.
        rows: [B] the group of each row, on the host.
        padded: whether rows may have columns among these P that they do not see.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], rows: np.ndarray, padded: bool):
        self.layers = [(keys.contiguous(), values.contiguous()) for keys, values in layers]
        self.padded = padded
        self._assign(rows)

    def __len__(self) -> int:
        """P."""
        return self.layers[0][0].shape[2]

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows alone."""
        self._assign(self._group[rows])

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each row, [B, H, P, D]: no longer shared."""
        return [(keys.index_select(0, self.of), values.index_select(0, self.of)) for keys, values in self.layers]

    def _assign(self, of: np.ndarray) -> None:
        device = self.layers[0][0].device
        used, at, counts = np.unique(of, return_inverse=True, return_counts=True)
        if 2 * len(used) <= len(self.layers[0][0]):  # what no row goes on from is dropped, not one by one
            rest = waits.sent(used, device)
            self.layers = [(keys[rest], values[rest]) for keys, values in self.layers]
            of, used = at, np.arange(len(used))
        # slot [B]: place of a row in its group. table [G, R]: the rows of each group, and 0 where it has fewer than R,
        # whose scores nobody takes back out.
        self._group, groups, most = of, len(self.layers[0][0]), int(counts.max(initial=0))
        order = np.argsort(of, kind="stable")
        ends = np.zeros(groups, np.int64)
        ends[used] = counts
        first = np.cumsum(ends) - ends
        slot = np.empty_like(of)
        slot[order] = np.arange(len(of)) - first[of[order]]
        table = np.zeros((groups, most), np.int64)
        table[of, slot] = np.arange(len(of))
        # in order and as many of each: then a view does instead of an index
        self.even = table.size == len(of) and bool((table.flatten() == np.arange(len(of))).all())
        self.of, self.slot, self.table = (waits.sent(x, device) for x in (of, slot, table))

    def scores(self, layer: int, query: Tensor) -> Tensor:
        """[B, H, N L, P] of queries [B, H, N L, D]."""
        return self._rows(self._groups(query) @ self.layers[layer][0].transpose(2, 3))

    def mean(self, layer: int, shares: Tensor) -> Tensor:
        """[B, H, N L, D] of shares [B, H, N L, P]."""
        return self._rows(self._groups(shares) @ self.layers[layer][1])

    def _groups(self, x: Tensor) -> Tensor:
        """[B, H, N L, _] as [G, H, R N L, _]."""
        groups, most = self.table.shape
        x = (
            x.view(groups, most, *x.shape[1:])
            if self.even
            else x.index_select(0, self.table.flatten()).view(groups, most, *x.shape[1:])
        )
        return x.transpose(1, 2).reshape(groups, x.shape[2], -1, x.shape[-1])

    def _rows(self, x: Tensor) -> Tensor:
        """[G, H, R N L, _] as [B, H, N L, _]."""
        groups, most = self.table.shape
        x = x.view(groups, x.shape[1], most, -1, x.shape[-1]).transpose(1, 2)
        return x.flatten(0, 1) if self.even else x[self.of, self.slot]


class Levels:
    """What a forward sees before what its cache holds.

    Args:
        prefixes: in the order of their columns.
        mask: [B, P + Q] columns that each row has, the ``new`` ones (L) included, which see what is before them.
        holes: whether rows may lack columns after the first P.
    """

    def __init__(self, prefixes: Sequence[Prefix], mask: Tensor, new: int, holes: bool):
        self.prefixes = prefixes
        ends = np.cumsum([0, *map(len, prefixes)]).tolist()
        self.parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self.after = slice(ends[-1], mask.shape[1])
        self.hidden: list[tuple[slice, Tensor]] = []  # columns, and [B, 1, 1, 1, columns] or [L, columns] of them
        for part, needed in zip((*self.parts, self.after), (*(p.padded for p in prefixes), holes), strict=True):
            if needed:
                self.hidden.append((part, ~mask[:, None, None, None, part].bool()))
        if new > 1:
            later = mask.shape[1] - ends[-1]
            self.hidden.append((self.after, mask.new_ones((new, later), dtype=torch.bool).triu(later - new + 1)))

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """[B, heads, L, D] of queries [B, heads, L, D], over the prefixes and keys and values [B, H, Q, D]."""
        rows, heads, new, _ = query.shape
        columns = sum(map(len, self.prefixes)) + keys.shape[2]
        size = max(1, SCORES // (rows * heads * columns))
        parts = [slice(begin, min(begin + size, new)) for begin in range(0, new, size)]
        means = [self._attend(layer, query[:, :, part], part, keys, values, scale) for part in parts]
        return means[0] if len(means) == 1 else torch.cat(means, 2)

    def _attend(self, layer: int, query: Tensor, part: slice, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """The same of a part of the new tokens."""
        rows, heads, new, width = query.shape
        shared = keys.shape[1]
        # [B, H, N L, D]: heads that share a key are rows to it, so that each key is read once
        query = (query * scale).reshape(rows, shared, -1, width)
        before = [prefix.scores(layer, query) for prefix in self.prefixes]
        scores = torch.cat([*before, query @ keys.transpose(2, 3)], -1).view(rows, shared, heads // shared, new, -1)
        lowest = torch.finfo(scores.dtype).min  # not -inf: a row of filling sees nothing, and must not become NaN
        for columns, hidden in self.hidden:
            scores[..., columns].masked_fill_(hidden if hidden.ndim > 2 else hidden[part], lowest)
        # one softmax over all levels, in fp32 as transformers' eager attention has it
        shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype).view(rows, shared, -1, scores.shape[-1])
        mean = shares[..., self.after] @ values
        for prefix, columns in zip(self.prefixes, self.parts, strict=True):
            mean = mean + prefix.mean(layer, shares[..., columns])
        return mean.view(rows, heads, new, values.shape[-1])  # some have values narrower than keys


@contextlib.contextmanager
def attending(config: Any, levels: Levels) -> Iterator[None]:
    """The models of this configuration see these levels before what their caches hold."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)  # without a mask function of that name none is made, or needed
    usual, token = config._attn_implementation, _now.set(levels)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
        _now.reset(token)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The interface of attention functions in transformers: [B, L, heads, D]."""
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if rest.get(name) is not None:
            raise NotImplementedError(f"{name} in attention to a shared prefix")
    if mask is not None:
        raise NotImplementedError("a mask of the model's own in attention to a shared prefix")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _now.get().attend(module.layer_idx, query, key, value, scale).transpose(1, 2), None
