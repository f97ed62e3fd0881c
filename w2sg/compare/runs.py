"""Finished runs: what each left behind, which settings they differ in, and which cannot be used."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.config import renamed
from w2sg.metrics.predictions import right as of_predictions
from w2sg.reports.label_runs import COLUMNS, TEXTS
from w2sg.reports.section import Section
from w2sg.reports.sections.accuracy import Accuracy
from w2sg.reports.sections.alignment_tax import AlignmentTax
from w2sg.reports.sections.alpha_sweep import AlphaSweep
from w2sg.reports.sections.axes import Axes
from w2sg.reports.sections.decoded import Decoded
from w2sg.reports.sections.held_out_pairs import HeldOutPairs
from w2sg.reports.sections.labels_before_training import LabelsBeforeTraining
from w2sg.reports.sections.systems import Systems
from w2sg.reports.stored import NEEDED, no_report
from w2sg.reports.words import short
from w2sg.store.files import read_json
from w2sg.store.keys import flatten

# Neither changes what a run finds; seeds are what is averaged over, and losses are what is compared.
APART = ("seed", "dataset.split_seed", "out", "store", "logger", "trainer", "dataset.path", "dataset.zero_shot")
APART += ("method.baselines", "report")  # what else is measured beside the student, and what is shown
ANCHORS = ("method._target_", "dataset.name", "weak.name", "strong.name", "refine.kind")
TWICE = "method.refine."  # refine= once more, as the method is given it
LATER = ".stochastic_rounding"  # an option that older reports do not know, where it is off
# What reports say by themselves since they have a "summary"; of older ones it is made here, by top-level key.
OLDER: Mapping[str, Sequence[Section]] = {
    "text": (AlphaSweep(), Systems(), HeldOutPairs()),
    "decoding": (Decoded(), AlignmentTax()),
    "refinement": (Axes(), LabelsBeforeTraining()),
    "metrics": (Accuracy(),),
}
Estimates = dict[str, dict[str, float | None]]


@dataclass
class Finished:
    """One run that left a report.

    Attributes:
        folder: where it lies.
        content: its report.json.
        where: its folder as it is called, from the folder of all runs.
    """

    folder: Path
    content: dict[str, Any]
    where: str

    @property
    def labels(self) -> bool:
        """Whether weak model, student and ceiling label the same rows, so that they can be tested in pairs."""
        others = {"text", "decoding"} & self.content.keys()
        refined = "refinement" in self.content and "pgr" not in self.content
        return not (others or refined) and {"weak", "student", "ceiling"} <= self.content["metrics"].keys()

    @property
    def decodes(self) -> bool:
        """Whether it measured a decoder."""
        return "decoding" in self.content

    @property
    def method(self) -> tuple[str, str | None]:
        """The path of its method, and the kind of its decoder where it measured one."""
        kind = self.content["decoding"]["decoder"]["kind"] if self.decodes else None
        return self.settings["method._target_"], kind

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration, flat, without what does not change a result."""
        flat = flatten(self.content["config"])
        kept = {k: v for k, v in flat.items() if not any(k == a or k.startswith(a + ".") for a in APART)}
        kept = {k: v for k, v in kept.items() if not k.startswith(TWICE)}
        kept |= {k: "sdpa" for k, v in kept.items() if k.endswith(".attention") and v == "auto"}  # its name before
        kept = {k: v for k, v in kept.items() if not k.endswith(".save") or v == "bf16"}
        kept = {k: v for k, v in kept.items() if v is not False or not k.endswith(LATER)}
        more = {"trainer.matmul": "high"} if flat.get("trainer.matmul") == "high" else {}
        return kept | {"trainer.precision": flat.get("trainer.precision")} | more

    @property
    def replicate(self) -> tuple[int, int]:
        """Seed of the split and of the run: what runs of one setting may differ in."""
        config = self.content["config"]
        return config["dataset"]["split_seed"], config["seed"]

    @cached_property
    def summary(self) -> Estimates:
        """Its columns of the table of settings, {heading: {value, low, high}}."""
        written = self.content.get("summary")
        if written is None:
            key = next(key for key in OLDER if key in self.content)
            written = {k: v for section in OLDER[key] for k, v in section.summary(self.content).items() if v}
        return {
            str(heading): {end: _number(estimate.get(end)) for end in ("value", "low", "high")}
            for heading, estimate in written.items()
        }

    @property
    def newest(self) -> float:
        """When its report was written."""
        return (self.folder / "report.json").stat().st_mtime

    @cached_property
    def right(self) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
        """Test ids in order, and per model [N] whether it was right on each."""
        return self._predictions[0], self._predictions[1]

    @property
    def prompts(self) -> list[str] | None:
        """[N] the prompt of each test row, in the order of `right`; None in the files of an earlier version."""
        return self._predictions[2]

    @property
    def fingerprint(self) -> str:
        """A hash of ids and logits: two runs that have it in common are one run."""
        return self._predictions[3]

    @cached_property
    def _predictions(self) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str] | None, str]:
        import pyarrow.parquet as pq

        with open(self.folder / "predictions.parquet", "rb") as file:  # pyarrow takes no path that is not UTF-8
            table = pq.read_table(file)
        ids = np.array(table["id"].to_pylist())
        order = np.argsort(ids)
        labels = np.array(table["label"].to_pylist())
        right, whole = {}, hashlib.sha256("\n".join(ids[order].tolist()).encode())
        for name in table.column_names:
            if name not in (*COLUMNS, *TEXTS):
                logits = np.array(table[name].to_pylist(), np.float64)
                right[name] = of_predictions(logits, labels)[order]
                whole.update(name.encode() + logits[order].tobytes())
        prompts = None
        if "prompt" in table.column_names:
            column = table["prompt"].to_pylist()
            prompts = [column[i] for i in order]
        return tuple(ids[order].tolist()), right, prompts, whole.hexdigest()


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def read_runs(root: Path) -> tuple[list[Finished], list[str]]:
    """Every finished run below a folder, and what could not be used, with the reason."""
    runs, left_out = [], []
    for file in sorted(root.rglob("report.json")):
        where = file.parent.relative_to(root)
        try:
            content = read_json(file)
            if reason := no_report(content):
                left_out.append(f"{where}: its report.json is no report of a run ({reason})")
                continue
            if not content.keys() >= NEEDED.keys():
                left_out.append(f"{where}: its report is of an earlier version; run its command again")
                continue
            content["config"] = renamed.tree(content["config"], quiet=True)
            run = Finished(file.parent, content, str(where) if where.parts else file.parent.name)
            run.settings, run.replicate, run.summary, run.method  # noqa: B018 (a damaged report shows itself here)
            if run.labels:
                run.right  # noqa: B018
        except Exception as error:  # a file of any content may lie here; the others still count
            left_out.append(f"{where}: cannot be read ({type(error).__name__}: {str(error)[:200]})")
            continue
        runs.append(run)
    return runs, left_out


def by_split(values: dict[tuple[int, int], float]) -> list[float]:
    """A number for each split, the mean of its seeds; for each seed where there is one split."""
    splits = defaultdict(list)
    for (split, _), value in values.items():
        splits[split].append(value)
    return list(values.values()) if len(splits) == 1 else [float(np.mean(seeds)) for seeds in splits.values()]


def varying(runs: list[Finished]) -> tuple[list[str], list[str]]:
    """Settings in which runs differ; what belongs to another model or dataset counts only among runs of that one."""

    def differ(group: Sequence[Finished], prefix: str) -> set[str]:
        keys = {k for run in group for k in run.settings if k.startswith(prefix)}
        return {k for k in keys if len({json.dumps(run.settings.get(k), default=str) for run in group}) > 1}

    settings: set[str] = set()
    sections = {anchor.split(".")[0]: anchor for anchor in ANCHORS}
    for section, anchor in sections.items():
        groups = defaultdict(list)
        for run in runs:
            groups[run.settings.get(anchor)].append(run)
        if len(groups) > 1:
            settings.add(anchor)
        for group in groups.values():
            settings |= differ(group, section + ".")
    by_loss = defaultdict(list)
    for run in runs:
        by_loss[run.settings["loss._target_"]].append(run)
    options = sorted({k for group in by_loss.values() for k in differ(group, "loss.")})
    rest = {k for k in differ(runs, "") if k.split(".")[0] not in {*sections, "loss"}}
    ordered = [a for a in ("weak.name", "strong.name", "dataset.name", "method._target_") if a in settings | rest]
    return ordered + sorted((settings | rest) - set(ordered)), options


def common_to(runs: Sequence[Finished]) -> dict[str, str]:
    """What all runs share of models, dataset and method."""
    keys = ("weak.name", "strong.name", "dataset.name", "method._target_")
    values = {key: {run.settings[key] for run in runs} for key in keys}
    shared = {key: next(iter(each)) for key, each in values.items() if len(each) == 1}
    named = {"dataset.name": str, "method._target_": lambda target: target.rpartition(".")[2]}
    return {key: named.get(key, short)(value) for key, value in shared.items()}


def loss_of(run: Finished, options: Sequence[str]) -> dict[str, Any]:
    """A run's loss, with those of its options in which runs differ."""
    keys = ("loss._target_", *options)
    return {key: run.settings[key] for key in keys if key in run.settings}
