"""All experiments with known answers: the list, how they run, and what they print and write."""

from __future__ import annotations

import html
import logging
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
from w2sg.reports.html import PALETTE, Raw, new_figure, page, svg, table
from w2sg.store.files import write_json

if TYPE_CHECKING:
    from w2sg.console import Plain

log = logging.getLogger(__name__)
OWN = "closed form derived here and checked by simulation"
CHECKS = (
    Check(
        "loss_values",
        "Every loss equals its definition on fixed logits, and the confidence loss warms up linearly inside a fit.",
        "definitions; openai/weak-to-strong pull request 33 for the warm-up",
        loss_values,
    ),
    Check(
        "whole_path",
        "From a file of pairs to report.json and summary.json every number is the planted one.",
        "planted; sign flips counted one by one",
        whole_path,
    ),
    Check(
        "misfit_gain",
        "With a convex student and squared loss, the gain over the teacher equals the distance from it.",
        "Charikar et al. 2024, arXiv 2405.15116, Theorem 1",
        misfit_gain,
    ),
    Check(
        "misfit_kl",
        "The same in nats: KL(student‖truth) for cross entropy, the Pythagorean identity for reverse KL on mixtures.",
        "Mulgund & Pabbaraju 2025, arXiv 2501.19105; Yao et al. 2025, arXiv 2502.11107, Theorem 2",
        misfit_kl,
    ),
    Check(
        "halfspaces",
        "PGR of classification is 1 − atan(ρ tan θ)/θ, if the student can express the share ρ² of its teacher's error.",
        OWN,
        halfspaces,
    ),
    Check(
        "pgr_intervals",
        "Fieller's interval covers the true PGR in 95 % of experiments, and small gaps are reported as not resolved.",
        "Fieller 1954; the noncentral t distribution",
        pgr_intervals,
    ),
    Check(
        "leakage",
        "A teacher that trained on rows it labels is detected by its accuracy on them; splits by prompt share no rows.",
        OWN,
        leakage,
    ),
    Check(
        "intrinsic_dimension",
        "The less the features of teacher and student overlap, the better the student; at small N its PGR is above 1.",
        f"Dong et al. 2025, arXiv 2502.05075; exact for Gaussian inputs, {OWN}",
        intrinsic_dimension,
    ),
    Check(
        "clusters",
        "Independent label noise is corrected by the majority of a cluster; noise on whole clusters is not.",
        "pseudolabel correction: Lang et al. 2024, arXiv 2405.16043; P(Bin(m, α) > m/2)",
        clusters,
    ),
    Check(
        "ridge",
        "A ridge student beats its ridge teacher exactly if the teacher is under-regularised.",
        "Moniri & Hassani 2025, arXiv 2505.18346",
        ridge,
    ),
    Check(
        "random_features",
        "Early stopping makes a student beat teachers on few random features, but no student contracts below a floor.",
        f"Medvedev et al. 2025, arXiv 2503.02877; the exact floor: {OWN}",
        random_features,
    ),
    Check(
        "ensembles",
        "A committee's error is bias + variance/M, and a student of its labels has the same error.",
        OWN,
        ensembles,
    ),
    Check(
        "surrogate",
        "Some labels teach better than gold ones: they amplify large features and leave out small ones.",
        "Ildiz et al. 2024, arXiv 2410.18837, Figure 1",
        surrogate,
    ),
    Check(
        "refinement",
        "Labels refined in context lose the weak model's bias exponentially in the examples of a context.",
        f"Somerstep et al. 2024, arXiv 2405.16236, Theorem 4.3; the rate: {OWN}",
        refinement,
    ),
    Check(
        "naive_floor",
        "Naive fine-tuning on biased labels has an error floor, however strong its anchor to the source.",
        f"arXiv 2405.16236, Proposition 3.2; our statement of it, {OWN}",
        naive_floor,
    ),
    Check(
        "refinement_fails",
        "If the bias leans towards another concept by more than one half, refinement is worse than naive training.",
        OWN,
        refinement_fails,
    ),
    Check(
        "product_of_contexts",
        "The product of m contexts is one context m times as long; their average is no better than one.",
        OWN,
        product_of_contexts,
    ),
    Check(
        "personas",
        "Refinement of text by a mixture of hidden Markov personas agrees with the exact sum over all texts.",
        f"the text twin of arXiv 2405.16236; {OWN}",
        personas,
    ),
)
# minutes each, so not part of "all"
APART = (
    Check(
        "sweeps",
        "Tests reject a true null in 5 % of sweeps and intervals hold the truth in 95 %, over seeds, split seeds, both "
        "and prompts of several rows.",
        "simulation; the truth is known because the draws are normal",
        sweeps,
    ),
)


@dataclass(frozen=True)
class Done:
    """The result of one check."""

    check: Check
    findings: Findings
    seconds: float


def chosen(name: str) -> tuple[Check, ...]:
    """The checks of ``known_answers=name``. Raises UserError if no check has that name."""
    found = tuple(check for check in CHECKS if name in ("all", check.name))
    found += tuple(check for check in APART if name == check.name)
    if not found:
        names = ", ".join(check.name for check in (*CHECKS, *APART))
        raise UserError(f"known_answers: there is no check '{name}'; use all, or one of {names}")
    return found


def run(check: Check) -> Done:
    """Run one check in a temporary, empty store, so that stages of older code cannot answer for this code."""
    begun, notices = time.perf_counter(), logging.getLogger("w2sg.training.stages")
    before = notices.level
    notices.setLevel(logging.WARNING)  # hundreds of stages that do not concern the user
    try:
        with tempfile.TemporaryDirectory() as folder:
            findings = check.run(Bench(Path(folder)))
    except Exception as error:  # one check that fails to run must not hide the results of the others
        log.exception("known_answers: %s could not be run", check.name)
        findings = Findings()
        findings.add("the check runs to its end", 1, 0, 0, f"{type(error).__name__}: {error}")
    finally:
        notices.setLevel(before)
    return Done(check, findings, time.perf_counter() - begun)


def run_known_answers(name: str, out: Path, console: Plain) -> bool:
    """Run checks, print them, write ``known_answers.html`` and ``.json`` below ``out``. True if all pass."""
    from rich.text import Text

    checks, finished = chosen(name), []
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "known_answers.html").touch()
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror or error}); name another folder") from error
    for check in checks:
        done = run(check)
        finished.append(done)
        show(done, console)
    failed = [done.check.name for done in finished if not done.findings.passed]
    seconds = sum(done.seconds for done in finished)
    verdict = (f"failed: {', '.join(failed)}", "red") if failed else ("all hold", "green")
    count = f"{len(finished)} check{'s' * (len(finished) != 1)}"
    console.print(Text.assemble(f"{count} in {seconds:.0f} s: ", verdict))
    try:
        write_json(out / "known_answers.json", [_record(done) for done in finished])
        (out / "known_answers.html").write_text(whole_page(name, finished), encoding="utf-8")
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror or error}); name another folder") from error
    console.say(f"written: {out / 'known_answers.html'}, {out / 'known_answers.json'}")
    return not failed


def _record(done: Done) -> dict:
    def plain(quantity: Quantity) -> dict:
        values = asdict(quantity) | {"passed": quantity.passed}
        return values | {"got": quantity.got if np.isfinite(quantity.got) else None}

    return {
        "name": done.check.name,
        "says": done.check.says,
        "source": done.check.source,
        "seconds": done.seconds,
        "passed": done.findings.passed,
        "quantities": [plain(quantity) for quantity in done.findings.quantities],
    }


def cells(quantity: Quantity) -> tuple[str, str, str, str]:
    """Name, expected, got and tolerance, formatted."""
    bound = {"=": "", "<=": "≤ ", ">=": "≥ "}[quantity.relation]
    return quantity.name, f"{bound}{quantity.expected:.5g}", f"{quantity.got:.5g}", f"{quantity.tolerance:.2g}"


def show(done: Done, console: Plain) -> None:
    """Print one check's numbers as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    def word(passed: bool) -> tuple[str, str]:
        return ("pass", "green") if passed else ("FAIL", "red")

    words = f" ({done.seconds:.1f} s): {done.check.says}"
    console.print(Text.assemble(word(done.findings.passed), " ", (done.check.name, "bold"), words), soft_wrap=True)
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("quantity", "expected", "got", "tolerance", ""):
        left = column in ("quantity", "")
        grid.add_column(column, justify="left" if left else "right", no_wrap=column != "quantity")
    for quantity in done.findings.quantities:
        grid.add_row(*cells(quantity), Text.assemble(word(quantity.passed)))
    console.print(grid)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def whole_page(name: str, finished: Iterable[Done]) -> str:
    """The page: every check with its figures over the theory and its table."""
    finished = list(finished)
    held = sum(done.findings.passed for done in finished)
    rows = [
        (
            Raw(f"<a href='#{done.check.name}'>{done.check.name}</a>"),
            _mark(done.findings.passed),
            f"{sum(q.passed for q in done.findings.quantities)} of {len(done.findings.quantities)}",
            f"{done.seconds:.1f}",
            done.check.says,
        )
        for done in finished
    ]
    return page(
        "Experiments with known answers",
        [
            "<h1>Experiments with known answers</h1>",
            f"<p class=command>python evaluate.py known_answers={html.escape(name)}</p>",
            f"<p class=verdict>{held} of {len(finished)} checks hold.</p>",
            "<p class=note>The code of every other run trains, reads, splits and measures here; expected values are "
            "computed from theory. Lines are theory, points are runs (whiskers: one standard error).</p>",
            table(("check", "", "numbers", "seconds", "what it shows"), rows, "facts"),
            *(section for done in finished for section in _section(done)),
        ],
    )


def _mark(passed: bool) -> Raw:
    return Raw("<span class=yes>pass</span>" if passed else "<span class=no>FAIL</span>")


def _section(done: Done) -> list[str]:
    check = done.check
    rows = [(*cells(q), _mark(q.passed), q.why) for q in done.findings.quantities]
    head = ("quantity", "expected", "got", "tolerance", "", "where the tolerance comes from")
    return [
        f"<h2 id={check.name}>{check.name.replace('_', ' ')} {_mark(done.findings.passed)}</h2>",
        f"<p>{html.escape(check.says)} <span class=note>Source: {html.escape(check.source)}.</span></p>",
        *(figure(panel) for panel in done.findings.panels),
        f"<details{'' if done.findings.passed else ' open'}><summary>{len(rows)} numbers</summary>",
        table(head, rows),
        "</details>",
    ]


def figure(panel: Panel) -> str:
    """Draw theory as lines and runs as points."""
    drawn, axis = new_figure(6.6, 3.4)
    for line in panel.lines:
        colour = PALETTE[line.colour]
        if line.kind == "theory":
            axis.plot(line.x, line.y, color=colour, lw=1.4, label=line.label or None)
        else:
            style = {"fmt": "o", "ms": 4, "lw": 1, "capsize": 2, "mfc": "white", "color": colour}
            axis.errorbar(line.x, line.y, yerr=line.error, label=line.label or None, **style)
    if panel.logx:
        axis.set_xscale("log")
    if panel.logy:
        axis.set_yscale("log")
    axis.set_xlabel(panel.x, fontsize=9)
    axis.set_ylabel(panel.y, fontsize=9)
    axis.set_title(panel.title, fontsize=10)
    axis.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1))
    return svg(drawn, f"{panel.title}: {panel.y} over {panel.x}, theory and runs")
