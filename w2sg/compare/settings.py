"""Runs of every kind as one table: a row for each setting, means over its seeds, the columns that any report has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.compare.names import key_of, losses_in_words, methods_in_words, settings_in_words
from w2sg.compare.runs import Finished, by_split, loss_of, varying
from w2sg.reports.colours import PAPER, looks
from w2sg.reports.figures import legend_below, new_figure, reach, svg, told
from w2sg.reports.section import Report, Section
from w2sg.reports.sections.accuracy import COLUMNS as OF_LABELS
from w2sg.reports.sections.decoded import COLUMNS as OF_DECODERS
from w2sg.reports.words import Cell, number, stacked

ON_TERMINAL = 6  # columns
AXES = ("content", "concept")
Row = dict[str, Any]  # method, setting, seeds, columns {heading: {mean, sd, low, high}}


class Settings(Section):
    """The union of what all reports say of themselves (summary.json: ``settings``).

    Attributes:
        older: folders of runs of one configuration and seed with a newer one.
    """

    key, template = "settings", "summary_settings.html"
    older: Sequence[str] = ()

    @classmethod
    def measure(cls, runs: Sequence[Finished]) -> Settings:
        """From finished runs; settings are told apart among runs of one method."""
        by_method: dict[tuple[str, bool], list[Finished]] = defaultdict(list)
        words = methods_in_words([run.method for run in runs])
        for run in runs:
            by_method[words[run.method], run.labels].append(run)
        rows, older = [], []
        for (method, _), group in sorted(by_method.items()):
            more, behind = rows_of(method, group)
            rows += more
            older += behind
        section = cls(content={"settings": rows})
        section.older = sorted(older)
        return section

    def show(self, report: Report) -> dict[str, Any]:
        """A table for all columns that any row has."""
        rows = report["settings"]
        columns = columns_of(rows)
        cells = [
            (row["method"], row["setting"], row["seeds"], *(_stacked(row["columns"].get(c)) for c in columns))
            for row in rows
        ]
        return {"columns": columns, "rows": cells, "figure": axes_figure(rows)}

    def table(self, report: Report) -> Any:
        """A table for each method, with the columns that say most and stand in no other table."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table

        by_method: dict[str, list[Row]] = defaultdict(list)
        for row in report["settings"]:
            by_method[row["method"]].append(row)
        tested = {cell["setting"] for cell in report["cells"]}
        grids = []
        for method, rows in by_method.items():
            elsewhere = {*OF_DECODERS, *(OF_LABELS if tested else ())}
            shown = [column for column in columns_of(rows) if column not in elsewhere][:ON_TERMINAL]
            if not shown:
                continue
            grid = Table(title=method, title_justify="left", box=SIMPLE_HEAD)
            for column in ("setting", "seeds", *shown):
                grid.add_column(column, justify="left" if column == "setting" else "right")
            for row in (row for row in rows if set(shown) & row["columns"].keys()):
                grid.add_row(row["setting"], str(row["seeds"]), *(cell(row["columns"].get(c), 2) for c in shown))
            grids.append(grid)
        return Group(*grids) if grids else None


def rows_of(method: str, runs: Sequence[Finished]) -> tuple[list[Row], list[str]]:
    """A row per setting: for each column its mean over splits, whose seeds are averaged before (over seeds where there
    is one split), their standard deviation, and the number of runs.

    One seed keeps the interval that its own report has. Of two runs of one setting and seed the newer counts, and the
    older one for what the newer has not measured (a baseline, say); folders of the older ones are returned too.
    """
    keys, loss_options = varying(list(runs))
    several = len({key_of(loss_of(run, loss_options)) for run in runs}) > 1
    cells: dict[str, dict[tuple[int, int], dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    values_of: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    newest: dict[tuple[str, tuple[int, int]], str] = {}
    older = []
    for run in sorted(runs, key=lambda run: run.newest):
        both = {k: run.settings.get(k) for k in keys}, loss_of(run, loss_options)
        key = key_of(both)
        if before := newest.get((key, run.replicate)):
            older.append(before)
        newest[key, run.replicate] = run.where
        cells[key][run.replicate] |= run.summary
        values_of[key] = both
    settings = dict(zip(values_of, settings_in_words([values for values, _ in values_of.values()]), strict=True))
    if several:
        losses = losses_in_words([loss for _, loss in values_of.values()])
        for key, loss in zip(values_of, losses, strict=True):
            settings[key] = ", ".join([settings[key]] * bool(keys) + [loss.replace("_", " ")])
    rows = []
    for key, replicates in cells.items():
        by_replicate = dict(sorted(replicates.items()))
        columns = {}
        for heading in dict.fromkeys(heading for summary in by_replicate.values() for heading in summary):
            known = {r: s[heading] for r, s in by_replicate.items() if s.get(heading, {}).get("value") is not None}
            if not known:
                continue
            values = by_split({r: estimate["value"] for r, estimate in known.items()})
            columns[heading] = {"mean": float(np.mean(values)), "sd": None, "low": None, "high": None}
            if len(values) > 1:
                columns[heading]["sd"] = float(np.std(values, ddof=1))
            else:
                columns[heading] |= {end: next(iter(known.values())).get(end) for end in ("low", "high")}
        rows.append({"method": method, "setting": settings[key], "seeds": len(by_replicate), "columns": columns})
    return sorted(rows, key=lambda row: row["setting"]), older


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The headings that any row has, each where it first stands."""
    return list(dict.fromkeys(heading for row in rows for heading in row["columns"]))


def cell(column: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A measure of a row as text."""
    if column is None:
        return "–"
    if column["sd"] is not None:
        return f"{number(column['mean'], digits)} ± {number(column['sd'], digits)}"
    inside = "" if column["low"] is None else f" [{number(column['low'], digits)}, {number(column['high'], digits)}]"
    return number(column["mean"], digits) + inside


def _stacked(column: Mapping[str, Any] | None) -> Cell | str:
    """The same with what is known of its spread below, so that a row of many columns stays narrow."""
    if column is None:
        return "–"
    if column["sd"] is not None:
        return Cell(number(column["mean"]), f"± {number(column['sd'])}")
    return stacked({**column, "value": column["mean"]})


def axes_figure(rows: Sequence[Row]) -> Markup | str:
    """Concept over content of refined answers: each setting's student, its weak and its untrained model hollow."""
    known = [row for row in rows if all(f"student: {axis}" in row["columns"] for axis in AXES)]
    if not known:
        return ""
    names = [f"{row['method']}: {row['setting']}" for row in known]
    look = looks(names)
    figure, axis = new_figure(6.4, 4.0 + 0.1 * len(known))
    for row, name in zip(known, names, strict=True):
        colour, _, key = look[name]
        for system, marker in (("student", "o"), ("weak", "v"), ("untrained", "s")):
            x, y = (row["columns"].get(f"{system}: {part}") for part in AXES)
            if x is None or y is None:
                continue
            main = system == "student"
            style = {"mfc": colour if main else PAPER, "label": f"{key}  {name}" if main else None}
            style |= {"fmt": marker, "color": colour, "capsize": 2, "lw": 1}
            axis.errorbar(x["mean"], y["mean"], xerr=_reach(x), yerr=_reach(y), **style)
            place = {"xytext": (5, 4), "textcoords": "offset points"}
            axis.annotate(key, (x["mean"], y["mean"]), color=colour, fontsize=8, **place)
    axis.set_xlabel("content")
    axis.set_ylabel("concept")
    axis.set_title("students (dots), weak models (triangles), untrained strong models (squares)", fontsize=8)
    legend_below(figure, axis, 1)
    named = list(zip(names, known, strict=True))
    students = [
        told(f"{part} of the student", {name: row["columns"][f"student: {part}"]["mean"] for name, row in named})
        for part in AXES
    ]
    return svg(figure, f"concept over content of each setting; {'; '.join(students)}")


def _reach(column: Mapping[str, Any]) -> list[list[float]]:
    if column["sd"] is not None:
        return [[column["sd"]], [column["sd"]]]
    if column["low"] is None:
        return [[0.0], [0.0]]
    return reach(column["mean"], column["low"], column["high"])
