"""What train.py and evaluate.py share: a checked configuration in, and errors that a user can read out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from w2sg import stops
from w2sg.errors import UserError


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Print a `UserError` as its message alone and exit with 1; anything else keeps its traceback.

    A run that a signal asked to end says so in one line and ends with 128 + the signal's number (143 for SIGTERM),
    whatever it has done being kept.
    """
    try:
        with stops.command():
            yield
    except UserError as error:
        from rich.console import Console

        console = Console(stderr=True)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
