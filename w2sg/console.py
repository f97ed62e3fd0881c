r"""The terminal: what is printed there is text, whatever it holds, on any terminal.

Names, paths and columns come from users and from files. None of them is markup, none of them may move the cursor or
colour a line, and a terminal without the characters gets others in their place.
"""

from __future__ import annotations

import codecs
import logging
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from w2sg.printable import SHOWN, printable

# For terminals without them; anything else is shown as its code.
ASCII = {
    "±": "+-",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "→": "->",
    "←": "<-",
    "↑": "^",
    "↓": "v",
    "≤": "<=",
    "≥": ">=",
    "×": "x",
    "·": ".",
    "•": "*",
    "‖": "||",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "\u00a0": " ",
    "\u2011": "-",
    "━": "-",
    "╸": "-",
    "╺": "-",
}


def _degrade(error: UnicodeError) -> tuple[str, int]:
    """What a stream writes for characters that its encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(
        ASCII.get(c) or SHOWN.get(ord(c)) or c.encode("ascii", "backslashreplace").decode() for c in lost
    ), error.end


codecs.register_error("w2sg.degrade", _degrade)


def any_terminal() -> None:
    """Let standard output and error take every text: on an ASCII terminal (``LC_ALL=C``), ± is written as +-."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="w2sg.degrade")
    logging.lastResort.setFormatter(LogFormatter())  # of programs that set up no log


class Plain(Console):
    """A console that takes all text for text: no markup, no emoji codes, no highlighting, no control characters."""

    def __init__(self, stderr: bool = False, **options: Any):
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Also what is a rich object already, as a cell of a table."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def say(self, line: str, label: str = "", style: str = "") -> None:
        """One line, wrapped by the terminal alone, with a word in colour before it."""
        if label:
            self.print(label, style=style, end="")
        self.print(line, soft_wrap=True)


class LogFormatter(logging.Formatter):
    """The log on the terminal, which repeats names of columns, files and models."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
