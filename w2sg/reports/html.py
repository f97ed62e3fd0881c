"""Figures as SVG inside a page, and the page around them: what the reports of one run and of many share."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

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
    "implicit": "#4d7c0f",
    "explicit": "#7c3aed",
}
# of losses: pale for forward, full for reverse, so that the pairs of the paper stand together
PALETTE = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569", "#a16207")

LEVEL = 0.05  # of tests: where p lies below it a difference is called resolved


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure in inches and its axes (an array where there are several columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def points(axis: Any, x: Sequence[float], found: Sequence[dict[str, Any]], across: bool = False, **style: Any) -> None:
    """Estimates with their intervals, over x or (``across``) beside it; what has no value is left out."""
    values = np.array([np.nan if f["value"] is None else f["value"] for f in found])
    ends = [[v if f[end] is None else f[end] for v, f in zip(values, found, strict=True)] for end in ("low", "high")]
    errors = np.abs(np.array(ends) - values)
    x, y, errors = (values, x, {"xerr": errors}) if across else (x, values, {"yerr": errors})
    axis.errorbar(x, y, **errors, **{"lw": 1.3, "ms": 4.5, "elinewidth": 1, "capsize": 2, **style})


def reach(value: float, low: float, high: float) -> list[list[float]]:
    """How far an interval reaches to both sides of a value, as error bars want it.

    Not below 0: where all rows agree, a bootstrap's mean is the value up to its rounding.
    """
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def band(axis: Any, found: dict[str, Any], colour: str) -> None:
    """An estimate that holds for all x, with its interval."""
    if found["value"] is not None:
        axis.axhline(found["value"], color=colour, ls="--", lw=1)
    if found["low"] is not None:
        axis.axhspan(found["low"], found["high"], color=colour, alpha=0.12, lw=0)


def training_figures(curves: dict[str, list[dict[str, float]]]) -> Iterable[str]:
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


def _lines(panels: Sequence[tuple[str, list[dict[str, float]], dict[str, str]]]) -> str:
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


def svg(figure: Any, alt: str) -> str:
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
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """An HTML table; cells are escaped unless they are `Raw`."""

    def cell(value: Any) -> str:
        return str(value) if isinstance(value, Raw) else html.escape(str(value))

    line = "".join(f"<th>{cell(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class=wide><table class="{kind}"><tr>{line}</tr>{body}</table></div>'


class Raw(str):
    """Text that is HTML already."""


def facts(found: dict[str, Any]) -> str:
    """Names and values below each other; empty values are left out."""
    rows = []
    for key, value in found.items():
        if value is None or value == {} or value == []:
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict):
            text = ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in value.items())
        rows.append((key.replace("_", " "), text))
    return table(("", ""), rows, "facts")


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, f"{'+' if sign else ''}.{digits}f")


def estimate(found: dict[str, Any], digits: int = 3, sign: bool = False) -> str:
    """``value [low, high]``."""
    inside = f" [{number(found['low'], digits, sign)}, {number(found['high'], digits, sign)}]"
    return number(found["value"], digits, sign) + (inside if found["value"] is not None else "")


def stacked(found: dict[str, Any], digits: int = 3, sign: bool = False, kind: str = "f") -> Raw:
    """A table's cell: the number, and its interval below; ``kind`` is "f" or "%"."""
    parts = {
        key: "–" if found[key] is None else format(found[key], f"{'+' if sign else ''},.{digits}{kind}")
        for key in ("value", "low", "high")
    }
    below = "" if found["low"] is None else f"<br><small>{parts['low']} to {parts['high']}</small>"
    return Raw(parts["value"] + below)


def p_value(p: float) -> str:
    """To three digits, without a 0 in front."""
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def p_text(p: float) -> str:
    """``= .012`` or ``< .001``."""
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def page(title: str, sections: Iterable[str]) -> str:
    """One self-contained HTML page."""
    body = "\n".join(section for section in sections if section)
    return PAGE.format(title=html.escape(printable(title)), body=printable(body))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1e293b;
  background: #fff }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2.2rem }} h3 {{ font-size: 1rem }}
table {{ border-collapse: collapse; margin: .5rem 0 }} .wide {{ overflow-x: auto }}
td, th {{ padding: .2rem .55rem; text-align: right; font-size: .83rem; white-space: nowrap }}
.left td:nth-child(2), .left th:nth-child(2) {{ text-align: left }}
td:first-child, th:first-child, .facts td {{ text-align: left }} tr {{ border-bottom: 1px solid #e2e8f0 }}
.facts td {{ vertical-align: top; overflow-wrap: anywhere; white-space: normal }}
.facts td:first-child {{ white-space: nowrap }}
.words td {{ white-space: normal }}
.replies td {{ vertical-align: top }} .replies td:last-child, .replies th:last-child {{ text-align: left; width: 100% }}
.dense td, .dense th {{ padding: .2rem .3rem }} .dense th {{ vertical-align: bottom }}
.said {{ white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow-y: auto }}
.command {{ font-family: ui-monospace, monospace; background: #f1f5f9; padding: .5rem .8rem; overflow-wrap: anywhere }}
pre {{ font-size: .8rem; overflow-x: auto }} code {{ font-size: .85em }}
.verdict {{ font-size: 1.05rem; border-left: 4px solid #2563eb; padding-left: .8rem }}
.warning {{ background: #fef3c7; padding: .4rem .8rem; margin: .4rem 0 }} .note {{ color: #475569; font-size: .9rem }}
img {{ max-width: 100%; vertical-align: top; margin: .2rem 0 }} summary {{ cursor: pointer; margin-top: 1.5rem }}
.yes {{ background: #dcfce7 }} .no {{ background: #fee2e2 }}
</style></head><body>
{body}
</body></html>
"""
