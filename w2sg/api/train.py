"""Runs from Python: what ``w2sg train`` and ``w2sg decode`` do, with a report in return."""

from __future__ import annotations

import contextlib
import copy
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2sg.api.report import Report, read_report
from w2sg.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from w2sg.config.typed import Typed


def train(
    overrides: Sequence[str] = (), *, out: str | Path | None = None, config_dir: str | Path | None = None
) -> Report:
    """Run one experiment, as ``w2sg train`` with the same settings: the same stages, files and numbers.

    Stages are cached in the store below ``out``, so the same call continues what was interrupted, and a second one
    computes nothing. May be called several times in one process. The global random generators are seeded by each run.

    Args:
        overrides: settings as on the command line, as ``["loss=rkl", "seed=1"]``.
        out: the folder of runs and their store, as ``out=``; the default is ``outputs``.
        config_dir: your folder of conf files, as ``--config-dir``.

    Returns:
        The report, read from the run's folder.

    Raises:
        UserError: settings do not hold, or name several runs; or whatever the run ends with, in one line.
        KeyboardInterrupt: the run was interrupted; what is finished is kept.
    """
    return _run("train", overrides, out, config_dir)


def decode(
    overrides: Sequence[str] = (), *, out: str | Path | None = None, config_dir: str | Path | None = None
) -> Report:
    """Measure one decoder, as ``w2sg decode`` with the same settings.

    Args:
        overrides: settings as on the command line, as ``["decoder=eft", "decoder.beta=0.5"]``.
        out, config_dir: as in `train`.

    Returns, raises: as `train`.
    """
    return _run("decode", overrides, out, config_dir)


def _run(name: str, overrides: Sequence[str], out: str | Path | None, config_dir: str | Path | None) -> Report:
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path

    from w2sg import stops
    from w2sg.config import outputs
    from w2sg.config.check import check
    from w2sg.config.composing import settle
    from w2sg.config.hydra import register
    from w2sg.config.plugins import CONF
    from w2sg.console import any_terminal

    line = _line(name, overrides, out, config_dir)
    any_terminal()
    outputs.one_notice_per_log()
    folders: list[Path] = []

    def task(cfg: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        from w2sg.experiment.run import run_composed

        folder = Path(HydraConfig.get().runtime.output_dir)
        folders.append(folder)
        with _logging(folder / f"{name}.log"):
            run_composed(cfg)

    with _hydra_restored():
        register(users=line.folder)
        settle(name, line, check)
        # a name that no script has: other ranks are then started as the command, and not as the caller's script
        hydra = Hydra.create_main_hydra2(f"w2sg-{name}", create_automatic_config_search_path(None, None, str(CONF)))
        try:
            with stops.command():
                hydra.run(name, task, line.overrides, with_log_configuration=False)
        except stops.Stopped as stop:
            if stop.number == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise
        finally:
            if "w2sg.training.processes" in sys.modules:  # of several devices: the next cell is not a rank
                sys.modules["w2sg.training.processes"].disband()
    return read_report(folders[0])


def _line(name: str, overrides: Sequence[str], out: str | Path | None, config_dir: str | Path | None) -> Typed:
    """The command line that these arguments are."""
    from w2sg.config.typed import sweep_in, typed

    if isinstance(overrides, str):
        raise UserError(f"{name}: overrides is a text; give a list of settings, as [{overrides!r}]")
    words = [str(word) for word in overrides]
    if flags := [word for word in words if word.startswith("-") and "=" not in word]:
        todo = (
            f"call {name} once for each run"
            if flags[0] in ("-m", "--multirun")
            else "give settings alone, as key=value"
        )
        raise UserError(f"{name}: {flags[0]} is of the command line; {todo}")
    words += [] if out is None else [f"out={Path(out).expanduser()}"]
    words += [] if config_dir is None else [f"--config-dir={Path(config_dir).expanduser()}"]
    line = typed(words)
    if line.multirun:
        raise UserError(f"{name}: these settings are several runs; call {name} once for each")
    if several := next((override for override in line.overrides if sweep_in(override)), None):
        key, _, value = several.partition("=")
        todo = f"call {name} once for each, or write {key}=[{value}] where a list is meant"
        raise UserError(f"{name}: {several} is several runs; {todo}")
    return line


@contextlib.contextmanager
def _hydra_restored() -> Iterator[None]:
    """Leave Hydra as it was found: its program, its configuration and its groups may be another's."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import JobRuntime
    from omegaconf import OmegaConf

    from w2sg.config import plugins

    program, configuration = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    job, groups = copy.deepcopy(JobRuntime.instance().conf), ConfigStore.instance().repo
    roles = [role for role in ("weak", "strong") if role not in groups]
    users, named = list(plugins._given), OmegaConf.has_resolver("run_name")
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = program, configuration
        JobRuntime.instance().conf, plugins._given[:] = job, users
        for role in roles:
            groups.pop(role, None)
        if not named:
            OmegaConf.clear_resolver("run_name")


@contextlib.contextmanager
def _logging(file: Path) -> Iterator[None]:
    """The log of a run, to a file as train.py has it, and to the screen where nobody else shows it."""
    from w2sg.console import LogFormatter

    ours, root = logging.getLogger("w2sg"), logging.getLogger()
    written = logging.FileHandler(file, encoding="utf-8")
    written.setFormatter(LogFormatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    handlers: list[logging.Handler] = [written]
    if not root.handlers and not ours.handlers:
        shown: Any = logging.StreamHandler(sys.stdout)
        shown.setFormatter(LogFormatter("%(message)s"))
        handlers.append(shown)
    level = ours.level
    ours.setLevel(logging.INFO)
    for handler in handlers:
        ours.addHandler(handler)
    try:
        yield
    finally:
        ours.setLevel(level)
        for handler in handlers:
            ours.removeHandler(handler)
            handler.close()
