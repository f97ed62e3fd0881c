"""Figures as SVG inside a page: in its colours, light or dark, with words and numbers for those who cannot see them."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from w2sg.printable import printable
from w2sg.reports.colours import BLUE, DARK, ORANGE, RED, TEAL, Look, variable
from w2sg.reports.render import plot
from w2sg.reports.words import spoken

Data = tuple[Sequence[str], Sequence[Sequence[Any]]]  # headings and rows of the numbers that a figure shows


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


def keyed(axis: Any, x: float, estimate: Mapping[str, Any], name: str, look: Look, before: str = "") -> None:
    """A system's point with its interval, and its key beside it; the legend says which key is whose.

    Args:
        before: what stands before the key, as "≤" where x is a bound.
    """
    style = {"fmt": look.marker, "color": look.colour, "ms": 6, "label": f"{look.key}  {name}"}
    points(axis, [x], [estimate], **style)
    if estimate["value"] is not None:
        text = f"{before}{look.key}"
        axis.annotate(text, (x, estimate["value"]), (6, 4), textcoords="offset points", fontsize=8, color=look.colour)


def legend_below(figure: Any, axis: Any, columns: int = 2) -> None:
    """One legend for all axes, below them, in the order of their keys."""
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), frameon=False, fontsize=8, loc="outside lower left", ncols=columns)


def training_figures(curves: dict[str, list[dict[str, float]]]) -> Iterable[Markup]:
    """Losses of every fit over its steps; of preference tuning the rewards and their accuracy, too."""
    losses = {"loss": BLUE, "held_out_loss": ORANGE}
    rewards = {"rewards/chosen": TEAL, "rewards/rejected": RED, "rewards/margins": BLUE}
    accuracies = {"rewards/accuracies": BLUE, "held_out_rewards/accuracies": ORANGE}
    others = []
    for name, logged in curves.items():
        if any("rewards/margins" in point for point in logged):
            shown = {"loss": losses, "implicit rewards": rewards, "accuracy": accuracies}
            yield _lines([(f"{name}: {words}", logged, keys) for words, keys in shown.items()])
        elif logged:
            others.append((f"{name}: loss", logged, losses))
    for start in range(0, len(others), 4):
        yield _lines(others[start : start + 4])


def _lines(panels: Sequence[tuple[str, list[dict[str, float]], dict[str, str]]]) -> Markup:
    """Panels beside each other: a title, the points, and the colour of each key."""
    figure, axes = new_figure(2.85 * len(panels), 2.1, len(panels))
    curves: dict[str, dict[float, float]] = {}  # in words, over steps
    for axis, (name, logged, keys) in zip(np.atleast_1d(axes), panels, strict=True):
        for key, colour in keys.items():
            if by_step := {p["step"]: p[key] for p in logged if key in p}:
                words = key.rpartition("/")[2].replace("held_out", "held-out").replace("_", " ")
                axis.plot(
                    *zip(*by_step.items(), strict=True),
                    ".-" if len(by_step) == 1 else "-",
                    color=colour,
                    lw=1,
                    label=words,
                )
                curves[name if name.endswith(words) else f"{name}, {words}"] = by_step
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(axis.lines) > 1:
            axis.legend(frameon=False, fontsize=7)
    steps = sorted({step for by_step in curves.values() for step in by_step})
    rows = [(f"{step:g}", *(f"{c[step]:.5g}" if step in c else "" for c in curves.values())) for step in steps]
    spans = (f"{name} from {next(iter(c.values())):.3f} to {[*c.values()][-1]:.3f}" for name, c in curves.items())
    return svg(figure, f"over optimizer steps: {', '.join(spans)}", (("step", *curves), rows))


def told(what: str, estimates: Mapping[str, Mapping[str, Any] | float | None], digits: int = 3) -> str:
    """The words of a figure: what it shows, then each name with its number and interval.

    >>> told("accuracy", {"student": {"value": 0.75, "low": 0.7, "high": 0.8}, "weak": 0.6})
    'accuracy: student 0.750 (0.700 to 0.800), weak 0.600'
    """
    return f"{what}: " + ", ".join(f"{name} {spoken(found, digits)}" for name, found in estimates.items())


def ends(estimate: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Value, low and high as cells of a figure's numbers."""
    return tuple(
        "" if (estimate or {}).get(end) is None else f"{estimate[end]:.5g}" for end in ("value", "low", "high")
    )


def svg(figure: Any, alt: str, data: Data | None = None) -> Markup:
    """The figure as a part of the page.

    Args:
        alt: what it shows, with its numbers.
        data: the numbers, which fold away below it and can be saved as CSV; None where a table beside it has them.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.patch.set_visible(False)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of data and models, which may hold a dollar
        text.set_text(printable(text.get_text()))
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "w2sg"}):  # else every drawing has other ids in it
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return plot(Markup(_inline(buffer.getvalue().decode(), alt)), data)


def _inline(drawn: str, alt: str) -> str:
    """An SVG file as an element: without what only a file has, in colours of the page, with ids that no other has."""
    body = drawn[drawn.index("<svg") :].rstrip()
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.S)
    own = hashlib.sha256(f"{alt} {body}".encode()).hexdigest()[:8]
    body = re.sub("|".join(DARK), lambda found: f"var({variable(found[0])}, {found[0]})", body)
    body = re.sub(r'\bid="', f'id="f{own}-', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#f{own}-", body)
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(printable(alt))}"', 1)
