"""The best of n samples: what the guide takes for better, and what the judge does."""

from __future__ import annotations

from typing import Any

from w2sg.reports.colours import COLOURS
from w2sg.reports.figures import new_figure, points, svg, told
from w2sg.reports.section import Report, Section
from w2sg.reports.words import number, stacked


class BestOfN(Section):
    """Guide's value and judge's reward over n (report.json: ``decoding.best_of_n``).

    Args:
        curve: of `w2sg.metrics.replies.best_of_n`; None where the judge gives no rewards.
    """

    key, template = "best_of_n", "best_of_n.html"

    def __init__(self, curve: list[dict[str, Any]] | None = None):
        super().__init__(content={} if curve is None else {"decoding": {"best_of_n": curve}})

    def show(self, report: Report) -> dict[str, Any] | None:
        """Figure and table."""
        if (curve := report["decoding"].get("best_of_n")) is None:
            return None
        figure, axes = new_figure(7.6, 2.8, 2)
        inks = COLOURS["implicit_per_token"], COLOURS["explicit"]
        for axis, kind, colour in zip(axes, ("proxy", "gold"), inks, strict=True):
            points(axis, [max(p["kl"], 0.0) for p in curve], [p[kind] for p in curve], fmt="o-", color=colour)
            axis.set_title("guide's value" if kind == "proxy" else "judge's reward", fontsize=9)
            axis.set_xlabel("KL from one sample, at most: log n − (n − 1)/n", fontsize=8)
        value, reward = (
            told(words, {f"n = {p['n']}": p[kind] for p in curve})
            for kind, words in (("proxy", "guide's value of the best of n"), ("gold", "judge's reward"))
        )
        words = f"{value}; {reward}"
        rows = [(p["n"], number(p["kl"], 2), *(stacked(p[kind], 3, True) for kind in ("proxy", "gold"))) for p in curve]
        return {"figure": svg(figure, words), "rows": rows}

    def warnings(self, report: Report) -> list[str]:
        """That there is no curve."""
        if report["decoding"].get("best_of_n") or "judge" not in report["decoding"]:
            return []
        return ["the judge compares and gives no rewards, so there is no curve of the best of n"]
