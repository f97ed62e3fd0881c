"""What all commands share: a checked configuration in, and errors that a user can read out."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from w2sg import stops
from w2sg.config import outputs
from w2sg.errors import OutsideError, UserError

if TYPE_CHECKING:
    from w2sg.config.typed import Typed


def launch(task: Callable[[Any], Any], name: str) -> None:
    """Run a program of Hydra's on ``sys.argv``, once every run that is typed there holds.

    Args:
        task: called with each run's configuration.
        name: the file of conf/ that it starts from: train, decode or evaluate.
    """
    from w2sg.cli.help import asks_help, print_help

    if asks_help(sys.argv[1:]):
        print_help(name)
        return
    import hydra

    from w2sg.config.check import check, check_evaluate
    from w2sg.config.composing import settle
    from w2sg.config.hydra import known_mode, register, tell_sweep
    from w2sg.config.plugins import CONF
    from w2sg.config.programs import command
    from w2sg.config.typed import typed
    from w2sg.console import Plain, any_terminal
    from w2sg.live import clock

    any_terminal()
    if not stops.speaks():  # rank 0 says it
        logging.getLogger("w2sg").setLevel(logging.ERROR)
    # a line for each run is ours to print
    logging.getLogger("hydra._internal.core_plugins.basic_launcher").setLevel(logging.WARNING)
    begun, settled = time.monotonic(), None
    with readable_errors():
        line = typed(sys.argv[1:], sweeps=name != "evaluate")
        register(users=line.folder)
        sys.argv[1:] = line.arguments
        shows = line.has("--cfg", "-c", "--info", "-i")
        elsewhere = line.has("--config-path", "-cp", "--experimental-rerun")
        if not elsewhere and not line.has("--hydra-help", "--version", "--shell-completion", "-sc"):
            holds = (lambda cfg, _: check_evaluate(cfg)) if name == "evaluate" else check
            start = line.value("--config-name") or name
            settled = settle(start, line, None if shows else holds)
            if not shows and "plan.only=true" in [word.lstrip("+").lower() for word in line.overrides]:
                _plan(start, line, settled.jobs)
                return
    jobs = None if settled is None else settled.jobs
    tell_sweep(jobs)
    with late_help(), contextlib.nullcontext() if settled is None else known_mode(settled.mode):
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
    if jobs is not None and stops.speaks():
        typed_out = [word.partition("=")[2] for word in line.overrides if word.startswith("out=")]
        out = typed_out[-1] if typed_out else "outputs"
        console = Plain()
        console.say(f"{len(jobs)} run{'s' * (len(jobs) > 1)} in {clock(time.monotonic() - begun)}")
        console.say(f"next: {command('compare', shlex.quote(out))}")


def _plan(name: str, line: Typed, jobs: list[list[str]] | None) -> None:
    """Say what the runs would do, in their place."""
    from w2sg.config.check import check
    from w2sg.config.composing import composed
    from w2sg.planning.command import plan_runs

    if jobs is None and line.multirun:
        raise UserError("plan: this sweeper chooses each run by those before it; plan one of them, without -m")
    runs = [line.overrides] if jobs is None else jobs
    plan_runs(composed(name, runs, check), runs)


@contextlib.contextmanager
def late_help() -> Iterator[None]:
    """Let Hydra make its parser, one help of which is no text until it is shown.

    argparse checks that at once from Python 3.14 on, and Hydra 1.3 ends with an error (facebookresearch/hydra#3121).
    """
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None:
        yield
        return
    argparse.ArgumentParser._check_help = lambda *_: None
    try:
        yield
    finally:
        argparse.ArgumentParser._check_help = check


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Print a `UserError` as its message alone and exit with 1; anything else keeps its traceback.

    So does an error in code from outside w2sg where HYDRA_FULL_ERROR=1.

    A run that a signal asked to end says so in one line and ends with 128 + the signal's number (143 for SIGTERM),
    whatever it has done being kept.
    """
    outputs.one_notice_per_log()
    try:
        with stops.command():
            yield
    except UserError as error:
        if isinstance(error, OutsideError) and os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        from w2sg.config.programs import as_started
        from w2sg.console import Plain

        Plain(stderr=True).say(as_started(str(error)), "error: ", "bold red")
        sys.exit(1)
