"""Combining the labels of several teachers, and drawing the rows of each.

Shapes: M members, N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from w2sg.data.table import uniform

COMBINE = ("mean", "logits", "vote", "boost")


def combine(members: Sequence[Tensor], how: str, weights: Sequence[float] | None = None) -> Tensor:
    """[N, C] label logits of a committee.

    - ``mean``: log of the mean probability.
    - ``logits``: mean log-probability (a product of experts).
    - ``vote``: log of the share of votes, half a vote more for each class (Jeffreys' prior), so that none is certain.
    - ``boost``: weighted votes over C - 1, the logits of SAMME's probabilities (Zhu et al. 2009, eq. 7).

    Args:
        members: M tensors [N, C] of logits.
        how: one of the four above.
        weights: M votes, for ``boost``.
    """
    logs = torch.stack([logits.double().log_softmax(-1) for logits in members])
    classes = logs.shape[-1]
    if how == "mean":
        return (logs.logsumexp(0) - np.log(len(logs))).float()
    if how == "logits":
        return logs.mean(0).float()
    votes = torch.nn.functional.one_hot(logs.argmax(-1), classes).double()  # [M, N, C]
    if how == "vote":
        return ((votes.sum(0) + 0.5) / (len(logs) + 0.5 * classes)).log().float()
    return (torch.einsum("m,mnc->nc", torch.tensor(weights, dtype=torch.float64), votes) / (classes - 1)).float()


def member_rows(ids: Sequence[str], member: int, resample: str, part: float, seed: int) -> np.ndarray | None:
    """Row numbers that a member learns from, or None for all.

    ``bootstrap`` draws as many as there are, with repetition. ``subset`` draws the share ``part``, without. The draw
    depends on seed and content ids only, not on the order of the rows.
    """
    if resample == "none":
        return None
    order = np.argsort(ids, kind="stable")
    if resample == "subset":
        draws = np.array([uniform(seed, f"member{member}", ids[row]) for row in order])
        return np.sort(order[np.argsort(draws, kind="stable")[: max(1, round(part * len(ids)))]])
    draws = np.array([uniform(seed, f"member{member}", k) for k in range(len(ids))])
    return np.sort(order[(draws * len(ids)).astype(np.int64)])


def weighted_rows(ids: Sequence[str], weights: np.ndarray, member: int, seed: int) -> np.ndarray:
    """[N] row numbers drawn in proportion to ``weights`` [N], with repetition: boosting by resampling."""
    order = np.argsort(ids, kind="stable")
    edges = np.cumsum(weights[order])
    draws = np.array([uniform(seed, f"boost{member}", k) for k in range(len(ids))]) * edges[-1]
    return np.sort(order[np.minimum(np.searchsorted(edges, draws, side="right"), len(ids) - 1)])


def boosted(weights: np.ndarray, right: np.ndarray, classes: int) -> tuple[float, np.ndarray]:
    """One round of SAMME (Zhu et al. 2009, algorithm 2): the member's weight, and the rows' weights after it.

    Args:
        weights: [N] weights of the rows, summing to 1.
        right: [N] bool, whether the member answers a row correctly.
        classes: C.

    Returns:
        The member's weight and the rows' new weights [N]. A member no better than chance gets 0 and changes no weight.
    """
    error = float(weights[~right].sum())
    error = min(max(error, 0.5 / len(weights)), 1.0)  # half a row wrong at least, so that no vote is infinite
    weight = np.log((1 - error) / error) + np.log(classes - 1) if error < 1 else -np.inf
    if weight <= 0:
        return 0.0, weights
    after = np.where(right, weights, weights * np.exp(weight))
    return float(weight), after / after.sum()
