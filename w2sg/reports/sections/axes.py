"""Refined answers on two axes: content (how right they are) and concept (how much they are as was told)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from w2sg.reports.colours import assigned
from w2sg.reports.figures import new_figure, points, svg, told
from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.words import (
    NONE,
    counted,
    cut_off_warning,
    estimate,
    judged,
    no_verdict_warning,
    number,
    p_value,
    stacked,
    wins_cell,
)

# What the student is held against in the summary of many runs, in words.
OTHERS = {"naive": "naive", "base": "untrained", "self": "own answers"}


def axes_of(refinement: Mapping[str, Any]) -> list[str]:
    """The axes that were measured."""
    return [axis for axis in ("content", "concept") if axis in refinement["systems"]["student"]]


class Axes(Section):
    """Systems on both axes (report.json: ``refinement.systems``, ``differences``, ``wins``, ``pgr``, ``left_out``)."""

    key, template = "axes", "axes.html"

    def show(self, report: Report) -> dict[str, Any]:
        """Figure and table."""
        refinement, rows = report["refinement"], []
        axes, wins = axes_of(refinement), refinement.get("wins")
        for name, system in refinement["systems"].items():
            cells: list[Any] = [name_of(report, name)]
            for axis in axes:
                gap = refinement["differences"].get(f"student - {name}", {}).get(axis)
                cells += [stacked(system[axis]), stacked(gap or NONE, 3, True), p_value(gap["p"]) if gap else "–"]
            if wins is not None:
                cells += [wins_cell(wins.get(name, {}), key) for key in ("win_rate", "length_controlled")]
            rows.append((*cells, number(system["characters"], 0), f"{system['cut_off']:.0%}"))
        head = ["", *(words for axis in axes for words in (axis, "student −\nthis", "p"))]
        head += [] if wins is None else ["student wins\nover this", "… length\ncontrolled"]
        head += ["characters", "cut off"]
        return {"figure": _pareto(report), "head": head, "rows": rows, "pgr": refinement.get("pgr")}

    def warnings(self, report: Report) -> list[str]:
        """A student that need not have learnt anything from the weak answers; answers cut off; what was left out."""
        refinement, lines = report["refinement"], []
        differences = refinement["differences"]
        untrained = differences.get("student - base", {}).get("content")
        if untrained and untrained["low"] is not None and untrained["low"] <= 0:
            how = "worse than" if untrained["high"] < 0 else "not told apart from"
            lines.append(
                f"on content the student is {how} the strong model without any training "
                f"({untrained['value']:+.3f} [{untrained['low']:+.3f}, {untrained['high']:+.3f}]): there is nothing on "
                "this axis that it need have learnt from the weak one"
            )
        alone = differences.get("student - self", {})
        if alone and all(gap["low"] is not None and gap["low"] <= 0 <= gap["high"] for gap in alone.values()):
            lines.append(
                "the student cannot be told from one trained on the strong model's own answers without exemplars: the "
                "weak answers may have done nothing"
            )
        over = {f"student over {other}": measured for other, measured in refinement.get("wins", {}).items()}
        lines += no_verdict_warning(over)
        lines += cut_off_warning({name: s["cut_off"] for name, s in refinement["systems"].items()}, "answers")
        return lines + self._warnings + [f"left out: {reason}" for reason in refinement["left_out"]]

    def finding(self, report: Report) -> str:
        """The student's score on each axis, and what it gained."""
        refinement, lines = report["refinement"], []
        for axis in axes_of(refinement):
            parts = []
            for other, words in (("naive", "naive fine-tuning"), ("base", "the untrained strong model")):
                if gap := refinement["differences"].get(f"student - {other}", {}).get(axis):
                    parts.append(f"{judged(gap, 0.0, 3, True)} over {words}")
            score = estimate(refinement["systems"]["student"][axis])
            lines.append(
                f"{axis.capitalize()} of the student on {counted(refinement['prompts'], 'test prompts')}: {score}; "
                f"{', '.join(parts)}."
            )
        return " ".join(lines)

    def summary(self, report: Report) -> dict[str, Any]:
        """Scores of student, weak model and untrained model on both axes, gains of the student, and its wins."""
        refinement, columns = report["refinement"], {}
        if "systems" not in refinement:
            return {}
        for axis in ("content", "concept"):
            columns[f"student: {axis}"] = refinement["systems"].get("student", {}).get(axis)
            for name, words in OTHERS.items():
                gap = refinement["differences"].get(f"student - {name}", {}).get(axis)
                columns[f"student − {words}: {axis}"] = gap
        for axis in ("content", "concept"):
            for name, words in {"weak": "weak", "naive": "naive", "base": "untrained"}.items():
                columns[f"{words}: {axis}"] = refinement["systems"].get(name, {}).get(axis)
        for name in ("naive", "base"):
            win = refinement.get("wins", {}).get(name, {}).get("win_rate")
            columns[f"student's wins over {OTHERS[name]}"] = win
        return columns

    def table(self, report: Report) -> Any:
        """The systems on both axes, and the labels of weak and refined answers."""
        from rich.table import Table

        refinement = report["refinement"]
        axes, grid = axes_of(refinement), Table()
        for column in ("", *axes, "cut off"):
            grid.add_column(column, justify="left" if not column else "right")
        for name, system in refinement["systems"].items():
            grid.add_row(name_of(report, name), *(estimate(system[axis]) for axis in axes), f"{system['cut_off']:.0%}")
        grid.add_section()
        for name, words in (("weak", "labels: weak answers"), ("student", "labels: refined answers")):
            if name in refinement["labels"]:
                grid.add_row(words, *(estimate(refinement["labels"][name][axis]) for axis in axes), "")
        return grid


def _pareto(report: Report) -> Markup:
    """Content over concept, a point for each system; content alone where no concept is measured."""
    systems, axes = report["refinement"]["systems"], axes_of(report["refinement"])
    colours = assigned(systems)
    figure, axis = new_figure(7.4, 4.4 if len(axes) == 2 else 0.9 + 0.36 * len(systems))
    if len(axes) == 1:
        for row, (name, measured) in enumerate(systems.items()):
            points(axis, [row], [measured[axes[0]]], across=True, fmt="o", color=colours[name])
        axis.set_yticks(range(len(systems)), [name_of(report, name) for name in systems])
        axis.invert_yaxis()
        axis.set_xlabel(f"{axes[0]}, with 95 % interval", fontsize=8)
        return svg(figure, told(axes[0], {name_of(report, name): found[axes[0]] for name, found in systems.items()}))
    for name, measured in systems.items():
        x, y = measured["concept"], measured["content"]
        style = {"color": colours[name], "fmt": "*" if name == "student" else "o"}
        style["ms"] = 13 if name == "student" else 6
        points(axis, [x["value"]], [y], label=name_of(report, name), **style)
        points(axis, [y["value"]], [x], across=True, fmt="none", color=style["color"])
    axis.set_xlabel("concept: how much an answer is as the weak model was told", fontsize=8)
    axis.set_ylabel("content: how right it is", fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    both = [told(words, {name_of(report, name): found[words] for name, found in systems.items()}) for words in axes]
    return svg(figure, f"content over concept of each system; {'; '.join(both)}")
