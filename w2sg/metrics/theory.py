"""What a student made of its teacher: the theory's identity on real rows, agreement, overturned labels, confidence.

Shapes: N examples, C classes (2 for pairs, the first reply in front).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from w2sg.metrics.bootstrap import Bootstrap, Estimate, share_interval
from w2sg.metrics.labels import confidence, correct
from w2sg.metrics.spread import Spread

GAMMA = 1e-3  # probabilities of the theory lie in [GAMMA, 1 - GAMMA] (arXiv 2502.11107)
SATURATED = math.log((1 - GAMMA) / GAMMA)  # a logit beyond this lies outside of it


def three_point(student: Tensor, teacher: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """The exact identity gain = misfit + remainder of every example; it needs no assumption.

    Gain is NLL(teacher) - NLL(student), misfit is KL(student || teacher), and the remainder is
    ``sum_k (truth_k - student_k)(log student_k - log teacher_k)``. Theorem 2 of arXiv 2502.11107 (gain >= misfit) holds
    on these rows exactly when the mean remainder is not negative.

    Args:
        student, teacher: [N, C] finite logits.
        truth: [N, C] probabilities, hard or soft.

    Returns:
        ``gain``, ``misfit``, ``remainder``, ``forward_misfit`` = KL(teacher || student), [N] each, in nats.
    """
    log_s, log_w = F.log_softmax(student.double(), -1), F.log_softmax(teacher.double(), -1)
    above = log_s - log_w
    s, y = log_s.exp(), truth.double()
    return {
        "gain": (y * above).sum(-1),
        "misfit": (s * above).sum(-1),
        "remainder": ((y - s) * above).sum(-1),
        "forward_misfit": -(log_w.exp() * above).sum(-1),
    }


def identity(student: Tensor, teacher: Tensor, labels: Tensor, bootstrap: Bootstrap) -> dict[str, Any]:
    """Means of `three_point` with intervals, on one split.

    ``theorem`` is "holds" or "fails" where the interval of the remainder excludes 0, else "not resolved".
    ``lemma_ratio`` is |gain| over the bound sqrt(misfit) / (gamma sqrt 2) of Lemma 1: the bound is true and loose.
    """
    truth = F.one_hot(labels, student.shape[-1])
    parts = three_point(student, teacher, truth)
    means = {name: bootstrap.mean(values.numpy()) for name, values in parts.items()}
    remainder = means["remainder"]
    theorem = "holds" if remainder.positive else "fails" if remainder.negative else "not resolved"
    misfit = max(0.0, means["misfit"].value)
    bound = math.sqrt(misfit) / (GAMMA * math.sqrt(2))
    return {
        "rows": len(labels),
        **{name: mean.as_dict() for name, mean in means.items()},
        "theorem": theorem,
        "lemma_ratio": abs(means["gain"].value) / bound if bound else None,
    }


def agreement(student: Tensor, teacher: Tensor, labels: Tensor, bootstrap: Bootstrap) -> dict[str, Any]:
    """How often the student chooses as its teacher does, and what it makes of the teacher's errors.

    Returns:
        ``agreement``: over ``all`` rows, and where the teacher is right or wrong. ``overturned``: ``errors``, the share
        of the teacher's errors that the student gets right, and ``successes``, the share of what the teacher had right
        that it gets wrong. ``confident_disagreement``: disagreement among the tenth of rows that the student is surest
        of. Estimates with intervals, and the numbers of rows.
    """
    same = (student.argmax(-1) == teacher.argmax(-1)).numpy()
    s, w = correct(student, labels).numpy(), correct(teacher, labels).numpy()
    sure = confidence(student).numpy()
    surest = sure >= np.quantile(sure, 0.9)

    def share(part: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
        return {**bootstrap.share(part & whole, whole).as_dict(), "rows": int(whole.sum())}

    everywhere = np.ones(len(w), bool)
    return {
        "agreement": {
            "all": share(same, everywhere),
            "teacher_right": share(same, w),
            "teacher_wrong": share(same, ~w),
        },
        "overturned": {"errors": share(s, ~w), "successes": share(~s, w)},
        "confident_disagreement": share(~same, surest),
    }


def certainty(logits: Tensor) -> dict[str, float]:
    """Mean entropy (nats), mean confidence, and the share of rows whose logit lies beyond that of 0.999."""
    log_p = F.log_softmax(logits.double(), -1)
    top = logits.double().topk(2, -1).values
    return {
        "entropy": float(-(log_p.exp() * log_p).sum(-1).mean()),
        "confidence": float(confidence(logits).mean()),
        "saturated": float(((top[:, 0] - top[:, 1]) > SATURATED).double().mean()),
    }


def leak(
    teacher_on_transfer: np.ndarray,
    teacher_on_test: np.ndarray,
    transfer_prompts: np.ndarray | None = None,
    test_prompts: np.ndarray | None = None,
) -> dict[str, Any]:
    """The teacher's accuracy on transfer minus that on test, with a normal interval; clearly positive is a leak.

    A teacher that saw transfer rows while it trained is better there than on test, and its labels carry ground truth.
    Where it is right (or wrong) on nearly all of a split, that split has its exact limits instead.

    Args:
        teacher_on_transfer, teacher_on_test: [N], [M] whether it was right. transfer_prompts, test_prompts: [N], [M]
            the number of each row's prompt; None: each row has its own.
    """
    means, below, above = [], [], []
    for hits, prompts in ((teacher_on_transfer, transfer_prompts), (teacher_on_test, test_prompts)):
        hits = np.asarray(hits, np.float64)
        mean, spread = hits.mean(), Spread.of_clusters(hits[:, None], prompts)
        reach = 1.96 * math.sqrt(spread.covariance[0, 0])
        low, high = share_interval(hits, prompts, (mean - reach, mean + reach))
        means.append(mean)
        below.append(mean - low)
        above.append(high - mean)
    difference = float(means[0] - means[1])
    low, high = math.hypot(below[0], above[1]), math.hypot(above[0], below[1])
    return Estimate(difference, difference - low, difference + high).as_dict()


def theorem_conditions(loss: str, head_only: bool, mixture: bool) -> dict[str, bool]:
    """Which assumptions of Theorem 2 a run meets: reverse KL, the last layer alone, a class convex in probabilities.

    A linear head is convex in logits, not in probabilities; only the mixture head is of the theorem's class.
    """
    return {"reverse_kl": loss == "reverse_kl", "last_layer": head_only, "convex_class": head_only and mixture}
