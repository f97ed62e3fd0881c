"""Accuracy over training steps: rows that are not trained on are read during a fit, and nothing of the fit changes.

The rows are the test split and, where some are held out, those. What is measured is shown, never used to choose a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from w2sg.data.loading import StageData
from w2sg.training.random_state import random_state, set_random_state

DEFAULT_POINTS = 20  # of a fit whose evaluation costs next to nothing, besides the one before its first step


def interval(chosen: int | None, steps: int) -> int:
    """Optimizer steps between evaluations of a fit.

    Args:
        chosen: ``logger.eval_every``; None spreads `DEFAULT_POINTS` over the fit.
        steps: of the whole fit.
    """
    return max(1, -(-steps // DEFAULT_POINTS)) if chosen is None else chosen


def is_evaluation(point: dict[str, float]) -> bool:
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


def replay(logger: Log | None, curve: list[dict[str, float]]) -> None:
    """Give a logger the points of a curve that was recorded before."""
    if logger is not None:
        for point in curve:
            logger.log_metrics({k: v for k, v in point.items() if k != "step"}, step=int(point["step"]))
