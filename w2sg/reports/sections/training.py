"""How models were trained: curves, options, and the last numbers of each fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.config.check import fit_options
from w2sg.reports.figures import new_figure, svg
from w2sg.reports.section import Report, Section
from w2sg.store.files import read_json

NOTES = (
    "head",
    "layer",
    "accuracy",
    "steps",
    "best_epoch",
    "held_out",
    "hard_labels_clamped",
    "examples",
    "truncated_texts",
    "rows",
)
Curves = Mapping[str, list[dict[str, float]]]  # of each fit: points with "step", "loss" and others


def curves_of(stages: Any) -> dict[str, list[dict[str, float]]]:
    """The logged points of each fit of a run."""
    files = {record.name: stages.store.root / record.key / "curve.json" for record in stages.records}
    return {name: read_json(file) for name, file in files.items() if file.exists()}


class LabelTraining(Section):
    """Loss curves, settings, and facts of each fit of a label method (report.json: ``training``)."""

    key, template = "training", "label_training.html"
    curves: Curves = {}  # noqa: RUF012 (replaced, never changed)

    @classmethod
    def measure(cls, config: Any, stages: Any, notes: Mapping[str, Any]) -> LabelTraining:
        """From a run's configuration, the stages that it went through, and facts of the method."""
        facts: dict[str, Any] = dict(notes)
        selects = False
        for role in ("weak", "strong"):
            spec = getattr(config, role)
            options = fit_options(config, spec)
            selects = selects or options.validation > 0
            facts[f"{role}_model"] = (
                f"{spec.name}, train={spec.train}, lr {options.lr:g}, {options.epochs} epochs, batch "
                f"{options.batch_size}, {options.optimizer}, {options.schedule}, weight decay {options.weight_decay:g}"
            )
        facts["epochs_selected_on"] = (
            f"{config.training.select_on} labels" if selects else "nothing: the last epoch counts"
        )
        for record in stages.records:
            of_stage = {k: record.info[k] for k in NOTES if record.info.get(k)}
            if "-on-" in record.name:  # its numbers are those of the fit
                of_stage = {"rows": of_stage["rows"]} if "rows" in of_stage else {}
            if of_stage:
                facts[record.name] = of_stage
        section = cls(content={"training": facts})
        section.curves = curves_of(stages)
        return section

    def show(self, report: Report) -> dict[str, Any]:
        """The curves."""
        return {"figure": loss_figure(self.curves)}

    def warnings(self, report: Report) -> list[str]:
        """Epochs that were selected on gold labels."""
        if report["config"]["training"]["select_on"] != "gold":
            return []
        return ["the student was selected on GOLD labels (training.select_on=gold): its accuracy is optimistic"]


def loss_figure(curves: Curves) -> Markup | str:
    """Training loss (and held-out loss) of every fit over its steps."""
    curves = {name: points for name, points in curves.items() if points and "expert" not in name}
    if not curves:
        return ""
    figure, axes = new_figure(3.0 * len(curves), 2.2, len(curves))
    for axis, (name, points) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        for key, style in (("loss", {"color": "#2563eb"}), ("held_out_loss", {"color": "#dc2626", "marker": "."})):
            xy = [(p["step"], p[key]) for p in points if key in p]
            if xy:
                axis.plot(*zip(*xy, strict=True), lw=1, label=key.replace("_", "-", 1).replace("_", " "), **style)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.legend(frameon=False, fontsize=7)
    return svg(figure, "loss over optimizer steps")
