"""Curves to CSV, TensorBoard or Weights & Biases: one run per command, every curve under its stage's name."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from w2sg.config.schema import TrainConfig
from w2sg.errors import UserError
from w2sg.printable import printable

log = logging.getLogger(__name__)


class Curves(CSVLogger):
    """CSV files of a run's curves, which end where they cannot be written: the run goes on, and says so once."""

    said = False

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            if not Curves.said:
                Curves.said = True
                log.warning("curves cannot be written to %s (%s); the run goes on", self.log_dir, error.strerror)


class StageLogger(Logger):
    """A stage's view of the run's one W&B run: ``<stage>/<curve>`` over ``<stage>/step``."""

    def __init__(self, run: Any, stage: str):
        super().__init__()
        self._run, self._stage = run, stage
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    @property
    def name(self) -> str:
        return self._stage

    @property
    def version(self) -> str:
        return self._run.id

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._run.log({f"{self._stage}/{k}": v for k, v in metrics.items()} | {f"{self._stage}/step": step})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's configuration is logged once, by `Loggers`."""


def _mode(typed: str | None) -> str:
    """Whether W&B sends what it is told; old names of its modes included."""
    mode = typed or os.environ.get("WANDB_MODE") or "online"
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def _brief(error: Exception) -> str:
    """An error of a library in one line."""
    return " ".join(printable(str(error)).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _unless_refused(what: str, *words: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # wandb raises its own, requests' and plain errors
        log.warning(f"Weights & Biases {what}", _brief(error), *words)


class Loggers:
    """Gives every stage its logger, and closes the run's dashboards with what came out.

    Args:
        config: the run's configuration, shown in W&B.
        out: the run's folder.
        main: whether this process writes.
    """

    def __init__(self, config: TrainConfig, out: Path, main: bool):
        self.options, self.out = config.logger, out
        self.wandb = self._start_wandb(config) if config.logger.kind == "wandb" and main else None

    def _start_wandb(self, config: TrainConfig) -> Any:
        """The W&B run. What is typed counts, then what W&B's environment variables say, then our defaults."""
        options = self.options
        targets = (config.method["_target_"], config.loss["_target_"])
        method, loss = (target.rpartition(".")[2] for target in targets)
        weak, strong = (role.name.rstrip("/").rpartition("/")[2] for role in (config.weak, config.strong))
        group = f"{config.dataset.name}: {weak} -> {strong}"[:128]  # what losses and seeds of one comparison share
        defaults = {
            "project": ("WANDB_PROJECT", options.project, "w2sg"),
            "entity": ("WANDB_ENTITY", options.entity, None),
            "mode": ("WANDB_MODE", options.mode, None),
            "group": ("WANDB_RUN_GROUP", options.group, group),
            "name": ("WANDB_NAME", None, printable(self.out.name)[:128]),
            # a resumed run goes on; an agent of a sweep gives its runs ids of its own
            "id": ("WANDB_RUN_ID", None, hashlib.sha256(os.fsencode(self.out.resolve())).hexdigest()[:16]),
            "dir": ("WANDB_DIR", None, str(self.out)),
            "resume": ("WANDB_RESUME", None, "allow" if _mode(options.mode) == "online" else None),
        }
        given = {
            key: typed or (None if os.environ.get(name) else ours) for key, (name, typed, ours) in defaults.items()
        }
        names = (name[:64] for name in (method, config.dataset.name, loss))
        tags = dict.fromkeys([*names, *options.tags, *os.environ.get("WANDB_TAGS", "").split(",")])
        try:
            import wandb

            return wandb.init(
                **given,
                tags=list(filter(None, tags)),
                config=config.model_dump(by_alias=True),
                settings=wandb.Settings(silent=True),
            )
        except Exception as error:  # wandb raises its own, requests' and plain errors here
            raise UserError(
                f"logger: Weights & Biases could not start ({_brief(error)}); `wandb login` first, or use "
                "logger.mode=offline, or logger=csv"
            ) from error

    def stage(self, name: str) -> Logger | None:
        """The Lightning logger of one stage, or None."""
        match self.options.kind:
            case "csv":
                return Curves(self.out, name="csv", version=name)
            case "tensorboard":
                return TensorBoardLogger(self.out, name="tensorboard", version=name)
            case "wandb" if self.wandb is not None:
                return StageLogger(self.wandb, name)
        return None

    def summarise(
        self,
        report: dict[str, Any],
        predictions: dict[str, list],
        files: list[Path],
        replies: list[dict[str, Any]] | None = None,
    ) -> None:
        """Put accuracies and PGR into the dashboard's summary; log the page, the predictions and what was written.

        The report is on the disk by now: what W&B refuses is said, and the run ends as it would without it.
        """
        if self.wandb is None:
            return
        with _unless_refused("did not take the report (%s); it is in %s", self.out):
            import wandb

            summary = self.wandb.summary
            for model, values in report["metrics"].items():
                summary.update({f"{model}/{k}": v for k, v in values.items() if isinstance(v, float)})
            summary.update({f"pgr/{k}": v for k, v in report.get("pgr", {}).items() if v is not None})
            for split in ("test", "transfer"):
                parts = report["diagnostics"].get(split, {})
                summary.update(
                    {f"{split}/{k}": parts[k]["value"] for k in ("gain", "misfit", "remainder") if k in parts}
                )
            for system, measured in report.get("text", {}).get("systems", {}).items():
                names = [name for name in ("reward", "kl_per_token", "perplexity") if name in measured]
                values = {name: measured[name]["value"] for name in names}
                values |= {f"wins_over_{k}": v["win_rate"]["value"] for k, v in measured.get("against", {}).items()}
                values["tokens"] = measured["length"]["mean"]
                summary.update({f"{system}/{name}": value for name, value in values.items()})
            if replies:
                names = list(dict.fromkeys(name for row in replies for name in row))
                rows = [[row.get(name) for name in names] for row in replies]
                self.wandb.log({"samples": wandb.Table(columns=names, data=rows)})
            rows = [list(row) for row in zip(*predictions.values(), strict=True)]
            self.wandb.log({"predictions": wandb.Table(columns=list(predictions), data=rows)})
            kept = wandb.Artifact(f"report-{self.wandb.id}", type="report")
            for file in files:
                if file.suffix == ".html":
                    self.wandb.log({"report": wandb.Html(file.read_text(encoding="utf-8"), inject=False)})
                kept.add_file(str(file))
            self.wandb.log_artifact(kept)

    def finish(self, failed: bool) -> None:
        """Close the dashboards; a failed run is marked as failed."""
        if self.wandb is not None:
            with _unless_refused("could not close its run (%s)"):
                self.wandb.finish(exit_code=1 if failed else 0)
