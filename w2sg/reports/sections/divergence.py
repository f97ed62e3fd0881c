"""Rewards over the divergence from the strong model: what is gained, and how far from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from w2sg.reports.figures import COLOURS, new_figure, points, svg
from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.sections.decoded import STEERED
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
        shown = [(name_of(report, n), COLOURS.get(n, STEERED), s) for n, s in known]
        rows = [
            (
                name,
                stacked(system["kl"], 2),
                WAYS[system["kl"]["how"]],
                stacked(system["reward"], 3, True),
                number(system["cost"]["strong"], 2),
                number(system["cost"]["guide"], 2),
            )
            for name, _, system in shown
        ]
        without = [(name_of(report, name), why) for name, why in decoding["without_kl"].items()]
        return {"figure": frontier_figure(shown, decoding.get("best_of_n")), "rows": rows, "without": without}


def frontier_figure(
    shown: Sequence[tuple[str, str, Mapping[str, Any]]], curve: Sequence[Mapping[str, Any]] | None = None
) -> Markup:
    """Rewards over the divergence from the strong model.

    Args:
        shown: name, colour and what was measured of each system. curve: of the best of n.
    """
    figure, axis = new_figure(5.6, 3.2)
    if curve:
        style = {"fmt": ".--", "color": COLOURS["explicit"], "label": "the best of 1, 2, 4, …"}
        points(axis, [p["kl"] for p in curve], [p["gold"] for p in curve], **style)
    for name, colour, system in shown:
        kl, bound = system["kl"], system["kl"].get("how") == "at most"
        points(axis, [kl["value"]], [system["reward"]], fmt="<" if bound else "o", color=colour, label=name)
        if kl["low"] is not None:
            axis.hlines(system["reward"]["value"], kl["low"], kl["high"], color=colour, lw=1)
    axis.set_xlabel("KL from the strong model, nats per reply (◂ at most)", fontsize=8)
    axis.set_ylabel("judge's reward", fontsize=8)
    axis.legend(frameon=False, fontsize=7)
    return svg(figure, "the judge's reward over the divergence from the strong model, in nats per reply")
