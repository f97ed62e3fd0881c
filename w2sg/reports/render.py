"""Pages and parts of pages from Jinja2 templates; whatever is put into one is escaped."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from w2sg.printable import inert, printable
from w2sg.reports import words
from w2sg.reports.colours import DARK, variable

TEMPLATES = Path(__file__).parent / "templates"


@cache
def environment() -> Environment:
    """Templates of this folder, and of strings; all know ``table``, ``facts``, ``said`` and ``noted``."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "estimate", "stacked", "judged", "p_value", "short", "pgr_sentence", "counted", "folded"):
        made.filters[name] = getattr(words, name)
    parts = made.get_template("parts.html").module
    made.globals |= {"table": parts.table, "said": parts.said, "noted": parts.noted, "NONE": words.NONE}
    made.globals["facts"] = lambda facts, title="": parts.table(("", ""), words.fact_rows(facts), "facts", title)
    made.globals["schemes"] = {
        scheme: "; ".join(f"{variable(light)}: {shown}" for light, shown in colours.items())
        for scheme, colours in (("light", {colour: colour for colour in DARK}), ("dark", DARK))
    }
    return made


def render(template: str, **values: Any) -> Markup:
    """A part of a page.

    Args:
        template: the name of a file in w2sg/reports/templates, or the text of a template.
        values: what it puts in; text is escaped, what is `Markup` is not.
    """
    is_file = template.endswith(".html") and "\n" not in template and "{" not in template
    made = environment().get_template(template) if is_file else environment().from_string(template)
    return Markup(made.render(values))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "", title: str = "") -> Markup:
    """A table; cells are text, numbers or `w2sg.reports.words.Cell`, and a line break in a heading is one.

    Args:
        kind: classes of the style sheet, as "dense"; "runs" for rows that the page's filter box searches.
        title: what it is a table of, for those who hear it.
    """
    return environment().globals["table"](head, rows, kind, title)


def plot(drawn: Markup, data: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None) -> Markup:
    """A figure with its numbers: a table that folds away, and the same as CSV.

    Args:
        drawn: an SVG element. data: headings and rows; None for none.
    """
    saved = ""
    if data is not None:
        text = io.StringIO()
        head, rows = data
        csv.writer(text).writerows([inert(value) for value in line] for line in (head, *rows))
        saved = quote(printable(text.getvalue()))
    return environment().get_template("parts.html").module.plot(drawn, data, saved)


def page(title: str, parts: Iterable[str]) -> str:
    """One self-contained page of parts that are HTML already."""
    return str(render("page.html", title=printable(title), parts=[Markup(printable(part)) for part in parts]))
