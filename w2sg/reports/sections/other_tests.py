"""Every model on every test set: in distribution and out, set by set, subset by subset, and over the sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from markupsafe import Markup

from w2sg.metrics import intervals as statistics
from w2sg.metrics import labels as metrics
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.metrics.over_sets import over_sets
from w2sg.reports.colours import assigned
from w2sg.reports.figures import new_figure, points, svg, told
from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.sections.accuracy import paired_tests
from w2sg.reports.words import LEVEL, Cell, estimate, number, p_value

TRIO = ("weak", "student", "ceiling")
HOME = "test"  # the run's own split
FEW, MOST = 20, 30  # rows of a subset that is shown; subsets of a set that are shown


class Predicted(NamedTuple):
    """A test set with what models predict of it: model -> [N, C] logits."""

    table: Any
    logits: Mapping[str, Any]


class OtherTests(Section):
    """Accuracies on second test sets and on subsets (report.json: ``test_sets``, ``over_test_sets``)."""

    key, template = "other_tests", "other_tests.html"
    heading = "Other test sets"

    @classmethod
    def measure(cls, sets: Mapping[str, Any]) -> Self:
        """From what models predict of each test set.

        Args:
            sets: name -> what has ``table`` and ``logits`` {model: [N, C]}; `HOME` is the run's own.
        """
        content: dict[str, Any] = {}
        for_all: dict[str, Any] = {}
        for name, found in sets.items():
            measured, right = _measured(found)
            content[name] = measured
            if set(TRIO) <= right.keys():
                for_all[name] = {
                    "right": right,
                    "clusters": found.table.clusters,
                    "p": measured["tests"]["student - weak"]["p"],
                }
        if len(sets) < 2 and not any(measured["subsets"] for measured in content.values()):
            return cls(content={})
        result: dict[str, Any] = {"test_sets": content}
        if len(for_all) > 1:
            result["over_test_sets"] = over_sets(for_all)
        return cls(content=result)

    def show(self, report: Report) -> dict[str, Any] | None:
        """A figure, a table of sets, one of subsets, and what holds over all."""
        sets = report.get("test_sets")
        if sets is None:
            return None
        models = [name for name in report["metrics"] if any(name in s["accuracy"] for s in sets.values())]
        return {
            "heading": self.heading if len(sets) > 1 else "Subsets of the test split",
            "figure": _figure(report, sets, models) if len(sets) > 1 else "",
            "columns": ["test set", "rows", *(name_of(report, m) for m in models), "student − weak", "p", "PGR"],
            "rows": [_row(report, name, found, models) for name, found in sets.items()] if len(sets) > 1 else [],
            "subset_columns": ["subset", "rows", *(name_of(report, m) for m in models), "PGR"],
            "subsets": [
                (label(name) if len(sets) > 1 else "", [_subset(part, values, models) for part, values in shown])
                for name, found in sets.items()
                if (shown := list(found["subsets"].items())[:MOST])
            ],
            "left_out": [
                f"{label(name)}: subsets of fewer than {FEW} rows, or beyond the first {MOST}, are not shown "
                f"({found['subsets_left_out']:,})"
                for name, found in sets.items()
                if found["subsets_left_out"]
            ],
            "over": _over(report),
        }

    def table(self, report: Report) -> Any:
        """Accuracies, a row for each set."""
        from rich.table import Table

        sets = report.get("test_sets") or {}
        if len(sets) < 2:
            return None
        models = [name for name in report["metrics"] if any(name in s["accuracy"] for s in sets.values())]
        grid = Table(caption=" ".join(_over(report)[:1]) or None, caption_justify="left", caption_style="")
        for column in ("accuracy on", "rows", *(name_of(report, model) for model in models)):
            grid.add_column(column, justify="left" if column == "accuracy on" else "right")
        for name, found in sets.items():
            cells = (found["accuracy"].get(model) for model in models)
            grid.add_row(label(name), str(found["rows"]), *("–" if a is None else number(a["value"]) for a in cells))
        return grid

    def warnings(self, report: Report) -> list[str]:
        """Students that gain in distribution alone, and models that were left out."""
        sets = report.get("test_sets") or {}
        lines = []
        gains = {name: s["tests"].get("student - weak") for name, s in sets.items()}
        corrected = report.get("over_test_sets", {}).get("holm", {})

        def gained(name: str) -> bool:
            test = gains[name]
            return test is not None and test["difference"] > 0 and corrected.get(name, test["p"]) < LEVEL

        lost = [name for name in sets if name != HOME and gains[name] is not None and not gained(name)]
        if HOME in sets and gained(HOME) and lost:
            lines.append(
                f"the student is better than its teacher on its own test split, and not shown to be on "
                f"{', '.join(map(label, lost))}: the gain may hold in distribution alone"
            )
        for name, found in sets.items():
            chance = 1 / found["classes"]
            for model in TRIO[1:]:
                if name != HOME and (a := found["accuracy"].get(model)) and a["low"] <= chance <= a["high"]:
                    lines.append(f"{name_of(report, model)} is not told apart from chance on {label(name)}")
            if missing := [m for m in report["metrics"] if m not in found["accuracy"]]:
                lines.append(
                    f"{', '.join(name_of(report, m) for m in missing)}: no single model, so not measured on "
                    f"{label(name)}"
                )
        return lines

    def summary(self, report: Report) -> dict[str, Any]:
        """The student on each other set, and its mean gain over the sets."""
        sets = report.get("test_sets") or {}
        columns = {
            f"student on {name}": found["accuracy"].get("student") for name, found in sets.items() if name != HOME
        }
        if "over_test_sets" in report:
            columns["gain over test sets"] = report["over_test_sets"]["difference"]
        return columns


def label(name: str) -> str:
    """A test set in words."""
    return "its own test split" if name == HOME else name


def _measured(found: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The numbers of one set, and which rows each model has right."""
    table, gold = found.table, torch.as_tensor(found.table.labels)
    right = {name: metrics.correct(logits, gold).numpy() for name, logits in found.logits.items()}
    bootstrap = Bootstrap(len(table), clusters=table.clusters)
    subsets, left_out = {}, 0
    names = table.subsets or []
    for part in sorted(set(names) - {""}, key=lambda part: (-names.count(part), part)):
        rows = np.flatnonzero(np.array(names) == part)
        if len(rows) < FEW or len(subsets) == MOST:
            left_out += 1
            continue
        inside = {name: hits[rows] for name, hits in right.items()}
        subsets[part] = {"rows": len(rows), **_accuracies(inside, [table.clusters[k] for k in rows])}
    measured = {
        "rows": len(table),
        "prompts": bootstrap.count,
        "classes": table.classes,
        **_accuracies(right, table.clusters),
        "tests": paired_tests(right, bootstrap.codes),
        "subsets": subsets,
        "subsets_left_out": left_out,
    }
    return measured, right


def _accuracies(right: Mapping[str, np.ndarray], clusters: list[str]) -> dict[str, Any]:
    bootstrap = Bootstrap(len(clusters), clusters=clusters)
    found: dict[str, Any] = {"accuracy": {name: bootstrap.share(hits).as_dict() for name, hits in right.items()}}
    if set(TRIO) <= right.keys():
        found["pgr"] = statistics.performance_gap_recovered(*(right[name] for name in TRIO), bootstrap)
    return found


def _row(report: Report, name: str, found: Mapping[str, Any], models: list[str]) -> tuple[Any, ...]:
    test = found["tests"].get("student - weak")
    p = report.get("over_test_sets", {}).get("holm", {}).get(name)
    where = f"{label(name)} (in distribution)" if name == HOME else name
    gain = "–" if test is None else estimate({**test, "value": test["difference"]}, sign=True)
    return where, found["rows"], *_cells(found, models), gain, "–" if p is None else p_value(p), _pgr(found)


def _subset(name: str, found: Mapping[str, Any], models: list[str]) -> tuple[Any, ...]:
    return name, found["rows"], *_cells(found, models), _pgr(found)


def _cells(found: Mapping[str, Any], models: list[str]) -> list[Any]:
    cells = []
    for model in models:
        a = found["accuracy"].get(model)
        cells.append("–" if a is None else Cell(number(a["value"]), f"{number(a['low'])} to {number(a['high'])}"))
    return cells


def _pgr(found: Mapping[str, Any]) -> Any:
    pgr = found.get("pgr")
    if pgr is None:
        return "–"
    return estimate(pgr) if pgr["resolved"] else "no gap resolved"


def _over(report: Report) -> list[str]:
    """What holds over the sets, a line each."""
    over = report.get("over_test_sets")
    if over is None:
        return []
    count, gain, sets = len(over["holm"]), over["difference"], over["over_sets"]
    lines = [
        f"Over these {count} sets, each counted the same, the student gains {gain['value']:+.3f} "
        f"[{gain['low']:+.3f}, {gain['high']:+.3f}] on its teacher, prompts drawn within each set."
    ]
    if sets["low"] is None:
        lines.append("Two sets say nothing of others: an interval over sets needs three.")
    else:
        lines.append(
            f"For sets like these the interval is [{sets['low']:+.3f}, {sets['high']:+.3f}] (Student's t over "
            f"{count} sets)."
        )
    if over["pgr"] is None:
        lines.append("The mean gap to the ceiling is not resolved, so no PGR over the sets is claimed.")
    else:
        pgr = over["pgr"]
        ends = " to ".join("beyond" if end is None else f"{end:.2f}" for end in (pgr["low"], pgr["high"]))
        lines.append(f"Mean gain over mean gap: PGR {pgr['value']:.2f} ({ends}).")
    return lines


def _figure(report: Report, sets: Mapping[str, Any], models: list[str]) -> Markup:
    """Accuracy of each model on each set."""
    colours, names = assigned(models), list(sets)
    figure, axes = new_figure(6.8, 1.0 + 0.18 * len(models) * len(names))
    step = 0.8 / max(1, len(models))
    for place, model in enumerate(models):
        rows = [row + (place - (len(models) - 1) / 2) * step for row in range(len(names))]
        found = [sets[name]["accuracy"].get(model) for name in names]
        here = [(row, a) for row, a in zip(rows, found, strict=True) if a is not None]
        points(
            axes,
            [row for row, _ in here],
            [a for _, a in here],
            across=True,
            fmt="o",
            ms=5,
            capsize=2,
            color=colours[model],
            label=name_of(report, model),
        )
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(1 / next(iter(sets.values()))["classes"], color="0.6", ls=":", lw=1)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(models)))
    axes.set_xlabel("accuracy with 95 % interval; dotted: chance", fontsize=8)
    shown = {
        f"{name_of(report, model)} on {label(name)}": sets[name]["accuracy"][model]
        for name in names
        for model in models
        if model in sets[name]["accuracy"]
    }
    return svg(figure, told("accuracy on each test set with 95 % interval", shown))
