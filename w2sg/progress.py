"""What a run shows while it works: one live line on a terminal, and plain lines everywhere else.

    with showing("auto"):                          # a run
        with stage("student") as now:              # one of its stages
            count("training", total=500, unit="it")
            at(120)                                # stage 4 of 11 · student: training 120/500 · 3.1 it/s · 2:02 left
            now.finish(4, found=False)

Code that works deep inside a stage calls `count`, `at`, `tokens` and `part`. They only note numbers, so they may be
called at every token. A thread draws the live line four times a second. Where nothing is shown they do nothing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from w2sg import stops
from w2sg.console import as_typed
from w2sg.live import ERASE, FILE_ONLY, Bar, Diversion, clock, fitting, is_terminal, number, shorter

log = logging.getLogger(__name__)
Mode = Literal["auto", "plain", "none"]
# Plain lines: seconds between two, unless this share was done since, and seconds at the latest.
EVERY, OFTEN, SHARE = 30.0, 300.0, 0.1
TICK = 0.1  # seconds between two looks at the counters


@dataclass(eq=False)
class Stage:
    """A stage that is being made, and how far it is.

    Attributes:
        name, verb: "student", "training". total, done: in units, such as steps or rows. unit: as in a rate, "rows".
        batch, part: units that are worked on at the moment, and the share of that work which is done.
        written: tokens that were written. kept: units that a stopped run would not repeat.
    """

    name: str
    verb: str = "loading"
    unit: str = ""
    total: float | None = None
    done: float = 0.0
    batch: float = 0.0
    part: float = 0.0
    written: int = 0
    kept: float | None = None
    counted_since: float = 0.0
    since: float = 0.0
    first: float = 0.0
    inner: float = 0.0  # seconds of the stages that were made for it

    @property
    def reached(self) -> float:
        """Units done, with the share of those that are worked on."""
        return self.done + self.batch * self.part

    def begin(self, what: str) -> None:
        """The stage is not in the store, and is made now. ``what``: its folder, and why it was not found."""
        self.since = time.monotonic()
        if _shown is not None:
            _shown.begin(self, what)

    def finish(self, done: int, found: bool) -> None:
        """The stage is there. ``done``: stages that the run now rests on. ``found``: it was in the store."""
        if _shown is not None:
            _shown.finish(self, done, found)


_shown: Shown | None = None
_silent = False


@contextlib.contextmanager
def stage(name: str) -> Iterator[Stage]:
    """A stage of the run. Stages that it needs may be made inside."""
    now, shown = Stage(name, since=time.monotonic()), _shown
    if shown is None:
        yield now
        return
    shown.stack.append(now)
    try:
        yield now
    except BaseException:
        shown.broken = shown.broken or now
        raise
    finally:
        shown.stack.remove(now)
        if shown.stack:
            shown.stack[-1].inner += time.monotonic() - now.since


def count(verb: str, total: float | None = None, unit: str = "", done: float = 0, waited: float = 0.0) -> None:
    """What the stage does now, and how many units of it there are.

    Args:
        done: units done in an earlier process. waited: seconds for which this is already going on.
    """
    if _shown is not None and _shown.stack:
        now = _shown.stack[-1]
        now.verb, now.unit, now.total, now.done, now.batch, now.part, now.written = verb, unit, total, done, 0, 0, 0
        now.first, now.counted_since = done, time.monotonic() - waited
        _shown.counts(now)


def at(done: float, batch: float = 0) -> None:
    """So many units are done. ``batch``: units that are begun now."""
    if _shown is not None and _shown.stack:
        now = _shown.stack[-1]
        now.done, now.batch, now.part = done, batch, 0
        _shown.tick(now)


def part(share: float) -> None:
    """The share of the units begun that is done. It never falls."""
    if _shown is not None and _shown.stack:
        now = _shown.stack[-1]
        now.part = min(1.0, max(now.part, share))
        _shown.tick(now)


def tokens(more: int) -> None:
    """So many more tokens were written."""
    if _shown is not None and _shown.stack:
        _shown.stack[-1].written += more


def kept(done: float | None = None) -> None:
    """So many units of the stage, or all that are done, are on the disk: a stopped run does not repeat them."""
    if _shown is not None and _shown.stack:
        _shown.stack[-1].kept = _shown.stack[-1].done if done is None else done


def elapsed() -> float | None:
    """Seconds since the run began; None where nothing is shown."""
    return None if _shown is None else time.monotonic() - _shown.begun


def prefix() -> str:
    """What a line of the log begins with, where several runs share a terminal: "run 3 of 12 · "."""
    return "" if _shown is None else _shown.prefix()


def between(verb: str) -> None:
    """What the run does now that all its stages are done."""
    if _shown is not None:
        _shown.last = Stage("", verb, since=time.monotonic())


def expect(total: int | None, done: int = 0) -> None:
    """How many stages the run has, and how many are done; None where that is not known."""
    if _shown is not None:
        _shown.total, _shown.done = total, done


def rest() -> None:
    """Take the live line away for good: what follows is the run's result."""
    if _shown is not None:
        _shown.flush()
        _shown.stop()


def sweep() -> Sweep | None:
    """The sweep that the run is part of."""
    return None if _shown is None else _shown.sweep


@dataclass(frozen=True)
class Sweep:
    """A run's place in a sweep.

    Attributes:
        number: from 1. runs: of the sweep; None where its sweeper decides as it goes.
        label: what the run differs in. apart: runs are processes side by side, which share the terminal.
    """

    number: int
    runs: int | None
    label: str
    apart: bool = False

    @property
    def place(self) -> str:
        """As "run 3 of 12"."""
        return f"run {self.number}{'' if self.runs is None else f' of {self.runs}'}"


class Shown:
    """What one run shows.

    Args:
        mode: ``auto`` is a live line where standard output and error are a terminal, else plain lines.
        sweep: the run's place in a sweep. noun: what its parts are called.
    """

    def __init__(self, mode: Mode, sweep: Sweep | None = None, noun: str = "stage"):
        self.noun = noun
        alone = sweep is None or not sweep.apart
        self.live = mode == "auto" and alone and is_terminal()
        self.plain = mode != "none" and not self.live
        self.sweep = sweep
        self.begun = self.idle = time.monotonic()  # idle: since when there is no stage
        self.total: int | None = None
        self.done = 0
        self.stack: list[Stage] = []  # each of which is made for the one before it
        self.broken: Stage | None = None
        self.last: Stage | None = None
        self._found: list[str] = []
        self._line = self._looked = 0.0
        self._lined = 0.0
        self._bar = Bar(self.text) if self.live else None
        self._diverted = Diversion()

    # -- stages -------------------------------------------------------------------------------------------------------

    def begin(self, now: Stage, what: str) -> None:
        self.flush()
        self._line, self._lined = time.monotonic(), 0.0
        self.say(f"{self.place()}{now.name}: working on {what}", hidden=not self.plain)

    def finish(self, now: Stage, done: int, found: bool) -> None:
        if found:
            self._found.append(now.name)
            self.done, self.idle = done, time.monotonic()
            return
        units = "" if now.total is None or not now.unit else f"{number(now.total)} {_plural(now)} in "
        took = clock(time.monotonic() - now.since - now.inner)
        self.say(f"{self.place()}{now.name}: {units or 'done in '}{took}")
        self.done, self.idle = done, time.monotonic()

    def flush(self) -> None:
        """Say which stages were in the store since that was last said."""
        if self._found:
            names = dict.fromkeys(self._found)
            count = f"{len(names)} stage{'s' * (len(names) > 1)} found in the store: "
            self.say(self.prefix() + fitting(count, list(names), self.width() - len(self.prefix())))
            self._found.clear()

    def counts(self, now: Stage) -> None:
        if self._bar is not None:
            self._bar.restart(now.total, now.reached)

    def tick(self, now: Stage) -> None:
        moment = time.monotonic()
        if moment - self._looked < TICK:
            return
        self._looked = moment
        if self._bar is not None:
            self._bar.update(now.reached)
        elif self.plain and moment - self._line >= EVERY:
            share = now.reached / now.total if now.total else 0.0
            if share - self._lined >= SHARE or moment - self._line >= OFTEN:
                self._line, self._lined = moment, share
                self.say(self.text())

    # -- texts --------------------------------------------------------------------------------------------------------

    def prefix(self) -> str:
        return "" if self.sweep is None or self.live else f"{self.sweep.place} · "

    def place(self) -> str:
        """As "stage 4 of 11 · ". A plan that turns out too short is not repeated."""
        mine = self.done + 1
        of = f" of {self.total}" if self.total is not None and self.total >= mine else ""
        return f"{self.prefix()}{self.noun} {mine}{of} · "

    def text(self, width: int | None = None) -> str:
        """The line of this moment, in at most ``width`` characters."""
        place = self.place().removesuffix(" · ")
        now = self.stack[-1] if self.stack else self.last or Stage("", "preparing", since=self.idle)
        if now is self.last:
            place = self.prefix().removesuffix(" · ")
        what, counts, rate = now.name, "", ""
        if now.total:
            counts = f" {number(now.reached)}/{number(now.total)}"
        speed, left = (None, None) if self._bar is None or not now.total else self._bar.estimate()
        if self._bar is None and now.total and now.reached > now.first:
            speed = (now.reached - now.first) / max(1e-9, time.monotonic() - now.counted_since)
            left = (now.total - now.reached) / speed
        if now.written:
            rate = _rate(now.written / max(1e-9, time.monotonic() - now.counted_since), "tok")
        elif speed and now.unit:
            rate = _rate(speed, now.unit)
        waited = time.monotonic() - (now.counted_since or now.since)
        so_far = f"{clock(waited)} so far" if waited >= 5 else ""
        time_left = f"{clock(max(left, 1), short=False)} left" if left is not None else so_far
        verb = f"{now.name and ': '}{now.verb}{counts}"
        run, label = ("", "") if self.sweep is None or not self.live else (self.sweep.place, self.sweep.label)
        brief = shorter(run), label[:12], shorter(place), what + verb
        for words in ((run, label, place, what + verb, rate), (run, label, place, what + verb), brief):
            text = " · ".join(filter(None, [*words, time_left]))
            if width is None or len(text) <= width:
                return text
        return (text[: max(0, width - 3)] + "...")[:width]

    def kept(self) -> list[str]:
        """Lines on what a stop leaves behind, and how to resume."""
        parts = [f"{self.done} finished stage{'s' * (self.done != 1)}"]
        now = self.broken or (self.stack[-1] if self.stack else None)
        if now is not None and now.kept:
            parts.append(f"{now.name} up to {_one(now)} {number(now.kept)} of {number(now.total or now.kept)}")
        of_run = "" if self.sweep is None else f" of {self.sweep.place}, and the runs before it"
        lines = [f"kept: {' and '.join(parts)}{of_run}"]
        return [*lines, f"resume: {command}"] if (command := as_typed()) else lines

    # -- output -------------------------------------------------------------------------------------------------------

    def say(self, line: str, hidden: bool = False) -> None:
        """A line that stays. It goes through the log, so that the run's file has it, too."""
        hidden = hidden or not (self.live or self.plain) or (self.live and self.sweep is not None)
        if log.hasHandlers():
            log.info("%s", line, extra=FILE_ONLY if hidden else {})
        elif not hidden:  # no log is set up, as in a notebook
            print(line)

    def width(self) -> int:
        return 1000 if self._bar is None else self._bar.width

    def start(self) -> None:
        self._diverted.begin(self._bar)
        if self._bar is not None:
            self._bar.start()
            stops.erase = ERASE

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            stops.erase = ""
        self._diverted.end()


@contextlib.contextmanager
def showing(
    mode: Mode, sweep: Sweep | None = None, main: bool = True, begun: float | None = None, noun: str = "stage"
) -> Iterator[None]:
    """Show what a run does inside this context. Inside of another such context it has no effect.

    Args:
        main: whether this process prints; of several ranks only the first does.
        begun: when the run did, by `time.monotonic`. noun: what its parts are called.
    """
    global _shown
    if _shown is not None or _silent or not main:
        yield
        return
    shown = _shown = Shown(mode, sweep, noun)
    shown.begun = begun or shown.begun
    stops.describe = shown.kept
    shown.start()
    try:
        yield
        stops.describe = list  # what is stopped after this run is not this run
    finally:
        shown.flush()
        shown.stop()
        _shown = None


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Nothing inside this context is shown: its stages do not concern the user."""
    global _shown, _silent
    before = _shown, _silent
    _shown, _silent = None, True
    try:
        yield
    finally:
        _shown, _silent = before


def _rate(speed: float, unit: str) -> str:
    if speed < 0.1:
        return f"{clock(1 / speed)} each"
    return f"{speed:.1f} {unit}/s" if speed < 10 else f"{number(speed)} {unit}/s"


def _one(now: Stage) -> str:
    return {"it": "step", "rows": "row", "replies": "reply", "prompts": "prompt"}.get(now.unit, now.unit)


def _plural(now: Stage) -> str:
    return _one(now) if now.total == 1 else "steps" if now.unit == "it" else now.unit
