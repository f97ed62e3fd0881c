"""Which layer of a frozen backbone to read: cross-validated logistic regression on ground-truth rows."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

FOLDS = 5


def choose_layer(states: Tensor, labels: Tensor, ids: list[str], classes: int, l2: float = 1.0) -> list[float]:
    """Cross-validated accuracy of a linear probe at every layer.

    Args:
        states: [N, n, K, D] frozen states of n texts at K layers.
        labels: [N] gold classes; for pairs (n = 2) which text is the better one.
        ids: [N] content hashes; they decide the folds, so row order does not matter.
        classes: C.
        l2: penalty on the squared weights of standardised features, per training set.

    Returns:
        K accuracies on held-out folds.
    """
    fold = np.array([int.from_bytes(hashlib.sha256(f"fold:{i}".encode()).digest()[:8], "big") % FOLDS for i in ids])
    return [_accuracy(states[:, :, k].double(), labels, fold, classes, l2) for k in range(states.shape[2])]


def _accuracy(states: Tensor, labels: Tensor, fold: np.ndarray, classes: int, l2: float) -> float:
    right = 0
    pairs = states.shape[1] == 2
    for k in range(FOLDS):
        train, test = torch.as_tensor(fold != k), torch.as_tensor(fold == k)
        if not test.any() or not train.any():
            continue
        flat = states[train].flatten(0, 1)
        scaled = (states - flat.mean(0)) / flat.std(0).clamp_min(1e-6)
        weights = _fit(scaled[train], labels[train], classes, l2)
        right += int((_logits(scaled[test], weights, pairs).argmax(-1) == labels[test]).sum())
    return right / len(labels)


def _logits(x: Tensor, weights: Tensor, pairs: bool) -> Tensor:
    return (x @ weights).squeeze(-1) if pairs else x[:, 0] @ weights


def _fit(x: Tensor, y: Tensor, classes: int, l2: float) -> Tensor:
    pairs = x.shape[1] == 2
    shape = (x.shape[-1], 1 if pairs else classes)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(flat.reshape(shape), requires_grad=True)
        loss = F.cross_entropy(_logits(x, weights, pairs), y, reduction="sum") + l2 * weights.square().sum()
        loss.backward()
        return float(loss), weights.grad.numpy().ravel()

    result = minimize(objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return torch.tensor(result.x.reshape(shape))
