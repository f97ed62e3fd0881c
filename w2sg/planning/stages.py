"""Stages that are looked for and never made: each job says what it would do, stand-ins take the place of outputs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from w2sg.models.once import weightless
from w2sg.planning.devices import PlanDevices
from w2sg.planning.work import Planned, config_of, models_of, of_fit_job, of_read_job
from w2sg.reports.words import short
from w2sg.store.files import read_json, write_json
from w2sg.store.keys import folder_name
from w2sg.store.soundness import KEY, MANIFEST
from w2sg.store.store import Store
from w2sg.training import foreseen
from w2sg.training.foreseen import Foreseen, Unforeseen
from w2sg.training.jobs import FitJob, ReadJob
from w2sg.training.keeping import FULL, Keep
from w2sg.training.stages import StageRecord, Stages

FIELDS = {f.name for f in fields(Planned)}


class Foresight:
    """What was foreseen of all runs of a plan: each stage is asked once.

    Attributes:
        folder: of small files, which go with it. planned: by folder name; within: the stages that each asked for.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="w2sg-plan-"))
        self.planned: dict[str, Planned] = {}
        self.within: dict[str, list[str]] = {}

    def close(self) -> None:
        """Forget all stand-ins."""
        for folder in [f for f in foreseen.stand_ins if f.parent == self.folder]:
            del foreseen.stand_ins[folder]
        shutil.rmtree(self.folder, ignore_errors=True)


class ForeseenStages(Stages):
    """The stages of a run that is planned. Nothing is written but small files in the folder of the foresight.

    Attributes:
        planned: by folder name, in the order in which a run would finish them.
        invented: whether any output was made up, so that what a method computes of it may be impossible.
    """

    def __init__(
        self, store: Store, devices: PlanDevices, eval_every: int | None, test_rows: str | None, foresight: Foresight
    ):
        super().__init__(store, devices, lambda _: None, 0.0, 1, eval_every, test_rows)
        self.foresight, self.folder = foresight, foresight.folder
        self.planned: dict[str, Planned] = {}
        self.invented = False

    # -- the three kinds ----------------------------------------------------------------------------------------------

    def fit(
        self, name: str, key: dict[str, Any], make: Callable[[], FitJob], evaluated: bool = False, keep: Keep = FULL
    ) -> Path:
        return self._look(name, key, lambda part: self._fit_of(make, part, keep), keep.whole)

    def read(self, name: str, key: dict[str, Any], make: Callable[[], ReadJob], whole: bool = False) -> Path:
        return self._look(name, key, lambda part: self._read_of(name, make, part, whole))

    def compute(
        self,
        name: str,
        key: dict[str, Any],
        work: Callable[[Path], dict[str, Any]],
        foreseen: Callable[[Path], Foreseen] | None = None,
    ) -> Path:
        return self._look(name, key, lambda part: self._compute_of(name, foreseen, part))

    def ask(
        self,
        name: str,
        key: dict[str, Any],
        ids: Any,
        answer: Any,
        engine: Any,
        foreseen: Callable[[Path], Foreseen] | None = None,
        verb: str = "writing",
        unit: str = "replies",
    ) -> Path:
        return self._look(name, key, lambda part: self._compute_of(name, foreseen, part))

    def copy(self, name: str, key: dict[str, Any], folder: Path) -> Path:
        stage = folder_name(name, key)

        def found(part: Path) -> Foreseen:
            if folder not in foreseen.stand_ins:
                raise Unforeseen(f"{name}: stands beside {folder.name}, which is in the store")
            ids, tensors = foreseen.stand_in(folder)
            return Foreseen({"values": tensors[stage]}, ids=ids)

        return self._look(name, key, lambda part: self._compute_of(name, found, part))

    def _fit_of(self, make: Callable[[], FitJob], part: Path, keep: Keep) -> dict[str, Any]:
        job = make()
        found = of_fit_job(job, self.devices, self.eval_every)
        if not any(p.device.type == "meta" for p in job.scorer.parameters()):
            job.scorer.save(part / "model")  # small, and later stages are made with it
        write_json(part / "curve.json", [])
        left = 0.0 if not keep.whole else 0.5 if keep.rounds else 1.0  # `Keep`: of the weights
        return {**found, "disk": left * found["disk"], "models": _names(job.scorer)}

    def _read_of(self, name: str, make: Callable[[], ReadJob], part: Path, whole: bool) -> dict[str, Any]:
        job = make()
        if job.foreseen is None:
            raise Unforeseen(f"{name}: what it finds is not said beforehand, and later stages hang on it")
        found = job.foreseen()
        foreseen.stand_ins[part] = (list(job.examples.ids), found.tensors)
        return {**of_read_job(job, found, self.devices, whole), "models": _names(job.model)}

    def _compute_of(self, name: str, found: Callable[[Path], Foreseen] | None, part: Path) -> dict[str, Any]:
        if found is None:
            raise Unforeseen(f"{name}: what it computes is not said beforehand, and later stages hang on it")
        output = found(part)
        if output.tensors:
            foreseen.stand_ins[part] = (output.ids, output.tensors)
        size = sum(t.numel() * 4 for t in output.tensors.values())
        if output.writing is None:
            return {"disk": float(size), "rows": len(output.ids) or None}
        tokens = int(output.writing.replies.sum())
        told = f"{name}: another engine or a server writes; its operations and memory are not in the plan"
        return {
            "kind": "write",
            "rows": len(output.ids),
            "tokens": tokens,
            "at_most": True,
            "disk": float(size),
            "notes": (told,),
        }

    # -- any stage ----------------------------------------------------------------------------------------------------

    def _look(
        self, name: str, key: dict[str, Any], work: Callable[[Path], dict[str, Any]], whole: bool = False
    ) -> Path:
        folder = folder_name(name, key)
        path, stand_in = self.store.root / folder, self.folder / folder
        if self.store.peek(name, key, whole).cached:
            if folder not in self._walked:
                info = self._info(path)
                for other in info.get("rests_on", ()):
                    self._recall(other)
                self._note(name, path, info)
            for making in self._making:
                making[folder] = None
            return path
        self.invented = True
        if folder not in self.foresight.planned:
            stand_in.mkdir(exist_ok=True)
            write_json(stand_in / KEY, key)
            self._making.append({})
            try:
                with weightless(self.devices.world):
                    told = work(stand_in)
            finally:
                self.foresight.within[folder] = list(self._making.pop())
            told = {k: v for k, v in told.items() if k in FIELDS}
            self.foresight.planned[folder] = Planned(name, folder, **told)
        for stage in [*self.foresight.within[folder], folder]:
            for making in self._making:
                making[stage] = None
            if stage not in self.foresight.planned:
                self._recall(stage)
            elif stage not in self._walked:
                self._walked.add(stage)
                self.planned[stage] = self.foresight.planned[stage]
                self._list(self.planned[stage].name, stage, False)
        return stand_in

    def _info(self, path: Path) -> dict[str, Any]:
        return read_json(path / MANIFEST)["info"]

    def _recall(self, folder: str) -> None:
        path = self.store.root / folder
        if folder not in self._walked and path.is_dir():
            self._note(folder.rpartition("-")[0], path, {})

    def _note(self, name: str, path: Path, info: dict[str, Any]) -> None:
        """A stage from the store."""
        self._walked.add(path.name)
        disk = float(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()))
        self.planned[path.name] = Planned(
            name, path.name, True, rows=info.get("examples"), tokens=info.get("tokens"), disk=disk
        )
        self._list(name, path.name, True)

    def _list(self, name: str, folder: str, cached: bool) -> None:
        self.records.append(StageRecord(name, folder, cached, 0.0, 0, None, {}))


def _names(model: nn.Module) -> tuple[str, ...]:
    """Of the models in a module, as a page has them."""
    found = []
    for one in models_of(model):
        name = str(getattr(config_of(one), "_name_or_path", "") or "")
        found.append(short(name) if name else type(one).__name__)
    return tuple(dict.fromkeys(found))
