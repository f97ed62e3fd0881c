"""All experiments with known answers: the list, how they run, and what they print and write."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from w2sg import progress
from w2sg.config.programs import command
from w2sg.errors import UserError
from w2sg.known_answers.bench import Bench
from w2sg.known_answers.concepts import naive_floor, product_of_contexts, refinement, refinement_fails
from w2sg.known_answers.halfspaces import halfspaces
from w2sg.known_answers.intervals import pgr_intervals
from w2sg.known_answers.kernels import random_features, ridge
from w2sg.known_answers.labels import clusters, leakage
from w2sg.known_answers.linear import ensembles, intrinsic_dimension, misfit_gain, surrogate
from w2sg.known_answers.objectives import loss_values, misfit_kl
from w2sg.known_answers.personas import personas
from w2sg.known_answers.result import Check, Findings, Panel, Quantity
from w2sg.known_answers.sweeps import sweeps
from w2sg.known_answers.whole_path import whole_path
from w2sg.reports.colours import PALETTE, PAPER
from w2sg.reports.figures import new_figure, svg
from w2sg.reports.render import page, render
from w2sg.reports.words import Cell, counted
from w2sg.store.files import write_json

if TYPE_CHECKING:
    from w2sg.console import Plain

log = logging.getLogger(__name__)
CHECKS: tuple[Check, ...] = (
    *(loss_values, whole_path, misfit_gain, misfit_kl, halfspaces, pgr_intervals, leakage, intrinsic_dimension),
    *(clusters, ridge, random_features, ensembles, surrogate),
    *(refinement, naive_floor, refinement_fails, product_of_contexts, personas),
)
APART: tuple[Check, ...] = (sweeps,)  # minutes each, so not part of "all"


@dataclass(frozen=True)
class Done:
    """The result of one check."""

    check: Check
    findings: Findings
    seconds: float


def chosen(name: str) -> tuple[Check, ...]:
    """The checks of ``known_answers=name``. Raises UserError if no check has that name."""
    checks = {check.name: (check,) for check in (*CHECKS, *APART)}
    if name != "all" and name not in checks:
        raise UserError(f"known_answers: there is no check '{name}'; use all, or one of {', '.join(checks)}")
    return CHECKS if name == "all" else checks[name]


def run_check(check: Check) -> Done:
    """Run one check in a temporary, empty store, so that stages of older code cannot answer for this code."""
    begun = time.perf_counter()
    try:
        with progress.hidden(), tempfile.TemporaryDirectory() as folder:
            findings = check.run(Bench(Path(folder)))
    except Exception as error:  # one check that fails to run must not hide the results of the others
        log.exception("known_answers: %s could not be run", check.name)
        findings = Findings()
        findings.add("the check runs to its end", 1, 0, 0, f"{type(error).__name__}: {error}")
    return Done(check, findings, time.perf_counter() - begun)


def run_known_answers(name: str, out: Path, console: Plain) -> bool:
    """Run checks, print them, write ``known_answers.html`` and ``.json`` below ``out``. True if all pass."""
    from rich.text import Text

    checks, finished = chosen(name), []
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "known_answers.html").touch()
    for place, check in enumerate(checks):
        with progress.showing("auto", noun="check"), progress.stage(check.name):
            progress.expect(len(checks), place)
            progress.count("running")
            done = run_check(check)
        finished.append(done)
        show_check(done, console)
    failed = [done.check.name for done in finished if not done.findings.passed]
    seconds = sum(done.seconds for done in finished)
    verdict = (f"failed: {', '.join(failed)}", "red") if failed else ("all hold", "green")
    count = counted(len(finished), "checks")
    console.print(Text.assemble(f"{count} in {seconds:.0f} s: ", verdict))
    with _writing(out):
        write_json(out / "known_answers.json", [_record(done) for done in finished])
        (out / "known_answers.html").write_text(whole_page(name, finished), encoding="utf-8")
    console.say(f"written: {out / 'known_answers.html'}, {out / 'known_answers.json'}")
    return not failed


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror or error}); name another folder") from error


def _record(done: Done) -> dict:
    quantities = [
        asdict(q) | {"passed": q.passed, "got": q.got if np.isfinite(q.got) else None} for q in done.findings.quantities
    ]
    about = {"name": done.check.name, "says": done.check.says, "source": done.check.source, "seconds": done.seconds}
    return about | {"passed": done.findings.passed, "quantities": quantities}


def cells(quantity: Quantity) -> tuple[str, str, str, str]:
    """Name, expected, got and tolerance, formatted."""
    bound = {"=": "", "<=": "≤ ", ">=": "≥ "}[quantity.relation]
    return quantity.name, f"{bound}{quantity.expected:.5g}", f"{quantity.got:.5g}", f"{quantity.tolerance:.2g}"


def show_check(done: Done, console: Plain) -> None:
    """Print one check's numbers as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table
    from rich.text import Text

    def word(passed: bool) -> tuple[str, str]:
        return ("pass", "green") if passed else ("FAIL", "red")

    words = f" ({done.seconds:.1f} s): {done.check.says}"
    console.print(Text.assemble(word(done.findings.passed), " ", (done.check.name, "bold"), words), soft_wrap=True)
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("expected", "got", "tolerance"))
    grid = Table("quantity", *numbers, Column("", no_wrap=True), box=SIMPLE_HEAD, pad_edge=False)
    for quantity in done.findings.quantities:
        grid.add_row(*cells(quantity), Text.assemble(word(quantity.passed)))
    console.print(grid)


def _mark(passed: bool) -> Cell:
    return Cell("pass" if passed else "FAIL", kind="yes" if passed else "no")


def whole_page(name: str, finished: Iterable[Done]) -> str:
    """The page: every check with its figures over the theory and its table."""
    finished = list(finished)
    overview = [
        (
            Markup('<a href="#{0}">{0}</a>').format(done.check.name),
            _mark(done.findings.passed),
            f"{sum(q.passed for q in done.findings.quantities)} of {len(done.findings.quantities)}",
            f"{done.seconds:.1f}",
            done.check.says,
        )
        for done in finished
    ]
    rows = [[(*cells(q), _mark(q.passed), q.why) for q in done.findings.quantities] for done in finished]
    typed = command("check-theory", name)
    whole = render("known_answers.html", command=typed, finished=finished, overview=overview, rows=rows, figure=figure)
    return page("Experiments with known answers", [whole])


def figure(panel: Panel) -> str:
    """Draw theory as lines and runs as points."""
    drawn, axis = new_figure(6.6, 3.4)
    for line in panel.lines:
        colour = PALETTE[line.colour]
        if line.kind == "theory":
            axis.plot(line.x, line.y, color=colour, lw=1.4, label=line.label or None)
        else:
            style = {"fmt": "o", "ms": 4, "lw": 1, "capsize": 2, "mfc": PAPER, "color": colour}
            axis.errorbar(line.x, line.y, yerr=line.error, label=line.label or None, **style)
    axis.set(xscale="log" if panel.logx else "linear", yscale="log" if panel.logy else "linear")
    axis.set_xlabel(panel.x, fontsize=9)
    axis.set_ylabel(panel.y, fontsize=9)
    axis.set_title(panel.title, fontsize=10)
    axis.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1))
    data = [
        (line.label, line.kind, *(f"{n:.5g}" for n in point), f"{error:.2g}" if line.error is not None else "")
        for line in panel.lines
        for *point, error in zip(line.x, line.y, line.error or [0.0] * len(line.x), strict=True)
    ]
    runs = sum(kind == "measured" for _, kind, *_ in data)
    alt = f"{panel.title}: {panel.y} over {panel.x}; lines are theory, {counted(runs, 'runs')} are points"
    return svg(drawn, alt, (("line", "of", panel.x, panel.y, "one standard error"), data))
