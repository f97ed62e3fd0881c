"""Token ids of many texts: made once per store, by one process, and mapped by all; of a few texts made where needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from w2sg.data import ragged
from w2sg.training.foreseen import Foreseen
from w2sg.training.stages import Stages

# Characters from which token ids are a stage of their own: a million tokens or so, which take a tokenizer a second or
# two. Below that a folder of the store, its lock and its seal cost as much as they save.
MANY = 4_000_000


def encoded(
    stages: Stages,
    name: str,
    key: dict[str, Any],
    encoder: Callable[[list[str]], Sequence[Sequence[int]]],
    texts: Sequence[str],
) -> ragged.Ragged:
    """Token ids of texts, in their order.

    Args:
        stages: of the run, which has a stage more where the texts are many.
        name: of that stage.
        key: what decides the ids.
        encoder: texts to ids; it is given a slice of them at a time.
    """
    if sum(map(len, texts)) < MANY:
        return ragged.encode(encoder, texts)
    return _kept(stages, name, key, lambda part: ragged.write(encoder, texts, part))


def made(
    stages: Stages, name: str, key: dict[str, Any], make: Callable[[], Sequence[np.ndarray]], characters: int
) -> Sequence[np.ndarray]:
    """`encoded`, by a function that has to see all texts at once.

    Args:
        characters: of the texts.
    """
    return make() if characters < MANY else _kept(stages, name, key, lambda part: ragged.write(list, make(), part))


def _kept(stages: Stages, name: str, key: dict[str, Any], write: Callable[[Path], int]) -> ragged.Ragged:
    def foreseen(part: Path) -> Foreseen:  # later stages hang on every token
        return Foreseen({"ids": torch.empty(write(part), device="meta")})

    return ragged.mapped(stages.compute(name, key, lambda part: {"tokens_written": write(part)}, foreseen))
