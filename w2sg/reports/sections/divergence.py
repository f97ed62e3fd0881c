"""Rewards over the divergence from the strong model: what is gained, and how far from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from w2sg.reports.colours import COLOURS, Look, looks
from w2sg.reports.figures import ends, keyed, legend_below, new_figure, points, svg, told
from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.words import number, stacked

WAYS = {"itself": "itself", "exact": "mean over its replies", "at most": "at most"}


class Divergence(Section):
    """Reward and divergence of each system that has one (report.json: ``decoding.systems.*.kl``, ``without_kl``).

    Args:
        divergences: by system, as `w2sg.evaluation.divergence.frontier` gives them. without: why others have none.
    """

    key, template = "divergence", "divergence.html"

    def __init__(
        self, divergences: Mapping[str, Mapping[str, Any]] | None = None, without: Mapping[str, str] | None = None
    ):
        systems = {name: {"kl": dict(kl)} for name, kl in (divergences or {}).items()}
        content = {} if divergences is None else {"systems": systems, "without_kl": dict(without or {})}
        super().__init__(content={"decoding": content})

    def show(self, report: Report) -> dict[str, Any] | None:
        """Figure and table, where there are two systems to compare."""
        decoding = report["decoding"]
        known = [(n, s) for n, s in decoding["systems"].items() if "kl" in s and "reward" in s]
        if len(known) < 2:
            return None
        shown = {name_of(report, n): s for n, s in known}
        look = {name_of(report, name): found for name, found in looks(decoding["systems"]).items()}
        rows = [
            (
                name,
                stacked(system["kl"], 2),
                WAYS[system["kl"]["how"]],
                stacked(system["reward"], 3, True),
                number(system["cost"]["strong"], 2),
                number(system["cost"]["guide"], 2),
            )
            for name, system in shown.items()
        ]
        without = [(name_of(report, name), why) for name, why in decoding["without_kl"].items()]
        return {"figure": frontier_figure(shown, look, decoding.get("best_of_n")), "rows": rows, "without": without}


def frontier_figure(
    shown: Mapping[str, Mapping[str, Any]], look: Mapping[str, Look], curve: Sequence[Mapping[str, Any]] | None = None
) -> Markup:
    """Rewards over the divergence from the strong model.

    Args:
        shown: what was measured of each system, by name. look: how each is drawn. curve: of the best of n.
    """
    figure, axis = new_figure(6.4, 3.6 + 0.1 * len(shown))
    if curve:
        style = {"fmt": ".--", "color": COLOURS["explicit"], "label": "the best of 1, 2, 4, …"}
        points(axis, [p["kl"] for p in curve], [p["gold"] for p in curve], **style)
    for name, system in shown.items():
        kl = system["kl"]
        keyed(axis, kl["value"], system["reward"], name, look[name], "≤ " if kl.get("how") == "at most" else "")
        if kl["low"] is not None:
            axis.hlines(system["reward"]["value"], kl["low"], kl["high"], color=look[name].colour, lw=1)
    axis.set_xlabel("KL from the strong model, nats per reply (≤: a bound)", fontsize=8)
    axis.set_ylabel("judge's reward", fontsize=8)
    legend_below(figure, axis)
    rewards = told("judge's reward", {name: system["reward"] for name, system in shown.items()})
    far = told("KL from the strong model in nats per reply", {name: system["kl"] for name, system in shown.items()}, 2)
    rows = [(name, *ends(system["kl"]), *ends(system["reward"])) for name, system in shown.items()]
    return svg(figure, f"{rewards}; {far}", (("", "KL", "low", "high", "reward", "low", "high"), rows))
