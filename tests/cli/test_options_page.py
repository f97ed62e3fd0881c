"""docs/options.md says what the code says: every option with its type, default and help."""

from pkgutil import resolve_name
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, PositiveInt

from w2sg.cli.options import PAGE, documented, options_of, page
from w2sg.config import Options, option
from w2sg.config.option import options_class
from w2sg.config.plugins import files


class Inner(Options):
    rate: float = option(0.5, "a rate", gt=0)


class Outer(Options):
    inner: Inner = option(Inner(rate=2.0), "one section")
    size: PositiveInt | None = option(None, "a size; null is all")
    how: Literal["a", "b"] = option("a", "a | b")
    path: str = option(..., "where")


def keywords(run, size: Annotated[int, Field(ge=2)] = 5, names: list[str] = ()):
    """A method.

    Args:
        run: what calls it.
        size: of a thing: one
            that goes on.
        names: of all.
    """


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m w2sg.cli.options writes it"


def test_a_class_is_walked_with_its_sections_and_their_defaults():
    assert list(options_of(Outer, "method")) == [
        ("method.inner", "section", "", "one section"),
        ("method.inner.rate", "number > 0", "2.0", "a rate"),
        ("method.size", "integer > 0 or null", "null", "a size; null is all"),
        ("method.how", "a, b", "a", "a \\| b"),
        ("method.path", "text", "", "where"),
    ]


def test_keyword_parameters_are_documented_by_the_docstring():
    assert list(options_of(keywords, "m")) == [
        ("m.size", "integer ≥ 2", "5", "of a thing: one that goes on"),
        ("m.names", "list of text", "[]", "of all"),
    ]


@pytest.mark.parametrize("choice", files("method"))
def test_every_parameter_of_a_method_has_a_line(choice):
    target = (yaml.safe_load(files("method")[choice][0].read_text()) or {}).get("_target_")
    if target is None:  # a file that stands on another one
        return
    function = resolve_name(target)
    if options_class(function) is None:
        names = list(function.__annotations__)[1:]
        assert set(documented(function)) == set(names) - {"return"}
