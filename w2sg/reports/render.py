"""Pages and parts of pages from Jinja2 templates; whatever is put into one is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from w2sg.printable import printable
from w2sg.reports import words

TEMPLATES = Path(__file__).parent / "templates"


@cache
def environment() -> Environment:
    """Templates of this folder, and of strings; ``table``, ``facts`` and ``said`` are known to all of them."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "estimate", "stacked", "judged", "p_value", "short", "pgr_sentence"):
        made.filters[name] = getattr(words, name)
    parts = made.get_template("parts.html").module
    made.globals |= {"table": parts.table, "said": parts.said, "NONE": words.NONE}
    made.globals["facts"] = lambda facts: parts.table(("", ""), words.fact_rows(facts), "facts")
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


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> Markup:
    """A table; cells are text, numbers or `w2sg.reports.words.Cell`, and a line break in a heading is one."""
    return environment().globals["table"](head, rows, kind)


def page(title: str, parts: Iterable[str]) -> str:
    """One self-contained page of parts that are HTML already."""
    return str(render("page.html", title=printable(title), parts=[Markup(printable(part)) for part in parts]))
