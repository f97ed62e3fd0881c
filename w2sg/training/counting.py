"""Tells `w2sg.progress` how far a fit or a reading is. It replaces Lightning's own bar."""

from __future__ import annotations

from typing import Any

import lightning as L

from w2sg import progress
from w2sg.data.loading import Batch


class Counting(L.Callback):
    """Counts steps of a fit, and rows of a reading.

    Args:
        steps: of the whole fit.
        rows: of the whole reading. read: rows that an earlier process read.
        verb, unit: what is done, and what rows are called.
    """

    def __init__(self, steps: int = 0, rows: int = 0, read: int = 0, verb: str = "reading", unit: str = "rows"):
        self.steps, self.rows, self.read, self.verb, self.unit = steps, rows, read, verb, unit

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        progress.count("training", self.steps, "it", trainer.global_step)
        if trainer.global_step:
            progress.kept(trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        progress.at(trainer.global_step, 1)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        progress.at(trainer.global_step)

    def on_predict_start(self, trainer: L.Trainer, *_: Any) -> None:
        progress.count(self.verb, self.rows, self.unit, self.read)
        if self.read:
            progress.kept(self.read)

    def on_predict_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, *_: Any) -> None:
        progress.at(self.read, batch.total)

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, found: Any, batch: Batch, *_: Any
    ) -> None:
        self.read += batch.total  # of all devices
        progress.at(self.read)
