"""Rows of unequal length as one batch: filled up on the left, their common start apart, or sorted by length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def fill_left(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens, filled on the left, and where they have tokens: [B, L] each."""
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.from_numpy(np.array(tokens, np.int64))
        mask[row, longest - len(tokens) :] = 1
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def common_start(prompts: Sequence[np.ndarray], worth: int = 8) -> int:
    """Tokens that all prompts begin with, one short of the shortest; 0 where too few are worth a forward."""
    if len(prompts) < 2:
        return 0
    first, shared = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        differs = np.flatnonzero(np.asarray(first[:shared]) != np.asarray(prompt[:shared]))
        shared = int(differs[0]) if len(differs) else shared
    return shared if shared >= worth else 0


def by_length(lengths: Sequence[int], at_once: int) -> list[list[int]]:
    """Places of equal lengths, at most so many tokens of them together, or a single one.

    >>> by_length([2, 3, 2, 2], at_once=4)
    [[0, 2], [3], [1]]
    """
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length, []).append(place)
    parts = []
    for length, alike in places.items():
        size = max(1, at_once // max(1, length))
        parts += [alike[begin : begin + size] for begin in range(0, len(alike), size)]
    return parts


def in_parts(rows: int, columns: int, at_once: int) -> list[slice]:
    """Runs of columns that rows are read in, one after the other, each at most so many tokens, or one of each row.

    >>> in_parts(4, 5, at_once=8)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = max(1, at_once // max(1, rows))
    return [slice(begin, min(begin + size, columns)) for begin in range(0, columns, size)]
