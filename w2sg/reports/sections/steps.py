"""Accuracy over training steps: what each fit had learned when, beside its teacher and the ceiling."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.reports.colours import NOTE, assigned
from w2sg.reports.figures import new_figure, svg, told
from w2sg.reports.section import Report, Section, name_of

log = logging.getLogger(__name__)
MEASURES = {"accuracy": "accuracy", "nll": "NLL (nats)"}
ROWS = {"test": "test split", "held_out": "held-out rows"}  # watched, as `w2sg.training.evaluating` calls them
KEYS = tuple(f"{rows}_{measure}" for rows in ROWS for measure in MEASURES)
ACROSS = 3  # panels beside each other
Points = Sequence[Mapping[str, float]]


class AccuracyOverSteps(Section):
    """Accuracy and NLL of each fit over its optimizer steps (report.json: ``accuracy_over_steps``).

    The test split is measured against gold labels, held-out rows against the labels that were trained on. A fit that
    comes from the store keeps the curve that it was made with.
    """

    key, template = "accuracy_over_steps", "accuracy_over_steps.html"

    @classmethod
    def measure(cls, stages: Any) -> AccuracyOverSteps:
        """From the stages that a run went through; what is missing is said once."""
        fits: dict[str, Any] = {}
        others: list[str] = []
        for record in stages.records:
            folder = stages.store.root / record.key
            if not (folder / "curve.json").exists() or "expert" in record.name:
                continue
            kept = [{"step": p["step"], **{k: p[k] for k in KEYS if k in p}} for p in stages.curve(folder)]
            if points := [point for point in kept if len(point) > 1]:
                chosen = record.info.get("best_step")
                fits[record.name] = {"cached": record.cached, "chosen_step": chosen, "points": points}
            elif record.name not in stages.unmeasured:
                others.append(record.name)
        if stages.unmeasured and stages.devices.main:
            log.info(
                "accuracy over training steps: not measured for %s, which the store has from a run without it or with "
                "other test rows",
                ", ".join(stages.unmeasured),
            )
        missing = {"from_the_store": list(stages.unmeasured), "not_asked_for": others}
        return cls(content={"accuracy_over_steps": {"fits": fits, **missing}})

    def show(self, report: Report) -> dict[str, Any]:
        """A figure for each measure, a panel for each fit."""
        measured = report["accuracy_over_steps"]
        figures = [figure for measure in MEASURES for figure in figures_of(report, measure)]
        return {"figures": figures, **measured, "name_of": lambda name: name_of(report, name)}


def figures_of(report: Report, measure: str) -> Iterator[Markup]:
    """Panels of one measure, a few to a figure."""
    fits = report["accuracy_over_steps"]["fits"]
    shown = [name for name, fit in fits.items() if any(f"test_{measure}" in point for point in fit["points"])]
    colours = assigned([*report["metrics"], *fits])
    for start in range(0, len(shown), ACROSS):
        names = shown[start : start + ACROSS]
        figure, axes = new_figure(3.6 * len(names), 2.6, len(names))
        for axis, name in zip(np.atleast_1d(axes), names, strict=True):
            _panel(axis, report, name, measure, colours)
        ends = {name_of(report, name): fits[name]["points"][-1][f"test_{measure}"] for name in names}
        words = told(f"{MEASURES[measure]} on test over optimizer steps, at the last one", ends)
        keys = [f"{rows}_{measure}" for rows in ROWS]
        head = ["fit", "step", *(f"{MEASURES[measure]}, {words}" for words in ROWS.values())]
        rows = [
            (name, f"{p['step']:g}", *(f"{p[k]:.5g}" if k in p else "" for k in keys))
            for name in names
            for p in fits[name]["points"]
        ]
        yield svg(figure, words, (head, rows))


def _panel(axis: Any, report: Report, name: str, measure: str, colours: Mapping[str, str]) -> None:
    fit, colour = report["accuracy_over_steps"]["fits"][name], colours[name]
    for rows, line in zip(ROWS, ("-", ":"), strict=True):
        if xy := [(p["step"], p[f"{rows}_{measure}"]) for p in fit["points"] if f"{rows}_{measure}" in p]:
            axis.plot(*zip(*xy, strict=True), line, color=colour, lw=1.4, marker=".", ms=3, label=ROWS[rows])
    if measure == "accuracy":
        for other in ("weak", "ceiling"):
            value = report["metrics"].get(other, {}).get("accuracy")
            if value is not None and other != name:
                words = {"weak": "teacher, at its end", "ceiling": "ceiling, at its end"}[other]
                axis.axhline(value, color=colours[other], ls="--", lw=1, label=words)
    if fit["chosen_step"] is not None:
        axis.axvline(fit["chosen_step"], color=NOTE, lw=0.8, label="weights kept")
    axis.set_title(name_of(report, name), fontsize=9)
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.set_ylabel(MEASURES[measure], fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=7)
