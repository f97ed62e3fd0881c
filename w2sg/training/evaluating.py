"""Accuracy over training steps: rows that are not trained on are read during a fit, and nothing of the fit changes.

The rows are the test split and, where some are held out, those. What is measured is shown, never used to choose a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from w2sg.data.loading import StageData
from w2sg.data.table import digest
from w2sg.store.files import read_json
from w2sg.training.random_state import random_state, set_random_state

Point = dict[str, float | str]  # ``step``, measures, and ``rows``: which test rows they were measured on
DEFAULT_POINTS = 20  # of a fit whose evaluation costs next to nothing, besides the one before its first step


def interval(chosen: int | None, steps: int) -> int:
    """Optimizer steps between evaluations of a fit.

    Args:
        chosen: ``logger.eval_every``; None spreads `DEFAULT_POINTS` over the fit.
        steps: of the whole fit.
    """
    return max(1, -(-steps // DEFAULT_POINTS)) if chosen is None else chosen


def rows_of(ids: Iterable[str], labels: Iterable[int]) -> str:
    """Which rows with which gold labels, in any order, as a hash: curves over other rows are not comparable."""
    return digest(*sorted(f"{i}:{y}" for i, y in zip(ids, labels, strict=True)))


def test_rows(data: StageData) -> str | None:
    """`rows_of` the test rows that a fit watches; None where it watches none."""
    test = data.watched.get("test")
    return None if test is None else rows_of(test.ids, test.gold.tolist())


def on_rows(curve: list[Point], rows: str | None) -> list[Point]:
    """A curve without what was measured on other test rows than these, such as those of an earlier run.

    >>> on_rows([{"step": 0, "loss": 1.0}, {"step": 2, "test_accuracy": 0.5, "rows": "a"}], "b")
    [{'step': 0, 'loss': 1.0}]
    """
    kept = [{k: v for k, v in p.items() if p.get("rows") == rows or not k.startswith("test_")} for p in curve]
    return [point for point in kept if point.keys() - {"step", "rows"}]


def on_test(curve: list[Point]) -> bool:
    """Whether any point was measured on test rows."""
    return any(key.startswith("test_") for point in curve for key in point)


def is_evaluation(point: Point) -> bool:
    """Whether a point of a curve was measured on watched rows (``test_accuracy``, ``held_out_accuracy``, ...)."""
    return any(key.startswith(("test_", "held_out_")) and key != "held_out_loss" for key in point)


def evaluate(module: Any, data: StageData) -> dict[str, float]:
    """Measures of a model in training on every set of rows that its stage watches, as ``<rows>_<measure>``.

    Random state and the mode of every submodule are put back, so the next step is the one without this.

    Args:
        module: a `FitModule`, attached to a trainer; its ``examine`` and ``measures`` say what is measured.
        data: of the stage.
    """
    found: dict[str, float] = {}
    with _as_it_was(module), torch.no_grad(), module.trainer.precision_plugin.forward_context():
        for name, examples in data.watched.items():
            seen = [module.examine(batch.to(module.device)) for batch in data.reading(examples)]
            found |= {f"{name}_{measure}": value for measure, value in module.measures(seen).items()}
    return found


@contextmanager
def _as_it_was(module: torch.nn.Module) -> Iterator[None]:
    random, modes = random_state(), [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        set_random_state(random)


class Log(Protocol):
    """A Lightning logger, as far as it is used here."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...


def replay(logger: Log | None, curve: list[Point]) -> None:
    """Give a logger the points of a curve that was recorded before."""
    if logger is not None:
        for point in curve:
            values = {k: v for k, v in point.items() if k not in ("step", "rows")}
            logger.log_metrics(values, step=int(point["step"]))


def curve_of(folder: Path) -> list[Point]:
    """The whole curve of a finished fit, on whatever test rows it was measured; empty for any other stage."""
    file = folder / "curve.json"
    return read_json(file) if file.exists() else []
