"""The live line of a terminal, drawn by rich in one place; what is printed meanwhile stands above it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

from w2sg.console import Plain

A_SECOND = 4  # drawings of the line
ERASE = "\r\x1b[2K"
FILE_ONLY = {"file_only": True}  # ``extra`` of a log record that the terminal does not show


def is_terminal() -> bool:
    """Whether a line can be drawn again in its place: output and errors are a terminal that is not a dumb one."""
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown", "")
    return not dumb and all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


class Bar:
    """The live line, and how fast what it counts goes on.

    Args:
        text: the line of this moment, in at most so many characters.
    """

    def __init__(self, text: Callable[[int], str]):
        from rich.progress import Progress, ProgressColumn
        from rich.table import Column
        from rich.text import Text

        self.console = _Line()
        bar = self

        class Line(ProgressColumn):
            def render(self, _task: Any) -> Text:
                return Text(text(bar.width))

        column = Line(Column(no_wrap=True, overflow="ellipsis"))
        options = {
            "redirect_stdout": False,
            "redirect_stderr": False,
            "transient": True,
            "refresh_per_second": A_SECOND,
        }
        self.progress = Progress(column, console=self.console, **options)
        self.task = self.progress.add_task("")
        self.running = False

    def start(self) -> None:
        if not self.running:
            self.running = True
            self.progress.start()

    def stop(self) -> None:
        if self.running:
            self.running = False
            self.progress.stop()

    @property
    def width(self) -> int:
        """Characters of the line; the last column stays free, where terminals would wrap."""
        return self.console.width - 1

    def restart(self, total: float | None, done: float) -> None:
        self.progress.reset(self.task, total=total, completed=done)

    def update(self, done: float) -> None:
        self.start()  # where another program's bar had its place
        self.progress.update(self.task, completed=done)

    def estimate(self) -> tuple[float | None, float | None]:
        """Units a second, and seconds left; of the last half minute."""
        task = self.progress.tasks[0]
        if task.total is None or task.speed is None:
            return None, None
        return task.speed, task.time_remaining


class _Line(Plain):
    """The console of the live line. It leaves the cursor where it is, so that a killed run hides none."""

    def __init__(self) -> None:
        super().__init__(file=_Unbroken(sys.stderr), force_terminal=True)

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Unbroken:
    """A stream whose terminal may close: what cannot be shown does not end the run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Above(_Unbroken):
    """A stream of the terminal whose lines stand above the live line.

    A carriage return is another program's bar, such as of a download. It has the terminal until its line ends.
    """

    def __init__(self, stream: TextIO, bar: Bar):
        super().__init__(stream)
        self._bar, self._rest, self._lock = bar, "", threading.RLock()

    def write(self, text: str) -> int:
        from rich.text import Text

        with self._lock:
            if not self._bar.running or "\r" in text:
                self._bar.stop()
                return super().write(text)
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._bar.console.print(Text.from_ansi(line), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        if self._rest and not self._bar.running:
            rest, self._rest = self._rest, ""
            super().write(rest)
        super().flush()


class Diversion:
    """While a run shows its stages, the log's terminal handlers leave out what is for its file alone (`FILE_ONLY`).

    Beside a live line whatever is printed or logged stands above it.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def begin(self, bar: Bar | None) -> None:
        streams = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
        known = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
        for handler in {h for one in known if isinstance(one, logging.Logger) for h in one.handlers}:
            if getattr(handler, "stream", None) not in streams:
                continue
            handler.addFilter(_is_for_terminal)
            self._undo.append(partial(handler.removeFilter, _is_for_terminal))
            if bar is not None and not hasattr(type(handler), "stream"):  # one that looks it up each time
                self._undo.append(partial(handler.setStream, handler.stream))
                handler.setStream(Above(handler.stream, bar))
        for name in ("stdout", "stderr") if bar is not None else ():
            self._undo.append(partial(setattr, sys, name, getattr(sys, name)))
            setattr(sys, name, Above(getattr(sys, name), bar))

    def end(self) -> None:
        while self._undo:
            self._undo.pop()()


def _is_for_terminal(record: logging.LogRecord) -> bool:
    return not getattr(record, "file_only", False)


def clock(seconds: float, short: bool = True) -> str:
    """Seconds as a clock shows them; with ``short`` those below ten as they are.

    >>> clock(0.04), clock(80), clock(3723)
    ('0.0 s', '1:20', '1:02:03')
    """
    if short and seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fitting(start: str, names: Sequence[str], width: int) -> str:
    """As many names as a line has room for, and how many more there are.

    >>> fitting("found: ", ["weak", "student", "ceiling"], 26)
    'found: weak and 2 more'
    """
    for shown in range(len(names), 0, -1):
        more = f" and {len(names) - shown} more" if shown < len(names) else ""
        if len(line := start + ", ".join(names[:shown]) + more) <= width:
            return line
    return (start + names[0])[:width]


def shorter(place: str) -> str:
    """As "run 3 of 12 · stage 4 of 11" in fewer characters: "3/12 · 4/11"."""
    return place.replace("run ", "").replace("stage ", "").replace(" of ", "/")


def number(value: float) -> str:
    return f"{int(value):,}"
