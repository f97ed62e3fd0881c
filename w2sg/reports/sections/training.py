"""How models were trained: curves, options, and the last numbers of each fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from w2sg.config.build import fit_options
from w2sg.losses.preferences import displacement
from w2sg.reports.figures import training_figures
from w2sg.reports.section import Report, Section
from w2sg.reports.words import left_out_warning, number
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
    "attention",
)
Curves = Mapping[str, list[dict[str, float]]]  # of each fit: points with "step", "loss" and others


def curves_of(stages: Any) -> dict[str, list[dict[str, float]]]:
    """The logged points of each fit of a run."""
    files = {record.name: stages.store.root / record.key / "curve.json" for record in stages.records}
    return {name: read_json(file) for name, file in files.items() if file.exists()}


class LabelTraining(Section):
    """Loss curves, settings, and facts of each fit of a label method (report.json: ``training``, ``models``)."""

    key, template = "training", "label_training.html"
    curves: Curves = {}  # noqa: RUF012 (replaced, never changed)

    @classmethod
    def measure(
        cls, config: Any, stages: Any, notes: Mapping[str, Any], models: Mapping[str, Any] | None = None
    ) -> LabelTraining:
        """From a run's configuration, the stages that it went through, facts of the method, and the model of each
        system, of which the report notes its stage and settings.
        """
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
        known = {
            name: {
                "stage": None if model.folder is None else model.folder.name,
                "role": model.source.role,
                "model": model.source.spec.model_dump(by_alias=True),
            }
            for name, model in (models or {}).items()
        }
        section = cls(content={"training": facts, "models": known})
        section.curves = curves_of(stages)
        return section

    def show(self, report: Report) -> dict[str, Any]:
        """The curves; experts of a mixture are left out."""
        curves = {name: points for name, points in self.curves.items() if "expert" not in name}
        return {"figures": list(training_figures(curves))}

    def warnings(self, report: Report) -> list[str]:
        """Epochs that were selected on gold labels."""
        if report["config"]["optim"]["select_on"] != "gold":
            return []
        return ["the student was selected on GOLD labels (optim.select_on=gold): its accuracy is optimistic"]


class FitTraining(Section):
    """Curves and last numbers of each fit of models that write (report.json: ``training`` and ``dropped``, within what
    the run measured).

    Args:
        root: the top-level key that holds them, as "text".
        stages: those that the run went through.
        dropped: what was left out on the way to each stage.
        losses: the preference objective of each fit that has one, for what its last rewards mean.
        pairs: how many pairs the last preference stage was trained on; None where there was none.
    """

    key, template = "training", "fit_training.html"

    def __init__(
        self,
        root: str,
        stages: Any = None,
        dropped: Mapping[str, Mapping[str, int]] | None = None,
        losses: Mapping[str, str] | None = None,
        pairs: int | None = None,
    ):
        self.root, self.losses, self.curves = root, dict(losses or {}), curves_of(stages) if stages else {}
        content: dict[str, Any] = {"training": last_numbers(stages) if stages else {}, "dropped": dict(dropped or {})}
        super().__init__(content={root: content | ({} if pairs is None else {"pairs": pairs})})

    def show(self, report: Report) -> dict[str, Any] | None:
        """Figures, the last logged numbers, and what was dropped."""
        measured = report[self.root]
        dropped = {name: counts for name, counts in measured["dropped"].items() if counts}
        if not (self.curves or measured["training"] or dropped):
            return None
        signed = ("rewards/chosen", "rewards/rejected", "rewards/margins")
        last = ("loss", "grad_norm", *signed, "rewards/accuracies")
        rows = []
        for name, fit in measured["training"].items():
            counts = ["–" if fit[key] is None else f"{fit[key]:,}" for key in ("examples", "steps", "best_epoch")]
            packed = {None: "–", True: "yes", False: "no"}[fit["packed"]]
            rows.append((name, *counts, packed, *(number(fit["last"].get(key), 3, key in signed) for key in last)))
        head = ["fit", "examples", "steps", "best epoch", "packed"]
        head += [key.rpartition("/")[2].replace("_", " ") for key in last]
        figures = list(training_figures(self.curves))
        return {"figures": figures, "head": head, "rows": rows, "pairs": measured.get("pairs"), "dropped": dropped}

    def warnings(self, report: Report) -> list[str]:
        """Likelihoods that fall on both sides, and what was left out."""
        measured = report[self.root]
        lines = [
            line
            for name, fit in measured["training"].items()
            if name in self.losses
            for line in displacement(name, self.losses[name], fit["last"])
        ]
        return lines + left_out_warning(measured["dropped"])


def last_numbers(stages: Any) -> dict[str, dict[str, Any]]:
    """Of each fit: the first and the last point of its curve, all that were measured on held-out rows, and how it
    went.
    """
    fits = {}
    for record in stages.records:
        file = stages.store.root / record.key / "curve.json"
        if file.exists():
            points = [point for point in read_json(file) if "loss" in point]
            facts = {key: record.info.get(key) for key in ("steps", "examples", "packed", "best_epoch", "attention")}
            ends = {"first": points[0], "last": points[-1]} if points else {"first": {}, "last": {}}
            measured = [point for point in read_json(file) if "held_out_loss" in point]
            fits[record.name] = facts | ends | ({"held_out": measured} if measured else {})
    return fits
