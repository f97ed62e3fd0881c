"""The lm-evaluation-harness from the command line: `w2sg harness RUN system=cong tasks=[arc_easy]`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from w2sg import progress
from w2sg.console import Plain
from w2sg.errors import UserError
from w2sg.evaluation.lm_harness import (
    RESULT,
    Options,
    evaluate_tasks,
    find_subject,
    harness_imported,
    load_tasks,
    result_rows,
    task_manager,
    with_baseline,
    writable,
    write_rows,
)


def run_harness(
    place: Path,
    system: str | None,
    options: Options,
    baseline: bool,
    to: Path | None,
    out: Path,
    root: Path,
    console: Plain,
) -> list[dict[str, Any]]:
    """Evaluate a model, print the table and write `RESULT`.

    Args:
        place: a finished run, a stage of a store, or a saved model.
        system: which of the run's models.
        baseline: also evaluate the model before its training.
        to: the folder for `RESULT`; None for that of the run or the model.
        out, root: where runs and the store lie; see `w2sg.models.finished.find_finished`.

    Returns:
        The rows that `RESULT` now holds of it; see `result_rows`.

    Raises:
        UserError: the harness is not installed, there is no such model or task, or a task's data is not to be had.
    """
    if find_spec("lm_eval") is None:
        raise UserError("harness: the package lm-eval is not installed; pip install lm-eval")
    subject = find_subject(place, system, out, root)
    if baseline and subject.before is None:
        raise UserError(
            f"baseline: nothing says what {subject.name} was trained from; give a run and one of its trained systems"
        )
    if options.include is not None and not options.include.is_dir():
        raise UserError(f"include: there is no folder {options.include}")
    folder = subject.folder if to is None else to
    writable(folder)
    with harness_imported():
        manager = task_manager(options)
        load_tasks(manager, options.tasks)  # what is missing is said before a model is loaded
        with progress.showing("auto", noun="model"):
            lines = _asked(subject.name, subject.model, manager, options, 0, 1 + baseline)
            if baseline:
                before = _asked(subject.before.name, subject.before, manager, options, 1, 2)
                lines = [with_baseline(tuned, untuned) for tuned, untuned in zip(lines, before, strict=True)]
    show_rows(lines, console)
    for row in lines:
        row.pop("each")
    try:
        write_rows(folder / RESULT, subject, lines)
    except OSError as error:
        raise UserError(f"to: {folder / RESULT} cannot be written ({error.strerror or error})") from error
    console.say(f"written: {folder / RESULT}")
    return lines


def _asked(name: str, model: Any, manager: Any, options: Options, place: int, of: int) -> list[dict[str, Any]]:
    """The rows of one of the models that are evaluated."""
    with progress.stage(name):
        progress.expect(of, place)
        return result_rows(name, evaluate_tasks(model, manager, options), options)


def show_rows(lines: list[dict[str, Any]], console: Plain) -> None:
    """The table: task, metric, value ± standard error; with a baseline also that of it and the difference."""
    compared = any("before" in row for row in lines)
    table = Table(box=None, pad_edge=False)
    for title in ("task", "metric"):
        table.add_column(title, overflow="fold")
    for title in ["n", "shots", lines[0]["system"], *([lines[0]["before"], "difference"] if compared else [])]:
        table.add_column(title, no_wrap=True, justify="right")
    for row in lines:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        arrow = {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "")
        cells = [
            row["task"],
            metric + arrow,
            *("-" if row[k] is None else str(row[k]) for k in ("examples", "fewshot")),
        ]
        cells.append(_measured(row["value"], row["stderr"]))
        if compared:
            cells.append(_measured(row["before_value"], row["before_stderr"]))
            cells.append(_measured(row["difference"], row["difference_stderr"], "+.3f"))
        table.add_row(*cells)
    console.print(table)


def _measured(value: float | None, stderr: float | None, how: str = ".3f") -> str:
    if value is None:
        return "-"
    return format(value, how) + ("" if stderr is None else f" ± {stderr:.3f}")
