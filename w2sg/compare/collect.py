"""Many finished runs as one page: what was measured of each, tests between label runs, and decoders side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2sg.compare.decoders import DecoderGroups
from w2sg.compare.label_runs import Cell, compare_label_runs
from w2sg.compare.label_section import LabelRuns, findings
from w2sg.compare.names import methods_in_words, shortest
from w2sg.compare.runs import Finished, common_to, read_runs
from w2sg.compare.settings import Settings
from w2sg.compare.table import write_summary
from w2sg.config.programs import command
from w2sg.errors import UserError
from w2sg.reports.render import page, render
from w2sg.reports.section import Section
from w2sg.reports.words import counted, folded

EMPTY = {"cells": [], "student_against_teacher": [], "between_losses": [], "ahead": [], "notes": [], "decoders": []}
OWN = ("method", "folder", "split_seed", "seed", "setting", "loss")  # columns of summary.csv that say which run it is


@dataclass(frozen=True)
class Summary:
    """What many runs say together.

    Attributes:
        content: what summary.json holds.
        cells: of label runs, in the order of settings, then losses.
        html: the page. lines: of summary.csv, names of columns first.
        sections: of the page and the terminal.
    """

    content: dict[str, Any]
    cells: Sequence[Cell]
    html: str
    lines: list[list[Any]]
    sections: Sequence[Section]

    def write(self, root: Path) -> list[Path]:
        """Write summary.html, .csv and .json beside the runs.

        Raises:
            UserError: the folder cannot be written.
        """
        return write_summary(root, "summary", self.html, self.lines, self.content)

    def show(self, console: Any) -> None:
        """Print the tables, then what is resolved, then what was left out and why."""
        console.print(heading(self.content), style="bold")
        for section in self.sections:
            if (table := section.table(self.content)) is not None:
                console.print(table)
        for line in findings(self.content):
            console.print(f"- {line}")
        for line, _ in folded(self.content["left_out"]):
            console.say(f": {line}", "left out", "yellow")


def collect(root: Path) -> Summary:
    """Gather every finished run below a folder.

    A report that was changed by hand or is of other code may hold anything. It is left out, named with the reason, and
    the others count.

    Raises:
        UserError: no folder, or no finished run in it.
    """
    if not root.is_dir():
        raise UserError(f"runs: there is no folder {root}; name the one that runs were written to, as runs=outputs")
    runs, left_out = read_runs(root)
    try:
        return _summary(root, runs, left_out)
    except UserError:
        raise
    except Exception:
        usable = [run for run in runs if not (reason := _broken(root, run)) or left_out.append(reason)]
        if len(usable) == len(runs):
            raise
        return _summary(root, usable, left_out)


def _broken(root: Path, run: Finished) -> str | None:
    """Why a run alone makes no page; None where it does."""
    from w2sg.console import Plain

    try:
        _summary(root, [run], []).show(Plain(quiet=True))
    except Exception as error:
        where = run.folder.relative_to(root)
        return f"{where}: its report cannot be used ({type(error).__name__}: {str(error)[:200]})"
    return None


def _summary(root: Path, runs: list[Finished], left_out: Sequence[str]) -> Summary:
    if not runs:
        more = "".join(f"\n  {line}" for line in left_out)
        raise UserError(f"runs: no finished run below {root}; a finished run leaves a report.json{more}")
    content: dict[str, Any] = {"common": common_to(runs), "runs": 0, **EMPTY, "left_out": [*left_out]}
    sections: list[Section] = []
    cells: list[Cell] = []
    if labels := [run for run in runs if run.labels]:
        cells, compared, more = compare_label_runs(labels)
        content |= compared
        content["left_out"] += more
        sections.append(LabelRuns())
    if decoders := [run for run in runs if run.decodes]:
        sections.append(DecoderGroups.measure(decoders))
    others = [run for run in runs if not run.labels]
    settings = Settings.measure([*(run for cell in cells for run in cell.runs.values()), *others])
    sections.append(settings)
    for section in sections:
        content |= section.content
    if settings.older:
        content["left_out"].append(
            f"{counted(len(settings.older), 'older runs')} of the same configuration, but for what the newer did not "
            "measure: " + ", ".join(settings.older)
        )
    content["runs"] = sum(len(cell.runs) for cell in cells) + len(others)
    content["seconds"] = _seconds(runs)
    json.dumps(content, allow_nan=False)  # numbers that are none show here, where their run can be left out
    left_out = [(f"left out: {first}", lines) for first, lines in folded(content["left_out"])]
    values = {"title": heading(content), "findings": findings(content), "left_out": left_out}
    values |= {"root": str(root), "command": command("compare", str(root))}
    summary = render("summary.html", report=content, **values)
    html = page(heading(content), [summary, *(section.html(content) for section in sections)])
    return Summary(content, cells, html, _lines(cells, others), sections)


def heading(content: dict[str, Any]) -> str:
    """How many runs, of what."""
    common = content["common"]
    pair = [common[k] for k in ("weak.name", "strong.name") if k in common]
    parts = [" → ".join(pair)] if len(pair) == 2 else pair
    parts += [common[k] for k in ("dataset.name", "method._target_") if k in common]
    return f"{counted(content['runs'], 'runs')}: " + (", ".join(parts) or "several models, datasets and methods")


def _lines(cells: Sequence[Cell], others: Sequence[Finished]) -> list[list[Any]]:
    """The names of columns, and one line per run: its own columns, then those that its report has."""
    lines = [(run, _line_of_labels(cell, run)) for cell in cells for run in cell.runs.values()]
    lines += [(run, _line(run)) for run in others]
    methods, folders = methods_in_words([run.method for run, _ in lines]), shortest([run.where for run, _ in lines])
    headings = _headings([run for run, _ in lines], {*OWN, *(name for _, line in lines for name in line)})
    for run, line in lines:
        line |= {"method": methods[run.method], "folder": folders[run.where]}
        line |= {
            headings[heading, end]: value
            for heading, estimate in run.summary.items()
            for end, value in estimate.items()
            if value is not None
        }
    names = list(dict.fromkeys(k for _, line in lines for k in line))
    return [names, *([line.get(name, "") for name in names] for _, line in lines)]


def _headings(runs: Sequence[Finished], taken: set[str]) -> dict[tuple[str, str], str]:
    """(heading, end of its interval) of what reports say of themselves -> a column that nothing else has."""
    headings = dict.fromkeys(heading for run in runs for heading in run.summary)
    columns: dict[tuple[str, str], str] = {}
    for end, word in {"value": "", "low": " low", "high": " high"}.items():
        for heading in headings:
            name = heading + word
            while name in taken:
                name = f"summary: {name}"
            columns[heading, end] = name
            taken.add(name)
    return columns


def _line(run: Finished) -> dict[str, Any]:
    split_seed, seed = run.replicate
    return {"method": "", "folder": "", "split_seed": split_seed, "seed": seed}


def _line_of_labels(cell: Cell, run: Finished) -> dict[str, Any]:
    line = _line(run) | {"setting": cell.setting, **cell.values, "loss": cell.loss}
    for model, values in run.content["metrics"].items():
        line |= {f"{model}_{k}": v for k, v in values.items() if k != "intervals"}
    return line | {f"pgr_{k}": v for k, v in run.content["pgr"].items()}


def _seconds(runs: Sequence[Finished]) -> dict[str, float]:
    """What the stages of all runs took, each counted once, and what they would have taken without a store."""
    once = {s["key"]: s["seconds"] for run in runs for s in run.content["stages"]}
    every = sum(s["seconds"] for run in runs for s in run.content["stages"])
    return {"computed": sum(once.values()), "without_store": every}
