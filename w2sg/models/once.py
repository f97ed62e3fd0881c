"""Several ranks share a model: one of them reads its weights, and the others are told what it finds.

A model of eight ranks would otherwise stand eight times in the memory of their machine before any of it is sent or cut.
The others build it without weights, on torch's meta device; `w2sg.training.sending` then gives them theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class _Ranks:
    reads: bool  # whether this one does; where nobody does, the model is planned
    first: Callable[[Callable[[], Any]], Any]  # what work gives on the one that reads, on every rank
    count: int = 1
    planned: bool = False


_ranks: ContextVar[_Ranks | None] = ContextVar("ranks", default=None)


@contextlib.contextmanager
def _while(ranks: _Ranks | None) -> Iterator[None]:
    before = _ranks.set(ranks)
    try:
        yield
    finally:
        _ranks.reset(before)


def read_by_one(
    reads: bool, first: Callable[[Callable[[], Any]], Any], count: int
) -> contextlib.AbstractContextManager[None]:
    """Models that are loaded in here have weights on one rank only. Every rank loads the same ones, in one order.

    Args:
        reads: whether this rank does. first: runs work there alone, and gives its value on every rank. count: of ranks.
    """
    return _while(_Ranks(reads, first, count))


def read_by_each() -> contextlib.AbstractContextManager[None]:
    """Each rank reads models for itself, as outside of `read_by_one`."""
    return _while(None)


def weightless(count: int = 1) -> contextlib.AbstractContextManager[None]:
    """Models that are loaded in here have no weights on any of ``count`` ranks: a plan asks how large they are."""
    return _while(_Ranks(False, lambda work: work(), count, planned=True))


def planned() -> bool:
    """Whether models have no weights, so that there are no numbers to look at."""
    ranks = _ranks.get()
    return ranks is not None and ranks.planned


def together() -> int:
    """Ranks that load the same models; 1 where each reads for itself."""
    ranks = _ranks.get()
    return 1 if ranks is None else ranks.count


def told(work: Callable[[], T]) -> T:
    """What ``work`` finds in weights: done by the rank that has them, known to all."""
    ranks = _ranks.get()
    return work() if ranks is None else ranks.first(work)


def built(whole: Callable[[], T], bare: Callable[[], T], each: bool = False) -> T:
    """A model: ``whole`` where weights are read, else ``bare``, which is called with torch's meta device.

    Args:
        each: every rank reads them, since what belongs to weights in few bits cannot be sent.
    """
    if each and not planned():
        return whole()
    made: list[T] = []

    def read() -> None:
        made.append(whole())

    if not planned():
        told(read)
    if not made:
        with torch.device("meta"):
            made.append(bare())
    return made[0]
