"""The other processes of a job: started for this one job, and ended with it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment

from w2sg import stops
from w2sg.config.plugins import PACKAGE
from w2sg.stops import PARENT
from w2sg.training import line

log = logging.getLogger(__name__)
RANKS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
NOT_FOR_A_JOB = re.compile(r"^[+~]{0,2}hydra[./](mode|run|sweep|sweeper|launcher|output_subdir|job_logging)([.=@/]|$)")

_children: list[subprocess.Popen] = []
_over = threading.Event()  # the job that they belong to is
_before: dict[str, str | None] = {}  # what stood in the environment in place of the ranks


def gather(fabric: Fabric) -> None:
    """Start this machine's other processes where nothing else does: each runs this one job, then ends.

    Lightning would repeat what was typed, which in a sweep is all of its jobs and under a launcher is not our command.
    """
    if PARENT in os.environ:
        threading.Thread(target=_follow, args=(int(os.environ[PARENT]),), daemon=True).start()
        return
    environment = fabric.strategy.cluster_environment
    if not isinstance(environment, LightningEnvironment) or environment.creates_processes_externally:
        return  # SLURM, torchrun and their like
    if not HydraConfig.initialized():  # a script of the user's own: Lightning repeats it, and its ranks stay in step
        return
    count = fabric.strategy.num_processes
    ranks = (environment.main_address, environment.main_port, environment.node_rank(), 0, fabric.world_size)
    _before.update({name: os.environ.get(name) for name in RANKS})
    os.environ.update({name: str(value) for name, value in zip(RANKS, ranks, strict=True)})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    inherited = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ, PARENT: str(os.getpid())}
    command, folder = _command()
    for rank in range(1, count):
        _children.append(subprocess.Popen(command, env={**inherited, "LOCAL_RANK": str(rank)}, cwd=folder))
    _over.clear()
    threading.Thread(target=_watch, args=(list(_children), _over), daemon=True).start()


def _command() -> tuple[list[str], str]:
    """What runs this job again, and where."""
    hydra = HydraConfig.get()
    script = Path(sys.argv[0]).absolute()
    if script.stem == hydra.job.name:
        command = [sys.executable, str(script)]
    else:  # the console command, evaluate.py, or a launcher's own program
        command = [sys.executable, str(PACKAGE), "decode" if hydra.job.config_name == "decode" else "train"]
    command += ["--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        if source.provider in {"main", "command-line"}:
            command += ["--config-path" if source.provider == "main" else "--config-dir", source.path]
    quoted = str(Path(hydra.runtime.output_dir).absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return [
        *command,
        *(typed for typed in hydra.overrides.hydra if not NOT_FOR_A_JOB.match(typed)),
        *hydra.overrides.task,
        "hydra.mode=RUN",
        f"hydra.run.dir='{quoted}'",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",  # the log file is rank 0's
    ], hydra.runtime.cwd


def _watch(children: list[subprocess.Popen], over: threading.Event) -> None:
    """End this process when one of its others fails: it would wait for that one for ever."""
    while not over.wait(0.2):
        codes = [code for child in children if (code := child.poll())]
        signals = [stops.CODES.get(code) or -code for code in codes if code in stops.CODES or -code in stops.SIGNALS]
        if signals:  # a signal that came to that one alone
            stops.request(signals[0])
            return
        if codes:
            if line.failed() or over.wait(5):  # the usual case: this process has noticed too, and says more
                return
            log.error("another process of this run failed (see above), so this one ends; finished stages are kept")
            _kill(children)
            logging.shutdown()
            os._exit(1)


def _follow(parent: int) -> None:
    """End with the process that started this one, however that ended: what is left would only hold its device."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@atexit.register
def disband() -> None:
    """Leave the group of a job that is over and wait for its other processes to end."""
    if not _before:
        return
    _over.set()
    line.leave()
    stops.join(None)
    stopping = stops.ended()
    if dist.is_initialized() and not stopping:  # which waits for the others
        dist.destroy_process_group()
    deadline = time.monotonic() + (4 if stopping else 20)
    for child in _children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    _kill(_children)
    _children.clear()
    for name, value in _before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _before.clear()


def _kill(children: list[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
