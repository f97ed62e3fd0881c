r"""The terminal prints every text literally.

Names, paths and columns come from users and from files. So none of them may act as markup, move the cursor or colour a
line. A terminal that lacks a character gets another in its place.
"""

from __future__ import annotations

import codecs
import logging
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from w2sg import stops
from w2sg.printable import SHOWN, printable

PROGRAMS = "w2sg", "train.py", "evaluate.py", "__main__.py"
TYPED = list(sys.argv)  # before anything is taken from it
# Replacements on terminals that lack these characters; any other character is shown as its code.
ASCII = {
    **dict.fromkeys("–—−\u2011━╸╺", "-"),
    **dict.fromkeys("’‘", "'"),
    **dict.fromkeys("“”", '"'),
    **{"±": "+-", "…": "...", "→": "->", "←": "<-", "↑": "^", "↓": "v", "≤": "<=", "≥": ">=", "‖": "||"},
    **{"×": "x", "·": ".", "•": "*", "\u00a0": " "},
}


def _degrade(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a stream's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(
        ASCII.get(c) or SHOWN.get(ord(c)) or c.encode("ascii", "backslashreplace").decode() for c in lost
    ), error.end


codecs.register_error("w2sg.degrade", _degrade)


def any_terminal() -> None:
    """Let standard output and error accept every text. On an ASCII terminal (``LC_ALL=C``) ± becomes +-."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="w2sg.degrade")
    logging.lastResort.setFormatter(LogFormatter())  # for programs that set up no log


def as_typed() -> str | None:
    """The command line of this process as a shell would take it; None where a launcher or another program wrote it."""
    launched = any(name in os.environ for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", stops.PARENT))
    program = Path(TYPED[0]).name if TYPED else ""
    if launched or program not in PROGRAMS:
        return None
    words, whole = TYPED[1:], list(sys.orig_argv)
    if program == "w2sg":  # Python runs it
        whole = ["w2sg", *words]
    elif whole[len(whole) - len(words) :] != words:
        whole = ["python", *TYPED]
    return printable(shlex.join(whole))


class Plain(Console):
    """A console that prints text literally: no markup, no emoji codes, no highlighting, no control characters."""

    def __init__(self, stderr: bool = False, **options: Any):
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape text inside rich objects too, such as a cell of a table."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def say(self, line: str, label: str = "", style: str = "", words: bool = False) -> None:
        """Print one line after a coloured word. Only the terminal wraps it.

        Args:
            words: it is a sentence, so on a terminal it is wrapped between words.
        """
        self.print(Text.assemble((label, style), line), soft_wrap=not (words and self.is_terminal))


class LogFormatter(logging.Formatter):
    """Escapes the log on the terminal, because it repeats names of columns, files and models."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
