"""Many finished refinements of answers as one table and one figure: settings side by side on both axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2sg.compare import table as side_by_side
from w2sg.compare.runs import read
from w2sg.reports.html import PALETTE, new_figure, reach, svg

SYSTEMS = {"student": "student", "weak": "weak", "naive": "naive", "base": "untrained"}
AXES = ("content", "concept")
COLUMNS = {f"{name}_{axis}": f"{words}: {axis}" for axis in AXES for name, words in SYSTEMS.items()}
COLUMNS |= {
    f"over_{name}_{axis}": f"student − {words}: {axis}"
    for axis in AXES
    for name, words in (("naive", "naive"), ("base", "untrained"), ("self", "own answers"))
}
COLUMNS |= {
    "wins_naive": "student's wins over naive",
    "wins_base": "student's wins over untrained",
    "retention": "share of the weak concept in the refined labels",
    "copy_rate": "copy rate",
    "exemplars": "exemplars in a context",
}


def collect(root: Path) -> list[dict[str, Any]]:
    """A row per setting, as `w2sg.compare.table.rows_of` has them."""
    return side_by_side.rows_of([run for run in read(root)[0] if run.refines], _numbers, list(COLUMNS))


def _numbers(content: dict[str, Any]) -> dict[str, dict[str, float | None] | None]:
    """What one run's report says, as estimates."""
    told = content["refinement"]
    labels = told["labels"]["student"]
    found: dict[str, Any] = {"copy_rate": labels.get("copy_rate")}
    if "exemplars" in labels:
        found["exemplars"] = {"value": labels["exemplars"]["mean"], "low": None, "high": None}
    for axis in AXES:
        for name in SYSTEMS:
            found[f"{name}_{axis}"] = told["systems"].get(name, {}).get(axis)
        for other in ("naive", "base", "self"):
            found[f"over_{other}_{axis}"] = told["differences"].get(f"student - {other}", {}).get(axis)
    for other in ("naive", "base"):
        found[f"wins_{other}"] = told.get("wins", {}).get(other, {}).get("win_rate")
    found["retention"] = told["retention"].get("concept", {}).get("student", {}).get("share")
    return found


def show(rows: list[dict[str, Any]], console: Any) -> None:
    """Print the columns that say most and that a run has; the page has them all."""
    names = ("student_content", "over_naive_content", "over_base_content", "student_concept", "over_naive_concept")
    shown = {name: COLUMNS[name] for name in (*names, "retention") if any(row[name] for row in rows)}
    side_by_side.show(rows, shown, "Refinement", console)


def write(rows: list[dict[str, Any]], root: Path) -> list[Path]:
    """Write summary_refined.html, .csv and .json beside the runs.

    Raises:
        UserError: the folder cannot be written.
    """
    there = {name: words for name, words in COLUMNS.items() if any(row[name] for row in rows)}
    note = "Differences are paired over test prompts."
    title = "Refinement of weak answers, settings side by side"
    return side_by_side.write(rows, there, root, "summary_refined", title, note, _figure(rows))


def _figure(rows: list[dict[str, Any]]) -> str:
    """Concept over content: each setting's student, with its weak and its untrained model as hollow points."""
    known = [row for row in rows if row["student_content"] and row["student_concept"]]
    if not known:
        return ""
    figure, axis = new_figure(6.4, 4.2)
    for k, row in enumerate(known):
        colour = PALETTE[k % len(PALETTE)]
        for name, marker in (("student", "o"), ("weak", "v"), ("base", "s")):
            x, y = (row[f"{name}_{part}"] for part in AXES)
            if x is None or y is None:
                continue
            style = {"mfc": colour if name == "student" else "white", "label": row["setting"]}
            if name != "student":
                style["label"] = None
            axis.errorbar(
                x["mean"], y["mean"], xerr=_reach(x), yerr=_reach(y), fmt=marker, color=colour, capsize=2, lw=1, **style
            )
    axis.set_xlabel("content")
    axis.set_ylabel("concept")
    axis.set_title("students (dots), weak models (triangles), untrained strong models (squares)", fontsize=8)
    axis.legend(frameon=False, fontsize=7)
    return svg(figure, "concept over content of each setting's student, weak model and untrained strong model")


def _reach(found: dict[str, Any]) -> list[list[float]]:
    if found["sd"] is not None:
        return [[found["sd"]], [found["sd"]]]
    if found["low"] is None:
        return [[0.0], [0.0]]
    return reach(found["mean"], found["low"], found["high"])
