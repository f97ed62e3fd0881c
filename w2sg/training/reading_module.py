"""The LightningModule of a model that only reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor, nn

from w2sg.data.loading import Batch
from w2sg.memory import Budget
from w2sg.store.shards import Found, joined
from w2sg.training.sharding import Sharded, in_place, place
from w2sg.training.within_memory import read_batch


class ReadingModule(L.LightningModule):
    """Runs a frozen model over rows: ``read(inputs)`` per micro-batch gives [b, ...] values, or `Found`; kept in fp32.

    `predict_step` returns the rows' places in the examples, what was found, and the useful and padded tokens.

    Args:
        budget: what goes through the model at once; less than a batch where memory runs out.
        together: ranks read the same rows, each with its part of a model.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[dict[str, Tensor]], Tensor | Found],
        budget: Budget | None = None,
        together: bool = False,
    ):
        super().__init__()
        self.model = model
        self.found = hashlib.sha256()
        self._read, self.budget, self._together = read, budget or Budget(), together

    def on_predict_start(self) -> None:
        self.budget.alone = not (self._together or isinstance(self.trainer.strategy, Sharded))

    def configure_model(self) -> None:
        place(self.model, self.trainer)
        # Lightning would send all that rank 0 has to the others, whose parts may be others
        self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name in in_place(self.model)]

    def predict_step(self, batch: Batch, _index: int) -> dict[str, Any]:
        real = batch.weight > 0
        found = read_batch(self.budget, batch, lambda inputs, _: self._read(inputs))
        values = joined([part if isinstance(part, Found) else Found(part) for part in found]).take(real)
        self._seen(batch, values)
        return {
            "index": batch.index[real].cpu(),
            "values": values.values.float().cpu(),
            "sizes": None if values.sizes is None else values.sizes.cpu(),
            "flags": None if values.flags is None else values.flags.cpu(),
            "beside": None if values.beside is None else values.beside.float().cpu(),
            "useful": batch.useful if values.useful is None else values.useful,
            "padded": batch.padded if values.padded is None else values.padded,
        }

    def _seen(self, batch: Batch, found: Found) -> None:
        """Ranks that read together must find the same, or what they sum is of different rows."""
        if self._together:
            shapes = found.values.shape if found.sizes is None else found.sizes.cpu()
            self.found.update(f"{batch.index.tolist()}{shapes}".encode())
            self.found.update(found.values.float().cpu().numpy().tobytes())
