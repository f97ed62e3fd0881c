"""Losses whose target hangs on who is sure: the student's own prediction beside the weak label, or the label itself."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from w2sg.errors import UserError
from w2sg.losses.marks import needs_soft_labels, whole_batch
from w2sg.losses.probabilities import expected_cost, log_probabilities, log_softmax, refuse_hard


@whole_batch
def confidence(
    logits: Tensor,
    weak_logits: Tensor,
    progress: float = 1.0,
    *,
    alpha: float = 0.5,
    warmup: float = 0.2,
    threshold: Literal["prior", "half"] = "prior",
) -> Tensor:
    """Auxiliary confidence loss: cross entropy with the weak label mixed with the student's own hardened prediction.

    Hardening: class k claims the examples whose s_k exceeds t_k, the (1 - prior_k) quantile of s_k over the batch
    (linear interpolation). Claimed by several, an example goes to the largest s_k / t_k; by none, to its most probable
    class. For C = 2 one of the two claims: "first, where s > t". An example exactly on the threshold gives no reason to
    take a side and gets the prior itself, shared among the classes that tie: the mean of a fair draw. Hence a zero
    head, where all examples tie, hardens nothing; swapping the replies of every pair swaps the targets; and a batch of
    one keeps its weak label.

    Args:
        logits: [B, C] of the student, the whole batch.
        weak_logits: [B, C] of the weak model; hard labels (``-inf``) are exact.
        progress: part of training done.
        alpha: weight of the hardened prediction after the warm-up.
        warmup: part of training over which the weight rises linearly from 0; 0 gives alpha at once.
        threshold: ``prior``: prior is the batch mean of w. ``half``: it is 1/C (for C = 2 t is the median).

    Returns:
        [B] ``(1 - a) CE(w, s) + a CE(hard(s), s)``, ``a = alpha min(1, progress / warmup)``; hard(s) is detached.

    >>> logits = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.5, 0.0]])
    >>> weak_logits = torch.tensor([[1.0, 0.0], [0.5, 0.0], [-1.0, 0.0]])
    >>> confidence(logits, weak_logits)
    tensor([0.3959, 0.6245, 0.6568])
    >>> confidence(logits, weak_logits, progress=0.1)
    tensor([0.5303, 0.7801, 0.7482])

    References:
        Burns et al. 2023, arXiv 2312.09390.
    """
    log_s, log_w = log_probabilities(logits, weak_logits)
    coefficient = _coefficient(alpha, warmup, progress)
    hard = _harden(log_s, log_w, threshold)
    # cross entropy is linear in its target, so one with the mixed target is the mixture of both
    return expected_cost((1 - coefficient) * log_w.exp() + coefficient * hard, log_s)


@whole_batch
@needs_soft_labels
def reverse_confidence(
    logits: Tensor,
    weak_logits: Tensor,
    progress: float = 1.0,
    *,
    alpha: float = 0.5,
    warmup: float = 0.2,
    threshold: Literal["prior", "half"] = "prior",
    form: Literal["A", "B"] = "A",
) -> Tensor:
    """Reverse cross entropy with the auxiliary confidence term, in two readings of an equation that is not public.

    A reverses the weak term only: the literal reverse of the other, CE(s, hard(s)), is infinite. B is the reverse cross
    entropy against the mixed target. They differ, since reverse cross entropy is not linear in its target.

    Args:
        logits: [B, C] of the student, the whole batch.
        weak_logits: [B, C] of the weak model, finite.
        progress, alpha, warmup, threshold: as in `confidence`.
        form: ``A`` or ``B``; B needs alpha < 1.

    Returns:
        [B] A: ``(1 - a) CE(s, w) + a CE(hard(s), s)``. B: ``CE(s, (1 - a) w + a hard(s))``.

    Raises:
        UserError: a weak logit is infinite (a hard label).

    >>> logits = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.5, 0.0]])
    >>> weak_logits = torch.tensor([[1.0, 0.0], [0.5, 0.0], [-1.0, 0.0]])
    >>> reverse_confidence(logits, weak_logits)
    tensor([0.2797, 0.5764, 0.7049])
    >>> reverse_confidence(logits, weak_logits, form="B")
    tensor([0.3664, 0.5865, 0.6632])

    References:
        "Reve. Conf. CE" in Figure 3 of arXiv 2502.11107.
    """
    log_s, log_w = log_probabilities(logits, weak_logits)
    coefficient = _coefficient(alpha, warmup, progress)
    hard = _harden(log_s, log_w, threshold)
    if form == "A":
        return (1 - coefficient) * expected_cost(log_s.exp(), log_w) + coefficient * expected_cost(hard, log_s)
    if form != "B":
        raise UserError(f"loss.form: '{form}' is neither A nor B")
    if alpha == 1:
        raise UserError("loss.alpha: form B needs alpha < 1, its loss against a wholly hard target is infinite")
    if coefficient == 0:
        return expected_cost(log_s.exp(), log_w)
    # hard holds exact zeros and ones, or shares of a tie: its logarithm loses nothing
    mixed = torch.logaddexp(log_w + math.log1p(-coefficient), hard.log() + math.log(coefficient))
    return expected_cost(log_s.exp(), mixed)


def product(
    logits: Tensor, weak_logits: Tensor, progress: float = 1.0, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Cross entropy with the normalised product of the weak label and the student's own prediction as the target.

    The product is a sum of logits, so it stays defined where student and hard label are sure of opposite classes.

    Args:
        logits: [B, C] of the student.
        weak_logits: [B, C] of the weak model; hard labels (``-inf``) are exact.
        progress: not used.
        alpha: power of the weak label, above 0.
        beta: power of the student's prediction.

    Returns:
        [B] ``CE(p, s)``, ``p = softmax(beta logits + alpha weak_logits)`` detached; gradient ``s - p``.

    >>> product(torch.tensor([[1.5, 0.0], [4.0, 0.0]]), torch.tensor([[0.5, 0.0], [-torch.inf, 0.0]]))
    tensor([0.3802, 4.0181])

    References:
        ``product_loss_fn`` of openai/weak-to-strong (code of Burns et al. 2023).
    """
    if alpha <= 0:
        raise UserError(f"loss.alpha: the power of the weak label must be above 0 (got {alpha})")
    log_s, log_w = log_probabilities(logits, weak_logits)
    target = log_softmax(beta * log_s.detach() + alpha * log_w).exp()
    return expected_cost(target, log_s)


@whole_batch
def cace(
    logits: Tensor,
    weak_logits: Tensor,
    progress: float = 1.0,
    *,
    threshold: float = 0.1,
    quantile: float | None = None,
) -> Tensor:
    """Confidence-adaptive cross entropy: forward where the weak label is sure, reverse where it is not.

    The sureness of a label is ``(max_k w_k - 1/C) / (2 - 2/C)``, from 0 (uniform) to 1/2 (hard); it is |w - 1/2| for
    C = 2. Hard labels are as sure as can be and get the forward loss, where they are exact.

    Args:
        logits: [B, C] of the student; with ``quantile`` the whole batch.
        weak_logits: [B, C] of the weak model.
        progress: not used.
        threshold: least sureness of the forward loss, 0 to 1/2.
        quantile: where given, the threshold is this quantile of the batch's sureness instead (0 to 1).

    Returns:
        [B] `cross_entropy` where sureness >= threshold, else `reverse_cross_entropy`.

    Raises:
        UserError: a label that takes the reverse loss rules a class out (possible for C > 2).

    >>> cace(torch.tensor([[1.5, 0.0], [1.5, 0.0]]), torch.tensor([[2.0, 0.0], [-0.1, 0.0]]))
    tensor([0.3802, 0.7262])

    References:
        CACE and Quan_CACE in the code of arXiv 2505.24313 (there the quantile is over all labels, here over the batch).
    """
    log_s, log_w = log_probabilities(logits, weak_logits)
    w = log_w.exp()
    uniform = 1 / w.shape[-1]
    sureness = ((w.max(-1).values - uniform) / (1 - uniform)).clamp(min=0) / 2
    sure = sureness >= (threshold if quantile is None else torch.quantile(sureness, quantile))
    log_w = log_w.masked_fill(sure[:, None], 0.0)  # keeps 0 * inf of unused reverse losses out of the gradient
    refuse_hard(log_w)
    return torch.where(sure, expected_cost(w, log_s), expected_cost(log_s.exp(), log_w))


def _coefficient(alpha: float, warmup: float, progress: float) -> float:
    """Linear from 0 to alpha over the warm-up. The published code multiplies by progress instead, and then jumps."""
    if not 0 <= alpha <= 1:
        raise UserError(f"loss.alpha: must lie between 0 and 1 (got {alpha})")
    return alpha * min(1.0, progress / warmup) if warmup > 0 else alpha


@torch.no_grad()
def _harden(log_s: Tensor, log_w: Tensor, threshold: str) -> Tensor:
    """[B, C] the student's predictions as hard targets, by the rule in `confidence`."""
    if threshold not in ("prior", "half"):
        raise UserError(f"loss.threshold: '{threshold}' is neither prior nor half")
    classes = log_s.shape[-1]
    prior = log_w.exp().mean(0) if threshold == "prior" else torch.full_like(log_s[0], 1 / classes)
    # Quantiles of log s: in the order of s, so the same examples lie above, but without ties among sure predictions.
    log_t = torch.quantile(log_s, (1 - prior).clamp(0, 1), dim=0).diagonal()  # [C], from each class at each quantile
    log_s = log_s.masked_fill(prior == 0, -torch.inf)  # a class that no label holds claims nothing
    excess = log_s - log_t
    score = torch.where((excess >= 0).any(-1, keepdim=True), excess, log_s)
    shares = prior * (score == score.max(-1, keepdim=True).values)
    return shares / shares.sum(-1, keepdim=True)
