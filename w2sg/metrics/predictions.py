"""From stored predictions to whether each was right, without torch."""

from __future__ import annotations

import numpy as np


def right(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N] whether each prediction is the gold class; a tie counts as the first class, as in the published code.

    Args:
        predictions: [N] logits of class 0 against class 1, or [N, C] logits, as predictions.parquet has them.
        labels: [N] gold classes, from 0.

    >>> right(np.array([0.3, -1.2, 0.0]), np.array([0, 0, 0])).tolist()
    [True, False, True]
    >>> right(np.array([[0.1, 2.0, -1.0]]), np.array([1])).tolist()
    [True]
    """
    choice = np.where(predictions >= 0, 0, 1) if predictions.ndim == 1 else predictions.argmax(1)
    return choice == labels
