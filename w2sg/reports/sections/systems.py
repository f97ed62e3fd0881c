"""Systems that answered the same prompts, side by side: rewards, win rates, lengths, damage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.reports.colours import FAINT, PAPER, assigned
from w2sg.reports.figures import new_figure, points, svg, told
from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.sections.accuracy import accuracy_of
from w2sg.reports.sections.alpha_sweep import length_cells
from w2sg.reports.words import NONE, cut_off_warning, estimate, judged, no_verdict_warning, stacked, unjudged, wins_cell

# What the student is held against on the page, in words.
OTHERS = {"weak_sft": "weak SFT", "ceiling": "the ceiling"}


class Systems(Section):
    """Trained models beside the untrained one, "base" (report.json: ``text.systems``, ``text.student``)."""

    key, template = "systems", "systems.html"

    def show(self, report: Report) -> dict[str, Any]:
        """Figure and table."""
        head, rows = _table(report)
        return {"figure": systems_figure(report), "head": head, "rows": rows}

    def warnings(self, report: Report) -> list[str]:
        """Replies that were cut off, and wins that are a matter of length."""
        systems = report["text"]["systems"]
        shares = {name_of(report, n): s["length"]["truncated"] for n, s in systems.items()}
        over = {
            f"{name_of(report, name)} over {name_of(report, other)}": measured
            for name, system in systems.items()
            for other, measured in system.get("against", {}).items()
            if other == "base" or name == student_of(report)
        }
        lines = no_verdict_warning(over) + cut_off_warning(shares, systems=systems)
        student = systems.get(student_of(report), {}).get("against", {}).get("base")
        if student and student["length_controlled"]["low"] is not None:
            raw, controlled = student["win_rate"], student["length_controlled"]
            if raw["low"] > 0.5 and controlled["low"] <= 0.5:
                lines.append(
                    f"the student's win rate over the untrained model ({raw['value']:.3f}) is not resolved once length "
                    f"is controlled ({controlled['value']:.3f} [{controlled['low']:.3f}, {controlled['high']:.3f}])"
                )
        return lines

    def finding(self, report: Report) -> str:
        """The student's win rates."""
        systems = report["text"]["systems"]
        against = systems.get(student_of(report), {}).get("against", {})
        if "base" not in against:
            judge = report["text"].get("judge")
            return "" if judge else "No judge was given: rewards and win rates of the trained models are unknown."
        raw, controlled = against["base"]["win_rate"], against["base"]["length_controlled"]
        others = ", ".join(
            f"against {words} {judged(against[other]['win_rate'], 0.5)}{unjudged(against[other])}"
            for other, words in OTHERS.items()
            if other in against
        )
        return (
            f"The student's win rate over the untrained strong model is {judged(raw, 0.5)}"
            f"{unjudged(against['base'])}, with length controlled {judged(controlled, 0.5)}"
            f"{'; ' if others else ''}{others}."
        )

    def summary(self, report: Report) -> dict[str, Any]:
        """The student's rewards, wins, damage, length and preference accuracy."""
        student = report["text"]["systems"].get(student_of(report))
        if student is None:
            return {}
        wins = {other: against["win_rate"] for other, against in student.get("against", {}).items()}
        return {
            "wins over untrained": wins.get("base"),
            "length controlled": student.get("against", {}).get("base", {}).get("length_controlled"),
            "student's reward": student.get("reward"),
            "wins over weak SFT": wins.get("weak_sft"),
            "wins over ceiling": wins.get("ceiling"),
            "KL per token": student.get("kl_per_token"),
            "perplexity": student.get("perplexity"),
            "tokens": {"value": student["length"]["mean"]},
        }

    def table(self, report: Report) -> Any:
        """The systems side by side, where they were judged."""
        from rich.table import Table

        systems = report["text"]["systems"]
        if not any("against" in system for system in systems.values()):
            return None
        grid, rewarded = Table(), any("reward" in system for system in systems.values())
        reward = ["reward"] if rewarded else []
        for column in ("", *reward, "wins over untrained", "length controlled", "tokens"):
            grid.add_column(column, justify="left" if not column else "right")
        for name, system in systems.items():
            against = system.get("against", {}).get("base", {})
            cells = [system.get("reward", NONE)] if rewarded else []
            cells += [against.get(key, NONE) for key in ("win_rate", "length_controlled")]
            grid.add_row(name_of(report, name), *map(estimate, cells), f"{system['length']['mean']:.0f}")
        return grid


def student_of(report: Report) -> str:
    """The name of the system that the run is about; older reports are of ConG."""
    return report["text"].get("student", "cong")


def systems_figure(report: Report) -> Markup | str:
    """Reward of each system's replies, and how often they beat the untrained strong model's."""
    systems = report["text"]["systems"]
    rewarded = [name for name in systems if "reward" in systems[name]]
    names = rewarded or [name for name in systems if "base" in systems[name].get("against", {})]
    if not names:
        return ""
    figure, axes = new_figure(9.6 if rewarded else 5.6, 0.95 + 0.36 * len(names), 2 if rewarded else 1)
    axes = np.atleast_1d(axes)
    colours = assigned(systems)
    for row, name in enumerate(names):
        style = {"fmt": "o", "color": colours[name], "across": True}
        if rewarded:
            points(axes[0], [row], [systems[name]["reward"]], **style)
        if against := systems[name].get("against", {}).get("base"):
            points(axes[-1], [row - 0.13], [against["win_rate"]], **style)
            points(axes[-1], [row + 0.17], [against["length_controlled"]], mfc=PAPER, **style)
    for axis in axes:
        axis.set_ylim(len(names) - 0.4, -0.6)
    if rewarded:
        axes[1].set_yticks(range(len(names)), [])
        axes[0].set_xlabel("explicit reward", fontsize=8)
    axes[0].set_yticks(range(len(names)), [name_of(report, n) for n in names])
    axes[-1].axvline(0.5, color=FAINT, ls="--", lw=1)
    axes[-1].set_xlabel("win rate over the untrained strong model (hollow: length controlled)", fontsize=8)
    wins = {
        name_of(report, name): systems[name]["against"]["base"]["win_rate"]
        for name in names
        if "base" in systems[name].get("against", {})
    }
    words = told("win rate over the untrained strong model", wins)
    if rewarded:
        words = f"{told('explicit reward', {name_of(report, n): systems[n]['reward'] for n in names})}; {words}"
    return svg(figure, words)


def _table(report: Report) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Heading and rows; what no system has is left out."""
    systems: Mapping[str, Mapping[str, Any]] = report["text"]["systems"]
    rewarded, judge, kl, perplexity = (
        any(key in system for system in systems.values()) for key in ("reward", "against", "kl_per_token", "perplexity")
    )
    others = [other for other in OTHERS if other in systems] if judge else []
    pairs = bool(report["metrics"])
    rows = []
    for name, system in systems.items():
        cells: list[Any] = [name_of(report, name)]
        against = system.get("against", {})
        cells += [stacked(system.get("reward", NONE))] if rewarded else []
        if judge:
            cells += [wins_cell(against.get("base", {}), key) for key in ("win_rate", "length_controlled")]
            cells += [wins_cell(against.get(other, {})) for other in others]
        cells += [stacked(system.get("kl_per_token", NONE), 4)] if kl else []
        cells += [stacked(system.get("perplexity", NONE), 2)] if perplexity else []
        cells += length_cells(system["length"], system["replies"])
        accuracy = accuracy_of(report, "student" if name == student_of(report) else name)
        rows.append((*cells, *([stacked(accuracy or NONE)] if pairs else [])))
    head = ["", *(["reward"] if rewarded else [])]
    head += ["wins over\nuntrained", "… length\ncontrolled"] if judge else []
    head += [f"wins over\n{name_of(report, other)}" for other in others]
    head += (["KL per\ntoken"] if kl else []) + (["perplexity"] if perplexity else [])
    return [*head, "tokens", "cut off", *(["pairs"] if pairs else [])], rows
