"""A run in Weights & Biases: its name, group and id, its curves, its summary. What W&B refuses ends no run.

docs/wandb.md has the table of everything that is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from w2sg.config.hydra import NOT_IN_NAME
from w2sg.config.schema import TrainConfig
from w2sg.printable import printable
from w2sg.store.keys import flatten
from w2sg.training.ledger import Ledger
from w2sg.training.precision import key_of

log = logging.getLogger(__name__)
LONGEST = 128  # characters of a name or a group
IN_WORDS = (
    "method",
    "decoder",
    "loss",
    "weak",
    "strong",
    "weak.name",
    "strong.name",
    "dataset",
    "pair",
    "seed",
    "dataset.split_seed",
)
CURVES = "w2sg-curves.json"  # in a run's folder: which points it holds
LOST = "takes no more curves (%s); they are in the store and on the page"
ANSWER = 30  # seconds that W&B has to answer at the start
PATIENCE = 600  # seconds that a finished run waits for W&B to take what is left


def setting_of(config: TrainConfig) -> str:
    """A hash of all that a run's results depend on, apart from its two seeds: of devices, the precision alone."""
    content = config.model_dump(mode="json", by_alias=True)
    for key in ("seed", "out", "store", "logger", "report"):
        content.pop(key, None)
    content["dataset"].pop("split_seed", None)
    content["trainer"] = {"precision": key_of(config.trainer)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def words_of(config: TrainConfig, typed: Sequence[str]) -> str:
    """A setting in words: method, loss, pair, dataset, and whatever else was typed, by the last part of its key."""
    method = config.method["_target_"].rpartition(".")[2]
    parts = [method if config.decoder is None else f"{method} {config.decoder.get('kind', '')}".strip()]
    if _learns_by_loss(config):
        parts.append(config.loss["_target_"].rpartition(".")[2])
    names = (role.name.rstrip("/").rpartition("/")[2] for role in (config.weak, config.strong))
    weak, strong = (name.removesuffix(".gguf") for name in names)
    parts += [f"{weak}→{strong}", config.dataset.name]
    for override in typed:
        key = override.lstrip("+~").partition("=")[0]
        if key not in IN_WORDS and not NOT_IN_NAME.match(override):
            role = key.startswith(("weak.", "strong."))
            parts.append(override.lstrip("+") if role else key.rpartition(".")[2] + override.lstrip("+~")[len(key) :])
    return printable(" ".join(parts))


def _cut(words: str, end: str) -> str:
    """Words and an end, within what W&B takes; what is left out is marked."""
    if len(words) + len(end) > LONGEST:
        words = words[: LONGEST - len(end) - 2].rpartition(" ")[0] + " …"
    return words + end


def _learns_by_loss(config: TrainConfig) -> bool:
    target = config.method["_target_"]
    of_text = ("w2sg.methods.cong.", "w2sg.methods.decode.")
    return not target.startswith(of_text) and config.method.get("target", "labels") == "labels"


class StageLogger(Logger):
    """A stage's view of the run's one W&B run: ``<stage>/<curve>`` over ``<stage>/step``."""

    def __init__(self, whole: WandbRun, stage: str):
        super().__init__()
        self._whole, self._stage = whole, stage
        with whole.unless_refused(LOST):
            whole.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    @property
    def name(self) -> str:
        return self._stage

    @property
    def version(self) -> str:
        return self._whole.run.id

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._whole.log(self._stage, metrics, step or 0)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """``<stage>/cached`` in the summary; the run's configuration is given once, at its start."""
        self._whole.mark(self._stage, params)


def _brief(error: Exception) -> str:
    """An error of a library in one line."""
    return " ".join(printable(str(error)).split())[:300] or type(error).__name__


class WandbRun:
    """The one W&B run of a command's run.

    Args:
        run: what ``wandb.init`` gave. out: the run's folder. offline: it is to be sent by `wandb sync`.
    """

    told_to_sync = False

    def __init__(self, run: Any, out: Path, offline: bool):
        self.run, self.out, self.offline = run, out, offline
        self._said: set[str] = set()
        folder = getattr(getattr(run, "settings", None), "sync_dir", None)
        mine = None if folder is None else Path(folder) / CURVES
        before = [] if mine is None else sorted(mine.parent.parent.glob(f"*run-*-{run.id}/{CURVES}"))
        self._ledger = Ledger(before, mine)
        self._joined = _resumed_at(run)

    # -- start --------------------------------------------------------------------------------------------------------

    @classmethod
    def start(cls, config: TrainConfig, out: Path, typed: Sequence[str]) -> WandbRun | None:
        """Begin the run, or continue the one of the same setting, seed and folder.

        Where W&B cannot be reached, the run is recorded offline; where not even that works, there is None. Either is
        said once.
        """
        import wandb

        given = asked_of_wandb(config, out, typed)
        settings: dict[str, Any] = {"silent": True, "reinit": "finish_previous"}
        if "finish_timeout" in wandb.Settings.model_fields and "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings |= {"finish_timeout": PATIENCE, "finish_timeout_raises": True}
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings["init_timeout"] = ANSWER
        offline = _mode(given["mode"]) == "offline"
        try:
            return cls(wandb.init(**given, settings=wandb.Settings(**settings)), out, offline)
        except Exception as error:  # wandb raises its own, requests' and plain errors here
            why = _brief(error)
        try:
            wandb.teardown()  # else its service still holds the run's id
            given |= {"mode": "offline", "resume": None}
            found = cls(wandb.init(**given, settings=wandb.Settings(**settings)), out, True)
        except Exception as error:
            log.warning(
                "Weights & Biases could not start (%s); the run goes on without it, its curves are in %s",
                _brief(error),
                out / "csv",
            )
            return None
        log.warning(
            "Weights & Biases could not start (%s); the run is recorded offline. `wandb login` if you have not, or use "
            "logger.mode=offline to record offline at once",
            why,
        )
        return found

    # -- curves -------------------------------------------------------------------------------------------------------

    def stage(self, name: str) -> StageLogger:
        """The logger of a stage."""
        return StageLogger(self, name)

    def log(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """A point of a stage's curves, unless this run has it already."""
        if LOST in self._said or step <= self._joined.get(stage, -1):
            return
        if new := self._ledger.new(stage, values, step):
            with self.unless_refused(LOST):
                self.run.log({f"{stage}/{key}": value for key, value in new.items()} | {f"{stage}/step": step})

    def mark(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Facts of a stage in the summary, unless this run has points of it already."""
        if LOST not in self._said and stage not in {*self._ledger.last, *self._joined}:
            with self.unless_refused(LOST):
                self.run.summary.update({f"{stage}/{key}": value for key, value in facts.items()})

    @contextlib.contextmanager
    def unless_refused(self, what: str, *words: Any) -> Iterator[None]:
        """Nothing that W&B raises ends a run: each kind of refusal is said once."""
        try:
            yield
        except Exception as error:  # wandb raises its own, requests' and plain errors
            if what not in self._said:
                self._said.add(what)
                log.warning(f"Weights & Biases {what}", _brief(error), *words)

    # -- end ----------------------------------------------------------------------------------------------------------

    def summarise(
        self,
        report: dict[str, Any],
        predictions: dict[str, list],
        files: list[Path],
        replies: list[dict[str, Any]] | None = None,
    ) -> None:
        """The summary's numbers; the page, the predictions and the files of the run.

        The report is on the disk by now, so the run ends as it would without W&B.
        """
        with self.unless_refused("did not take the report (%s); it is in %s", self.out):
            import wandb

            self.run.summary.update(summary_of(report))
            if replies:
                names = list(dict.fromkeys(name for row in replies for name in row))
                rows = [[row.get(name) for name in names] for row in replies]
                self.run.log({"samples": wandb.Table(columns=names, data=rows)})
            rows = [list(row) for row in zip(*predictions.values(), strict=True)]
            self.run.log({"predictions": wandb.Table(columns=list(predictions), data=rows)})
            kept = wandb.Artifact(f"report-{self.run.id}", type="report")
            for file in files:
                if file.suffix == ".html":
                    self.run.log({"report": wandb.Html(file.read_text(encoding="utf-8"), inject=False)})
                kept.add_file(str(file))
            self.run.log_artifact(kept)

    def finish(self, failed: bool) -> None:
        """Close the run; say once how offline runs are sent."""
        with self.unless_refused(
            "could not close its run (%s); `wandb sync %s` sends what is left", _folders(self.out, "")
        ):
            self.run.finish(exit_code=1 if failed else 0)
        if self.offline and not WandbRun.told_to_sync:
            WandbRun.told_to_sync = True
            log.info("Weights & Biases: recorded offline; `wandb sync %s` sends it", _folders(self.out, "offline-"))


def asked_of_wandb(config: TrainConfig, out: Path, typed: Sequence[str]) -> dict[str, Any]:
    """What ``wandb.init`` is given. What is typed counts, then what W&B's environment variables say, then our defaults;
    None leaves it to W&B, which reads its variables itself.
    """
    options, setting, words = config.logger, setting_of(config), words_of(config, typed)
    split = config.dataset.split_seed
    seed = f" seed {config.seed}" + (f" split {split}" if split else "")
    run = hashlib.sha256(f"{setting}:{config.seed}:{split}:".encode() + os.fsencode(out.resolve())).hexdigest()
    swept = bool(os.environ.get("WANDB_SWEEP_ID"))  # an agent gives its runs ids, and resumes none
    defaults = {
        "project": ("WANDB_PROJECT", options.project, "w2sg"),
        "entity": ("WANDB_ENTITY", options.entity, None),
        "mode": ("WANDB_MODE", options.mode, None),
        "group": ("WANDB_RUN_GROUP", options.group, _cut(words, f" {setting[:6]}")),
        "name": ("WANDB_NAME", None, _cut(words, seed)),
        "job_type": ("WANDB_JOB_TYPE", None, "train" if config.decoder is None else "decode"),
        "id": ("WANDB_RUN_ID", None, run[:16]),
        "dir": ("WANDB_DIR", None, str(out)),
        "resume": ("WANDB_RESUME", None, "allow" if _mode(options.mode) == "online" and not swept else None),
    }
    given: dict[str, Any] = {
        key: typed or (None if os.environ.get(name) else ours) for key, (name, typed, ours) in defaults.items()
    }
    targets = (config.method["_target_"], config.loss["_target_"])
    method, loss = (target.rpartition(".")[2] for target in targets)
    names = [method, config.dataset.name, *([loss] if _learns_by_loss(config) else [])]
    tags = [*(name[:64] for name in names), *options.tags, *os.environ.get("WANDB_TAGS", "").split(",")]
    given["tags"] = list(filter(None, dict.fromkeys(tags)))
    # by the keys that are typed, so that they meet the parameters of a sweep: strong.lr
    given["config"] = flatten(config.model_dump(mode="json", by_alias=True))
    return given


def summary_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report by the keys that they have in a run's summary."""
    summary: dict[str, float] = {}
    for model, values in report["metrics"].items():
        summary |= {f"{model}/{k}": v for k, v in values.items() if isinstance(v, float)}
    summary |= {f"pgr/{k}": v for k, v in report.get("pgr", {}).items() if isinstance(v, int | float)}
    for split in ("test", "transfer"):
        parts = report["diagnostics"].get(split, {})
        summary |= {f"{split}/{k}": parts[k]["value"] for k in ("gain", "misfit", "remainder") if k in parts}
    for system, measured in report.get("text", {}).get("systems", {}).items():
        names = [name for name in ("reward", "kl_per_token", "perplexity") if name in measured]
        values = {name: measured[name]["value"] for name in names}
        values |= {f"wins_over_{k}": v["win_rate"]["value"] for k, v in measured.get("against", {}).items()}
        values["tokens"] = measured["length"]["mean"]
        summary |= {f"{system}/{name}": value for name, value in values.items()}
    return summary


def _mode(typed: str | None) -> str:
    """Whether W&B sends what it is told; old names of its modes included."""
    mode = typed or os.environ.get("WANDB_MODE") or "online"
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def _resumed_at(run: Any) -> dict[str, float]:
    """The last step of each stage that a continued online run has, wherever it was begun."""
    if not getattr(run, "resumed", False):
        return {}
    ends = {key.rpartition("/")[0]: value for key, value in dict(run.summary).items() if key.endswith("/step")}
    return {stage: step for stage, step in ends.items() if isinstance(step, int | float)}


def _folders(out: Path, kind: str) -> str:
    """Where `wandb sync` finds the runs of this command: of a sweep, those of all its jobs."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    base = Path(os.environ.get("WANDB_DIR") or out)
    swept = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return str((base.parent / "*" if swept and not os.environ.get("WANDB_DIR") else base) / "wandb" / f"{kind}run-*")
