"""What train.py and evaluate.py share: a checked configuration in, and errors that a user can read out."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from w2sg.errors import UserError


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Print a `UserError` as its message alone and exit with 1; anything else keeps its traceback.

    A run that was asked to end (SIGTERM, as schedulers send it) ends with 143, whatever it has done being kept.
    """
    try:
        yield
    except UserError as error:
        from rich.console import Console

        console = Console(stderr=True)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if type(end).__name__ != "SIGTERMException":  # not imported: an error in a configuration needs no Lightning
            raise
        print("ended by SIGTERM; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
