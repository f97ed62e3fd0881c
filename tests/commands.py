"""Scripts in forks of a process that has imported the large packages already: seconds of each short run are imports."""

import atexit
import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import remembered

ROOT = Path(__file__).resolve().parent.parent
context: ForkServerContext = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        *("lightning.pytorch", "transformers", "peft", "pyarrow.parquet", "datasets", "hydra", "rich.progress"),
        *("matplotlib.figure", "matplotlib.backends.backend_svg", "torchmetrics", "scipy.stats", "jinja2"),
        *("w2sg.cli.train", "w2sg.experiment.run", "w2sg.config.composing"),
    ]
)


UNDRAWN = "W2SG_TESTS_DO_NOT_DRAW"  # set: figures are made and not drawn


@cache
def draw_where_wanted() -> None:
    """From now on this process draws figures only where `UNDRAWN` is not set."""
    from matplotlib.figure import Figure

    usual, usual_find = Figure.savefig, Figure.findobj

    def savefig(figure, file, **options):
        return file.write(b"<svg/>") if os.environ.get(UNDRAWN) else usual(figure, file, **options)

    def findobj(figure, *args, **options):  # makes every tick of the axes, to go through them
        return [] if os.environ.get(UNDRAWN) else usual_find(figure, *args, **options)

    Figure.savefig, Figure.findobj = savefig, findobj


def start(
    script: str,
    overrides: Sequence[str],
    environment: dict[str, str],
    out: Path | str,
    err: Path | str,
    folder: Path = ROOT,
):
    """The running process of a script in a folder; its output goes to two files."""
    arguments = (script, overrides, environment, str(out), str(err), str(folder))
    process: BaseProcess = context.Process(target=_run, args=arguments)
    process.start()
    return process


def _run(script: str, overrides: Sequence[str], environment: dict[str, str], out: str, err: str, folder: str) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
        if os.isatty(file):  # the streams of this process were made for files
            name = "stdout" if stream is sys.stdout else "stderr"
            terminal = open(stream.fileno(), "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, terminal)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = [script, *overrides], str((ROOT / script).parent)
    sys.modules["w2sg.console"].TYPED[:] = sys.argv  # which it reads where it is imported
    draw_where_wanted()
    remembered.remember()
    gc.freeze()  # the large packages need not be looked through
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
