"""Label runs on the page, in the files and on the terminal of many runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from w2sg.compare.label_figures import (
    BASELINES,
    bars_figure,
    difference_figure,
    gap_figure,
    lines_figure,
    pairs_figure,
    settings_of,
    size_figure,
)
from w2sg.reports.section import Report, Section
from w2sg.reports.words import LEVEL, Cell, counted, estimate, number, p_text, p_value, stacked


class LabelRuns(Section):
    """Accuracies by setting and loss, students against teachers, and losses against each other (summary.json:
    ``cells``, ``student_against_teacher``, ``between_losses``, ``ahead``, ``notes``).
    """

    key, template = "label_runs", "summary_labels.html"

    def show(self, report: Report) -> dict[str, Any]:
        """Three figures and their tables."""
        several = any(len(row["seeds"]) > 1 for row in report["cells"])
        spread = "over splits (their seeds averaged), or over seeds where there is one split"
        accuracies, tests = _rows(report)
        first = ["setting"] * (len(settings_of(report)) > 1) + ["loss"]
        return {
            "bars": f"Bars are means, whiskers one standard deviation {spread}" if several else "Bars are single runs",
            "figures": [bars_figure(report), lines_figure(report), difference_figure(report)],
            "sizes": size_figure(report),
            "gaps": gap_figure(report),
            "pairs": pairs_figure(report),
            "first": first,
            "accuracies": accuracies,
            "tests": tests,
            "test_names": _tests(report["student_against_teacher"]),
            "exact": report["student_against_teacher"][0]["exact"],
            "matrices": list(_matrices(report)),
            "ahead": [
                (
                    f"{e['a']} against {e['b']}".replace("_", " "),
                    e["settings"],
                    e["ahead"],
                    e["behind"],
                    p_value(e["p_holm"]),
                )
                for e in report["ahead"]
            ],
        }

    def table(self, report: Report) -> Any:
        """A line per setting and loss, with the corrected p of student against teacher."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        teachers = {(e["setting"], e["loss"]): e for e in report["student_against_teacher"]}
        grids = []
        for setting in settings_of(report):
            rows = [row for row in report["cells"] if row["setting"] == setting]
            shared = {m: row["accuracy"][m] for row in rows for m in BASELINES if m in row["accuracy"]}
            names = [f"{words} {_mean(shared[m])}" for m, words in BASELINES.items() if m in shared]
            title = Text.assemble((setting, "bold"), ": " + ", ".join(names))
            grid = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD)
            for column in ("loss", "runs", "student", "PGR", "p"):
                grid.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
            for row in rows:
                p = p_value(teachers[setting, row["loss"]]["p_holm"])
                student = _mean(row["accuracy"]["student"])
                grid.add_row(row["loss"].replace("_", " "), str(len(row["seeds"])), student, _pgr(row["pgr"]), p)
            grids.append(grid)
        return Group(*grids)


def findings(content: Report) -> list[str]:
    """What is there and what is not, in sentences; p values are corrected for their number (Holm)."""
    lines = []
    teachers = content["student_against_teacher"]
    better = [e for e in teachers if e["p_holm"] < LEVEL and e["difference"] > 0]
    worse = [e for e in teachers if e["p_holm"] < LEVEL and e["difference"] < 0]
    if teachers:  # there are none where no run is of label models
        lines.append(
            f"student against teacher: better in {len(better)}, worse in {len(worse)}, not resolved in "
            f"{len(teachers) - len(better) - len(worse)} of {counted(len(teachers), 'cells')} (setting and loss; "
            f"corrected p < .05; {_tests(teachers)})"
        )
    lines += content["notes"]
    cells = counted(len(content["cells"]), "cells")
    unresolved = [row for row in content["cells"] if not row["pgr"]["resolved"]]
    if unresolved:
        lines.append(f"the gap itself is not resolved in {len(unresolved)} of {cells}: no PGR")
    compared = content["between_losses"]
    compared = [e for e in compared if not e["identical"]]
    resolved = [e for e in compared if e["p_holm"] < LEVEL]
    if compared:
        lines.append(
            f"differences between losses that are resolved (corrected p < .05): {len(resolved)} of {len(compared)}"
        )
    losses = {
        r["loss"]: r["loss_target"].removeprefix("w2sg.losses.") for r in content["cells"] if "(" not in r["loss"]
    }
    for entry in content["ahead"]:
        if (losses.get(entry["a"]), losses.get(entry["b"])) in {
            ("reverse_kl", "forward_kl"),
            ("reverse_kl", "cross_entropy"),
            ("reverse_cross_entropy", "cross_entropy"),
            ("reverse_confidence", "confidence"),
        }:
            of = f"{entry['ahead']} of {counted(entry['settings'], 'settings')}"
            names = f"{entry['a']} is ahead of {entry['b']}".replace("_", " ")
            p = f"sign test over settings, corrected p {p_text(entry['p_holm'])}"
            lines.append(f"{names} in {of}, behind in {entry['behind']} ({p})")
    untrained = [
        row
        for row in content["cells"]
        if "zero_shot" in row["accuracy"] and row["accuracy"]["zero_shot"]["mean"] >= row["accuracy"]["student"]["mean"]
    ]
    if untrained:
        lines.append(
            f"the mean accuracy of the untrained strong model is at least that of the student in {len(untrained)} of "
            f"{cells} (means compared, not a test)"
        )
    return lines


def _tests(entries: list[dict[str, Any]]) -> str:
    """The tests that were made, in words."""
    return "; ".join(dict.fromkeys(e["test"] for e in entries))


def _mean(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return "–"
    return f"{accuracy['mean']:.3f}" + (f" ± {accuracy['sd']:.3f}" if accuracy["sd"] is not None else "")


def _pgr(pgr: dict[str, Any]) -> str:
    if pgr["resolved"]:
        return estimate(pgr, 2)
    return "no gap" if pgr["gap_high"] is not None and pgr["gap_high"] < 0 else "gap not resolved"


def _pgr_cell(pgr: dict[str, Any]) -> Cell | str:
    return stacked(pgr, 2) if pgr["resolved"] else _pgr(pgr)


def _rows(content: Report) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Accuracies, and tests of the student against its teacher, a row for each cell."""
    teachers = {(e["setting"], e["loss"]): e for e in content["student_against_teacher"]}
    several = len(settings_of(content)) > 1
    accuracies, tests = [], []
    for row in content["cells"]:
        test = teachers[row["setting"], row["loss"]]
        name = [row["setting"]] * several + [row["loss"].replace("_", " ")]
        models = (_mean(row["accuracy"].get(m)) for m in ("weak", "student", "ceiling", "zero_shot"))
        accuracies.append((*name, row["repeats"], *models, number(row["length_only"]), _pgr_cell(row["pgr"])))
        tests.append(
            (
                *name,
                stacked({**test, "value": test["difference"]}, sign=True),
                p_value(test["p_holm"]),
                ", ".join(p_value(p) for p in test["mcnemar_p"]),
                number(row["nll"]),
                number(row["overconfidence"], sign=True),
                number(row["gain"], 4, sign=True),
                number(row["misfit"], 4, sign=True),
                number(row["remainder"], 4, sign=True),
            )
        )
    return accuracies, tests


def _matrices(content: Report) -> Iterator[tuple[str, list[str], list[tuple[Any, ...]]]]:
    """Per setting, the accuracy of the row's loss minus that of the column's."""
    for setting in settings_of(content):
        entries = {(e["a"], e["b"]): e for e in content["between_losses"] if e["setting"] == setting}
        names = [row["loss"] for row in content["cells"] if row["setting"] == setting]
        if not entries:
            continue
        rows = []
        for a in names:
            cells: list[Any] = []
            for b in names:
                entry, sign = entries.get((a, b)), 1
                if entry is None:
                    entry, sign = entries.get((b, a)), -1
                if entry is None:
                    cells.append("")
                elif entry["identical"]:
                    cells.append("identical")
                else:
                    difference = sign * entry["difference"]
                    kind = "" if entry["p_holm"] >= LEVEL else "yes" if difference > 0 else "no"
                    shown = f"{number(difference, sign=True)} (p {p_text(entry['p_holm'])})"
                    cells.append(Cell(shown, kind=kind))
            rows.append((a.replace("_", " "), *cells))
        yield setting, [n.replace("_", " ") for n in names], rows
