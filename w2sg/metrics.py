"""Measures of label logits against gold classes, and the performance gap recovered, with bootstrap intervals.

Shapes: N examples, C classes (2 for pairs, the first reply in front), R bootstrap samples.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 2000


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """[N] whether the largest logit is the gold class; a tie counts as the first class, as in the published code."""
    return logits.argmax(-1) == labels


def measure(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Accuracy, AUROC, NLL (nats), Brier score, ECE (15 bins of the top class) and signed overconfidence.

    Args:
        logits: [N, C] finite logits.
        labels: [N] gold classes.

    Returns:
        ``auroc`` counts ties as one half; with C > 2 it is the mean of one-against-rest. It is None where a class is
        missing. ``brier`` is the squared error of P(first) for C = 2, summed over classes for C > 2.
        ``overconfidence`` is mean confidence minus accuracy.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits = logits.double()
    classes = logits.shape[-1]
    log_p = F.log_softmax(logits, -1)
    p = log_p.exp()
    hit = correct(logits, labels).double()
    truth = F.one_hot(labels, classes).double()
    squared = (p - truth).square().sum(-1) / (2.0 if classes == 2 else 1.0)
    confidence = p.max(-1).values
    return {
        "accuracy": float(hit.mean()),
        "auroc": _auroc(logits, labels),
        "nll": float(-log_p.gather(1, labels[:, None]).mean()),
        "brier": float(squared.mean()),
        "ece": float(multiclass_calibration_error(p, labels, num_classes=classes, n_bins=15, norm="l1")),
        "overconfidence": float(confidence.mean() - hit.mean()),
    }


def _auroc(logits: Tensor, labels: Tensor) -> float | None:
    from torchmetrics.functional.classification import binary_auroc

    classes = logits.shape[-1]
    if len(labels.unique()) < classes:
        return None
    if classes == 2:
        # torchmetrics squashes scores outside [0, 1] through a sigmoid, which ties large ones; ranks are safe.
        score = _ranks(logits[:, 0] - logits[:, 1])
        return float(binary_auroc(score, (labels == 0).long()))
    p = F.log_softmax(logits, -1)
    return float(np.mean([float(binary_auroc(_ranks(p[:, k]), (labels == k).long())) for k in range(classes)]))


def _ranks(score: Tensor) -> Tensor:
    """Scores as their places in (0, 1], equal where they are equal."""
    _, place = score.unique(return_inverse=True)
    return (place.double() + 1.0) / (place.max().double() + 1.0)


def bootstrap_weights(n: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """[R, N] how often each example is drawn in each bootstrap sample, divided by N: ``weights @ x`` are the means."""
    random = np.random.default_rng(seed)
    return random.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float32) / n


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def performance_gap_recovered(
    weak: Tensor, student: Tensor, ceiling: Tensor, weights: np.ndarray | None = None
) -> dict[str, float | bool | None]:
    """PGR = (student - weak) / (ceiling - weak) on accuracy (Burns et al. 2023), with a paired bootstrap interval.

    Args:
        weak, student, ceiling: [N] whether each was right, on the same examples.
        weights: from `bootstrap_weights`.

    Returns:
        ``value`` (None where the ceiling is no better than the weak model), the 95 % interval ``low``, ``high``,
        ``resolved``: whether the 95 % interval of the gap itself lies above 0, and ``gap`` with its interval. Where
        the gap is not resolved, low and high are None: a ratio over noise has no interval worth printing.
    """
    hits = torch.stack([weak, student, ceiling]).double().numpy()
    means = hits.mean(1)
    weights = bootstrap_weights(hits.shape[1]) if weights is None else weights
    w, s, c = (weights @ hits.T.astype(np.float32)).T
    gap = means[2] - means[0]
    gap_low, gap_high = interval(c - w)
    resolved = gap_low > 0
    low = high = None
    if resolved:
        # the few samples without a gap say nothing about the ratio's size: they widen it without limit, on their side
        ratio = np.where(c > w, (s - w) / np.where(c > w, c - w, 1.0), np.where(s > w, np.inf, -np.inf))
        low, high = (x if np.isfinite(x) else None for x in interval(ratio))
    return {
        "value": float((means[1] - means[0]) / gap) if gap > 0 else None,
        "low": low,
        "high": high,
        "resolved": bool(resolved),
        "gap": float(gap),
        "gap_low": gap_low,
        "gap_high": gap_high,
    }
