"""Runs of one kind as a table: a row for each setting, means over its seeds; and the files that tables go to."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.compare.runs import Finished, by_split, varying, words
from w2sg.errors import UserError
from w2sg.reports.html import number, page, table
from w2sg.store.files import write_json

PARTS = ("mean", "sd", "low", "high")
NOTE = (
    "Means ± standard deviation over splits, their seeds averaged before (over seeds where there is one split); with "
    "one run, its own interval over prompts. They describe these runs and test nothing: seeds of one split share their "
    "training rows, and splits of one pool many of them."
)

Measures = Mapping[str, Mapping[str, float | None] | None]


def rows_of(
    runs: Sequence[Finished], measures: Callable[[dict[str, Any]], Measures], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """A row per setting: for each column its mean over splits, whose seeds are averaged before (over seeds where there
    is one split), their standard deviation, and the number of runs.

    One seed keeps the interval that its own report has. Of two runs of one setting and seed the newer counts, and the
    older one for what the newer has not measured (a baseline, say).

    Args:
        measures: what one report says, {column: {value, and perhaps low, high}}; what it does not say is left empty.
    """
    if not runs:
        return []
    keys, _ = varying(list(runs))
    cells: dict[str, dict[tuple[int, int], dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    settings: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: (run.folder / "report.json").stat().st_mtime):
        values = {k: run.settings.get(k) for k in keys}
        cell = json.dumps(values, sort_keys=True, default=str)
        cells[cell][run.replicate] |= {k: v for k, v in measures(run.content).items() if v is not None}
        settings[cell] = values
    rows = []
    for cell, replicates in cells.items():
        found = dict(sorted(replicates.items()))
        row: dict[str, Any] = {"setting": words(settings[cell]), "seeds": len(found)}
        for name in columns:
            there = {r: f[name] for r, f in found.items() if f.get(name) is not None and f[name]["value"] is not None}
            if not there:
                row[name] = None
                continue
            values = by_split({r: f["value"] for r, f in there.items()})
            row[name] = {"mean": float(np.mean(values)), "sd": None, "low": None, "high": None}
            if len(values) > 1:
                row[name]["sd"] = float(np.std(values, ddof=1))
            else:
                row[name] |= {k: next(iter(there.values())).get(k) for k in ("low", "high")}
        rows.append(row)
    return sorted(rows, key=lambda row: row["setting"])


def cell(found: dict[str, Any] | None, digits: int = 3) -> str:
    """A measure of a row as text."""
    if found is None:
        return "–"
    if found["sd"] is not None:
        return f"{number(found['mean'], digits)} ± {number(found['sd'], digits)}"
    inside = "" if found["low"] is None else f" [{number(found['low'], digits)}, {number(found['high'], digits)}]"
    return number(found["mean"], digits) + inside


def show(rows: Sequence[dict[str, Any]], columns: Mapping[str, str], title: str, console: Any) -> None:
    """Print these columns, {name: heading}."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Grid

    grid = Grid(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("setting", "seeds", *columns.values()):
        grid.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        grid.add_row(row["setting"], str(row["seeds"]), *(cell(row[name], 2) for name in columns))
    console.print(grid)


def write(
    rows: Sequence[dict[str, Any]],
    columns: Mapping[str, str],
    root: Path,
    stem: str,
    title: str,
    note: str,
    figure: str = "",
) -> list[Path]:
    """Write the table as a page, CSV and JSON beside the runs.

    Raises:
        UserError: the folder cannot be written.
    """
    lines = [["setting", "seeds", *(f"{name} {part}" for name in columns for part in PARTS)]]
    for row in rows:
        numbers = [(row[name] or {}).get(part) for name in columns for part in PARTS]
        lines.append([row["setting"], row["seeds"], *("" if x is None else x for x in numbers)])
    shown = [(row["setting"], row["seeds"], *(cell(row[name]) for name in columns)) for row in rows]
    sections = [f"<h1>{title}</h1>", figure, table(("", "seeds", *columns.values()), shown)]
    sections.append(f"<p class=note>{NOTE} {note} Each run's report has the whole.</p>")
    return write_summary(root, stem, page(title, sections), lines, rows)


def _inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula (OWASP's rule); numbers stay numbers.

    >>> _inert("=1+1"), _inert(-0.5), _inert("-0.5"), _inert("rkl")
    ("'=1+1", -0.5, '-0.5', 'rkl')
    """
    if not isinstance(value, str) or not value.startswith(
        ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
    ):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def write_summary(root: Path, stem: str, html: str, lines: Sequence[Sequence[Any]], content: Any) -> list[Path]:
    """Write STEM.html, STEM.csv and STEM.json, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    text = io.StringIO()
    csv.writer(text).writerows([_inert(value) for value in line] for line in lines)
    try:
        for name, written in ((f"{stem}.csv", text.getvalue()), (f"{stem}.html", html)):
            (root / f"{name}.tmp").write_text(written, encoding="utf-8")
            (root / f"{name}.tmp").replace(root / name)
        write_json(root / f"{stem}.json", content)
    except OSError as error:
        raise UserError(f"runs: the summary cannot be written to {root} ({error.strerror or error})") from error
    return [root / f"{stem}.{kind}" for kind in ("html", "csv", "json")]
