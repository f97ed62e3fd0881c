"""The student and its teacher: where they agree, and the identity gain = misfit + remainder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from w2sg.metrics import labels as metrics
from w2sg.metrics import theory
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports.colours import RED, TEAL
from w2sg.reports.figures import new_figure, points, svg, told
from w2sg.reports.section import Report, Section
from w2sg.reports.words import estimate


class Taught(NamedTuple):
    """What the student learned from, and what it made of it.

    Attributes:
        table: the rows. teacher: [N, C] logits of the labels that it saw. student: [N, C] its own of the same rows.
        noiseless: whether the labels are as the weak model gave them.
    """

    table: Any
    teacher: Tensor
    student: Tensor
    noiseless: bool


class Teacher(Section):
    """Agreement and copied errors (report.json: ``diagnostics.agreement``, ``overturned``, ``confident_disagreement``,
    and the same within ``diagnostics.transfer``).
    """

    key, template = "teacher", "teacher.html"

    @classmethod
    def measure(
        cls, predictions: Mapping[str, Tensor], labels: Tensor, bootstrap: Bootstrap, taught: Taught | None = None
    ) -> Teacher:
        """From what models predict.

        Args:
            predictions: name -> [N, C] logits on the test split, of which ``weak`` and ``student`` are read.
            labels: [N] of the test split.
            bootstrap: over its prompts.
            taught: on the transfer split; None where it is not known.
        """
        content: dict[str, Any] = {}
        if {"weak", "student"} <= predictions.keys():
            weak, student = predictions["weak"], predictions["student"]
            content |= theory.agreement(student, weak, labels, bootstrap)
            if taught is not None:
                gold = torch.as_tensor(taught.table.labels)
                resampled = Bootstrap(len(gold), clusters=taught.table.clusters)
                content["transfer"] = theory.agreement(taught.student, taught.teacher, gold, resampled)
                hits = [metrics.correct(x, y).numpy() for x, y in ((taught.teacher, gold), (weak, labels))]
                leak = theory.leak(*hits, resampled.codes, bootstrap.codes)
                content["teacher_transfer_minus_test"] = leak if taught.noiseless else None
        return cls(content={"diagnostics": content})

    def show(self, report: Report) -> dict[str, Any] | None:
        """A row for each question, a column for each split."""
        splits = dict(_splits(report, "agreement"))
        if not splits:
            return None
        rows = []
        for words, group, key in (
            ("agrees with its teacher", "agreement", "all"),
            ("… where the teacher is right", "agreement", "teacher_right"),
            ("… where the teacher is wrong (copied errors)", "agreement", "teacher_wrong"),
            ("teacher's errors that it gets right", "overturned", "errors"),
            ("teacher's right answers that it gets wrong", "overturned", "successes"),
            ("disagrees, among the tenth it is surest of", "confident_disagreement", None),
        ):
            parts = [part[group] if key is None else part[group][key] for part in splits.values()]
            rows.append((words, *(f"{estimate(part)} of {part['rows']:,}" for part in parts)))
        return {"splits": list(splits), "rows": rows, "figure": agreement_figure(splits)}

    def warnings(self, report: Report) -> list[str]:
        """A teacher that may have seen the transfer split."""
        leak = report["diagnostics"].get("teacher_transfer_minus_test")
        if not leak or leak["low"] <= 0:
            return []
        return [
            f"the teacher is better on transfer than on test by {leak['value']:.3f} [{leak['low']:.3f}, "
            f"{leak['high']:.3f}]: it may have seen transfer rows, and its labels then carry ground truth"
        ]


class Theory(Section):
    """The three-point identity and theorem 2 of arXiv 2502.11107 (report.json: ``diagnostics.test``, ``transfer``,
    ``theorem_conditions``).
    """

    key, template = "theory", "theory.html"

    @classmethod
    def measure(
        cls,
        predictions: Mapping[str, Tensor],
        labels: Tensor,
        bootstrap: Bootstrap,
        taught: Taught | None = None,
        conditions: Mapping[str, bool] | None = None,
    ) -> Theory:
        """As `Teacher.measure`, with the conditions of the theorem that hold."""
        content: dict[str, Any] = {}
        if {"weak", "student"} <= predictions.keys():
            content["test"] = theory.identity(predictions["student"], predictions["weak"], labels, bootstrap)
            content["theorem_conditions"] = dict(conditions or {})
            if taught is not None:
                resampled = Bootstrap(len(taught.table), clusters=taught.table.clusters)
                gold = torch.as_tensor(taught.table.labels)
                content["transfer"] = theory.identity(taught.student, taught.teacher, gold, resampled)
        return cls(content={"diagnostics": content})

    def show(self, report: Report) -> dict[str, Any] | None:
        """Gain, misfit and remainder on both splits."""
        splits = dict(_splits(report, "gain", "test"))
        if not splits:
            return None
        words = {
            "gain": "gain: NLL of the teacher − NLL of the student",
            "misfit": "misfit: KL(student ‖ teacher)",
            "remainder": "remainder = gain − misfit",
            "forward_misfit": "forward misfit: KL(teacher ‖ student)",
        }
        rows = [(text, *(estimate(part[key], 4, sign=True) for part in splits.values())) for key, text in words.items()]
        rows.append(("gain ≥ misfit on these rows", *(part["theorem"] for part in splits.values())))
        conditions = report["diagnostics"]["theorem_conditions"]
        met = ", ".join(f"{k.replace('_', ' ')}: {'yes' if v else 'no'}" for k, v in conditions.items())
        return {"splits": list(splits), "rows": rows, "met": met}


def agreement_figure(splits: Mapping[str, Any]) -> Markup:
    """How often the student agrees with its teacher where that is right, and where it is wrong."""
    kinds = {
        "teacher_right": ("where the teacher is right", TEAL, "o"),
        "teacher_wrong": ("where the teacher is wrong (copied errors)", RED, "D"),
    }
    figure, axis = new_figure(6.8, 0.9 + 0.55 * len(splits))
    shown = {}
    for row, (name, part) in enumerate(splits.items()):
        for shift, (key, (words, colour, marker)) in zip((-0.15, 0.15), kinds.items(), strict=True):
            found = part["agreement"][key]
            style = {"fmt": marker, "color": colour, "label": words if row == 0 else None}
            points(axis, [row + shift], [found], across=True, **style)
            shown[f"on {name} {words}"] = found
    axis.set_yticks(range(len(splits)), list(splits))
    axis.set_ylim(len(splits) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("share of rows on which the student agrees with its teacher, with 95 % interval", fontsize=8)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return svg(figure, told("agreement of the student with its teacher", shown))


def _splits(report: Report, key: str, test: str | None = None) -> Iterator[tuple[str, Any]]:
    """What was measured on each split, where it was."""
    diagnostics = report["diagnostics"]
    for name, part in (
        ("test", diagnostics.get(test, {}) if test else diagnostics),
        ("transfer", diagnostics.get("transfer", {})),
    ):
        if key in part:
            yield name, part
