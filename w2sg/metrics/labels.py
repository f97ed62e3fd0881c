"""Measures of label logits against gold classes, with bootstrap intervals.

Shapes: N examples, C classes (2 for pairs, the first reply in front), R bootstrap samples.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from w2sg.metrics.bootstrap import Bootstrap, binomial_interval, cluster_sums, interval, share_interval

BINS = 15  # of confidence, for the calibration error, reliability curves and histograms


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
        "ece": float(multiclass_calibration_error(p, labels, num_classes=classes, n_bins=BINS, norm="l1")),
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


def confidence(logits: Tensor) -> Tensor:
    """[N] probability of the class that is chosen."""
    return F.softmax(logits.double(), -1).amax(-1)


def intervals(logits: Tensor, labels: Tensor, bootstrap: Bootstrap) -> dict[str, list[float] | None]:
    """The 95 % bootstrap interval, over test rows, of every number of `measure`."""
    logits = logits.double()
    log_p = F.log_softmax(logits, -1)
    p = log_p.exp()
    truth = F.one_hot(labels, logits.shape[-1])
    hit, sure = correct(logits, labels).double(), p.amax(-1)
    columns = {
        "accuracy": hit,
        "nll": -log_p.gather(1, labels[:, None])[:, 0],
        "brier": (p - truth).square().sum(-1) / (2.0 if logits.shape[-1] == 2 else 1.0),
        "overconfidence": sure - hit,
    }
    bins = torch.zeros(len(hit), BINS, dtype=torch.float64)
    bins[torch.arange(len(hit)), bin_of(sure)] = sure - hit
    samples = bootstrap.means(torch.cat([torch.stack(list(columns.values()), 1), bins], 1).numpy())
    draws = dict(zip(columns, samples.T, strict=False)) | {"ece": np.abs(samples[:, len(columns) :]).sum(1)}
    out: dict[str, list[float] | None] = {name: list(interval(values)) for name, values in draws.items()}
    out["accuracy"] = list(share_interval(hit.numpy(), bootstrap.codes, out["accuracy"]))
    score, positive = _one_against_rest(logits, labels)
    out["auroc"] = None
    if (positive.any(0) & ~positive.all(0)).all():
        areas = [weighted_auroc(score[:, k].numpy(), positive[:, k].numpy(), bootstrap) for k in range(score.shape[1])]
        out["auroc"] = _area_interval(interval(np.mean(areas, 0)), positive.numpy(), bootstrap)
    return out


def _area_interval(ends: tuple[float, float], positive: np.ndarray, bootstrap: Bootstrap) -> list[float]:
    """Where every sample has an area of 1 (or 0), the exact limit of the smaller class's prompts: the other end."""
    low, high = ends
    if low == high and low in (0.0, 1.0):
        sides = [
            (cluster_sums(side.astype(np.int64), bootstrap.codes) > 0).sum(0).min() for side in (positive, ~positive)
        ]
        low, high = binomial_interval(low, min(sides))
    return [low, high]


def bin_of(sure: Tensor) -> Tensor:
    """[N] the bin of each confidence: (0, 1/15], (1/15, 2/15], ..., as torchmetrics cuts them."""
    bounds = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    return (torch.bucketize(sure.double(), bounds) - 1).clamp(0, BINS - 1)


def reliability(logits: Tensor, labels: Tensor) -> list[dict[str, float | int]]:
    """Per bin of confidence that holds a row: its bounds, rows, mean confidence and accuracy."""
    sure, hit = confidence(logits), correct(logits, labels).double()
    place = bin_of(sure)
    return [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "rows": int((place == k).sum()),
            "confidence": float(sure[place == k].mean()),
            "accuracy": float(hit[place == k].mean()),
        }
        for k in place.unique().tolist()
    ]


def _one_against_rest(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [N, M] and whether each is of its class [N, M]: one column for two classes, else one per class."""
    if logits.shape[-1] == 2:
        return (logits[:, :1] - logits[:, 1:]), (labels == 0)[:, None]
    return F.log_softmax(logits, -1), F.one_hot(labels, logits.shape[-1]).bool()


def weighted_auroc(score: np.ndarray, positive: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """[R] areas under the ROC curve of resampled rows, ties counted as one half; nan for a sample without a class.

    The sum over tied groups, in rising order, of ``positives in it * (negatives below + half of those in it)``.
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    kind = positive[order].astype(np.float32)

    def area(weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, order]
        above = np.add.reduceat(drawn * kind, starts, axis=1, dtype=np.float64)
        below = np.add.reduceat(drawn * (1 - kind), starts, axis=1, dtype=np.float64)
        pairs = above.sum(1) * below.sum(1)
        won = (above * (below.cumsum(1) - below / 2)).sum(1)
        return won / np.where(pairs > 0, pairs, np.nan)

    return bootstrap.samples(area)
