"""How sure models are, and how often they are right then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from torch import Tensor

from w2sg.metrics import labels as metrics
from w2sg.metrics import theory
from w2sg.reports.colours import FAINT, PAPER, RED, SLATE, assigned
from w2sg.reports.figures import new_figure, svg, told
from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.words import number

Bins = Mapping[str, list[dict[str, float]]]  # of each model: low, high, confidence, accuracy, rows


class Confidence(Section):
    """Calibration of each model (report.json: ``diagnostics.reliability``, ``diagnostics.certainty``)."""

    key, template = "confidence", "confidence.html"

    @classmethod
    def measure(cls, predictions: Mapping[str, Tensor], labels: Tensor) -> Confidence:
        """From name -> [N, C] logits on the test split, and its labels [N]."""
        certainty = {name: theory.certainty(logits) for name, logits in predictions.items()}
        reliability = {name: metrics.reliability(logits, labels) for name, logits in predictions.items()}
        return cls(content={"diagnostics": {"certainty": certainty, "reliability": reliability}})

    def show(self, report: Report) -> dict[str, Any]:
        """Two figures."""
        return {"reliability": reliability_figure(report), "confidence": confidence_figure(report)}

    def warnings(self, report: Report) -> list[str]:
        """An overconfident student."""
        student = report["metrics"].get("student")
        if not student or student["intervals"]["overconfidence"][0] <= 0:
            return []
        low, high = student["intervals"]["overconfidence"]
        return [
            "the student is overconfident: its mean confidence exceeds its accuracy by "
            f"{student['overconfidence']:.3f} [{low:.3f}, {high:.3f}]"
        ]


def reliability_figure(report: Report) -> Markup:
    """Accuracy over confidence, in 15 bins."""
    models: Bins = report["diagnostics"]["reliability"]
    figure, axes = new_figure(2.45 * len(models), 2.6, len(models))
    lowest = min(b["confidence"] for bins in models.values() for b in bins)
    start, colours = max(0.0, min(0.5, lowest - 0.05)), assigned(report["metrics"])
    for axis, (name, bins) in zip(np.atleast_1d(axes), models.items(), strict=True):
        total, colour = sum(b["rows"] for b in bins), colours.get(name, SLATE)
        axis.plot([start, 1], [start, 1], color=FAINT, lw=1, ls="--", label="calibrated")
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axis.plot(x, y, color=colour, lw=1.2)
        axis.scatter(x, y, s=[12 + 220 * b["rows"] / total for b in bins], color=colour, alpha=0.8)
        axis.set_title(name_of(report, name), fontsize=9)
        axis.set_xlim(start, 1.03)
        axis.set_ylim(-0.03, 1.05)
        axis.set_xlabel("confidence", fontsize=8)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("accuracy", fontsize=8)
    first.legend(frameon=False, fontsize=7, loc="lower right")
    rows = [
        (name_of(report, name), *(number(b[key]) for key in ("low", "high", "confidence", "accuracy")), int(b["rows"]))
        for name, bins in models.items()
        for b in bins
    ]
    errors = {name_of(report, name): report["metrics"].get(name, {}).get("ece") for name in models}
    head = ("model", "confidence from", "to", "mean confidence", "accuracy", "rows")
    return svg(figure, told("accuracy over confidence in 15 bins; expected calibration error", errors), (head, rows))


def confidence_figure(report: Report) -> Markup:
    """How many rows are chosen with which confidence, right and wrong."""
    models: Bins = report["diagnostics"]["reliability"]
    figure, axes = new_figure(2.45 * len(models), 1.9, len(models))
    lowest = min(b["low"] for bins in models.values() for b in bins)
    most = max(b["rows"] for bins in models.values() for b in bins)
    colours, mistakes = assigned(report["metrics"]), {}
    for axis, (name, bins) in zip(np.atleast_1d(axes), models.items(), strict=True):
        left, width = [b["low"] for b in bins], [b["high"] - b["low"] for b in bins]
        right = [b["rows"] * b["accuracy"] for b in bins]
        wrong = [b["rows"] - r for b, r in zip(bins, right, strict=True)]
        style = {"align": "edge", "edgecolor": PAPER, "lw": 0.5}
        axis.bar(left, right, width, color=colours.get(name, SLATE), label="right", **style)
        axis.bar(left, wrong, width, bottom=right, color=RED, hatch="////", label="wrong", **style)
        axis.set_xlim(lowest, 1.0)
        axis.set_ylim(0, 1.05 * most)
        axis.set_xlabel("confidence", fontsize=8)
        axis.legend(frameon=False, fontsize=7)
        mistakes[name_of(report, name)] = sum(wrong)
    np.atleast_1d(axes)[0].set_ylabel("test rows", fontsize=8)
    return svg(figure, told("test rows by confidence, wrong ones on top; wrong are", mistakes, 0))
