"""Learning rates over the steps of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate_factor(schedule: str, warmup: float, total: int) -> Callable[[int], float]:
    """Multiplier of the learning rate at step k of ``total``: a linear rise in the warm-up, then the schedule to 0."""
    rise = round(warmup * total)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        part = (step - rise) / max(1, total - rise)
        return {"constant": 1.0, "linear": 1.0 - part, "cosine": 0.5 * (1.0 + math.cos(math.pi * part))}[schedule]

    return factor
