"""Rows that an engine beside this process answers: each rank asks for its part, and what is answered is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save

from w2sg import progress, stops
from w2sg.store.sealed import seal
from w2sg.store.shards import Found, Shards
from w2sg.training.devices import Devices

AT_ONCE = 2048  # rows of a question: engines fill their batches from them, and a killed run keeps those before


class Asked(Protocol):
    """What is asked (`w2sg.decoding.text_engine.TextEngine`).

    Attributes:
        share: of so many ranks one asks, with the devices of all of them.
    """

    share: int

    def ready(self) -> None:
        """Called by all ranks before any of them asks."""


def ask_rows(
    devices: Devices,
    scratch: Path,
    rows: int,
    ask: Callable[[np.ndarray], Found],
    ready: Callable[[], None],
    every: int,
    verb: str,
    unit: str,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Have all rows answered that were not before, neighbours by one engine, which may read what they share once.

    Args:
        ask: gives what is found for some rows, by their places.
        ready: called by all ranks before any of them asks.
        every: of so many ranks one asks, with the devices of all of them.

    Returns:
        On rank 0 what `Shards.join` gives; None on the others.
    """
    done = devices.first(lambda: Shards.done(scratch))
    todo = np.setdiff1d(np.arange(rows), done)
    engines = -(-devices.world // every)
    mine = np.array_split(todo, engines)[devices.rank // every] if devices.rank % every == 0 else todo[:0]
    progress.count(verb, rows, unit, len(done))
    files, answered = [], len(done)
    if len(todo):
        ready()
    for start in range(0, len(mine), AT_ONCE):
        part, begun = mine[start : start + AT_ONCE], time.perf_counter()
        progress.at(answered, len(part) * engines)
        found = ask(part)
        tensors = {
            "index": torch.from_numpy(part),
            "values": found.values.float().contiguous(),
            "useful": torch.tensor(found.useful or 0),
            "padded": torch.tensor(found.padded or 0),
            "seconds": torch.tensor(time.perf_counter() - begun, dtype=torch.float64),
        }
        tensors |= {name: x for name in ("sizes", "flags") if (x := getattr(found, name)) is not None}
        with stops.deferred():
            name = f"shard-{devices.rank:04d}-{len(done):06d}-{start:08d}"
            files.append(seal(scratch, name, ".safetensors", lambda f, t=tensors: f.write(save(t))).name)
        answered += len(part) * engines
        progress.at(min(answered, rows))
        progress.kept()
    written = [name for names in devices.everyone(files) for name in names]
    return Shards.join(scratch, rows, engines, written) if devices.main else None
