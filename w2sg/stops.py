"""Signals that ask a run to end. Every rank hears them at once, and ends where no work is lost.

    with command():                     # one line and an exit status of 128 + the signal's number
        with Deferral() as hold:
            hold.begin()                # from here on a signal is only recorded
            ...
            if requested():             # at a place where everything is written
                leave()

Outside a deferral a signal raises `Stopped` wherever the main thread is, as Ctrl-C raises KeyboardInterrupt. This is
safe because the files on the disk are complete at any moment. Python runs handlers between two bytecode instructions.
So a main thread that waits inside native code (for another rank, say) hears nothing. A listener thread does, and ends
the process if the main thread cannot. That thread also forwards signals between ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from w2sg.peers import LEFT, Peers

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
CODES = {128 + number: number for number in SIGNALS}  # exit statuses
PARENT = "W2SG_PARENT"  # set in processes that w2sg started: the parent's id
STUCK, LEAVING, AGAIN, NOTICE = 3.0, 5.0, 1.0, 2.0  # seconds


class Stopped(SystemExit):
    """A signal asked the run to end. The exit code is 128 + the signal's number, as in shells."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number, self.said = signal.Signals(number), False


class _Ear:
    """What one process has heard. The main thread and the listener thread write its fields."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = self.left_at = 0.0
        self.holds = 0
        self.leaving = False
        self.chained: dict[int, Any] = {}

    def hear(self, number: int) -> None:
        """Remember the first signal."""
        if self.number is None:
            self.number, self.since = number, time.monotonic()


_ear: _Ear | None = None
_peers: Peers | None = None  # connections of this process's run
describe: Callable[[], list[str]] = list  # lines on what a stop leaves behind
erase = ""  # what takes away a line that is on the terminal now
_ended = False
_status: int | None = None  # exit status of the process, once its last command was stopped


def ended() -> bool:
    """Whether a signal ended the last command of this process."""
    return _ended


def requested() -> int | None:
    """The signal that asked the run to end, or None."""
    return None if _ear is None else _ear.number


def left() -> bool:
    """Whether another rank of this run is about to end, or has."""
    return _peers is not None and _peers.left


def request(number: int) -> None:
    """Ask this process to end, as if it had received the signal."""
    if _ear is not None:
        os.kill(os.getpid(), number)


def leave(number: int | None = None) -> None:
    """Raise `Stopped`. Call it when everything worth keeping is on the disk.

    Args:
        number: the signal that the ranks agreed on, in case this rank has not heard it yet.
    """
    global _ended
    number, _ended = number or requested(), True
    if _ear is not None:
        _ear.number = _ear.number or number
        _ear.leaving, _ear.left_at = True, time.monotonic()
    raise Stopped(number)


def join(peers: Peers | None) -> None:
    """Hear what the other ranks of a run hear. None closes the connections of the last run."""
    global _peers
    if _peers is not None:
        _peers.close()
    _peers = peers


class Deferral:
    """Delays signals from `begin` to the end of the context. A delayed signal takes effect there."""

    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        """Delay signals from now on. A second call changes nothing."""
        if not self.begun and _ear is not None and threading.current_thread() is threading.main_thread():
            _ear.holds += 1
            self.begun = True

    def __enter__(self) -> Deferral:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.begun or _ear is None:
            return
        self.begun = False
        _ear.holds -= 1
        if kind is None and not _ear.holds and _ear.number is not None and not _ear.leaving:
            leave()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Delay signals during a few lines."""
    with Deferral() as hold:
        hold.begin()
        yield


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Hear the signals inside this context. Of nested contexts only the outermost has an effect.

    A signal that is ignored stays ignored (nohup, a shell's background jobs). A launcher's handler stays in place. If
    it handles a warning signal (SIGUSR1, SIGUSR2), it runs once the run has saved its work.
    """
    global _ear, _ended
    if _ear is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    ear, before = _Ear(), {}
    if _peers is not None:
        _peers.left = False
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not signal.default_int_handler:
            if number not in (getattr(signal, "SIGUSR1", None), getattr(signal, "SIGUSR2", None)):
                continue
            ear.chained[number] = handler
        elif handler not in (signal.SIG_DFL, signal.default_int_handler):
            continue
        before[number] = handler
    read, write = os.pipe()
    os.set_blocking(write, False)
    _ear, _ended = ear, False
    for number in before:
        signal.signal(number, _handle)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(ear, read, tuple(before)), name="w2sg-signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.write(write, b"\0")
        listener.join()
        os.close(read)
        os.close(write)
        _ear = None


@contextlib.contextmanager
def command(last: bool = False) -> Iterator[None]:
    """Hear signals while a command runs. A stop prints one line, and the exit status says which signal it was.

    If a signal has ended another rank, errors of this rank are its consequence. They are reported as that signal.

    Args:
        last: the process ends after this command, and soon, whatever libraries still do when the interpreter exits.
    """
    with contextlib.ExitStack() as stack:
        if last:
            stack.callback(_soon)
        stack.enter_context(heard())
        chained = {} if _ear is None else _ear.chained
        try:
            yield
        except Stopped as stop:
            _end(stop, chained)
            raise
        except Exception:
            if _peers is not None and requested() is None:
                time.sleep(1.0)  # the signal may still be on its way
            if requested() is None:
                raise
            stop = Stopped(requested())
            _end(stop, chained)
            raise stop from None


def _soon() -> None:
    global _status
    error = sys.exc_info()[1]
    if isinstance(error, Stopped):
        _status = error.code
        timer = threading.Timer(LEAVING, os._exit, (error.code,))
        timer.daemon = True
        timer.start()


@atexit.register
def _out() -> None:
    """Exit hard. Registered first, so it runs last, and skips process groups that would still wait for other ranks."""
    if _status is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_status)


def _end(stop: Stopped, chained: dict[int, Any]) -> None:
    if not stop.said:
        stop.said = True
        if speaks():
            sys.stderr.write(_line(stop.number))
            sys.stderr.flush()
        if stop.number in chained:  # a launcher's handler: it may requeue the job
            chained[stop.number](stop.number, None)


def _line(number: int) -> str:
    lines = [f"{erase}ended by {signal.Signals(number).name}; the same command resumes from here"]
    with contextlib.suppress(Exception):  # another thread may be changing what it looks at
        lines += describe()
    return "\n".join(lines) + "\n"


def speaks() -> bool:
    """Whether this process prints to the user. Of several ranks only one does."""
    return PARENT not in os.environ and all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID"))


def _handle(number: int, _frame: Any) -> None:
    ear = _ear
    if ear is not None:
        ear.hear(number)
        if not ear.holds and not ear.leaving:
            leave()


def _listen(ear: _Ear, read: int, ours: tuple[int, ...]) -> None:
    """Hear signals that the main thread may miss, tell the other ranks, and make sure that the process ends."""
    main, interrupted, told, noticed = threading.main_thread().ident, None, set(), False
    while True:
        peers = _peers
        lines = list(peers.lines) if peers is not None else []
        try:
            ready, _, _ = select.select([read, *lines], [], [], 0.2)
        except (OSError, ValueError):  # a connection closed in the meantime
            continue
        now, word = time.monotonic(), None
        if read in ready:
            for number in os.read(read, 64):
                if number == 0:
                    return
                if number in ours:
                    word = word or number
                if number == signal.SIGINT and number in ours:
                    if interrupted is not None and now - interrupted >= AGAIN:
                        _exit(number)
                    interrupted = interrupted or now
        for line in lines:
            if line in ready:
                number = next(iter(peers.hear(line)), None)
                if number is not None and ear.number is None:
                    ear.hear(number)
                    if ours:
                        signal.pthread_kill(main, ours[0])  # any of ours will do: `ear.number` has the real one
        if word is not None:
            ear.hear(word)
        if ear.number is None:
            continue
        if peers is not None and id(peers) not in told:
            told.add(id(peers))
            peers.tell(ear.number)
        if ear.leaving:
            if peers is not None and (id(peers), LEFT) not in told:
                told.add((id(peers), LEFT))
                peers.tell(LEFT)
            if now - ear.left_at > LEAVING:
                _exit(ear.number)
        elif not ear.holds:
            if now - ear.since > STUCK:
                _exit(ear.number)
        elif peers is not None and peers.left:
            ear.left_at = ear.left_at or now
            if now - ear.left_at > LEAVING:
                _exit(ear.number)
        elif interrupted is not None and now - interrupted > NOTICE and not noticed and speaks():
            noticed = True
            line = "ending after this step and its checkpoint; Ctrl-C again ends at once, without it\n"
            os.write(2, (erase + line).encode())


def _exit(number: int) -> None:
    if speaks():
        os.write(2, _line(number).encode())
    os._exit(128 + number)


def _forget() -> None:
    """A forked process forgets all this: it ends as any other process does."""
    global _ear, _peers
    if _ear is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _handle:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _ear = _peers = None


os.register_at_fork(after_in_child=_forget)
