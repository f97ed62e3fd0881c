"""Curves to CSV, TensorBoard or Weights & Biases: every curve under its stage's name, each of its points once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from w2sg.config.schema import TrainConfig
from w2sg.training.ledger import Ledger
from w2sg.training.wandb_run import WandbRun

log = logging.getLogger(__name__)


class Curves(CSVLogger):
    """A stage's curve as CSV, written whole each time; the run continues where it cannot be, and says so once."""

    said = False

    def __init__(self, out: Path, stage: str):
        super().__init__(out, name="csv", version=stage)
        self._forget()

    @rank_zero_only
    def _forget(self) -> None:
        """What an earlier run wrote there is given again, from its checkpoint or the store."""
        for name in ("metrics.csv", "hparams.yaml"):
            with suppress(OSError):
                Path(self.log_dir, name).unlink(missing_ok=True)

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            if not Curves.said:
                Curves.said = True
                log.warning("curves cannot be written to %s (%s); the run goes on", self.log_dir, error.strerror)


class Events(TensorBoardLogger):
    """A stage's curve for TensorBoard; points that are in its folder already are not written again."""

    def __init__(self, out: Path, stage: str):
        super().__init__(out, name="tensorboard", version=stage, default_hp_metric=False)
        file = Path(self.log_dir) / "logged.json"
        self._ledger = Ledger([file], file)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if new := self._ledger.new(self.version, metrics, step or 0):
            super().log_metrics(new, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Facts of a stage that has no points here yet: that its curve is replayed from the store, say."""
        if not self._ledger.last:
            super().log_hyperparams(params, *args, **kwargs)


class Loggers:
    """Gives every stage its logger, and closes the run's dashboard with what came out.

    Args:
        config: the run's configuration, shown in W&B.
        out: the run's folder.
        main: whether this process writes.
        typed: what the user typed, for the run's name in W&B.
    """

    def __init__(self, config: TrainConfig, out: Path, main: bool, typed: Sequence[str] = ()):
        self.kind, self.out = config.logger.kind, out
        self.wandb = WandbRun.start(config, out, typed) if self.kind == "wandb" and main else None
        if self.kind == "wandb" and main and self.wandb is None:
            self.kind = "csv"

    def stage(self, name: str) -> Logger | None:
        """The Lightning logger of one stage, or None."""
        match self.kind:
            case "csv":
                return Curves(self.out, name)
            case "tensorboard":
                return Events(self.out, name)
            case "wandb" if self.wandb is not None:
                return self.wandb.stage(name)
        return None

    def summarise(
        self,
        report: dict[str, Any],
        predictions: dict[str, list],
        files: list[Path],
        replies: list[dict[str, Any]] | None = None,
    ) -> None:
        """Put accuracies and PGR into the dashboard's summary; log the page, the predictions and what was written."""
        if self.wandb is not None:
            self.wandb.summarise(report, predictions, files, replies)

    def finish(self, failed: bool) -> None:
        """Close the dashboard; a failed run is marked as failed."""
        if self.wandb is not None:
            self.wandb.finish(failed)
