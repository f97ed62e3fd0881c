"""Weak labels as logits: hard ones, hard ones made finite, and smoothed ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from w2sg.errors import UserError
from w2sg.losses.probabilities import full_precision, log_softmax


def hard_logits(labels: Tensor, classes: int) -> Tensor:
    """Hard labels [B] as logits [B, classes]: 0 on the label and ``-inf`` elsewhere.

    >>> hard_logits(torch.tensor([1, 0]), 2)
    tensor([[-inf, 0.],
            [0., -inf]])
    """
    logits = torch.full((len(labels), classes), -torch.inf, device=labels.device)
    return logits.scatter_(1, labels[:, None].long(), 0.0)


def clamp_hard(weak_logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Hard labels pulled away from 0 and 1, so that reverse losses are finite; soft labels stay as they are.

    Args:
        weak_logits: [B, C].
        gamma: what a hard label leaves to the other classes together; 0.001 makes a pair's logit 6.9 (the theory of
            arXiv 2502.11107).

    Returns:
        [B, C] where a row with an infinite logit holds log-probabilities, 1 - gamma on the label and gamma / (C - 1)
        on each other class (a row with several possible classes keeps them and raises the others to that), and
        [B] whether the row was such a one.

    >>> clamp_hard(torch.tensor([[0.0, -torch.inf], [3.0, 0.0]]), gamma=0.001)
    (tensor([[-1.0005e-03, -6.9078e+00],
            [ 3.0000e+00,  0.0000e+00]]), tensor([ True, False]))
    """
    if not 0 < gamma < 0.5:
        raise UserError(f"optim.hard_label_clamp: must lie between 0 and 0.5 (got {gamma})")
    weak_logits = full_precision(weak_logits)
    hard = weak_logits.isinf().any(-1)
    least, most = math.log(gamma / (weak_logits.shape[-1] - 1)), math.log1p(-gamma)
    return torch.where(hard[:, None], log_softmax(weak_logits).clamp(least, most), weak_logits), hard


def smooth(weak_logits: Tensor, epsilon: float) -> Tensor:
    """Label smoothing ``w (1 - epsilon) + epsilon / C``, from logits to logits.

    Args:
        weak_logits: [B, C]; may be hard (``-inf``).
        epsilon: from 0 (returned as they are) to below 1.

    Returns:
        [B, C] log-probabilities, finite where epsilon > 0.

    >>> smooth(torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]), epsilon=0.1).exp()
    tensor([[0.9500, 0.0500],
            [0.5000, 0.5000]])
    """
    if not 0 <= epsilon < 1:
        raise UserError(f"optim.label_smoothing: must be at least 0 and below 1 (got {epsilon})")
    if epsilon == 0:
        return weak_logits
    log_w = log_softmax(full_precision(weak_logits))
    floor = torch.full_like(log_w, math.log(epsilon / log_w.shape[-1]))
    return torch.logaddexp(log_w + math.log1p(-epsilon), floor)
