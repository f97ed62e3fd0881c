"""Which layer of a frozen backbone to read: cross-validated logistic regression on ground-truth rows."""

from __future__ import annotations

import hashlib

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor

from w2sg import progress

FOLDS = 5


def choose_layer(states: Tensor, labels: Tensor, ids: list[str], classes: int, l2: float = 1.0) -> list[float]:
    """Cross-validated accuracy of a linear probe at every layer.

    Args:
        states: [N, n, K, D] frozen states of n texts at K layers.
        labels: [N] gold classes; for pairs (n = 2) which text is the better one.
        ids: [N] content hashes; they decide the folds, so row order does not matter.
        classes: C.
        l2: penalty on the squared weights of standardised features, relative to the mean loss of 1000 rows.

    Returns:
        K accuracies on held-out folds.
    """
    fold = np.array([int.from_bytes(hashlib.sha256(f"fold:{i}".encode()).digest()[:8], "big") % FOLDS for i in ids])
    x, y = states.numpy().astype(np.float64), labels.numpy()
    progress.count("choosing", x.shape[2], "layers")
    accuracies = []
    for k in range(x.shape[2]):
        accuracies.append(_accuracy(x[:, :, k], y, fold, classes, l2))
        progress.at(k + 1)
    return accuracies


def _accuracy(x: np.ndarray, y: np.ndarray, fold: np.ndarray, classes: int, l2: float) -> float:
    pairs = x.shape[1] == 2
    # Rewards of a pair are compared, so a linear reward is a logistic regression on the difference of the two texts.
    x = x[:, 0] - x[:, 1] if pairs else x[:, 0]
    right = 0
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        if not train.any() or not test.any():
            continue
        centre = 0.0 if pairs else x[train].mean(0)
        scale = np.sqrt(np.square(x[train] - centre).mean(0)).clip(1e-6)
        inputs = (x - centre) / scale
        weights = _fit(inputs[train], y[train], classes, pairs, l2)
        right += int((_logits(inputs[test], weights, pairs).argmax(-1) == y[test]).sum())
    return right / len(y)


def _logits(x: np.ndarray, weights: np.ndarray, pairs: bool) -> np.ndarray:
    z = x @ weights
    return np.concatenate([z, -z], 1) / 2 if pairs else z


def _fit(x: np.ndarray, y: np.ndarray, classes: int, pairs: bool, l2: float) -> np.ndarray:
    shape = (x.shape[1], 1 if pairs else classes)
    truth = np.eye(classes)[y]
    penalty = l2 / 1000.0

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        log_p = log_softmax(_logits(x, weights, pairs), axis=1)
        slope = (np.exp(log_p) - truth) / len(x)  # of the mean loss by the logits
        by_z = (slope[:, :1] - slope[:, 1:]) / 2 if pairs else slope
        loss = -(truth * log_p).sum() / len(x) + penalty * np.square(weights).sum()
        return loss, (x.T @ by_z + 2 * penalty * weights).ravel()

    return minimize(objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B").x.reshape(shape)
