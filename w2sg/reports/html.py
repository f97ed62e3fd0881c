"""Figures as SVG inside a page, and the page around them: what the reports of one run and of many share."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from w2sg.printable import printable
from w2sg.reports.figures import COLOURS, PALETTE, band, new_figure, points, reach, training_figures
from w2sg.reports.figures import svg as _svg
from w2sg.reports.words import LEVEL

__all__ = ["COLOURS", "LEVEL", "PALETTE", "band", "new_figure", "points", "reach", "svg", "training_figures"]


def svg(figure: Any, alt: str) -> str:
    """As text that pages are put together from."""
    return str(_svg(figure, alt))


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
