"""What a plan takes for the output of a stage that is not made yet.

A plan walks a method as a run does (`w2sg.planning`). Numbers of the right shapes stand in for those that a model would
find, and for replies texts as long as they may become. So later stages have rows of a known number and size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from w2sg.data.dialogue import Chat

# Folder of a stage that was foreseen -> its ids and values, which are nowhere written down.
stand_ins: dict[Path, tuple[list[str], dict[str, Tensor]]] = {}
walk = 0  # in the second walk rows have the values of others, by which keys that hang on them are found


class Unforeseen(Exception):
    """What a stage finds cannot be foreseen, and later stages hang on it."""


@dataclass(frozen=True)
class Writing:
    """What writing models do, at most.

    Attributes:
        prompts: [N] tokens of the prompt of each row. replies: [N] tokens that each reply may come to.
        rows: replies of one forward, on each device.
    """

    prompts: np.ndarray
    replies: np.ndarray
    rows: int


@dataclass(frozen=True)
class Foreseen:
    """A reading's output.

    Attributes:
        tensors: as the stage would keep them: ``values``, and ``sizes`` and ``flags`` where it has them.
        writing: where replies are written; their number of tokens is then a bound.
        ids: of the rows, where no examples have them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    writing: Writing | None = None
    ids: list[str] = field(default_factory=list)


def stand_in(folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Ids and values that stand in for those of a stage."""
    ids, tensors = stand_ins[folder]
    return ids, {name: _moved(value, tensors.get("sizes")) if walk else value for name, value in tensors.items()}


def _moved(value: Tensor, sizes: Tensor | None) -> Tensor:
    """Values of the next row, or of the next tokens where rows have different numbers of them."""
    if value is sizes or not value.is_contiguous() or len(value) < 2:
        return value
    step = 1 if sizes is None else int(sizes[0]) if bool((sizes == sizes[0]).all()) else 7919 % len(value)
    return value.roll(step, 0)


def numbers(*shape: int) -> Foreseen:
    """Values of a shape, about as a label's logits are."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return Foreseen({"values": drawn})


def per_token(sizes: np.ndarray, columns: int | None = None) -> Foreseen:
    """A log-probability for each of ``sizes`` tokens a row, [T] or [T, columns]."""
    total = int(sizes.sum())
    values = torch.full((total,) if columns is None else (total, columns), -2.0)
    return Foreseen({"values": values, "sizes": torch.from_numpy(np.asarray(sizes, np.int64))})


def texts(chat: Chat, prompts: Sequence[np.ndarray], lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    """Token ids of replies of given lengths: words of the prompts, one row after another.

    Args:
        prompts: token ids of prompts, whose words are taken. lengths: [N]. seed: of the stage.
    """
    marks = {*chat.stop, *chat.tokenizer.all_special_ids}
    found = np.concatenate([np.asarray(row, np.int64) for row in prompts])
    words = found[~np.isin(found, list(marks))]
    if not len(words):
        words = np.setdiff1d(chat.ids, list(marks))[:100]
    at, rows = seed, []
    for place, length in enumerate(lengths):  # steps that no row's length divides, so that no two rows are alike
        start = (at + 31 * place) % len(words)
        rows.append(np.take(words, np.arange(start, start + length), mode="wrap"))
        at += int(length)
    return rows


def replies(
    chat: Chat,
    prompts: Sequence[np.ndarray],
    prompt_of: np.ndarray,
    most: int,
    limit: int | None,
    rows: int,
    models: int,
    seed: int,
) -> Foreseen:
    """Replies as long as they may become, with the log-probabilities of the models that write.

    Args:
        prompts: [P] token ids. prompt_of: [N] the prompt of each reply.
        most: tokens of a reply. limit: positions of the models; None for no limit.
        rows: of one forward. models: that write together. seed: of the stage.
    """
    sizes = np.array([len(row) for row in prompts], np.int64)[prompt_of]
    room = np.full(len(sizes), most) if limit is None else np.clip(limit + 1 - sizes, 1, most)
    written = texts(chat, prompts, room, seed)
    flat = torch.from_numpy(np.concatenate(written)).float()
    values = torch.cat([flat[:, None], torch.full((len(flat), models), -2.0)], 1)
    tensors = {"values": values, "sizes": torch.from_numpy(room), "flags": torch.zeros(len(room), dtype=torch.long)}
    return Foreseen(tensors, Writing(sizes, room, rows))
