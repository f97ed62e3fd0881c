"""The folder of a run: whether it can be written is known before the work begins; a full log does not end a run."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

LEAST = 1_000_000  # bytes that a run's folder needs to begin with


def unwritable(folder: str | Path) -> str | None:
    """Why nothing could be written to a folder, which need not be there yet, in words; None where it could."""
    path = Path(folder).expanduser().absolute()
    missing: list[str] = []
    try:
        while not os.path.lexists(path):
            missing.append(path.name)
            path = path.parent
        path.stat()
        if not path.is_dir():
            return f"{path} is not a folder"
        if not os.access(path, os.W_OK | os.X_OK):
            read_only = os.statvfs(path).f_flag & getattr(os, "ST_RDONLY", 0)
            return f"{path} {'is on a read-only file system' if read_only else 'is not yours to write'}"
        longest = os.pathconf(path, "PC_NAME_MAX")
        for name in missing:
            if len(os.fsencode(name)) > longest:
                return f"the name {name[:40]}... has more than {longest} bytes"
        if shutil.disk_usage(path).free < LEAST:
            return f"the disk of {path} is full"
        for file in path.glob("*.log") if not missing else ():
            if not file.is_file() or not os.access(file, os.W_OK):
                return f"{file} is not a file that you may write to"
    except OSError as error:
        return f"{error.strerror}"
    return None


def problem(cfg: Any) -> str | None:
    """A line about ``out`` where the folder of a composed run cannot be written.

    Args:
        cfg: with its ``hydra`` node.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf.errors import OmegaConfBaseException

    hydra = HydraConfig.instance()
    before, hydra.cfg = hydra.cfg, cfg  # the folder's name asks it what was typed
    try:
        folder = cfg.hydra.run.dir
    except OmegaConfBaseException:  # which is told where the run is composed
        return None
    finally:
        hydra.cfg = before
    if cfg.get("out") is None or folder == ".":  # evaluate.py writes where it is told to
        return None
    if (why := unwritable(folder)) is None:
        return None
    return f"out: nothing can be written to {folder} ({why}); set out= to a folder that you may write to"


def one_notice_per_log() -> None:
    """Say once that a log file cannot be written, where logging would print a trace for every line of it."""
    logging.FileHandler.handleError = _unlogged


def _unlogged(handler: logging.FileHandler, _: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        logging.Handler.handleError(handler, _)
        return
    if not getattr(handler, "said", False):
        handler.said = True
        print(f"{handler.baseFilename} cannot be written ({error.strerror}); the run goes on without", file=sys.stderr)
