"""A method walked as a run walks it, over stages that are looked for and never made.

So every method is planned by its own code, those from outside as well. A second walk with other stand-ins shows which
keys hang on texts that are still to be written: they come out differently.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from w2sg.config.build import build
from w2sg.config.model_schema import ModelConfig
from w2sg.config.schema import TrainConfig
from w2sg.data import splits
from w2sg.errors import UserError
from w2sg.experiment.also import on_other_tests
from w2sg.experiment.run import Run
from w2sg.models.source import Source, find
from w2sg.planning.devices import PlanDevices
from w2sg.planning.stages import ForeseenStages, Foresight
from w2sg.planning.work import Planned
from w2sg.store.store import Store
from w2sg.training import foreseen
from w2sg.training.evaluating import rows_of
from w2sg.training.foreseen import Unforeseen

log = logging.getLogger(__name__)


@dataclass
class Plan:
    """What one run would do.

    Attributes:
        config: with the precision of the device in it. words: what was typed.
        stages: in the order in which a run finishes them. devices: that share the work.
        ends: why stages after these cannot be foreseen; None where these are all.
        notes: of models and data.
    """

    config: TrainConfig
    words: list[str]
    stages: list[Planned]
    devices: PlanDevices
    ends: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Shared:
    """What runs of a sweep have in common, so that it is read once."""

    models: dict[str, Source] = field(default_factory=dict)
    tables: dict[str, splits.Tables] = field(default_factory=dict)
    ids: dict[tuple, Any] = field(default_factory=dict)
    foresight: Foresight = field(default_factory=Foresight)


class PlannedRun(Run):
    """A run that finds out what it would do."""

    def __init__(self, config: TrainConfig, words: list[str], shared: Shared):
        self.shared = shared
        super().__init__(config, Path(config.out), words)
        self.inputs._ids = shared.ids

    def find(self, spec: ModelConfig, role: str, weights: bool = True) -> Source:
        known = self.shared.models
        name = f"{role} {weights} {spec.model_dump_json()}"
        if name not in known:
            try:
                known[name] = find(spec, role, weights)
            except UserError:
                known[name] = source = find(spec, role, weights=False)  # raises where more is missing than weights
                source.notes.append(
                    f"{role}: the weights of {spec.name} are not there, so no key of a stage with it is known"
                )
        return known[name]

    def _tables(self, config: TrainConfig) -> splits.Tables:
        name = f"{config.seed} {config.dataset.model_dump_json()}"
        if name not in self.shared.tables:
            self.shared.tables[name] = super()._tables(config)
        return self.shared.tables[name]

    def _devices(self, config: TrainConfig) -> PlanDevices:
        return PlanDevices(config)

    def _begin(self) -> None:
        config, test = self.config, self.data.test
        rows = rows_of(test.ids, test.labels.tolist())
        self.stages = ForeseenStages(
            Store(config.store), self.devices, config.logger.eval_every, rows, self.shared.foresight
        )

    def measure(self, predictions: Mapping[str, Any] | None = None, *_: Any, **__: Any) -> tuple[list, dict]:
        """The zero-shot score, and what models say of other test sets, are the stages that measuring asks for."""
        found = dict(predictions or {})
        if (untrained := self.zero_shot(self.strong, self.data.test)) is not None:
            found["zero_shot"] = untrained
        on_other_tests(self, found)
        return [], {}

    def report(self, *_: Any, **named: Any) -> Any:
        """Nothing is written."""
        others = ("story", "sections", "notes", "columns", "samples", "files", "taught")
        if predictions := {name: labels for name, labels in named.items() if name not in others}:
            self.measure(predictions)
        return SimpleNamespace(content={})


def plan(config: TrainConfig, words: Sequence[str] = (), shared: Shared | None = None) -> Plan:
    """What a run would do.

    Args:
        config: as checked. words: what was typed. shared: of the runs of a sweep.

    Raises:
        UserError: as the run itself would before its first stage.
    """
    if shared is None:
        shared = Shared()
        try:
            return plan(config, words, shared)
        finally:
            shared.foresight.close()
    (found, ends, run), (again, _, _) = (_walked(config, list(words), shared, walk) for walk in (0, 1))
    known = {(p.name, p.key) for p in again}
    missing = [note for source in (run.weak, run.strong, run.untuned) if source for note in source.notes]
    without = any("no key of a stage" in note for note in missing)
    stages = []
    for p in found:
        hangs = not p.cached and (p.name, p.key) not in known  # on texts that are still to be written
        stages.append(replace(p, foreseeable=p.cached or not (hangs or without), at_most=p.at_most or hangs))
    notes = [*run.stages.notes, *(note for p in stages for note in p.notes), *_assumed(run)]
    return Plan(run.config, list(words), stages, run.devices, ends, list(dict.fromkeys(notes)))


def _assumed(run: PlannedRun) -> Iterator[str]:
    """What a run finds out by trying it, and a plan cannot."""
    readers = [source for source in (run.weak, run.strong, run.untuned) if source and source.spec.arch == "hf"]
    if run.data.test.kind != "classes" and any(source.spec.share_prompt for source in readers):
        yield "texts are planned to share rows; a run tries it, and where a model mixes them each has its own"
        if run.devices.on_gpu and not torch.cuda.is_available():
            yield "masks are counted as SDPA keeps them; FlexAttention, which a GPU may take, keeps less"


def _walked(
    config: TrainConfig, words: list[str], shared: Shared, walk: int
) -> tuple[list[Planned], str | None, PlannedRun]:
    """The stages of one walk, and why it ended before its end."""
    run, ends = PlannedRun(config, words, shared), None
    before, foreseen.walk = foreseen.walk, walk
    try:
        build(config.method)(run)
    except Unforeseen as end:
        ends = str(end)
    except Exception as error:
        if not run.stages.invented:
            raise
        log.debug("the walk of a plan ended", exc_info=True)
        last = run.stages.records[-1].name if run.stages.records else "the first stage"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        ends = f"what comes after {last} hangs on what it finds ({reason})"
    finally:
        foreseen.walk = before
    return list(run.stages.planned.values()), ends, run
