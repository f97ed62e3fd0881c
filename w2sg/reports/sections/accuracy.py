"""Accuracy of each model on the test split, the student against the others, and the performance gap recovered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from markupsafe import Markup
from torch import Tensor

from w2sg.metrics import intervals as statistics
from w2sg.metrics import labels as metrics
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.metrics.intervals import MCNEMAR
from w2sg.reports.colours import COLOURS, assigned
from w2sg.reports.figures import new_figure, points, svg, told
from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.sections.splits import tested
from w2sg.reports.words import LEVEL, Cell, estimate, number, p_text, p_value, pgr_sentence

MEASURES = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE-15",
    "overconfidence": "overconfidence",
}
COLUMNS = ("accuracy", "weak accuracy", "ceiling accuracy", "PGR")  # of the summary of runs


class Accuracy(Section):
    """Every measure of each model with its interval (report.json: ``metrics``, ``tests``, ``pgr``)."""

    key, template = "accuracy", "accuracy.html"
    heading = "Accuracy"

    @classmethod
    def measure(cls, predictions: Mapping[str, Tensor], labels: Tensor, bootstrap: Bootstrap) -> Self:
        """From what models predict.

        Args:
            predictions: name -> [N, C] logits on the test split; ``weak``, ``student`` and ``ceiling`` give a PGR.
            labels: [N] of the test split.
            bootstrap: over the prompts of the N rows.
        """
        right = {name: metrics.correct(logits, labels).numpy() for name, logits in predictions.items()}
        content: dict[str, Any] = {
            "metrics": {
                name: {**metrics.measure(logits, labels), "intervals": metrics.intervals(logits, labels, bootstrap)}
                for name, logits in predictions.items()
            },
            "tests": paired_tests(right, bootstrap.codes),
        }
        if {"weak", "student", "ceiling"} <= right.keys():
            trio = (right[name] for name in ("weak", "student", "ceiling"))
            content["pgr"] = statistics.performance_gap_recovered(*trio, bootstrap)
        return cls(content=content)

    def show(self, report: Report) -> dict[str, Any]:
        """Figure, table of measures, table of tests."""
        return {
            "heading": self.heading,
            "figure": accuracy_figure(report),
            "measures": list(MEASURES.values()),
            "rows": _measures(report),
            "tests": _tests(report),
            "test": (name := test_name(next(iter(report["tests"].values()), {}))),
            "over": "test rows" if name == MCNEMAR else "prompts",
        }

    def warnings(self, report: Report) -> list[str]:
        """No gap, wide intervals, and an untrained model that does as well."""
        lines = []
        if (pgr := report.get("pgr")) and not pgr["resolved"]:
            worse = pgr["gap_high"] is not None and pgr["gap_high"] < 0
            lines.append(
                "the ceiling is worse than the weak model: nothing is there to recover"
                if worse
                else "the gap between weak and ceiling is within noise: no PGR is claimed"
            )
        if student := report["metrics"].get("student"):
            low, high = student["intervals"]["accuracy"]
            if high - low > 0.06:
                lines.append(
                    f"{tested(report['data'])} know an accuracy to about {(high - low) / 2:.3f} only; smaller "
                    "differences cannot be seen, and most published ones are smaller"
                )
        untrained = report["tests"].get("student - zero_shot")
        if untrained and not (untrained["p"] < LEVEL and untrained["difference"] > 0):
            resolved = untrained["p"] < LEVEL
            how = "more accurate than the student" if resolved else "not told apart from the student by accuracy"
            lines.append(
                f"the strong model without any training is {how} ({untrained['difference']:+.3f} "
                f"[{untrained['low']:+.3f}, {untrained['high']:+.3f}] for the student, {untrained['test']} p "
                f"{p_text(untrained['p'])}): "
                + (
                    "what the student can do, it need not have learnt from its teacher"
                    if resolved
                    else "whether the student learnt anything from its teacher is not known from accuracy"
                )
            )
        return lines

    def summary(self, report: Report) -> dict[str, Any]:
        """Accuracies of student, weak model and ceiling, and the PGR where there is a gap."""
        models = ("student", "weak", "ceiling")
        accuracies = {words: accuracy_of(report, name) for words, name in zip(COLUMNS, models, strict=False)}
        pgr = report.get("pgr")
        return accuracies | {"PGR": pgr if pgr and pgr["resolved"] else None}

    def table(self, report: Report) -> Any:
        """The models side by side, and the PGR below."""
        from rich.table import Table

        caption = pgr_sentence(report["pgr"]) if "pgr" in report else None
        grid = Table(caption=caption, caption_justify="left", caption_style="")
        for column in ("", "accuracy", "95 % interval", "AUROC", "NLL"):
            grid.add_column(column, justify="left" if not column else "right")
        for name, values in report["metrics"].items():
            low, high = values["intervals"]["accuracy"]
            row = [
                number(values["accuracy"]),
                f"{low:.3f} to {high:.3f}",
                number(values["auroc"]),
                number(values["nll"]),
            ]
            grid.add_row(name_of(report, name), *row)
        length = report["data"]["length_only"]
        grid.add_row("length alone", number(length["accuracy"]), f"{length['low']:.3f} to {length['high']:.3f}")
        return grid


def accuracy_of(report: Report, name: str) -> dict[str, float] | None:
    """A model's accuracy with its interval; None where it was not measured."""
    if (measured := report["metrics"].get(name)) is None:
        return None
    low, high = measured["intervals"].get("accuracy") or (None, None)
    return {"value": measured["accuracy"], "low": low, "high": high}


def test_name(test: Mapping[str, Any]) -> str:
    """Which test a p value is of."""
    return test.get("test", MCNEMAR)


def paired_tests(right: Mapping[str, np.ndarray], prompts: np.ndarray | None) -> dict[str, Any]:
    """The student against every other model on the same rows: difference with interval, and the exact test over
    prompts.

    Args:
        right: [N] of each model. prompts: [N] the prompt of each row; None where each has its own.
    """
    tests = {}
    for other in right.keys() - {"student"} if "student" in right else ():
        test = statistics.paired_test(right["student"], right[other], prompts)
        names = {"only_a": "only_student", "only_b": "only_other"}
        tests[f"student - {other}"] = {names.get(key, key): value for key, value in test.items()}
    return dict(sorted(tests.items()))


def _measures(report: Report) -> list[tuple[Any, ...]]:
    rows = []
    for name, values in report["metrics"].items():
        cells = []
        for key in MEASURES:
            low, high = values["intervals"][key] or (None, None)
            signed = key == "overconfidence"
            inside = "–" if low is None else f"{number(low, 3, signed)} to {number(high, 3, signed)}"
            cells.append(Cell(number(values[key], 3, signed), inside))
        rows.append((name_of(report, name), *cells))
    length = report["data"]["length_only"]
    alone = Cell(number(length["accuracy"]), f"{number(length['low'])} to {number(length['high'])}")
    rows.append((f"length alone ({length['rule']})", alone, *["–"] * (len(MEASURES) - 1)))
    return rows


def _tests(report: Report) -> list[tuple[Any, ...]]:
    return [
        (
            f"student − {name_of(report, name.removeprefix('student - '))}",
            estimate({**test, "value": test["difference"]}, sign=True),
            test["only_student"],
            test["only_other"],
            p_value(test["p"]),
        )
        for name, test in report["tests"].items()
    ]


def accuracy_figure(report: Report) -> Markup:
    """Accuracy of each model with its 95 % interval, and the length-only rule as a line."""
    measured = {name: accuracy_of(report, name) for name in report["metrics"]}
    colours = assigned(measured)
    figure, axes = new_figure(6.8, 0.85 + 0.36 * len(measured))
    for row, (name, found) in enumerate(measured.items()):
        points(axes, [row], [found], across=True, fmt="o", ms=7, capsize=3, color=colours[name])
        axes.annotate(
            f"{found['value']:.3f}", (found["value"], row), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(measured)), [name_of(report, name) for name in measured])
    axes.set_ylim(len(measured) - 0.5, -0.8)
    length = report["data"]["length_only"]["accuracy"]
    axes.axvline(length, color=COLOURS["length"], ls=":", lw=1.2, label=f"length alone, {length:.3f}")
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axes.set_xlabel("accuracy on test, with 95 % bootstrap interval", fontsize=8)
    shown = {name_of(report, name): found for name, found in measured.items()}
    return svg(figure, told("accuracy on test with 95 % interval", shown | {"length alone": length}))
