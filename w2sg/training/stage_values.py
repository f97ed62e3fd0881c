"""What finished reading stages hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from w2sg.store.files import read_json
from w2sg.training.foreseen import stand_in, stand_ins


def load_values(folder: Path) -> tuple[list[str], Tensor]:
    """Ids and values of a finished read stage."""
    ids, tensors = load_tensors(folder)
    return ids, tensors["values"]


def holds(folder: Path, name: str) -> bool:
    """Whether a finished read stage has values by this name."""
    if folder in stand_ins:
        return name in stand_in(folder)[1]
    with safe_open(folder / "values.safetensors", "pt") as tensors:
        return name in tensors.keys()  # noqa: SIM118 (not a dict)


def values_of(folder: Path, ids: Sequence[str]) -> Tensor:
    """[N, ...] values of a finished read stage, in the order of the ids."""
    stored_ids, values = load_values(folder)
    place = {i: row for row, i in enumerate(stored_ids)}
    return values[[place[i] for i in ids]]


def load_parts(folder: Path) -> dict[str, np.ndarray]:
    """Each id's own values, in fp64, of a finished read stage whose examples have several."""
    ids, tensors = load_tensors(folder)
    parts = np.split(tensors["values"].double().numpy(), np.cumsum(tensors["sizes"].numpy())[:-1])
    return dict(zip(ids, parts, strict=True))


def load_tensors(folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Ids, values, and sizes and flags where there are any, of a finished read stage."""
    if folder in stand_ins:
        return stand_in(folder)
    return read_json(folder / "ids.json"), load_file(folder / "values.safetensors")
