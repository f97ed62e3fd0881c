"""Rows of token ids of different lengths in one array: four bytes a token, in memory or mapped from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from w2sg.data.tokens import sliced


class Ragged(Sequence[np.ndarray]):
    """Token ids of N texts, each a view [length] of one int32 array.

    Args:
        ids: [T] of all texts, one after the other.
        sizes: [N] tokens of each.
    """

    def __init__(self, ids: np.ndarray, sizes: np.ndarray):
        self.ids, self.sizes = ids, sizes
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> np.ndarray:
        end = int(self._ends[row])
        return self.ids[end - int(self.sizes[row]) : end]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))


def encode(encoder: Callable[[list[str]], Sequence[Sequence[int]]], texts: Sequence[str]) -> Ragged:
    """Texts as token ids, a slice of them at a time."""
    parts = list(_slices(encoder, texts))
    return Ragged(*map(np.concatenate, zip(*parts, strict=True))) if parts else Ragged(*_empty())


def write(encoder: Callable[[list[str]], Sequence[Sequence[int]]], texts: Sequence[str], folder: Path) -> int:
    """`encode` into a folder, for `mapped`; no more than a slice is held. How many tokens there are is returned."""
    sizes = [np.zeros(0, np.int64)]
    with open(folder / "ids.bin", "wb") as file:
        for ids, lengths in _slices(encoder, texts):
            file.write(ids.astype("<i4").tobytes())
            sizes.append(lengths)
    np.save(folder / "sizes.npy", np.concatenate(sizes))
    return int(sum(map(np.sum, sizes)))


def mapped(folder: Path) -> Ragged:
    """What `write` wrote. The processes of a machine share its pages."""
    sizes = np.load(folder / "sizes.npy", allow_pickle=False)
    # as a plain array, whose views cost less; it keeps the mapped one alive
    ids = np.asarray(np.memmap(folder / "ids.bin", "<i4", "r")) if sizes.sum() else _empty()[0]
    return Ragged(ids, sizes)


def _slices(
    encoder: Callable[[list[str]], Sequence[Sequence[int]]], texts: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in sliced(len(texts)):
        rows = encoder(list(texts[part]))
        sizes = np.array([len(row) for row in rows], np.int64)
        yield np.fromiter(chain.from_iterable(rows), np.int32, int(sizes.sum())), sizes


def _empty() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, np.int32), np.zeros(0, np.int64)
