"""Figures as SVG inside a page, and the colours of the systems that stand in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.printable import printable

COLOURS = {
    "weak": "#94a3b8",
    "student": "#2563eb",
    "ceiling": "#334155",
    "zero_shot": "#d97706",
    "length": "#dc2626",
    # of methods whose models write
    "base": "#d97706",
    "cong": "#2563eb",
    "cong_s": "#60a5fa",
    "weak_sft": "#0891b2",
    "plain": "#a16207",
    "aux_conf": "#059669",
    "wspo": "#be185d",
    "guide": "#94a3b8",
    "naive": "#0891b2",
    "icl": "#60a5fa",
    "self": "#a16207",
    "self_cot": "#ca8a04",
    "shuffled": "#be185d",
    "gold_exemplars": "#059669",
    # of rewards
    "implicit_per_token": "#4d7c0f",
    "explicit": "#7c3aed",
}
# of losses: pale for forward, full for reverse, so that the pairs of the paper stand together
PALETTE = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569", "#a16207")


def colour_of(system: str) -> str:
    """A system has the same colour in every figure; one that is not known is violet."""
    return COLOURS.get(system, "#7c3aed")


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure in inches and its axes (an array where there are several columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def points(
    axis: Any, x: Sequence[float], estimates: Sequence[dict[str, Any]], across: bool = False, **style: Any
) -> None:
    """Estimates with their intervals, over x or (``across``) beside it; what has no value is left out."""
    values = np.array([np.nan if f["value"] is None else f["value"] for f in estimates])
    ends = [
        [v if f[end] is None else f[end] for v, f in zip(values, estimates, strict=True)] for end in ("low", "high")
    ]
    errors = np.abs(np.array(ends) - values)
    x, y, errors = (values, x, {"xerr": errors}) if across else (x, values, {"yerr": errors})
    axis.errorbar(x, y, **errors, **{"lw": 1.3, "ms": 4.5, "elinewidth": 1, "capsize": 2, **style})


def reach(value: float, low: float, high: float) -> list[list[float]]:
    """How far an interval reaches to both sides of a value, as error bars want it.

    Not below 0: where all rows agree, a bootstrap's mean is the value up to its rounding.
    """
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def band(axis: Any, estimate: dict[str, Any], colour: str) -> None:
    """An estimate that holds for all x, with its interval."""
    if estimate["value"] is not None:
        axis.axhline(estimate["value"], color=colour, ls="--", lw=1)
    if estimate["low"] is not None:
        axis.axhspan(estimate["low"], estimate["high"], color=colour, alpha=0.12, lw=0)


def training_figures(curves: dict[str, list[dict[str, float]]]) -> Iterable[Markup]:
    """Losses of every fit over its steps; of preference tuning the rewards and their accuracy, too."""
    losses = {"loss": "#2563eb", "held_out_loss": "#dc2626"}
    rewards = {"rewards/chosen": "#059669", "rewards/rejected": "#dc2626", "rewards/margins": "#2563eb"}
    others = []
    for name, logged in curves.items():
        if any("rewards/margins" in point for point in logged):
            shown = {"loss": losses, "implicit rewards": rewards, "accuracy": {"rewards/accuracies": "#334155"}}
            yield _lines([(f"{name}: {words}", logged, keys) for words, keys in shown.items()])
        elif logged:
            others.append((f"{name}: loss", logged, losses))
    for start in range(0, len(others), 4):
        yield _lines(others[start : start + 4])


def _lines(panels: Sequence[tuple[str, list[dict[str, float]], dict[str, str]]]) -> Markup:
    """Panels beside each other: a title, the points, and the colour of each key."""
    figure, axes = new_figure(2.85 * len(panels), 2.1, len(panels))
    for axis, (name, logged, keys) in zip(np.atleast_1d(axes), panels, strict=True):
        for key, colour in keys.items():
            if xy := [(p["step"], p[key]) for p in logged if key in p]:
                words = key.rpartition("/")[2].replace("held_out", "held-out").replace("_", " ")
                axis.plot(*zip(*xy, strict=True), "." if len(xy) == 1 else "-", color=colour, lw=1, label=words)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(axis.lines) > 1:
            axis.legend(frameon=False, fontsize=7)
    return svg(figure, "; ".join(name for name, *_ in panels) + ", over optimizer steps")


def svg(figure: Any, alt: str) -> Markup:
    """The figure as an image that needs no other file, with words for those who cannot see it."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of data and models, which may hold a dollar
        text.set_text(printable(text.get_text()))
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "w2sg"}):  # else every drawing has other ids in it
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(alt, data)
