"""What a reading stage found, written down every few seconds, so that a killed run keeps all but the last few."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from w2sg import progress, stops
from w2sg.store.files import remove, seen
from w2sg.store.sealed import seal, sweep, unsound

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What was found for some rows.

    Attributes:
        values: [b, ...] one value per row; or, with ``sizes``, [sum of sizes, ...] as many values as each row has.
        sizes: [b] values of each row; None for one each.
        flags: [b] a whole number per row, or None.
        useful, padded: tokens that had to be read or were written, and positions computed for them; None leaves it to
            the batch to say.
        beside: [b, ...] what another stage is to have of the same rows, or None.
    """

    values: Tensor
    sizes: Tensor | None = None
    flags: Tensor | None = None
    useful: int | None = None
    padded: int | None = None
    beside: Tensor | None = None

    def take(self, rows: Tensor) -> Found:
        """The rows [b] that are True."""
        values = self.values[rows if self.sizes is None else rows.repeat_interleave(self.sizes)]
        sizes, flags, beside = (None if x is None else x[rows] for x in (self.sizes, self.flags, self.beside))
        return Found(values, sizes, flags, self.useful, self.padded, beside)


def joined(parts: list[Found]) -> Found:
    """What was found for the rows of a batch that were read part by part."""
    if len(parts) == 1:
        return parts[0]

    def together(name: str) -> Tensor | None:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else torch.cat(columns)

    def sum_of(name: str) -> int | None:
        counts = [getattr(part, name) for part in parts]
        return None if counts[0] is None else sum(counts)

    tensors = (together(name) for name in ("values", "sizes", "flags"))
    return Found(*tensors, sum_of("useful"), sum_of("padded"), together("beside"))


class Shards(L.Callback):
    """Collects the findings of a prediction loop into files.

    Args:
        scratch: folder for the files.
        rank: of this process.
        rows: the places, in the whole table, of the rows that are read.
        seconds: between files.

    Attributes:
        files: names of those that were written.
    """

    def __init__(self, scratch: Path, rank: int, rows: np.ndarray, seconds: float = 10.0):
        self.scratch, self.rank, self.rows, self.seconds = scratch, rank, torch.from_numpy(rows), seconds
        self.flushed = time.perf_counter()
        self.pending: list[dict[str, Any]] = []
        self.files: list[str] = []

    def on_predict_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.pending.append(outputs)
        if time.perf_counter() - self.flushed > self.seconds:
            self._flush()

    def on_predict_end(self, *_: Any) -> None:
        self._flush()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, stops.Stopped):
            self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        now = time.perf_counter()
        tensors = {
            "index": self.rows[torch.cat([p["index"] for p in self.pending])],
            "values": torch.cat([p["values"] for p in self.pending]).contiguous(),
            "useful": torch.tensor(sum(p["useful"] for p in self.pending)),
            "padded": torch.tensor(sum(p["padded"] for p in self.pending)),
            "seconds": torch.tensor(now - self.flushed, dtype=torch.float64),
        }
        for name in ("sizes", "flags", "beside"):
            if self.pending[0][name] is not None:
                tensors[name] = torch.cat([p[name] for p in self.pending])
        taken = len(list(self.scratch.glob(f"shard-{self.rank:04d}-*.safetensors")))
        with stops.deferred():
            name = f"shard-{self.rank:04d}-{taken:06d}"
            self.files.append(seal(self.scratch, name, ".safetensors", lambda f: f.write(save(tensors))).name)
            self.pending, self.flushed = [], now
        progress.kept()

    @staticmethod
    def done(scratch: Path) -> np.ndarray:
        """Rows that are on disk. Damaged shards are deleted: their rows are read again."""
        sweep(scratch)
        done = [np.zeros(0, np.int64)]
        for file in sorted(scratch.glob("shard-*.safetensors")):
            wrong = unsound(file)
            try:
                if wrong is None:
                    done.append(load_file(file)["index"].numpy())
            except Exception as error:  # whatever is wrong with it, the remedy is the same
                wrong = str(error)
            if wrong is not None:
                log.warning("the shard %s cannot be used (%s); its rows are read again", file.name, wrong)
                remove(file)
        return np.concatenate(done)

    @staticmethod
    def join(
        scratch: Path, rows: int, world: int, files: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All shards in the order of rows, and what was counted while reading them.

        Args:
            files: that must be among them; other machines may have written them just now.
        """
        for file in files:
            seen(scratch / file)
        shards = [load_file(file) for file in sorted(scratch.glob("shard-*.safetensors"))]
        columns = {name: torch.cat([s[name] for s in shards]) for name, some in shards[0].items() if some.dim()}
        index = columns.pop("index")
        where = torch.full((rows,), -1)
        where[index] = torch.arange(len(index))
        if missing := int((where < 0).sum()):
            raise RuntimeError(f"{scratch.parent.name}: {missing} rows were never read")
        values = columns.pop("values")
        if "sizes" in columns:
            pieces = values.split(columns["sizes"].tolist())
            values = torch.cat([pieces[row] for row in where.tolist()])
        else:
            values = values[where]
        return {"values": values, **{name: column[where] for name, column in columns.items()}}, {
            "tokens": sum(int(s["useful"]) for s in shards),
            "padded_tokens": sum(int(s["padded"]) for s in shards),
            "seconds": sum(float(s["seconds"]) for s in shards) / world,
        }
