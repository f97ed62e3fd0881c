"""Losses that compare a student's logits with a weak model's: pure functions, one loss per example.

Every loss is ``(logits[B, C], weak_logits[B, C], progress, *, options) -> loss[B]``. B examples, C classes; for pairs
C = 2 and the logits are the rewards ``[r_first, r_second]``, so that class 0 is "the first reply is preferred".
In the formulas s = softmax(logits) is the student, w = softmax(weak_logits) the weak label, H the entropy (nats).

Weak labels come as logits because the probability of a sure teacher rounds to exactly 1 (from logit 6.25 in bf16, 16.75
in fp32) and its logarithm is lost. Everything is computed in fp32 (in fp64 where an input is), and no gradient reaches
the weak logits. ``-inf`` in weak logits is a hard label: exact in the forward losses, infinite and therefore refused in
the reverse ones (see `clamp_hard`). ``progress`` is the part of training that is done, for warm-ups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Literal

import torch
from torch import Tensor

from w2sg.errors import UserError


def whole_batch(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Marks a loss in which an example's value depends on the others: it must see the global batch, not a part."""
    loss.whole_batch = True
    return loss


def needs_whole_batch(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss, perhaps with options bound by `functools.partial`, must see the global batch.

    >>> needs_whole_batch(partial(confidence, alpha=0.75)), needs_whole_batch(cross_entropy)
    (True, False)
    """
    return getattr(_unbound(loss), "whole_batch", False)


def needs_soft_labels(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Marks a loss that is infinite on hard labels, and lets it refuse them.

    Losses from outside w2sg take the same mark. A run whose labels would be hard is then refused before it starts.

    Raises:
        UserError: from the marked loss, where a weak logit is infinite.
    """

    @wraps(loss)
    def soft_labels_only(logits: Tensor, weak_logits: Tensor, *args: object, **options: object) -> Tensor:
        _refuse_hard(weak_logits)
        return loss(logits, weak_logits, *args, **options)

    soft_labels_only.soft_labels_only = True
    return soft_labels_only


def takes_hard_labels(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss, perhaps with options bound by `functools.partial`, is without the mark `needs_soft_labels`.

    >>> takes_hard_labels(partial(confidence, alpha=0.75)), takes_hard_labels(reverse_kl)
    (True, False)
    """
    return not getattr(_unbound(loss), "soft_labels_only", False)


def _unbound(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    while isinstance(loss, partial):
        loss = loss.func
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Forward: the weak label is the reference distribution
# ---------------------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, weak_logits: Tensor, progress: float = 1.0) -> Tensor:
    """Forward cross entropy CE(w, s): the student must cover everything the weak label holds possible.

    Args:
        logits: [B, C] of the student.
        weak_logits: [B, C] of the weak model; hard labels (``-inf``) are exact.
        progress: not used.

    Returns:
        [B] ``-sum_k w_k log s_k``, with gradient ``s - w``.

    >>> cross_entropy(torch.tensor([[1.5, 0.0], [4.0, 0.0]]), torch.tensor([[0.5, 0.0], [-torch.inf, 0.0]]))
    tensor([0.7677, 4.0181])

    References:
        Burns et al. 2023, arXiv 2312.09390; CE(F_w, F_sw) of Definition 2 in arXiv 2502.11107.
    """
    log_s, log_w = _log_probabilities(logits, weak_logits)
    return _cross_entropy(log_w.exp(), log_s)


def forward_kl(logits: Tensor, weak_logits: Tensor, progress: float = 1.0) -> Tensor:
    """Forward KL divergence KL(w || s): `cross_entropy` less the entropy of the label, hence the same gradient.

    Args:
        logits: [B, C] of the student.
        weak_logits: [B, C] of the weak model; hard labels (``-inf``) are exact.
        progress: not used.

    Returns:
        [B] ``sum_k w_k (log w_k - log s_k)``, with gradient ``s - w``.

    >>> forward_kl(torch.tensor([[1.5, 0.0], [4.0, 0.0]]), torch.tensor([[0.5, 0.0], [-torch.inf, 0.0]]))
    tensor([0.1049, 4.0181])

    References:
        KL(F_w || F_sw) of Definition 1 in arXiv 2502.11107.
    """
    log_s, log_w = _log_probabilities(logits, weak_logits)
    w = log_w.exp()
    return (w * (log_w.masked_fill(w == 0, 0.0) - log_s)).sum(-1)  # 0 log 0 = 0


# ---------------------------------------------------------------------------------------------------------------------
# Reverse: the student is the reference distribution, and carries gradient in that place
# ---------------------------------------------------------------------------------------------------------------------


@needs_soft_labels
def reverse_cross_entropy(logits: Tensor, weak_logits: Tensor, progress: float = 1.0) -> Tensor:
    """Reverse cross entropy CE(s, w): the student may settle on what the weak label likes best.

    Unbounded below in the logits' scale for any label but the uniform one, where it is constant: labels that say
    nothing teach nothing, and the others push towards overconfidence.

    Args:
        logits: [B, C] of the student.
        weak_logits: [B, C] of the weak model, finite.
        progress: not used.

    Returns:
        [B] ``-sum_k s_k log w_k``, with gradient ``-s_k (log w_k - sum_j s_j log w_j)``; for C = 2 and the logit
        differences z and v, ``-s (1 - s) v``.

    Raises:
        UserError: a weak logit is infinite (a hard label).

    >>> reverse_cross_entropy(torch.tensor([[1.5, 0.0], [4.0, 0.0]]), torch.tensor([[0.5, 0.0], [-2.0, 0.0]]))
    tensor([0.5653, 2.0910])

    References:
        CE(F_sw, F_w) of Definition 2 in arXiv 2502.11107.
    """
    log_s, log_w = _log_probabilities(logits, weak_logits)
    return _cross_entropy(log_s.exp(), log_w)


@needs_soft_labels
def reverse_kl(logits: Tensor, weak_logits: Tensor, progress: float = 1.0) -> Tensor:
    """Reverse KL divergence KL(s || w): `reverse_cross_entropy` less the student's entropy, minimal at s = w only.

    Not convex: a student that starts far on the wrong side gets a gradient near 0. That makes it robust to flipped
    labels, and able to stay in a wrong mode.

    Args:
        logits: [B, C] of the student.
        weak_logits: [B, C] of the weak model, finite.
        progress: not used.

    Returns:
        [B] ``sum_k s_k (log s_k - log w_k)``, with gradient ``s_k (r_k - sum_j s_j r_j)``, r = log s - log w; for C = 2
        and the logit differences z and v, ``s (1 - s) (z - v)``.

    Raises:
        UserError: a weak logit is infinite (a hard label).

    >>> reverse_kl(torch.tensor([[1.5, 0.0], [4.0, 0.0]]), torch.tensor([[0.5, 0.0], [-2.0, 0.0]]))
    tensor([0.0902, 2.0009])

    References:
        KL(F_sw || F_w) of Definition 1 in arXiv 2502.11107.
    """
    log_s, log_w = _log_probabilities(logits, weak_logits)
    return (log_s.exp() * (log_s - log_w)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Confidence: the student's own hardened prediction beside the weak label
# ---------------------------------------------------------------------------------------------------------------------


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
    log_s, log_w = _log_probabilities(logits, weak_logits)
    coefficient = _coefficient(alpha, warmup, progress)
    hard = _harden(log_s, log_w, threshold)
    # cross entropy is linear in its target, so one with the mixed target is the mixture of both
    return _cross_entropy((1 - coefficient) * log_w.exp() + coefficient * hard, log_s)


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
    log_s, log_w = _log_probabilities(logits, weak_logits)
    coefficient = _coefficient(alpha, warmup, progress)
    hard = _harden(log_s, log_w, threshold)
    if form == "A":
        return (1 - coefficient) * _cross_entropy(log_s.exp(), log_w) + coefficient * _cross_entropy(hard, log_s)
    if form != "B":
        raise UserError(f"loss.form: '{form}' is neither A nor B")
    if alpha == 1:
        raise UserError("loss.alpha: form B needs alpha < 1, its loss against a wholly hard target is infinite")
    if coefficient == 0:
        return _cross_entropy(log_s.exp(), log_w)
    # hard holds exact zeros and ones, or shares of a tie: its logarithm loses nothing
    mixed = torch.logaddexp(log_w + math.log1p(-coefficient), hard.log() + math.log(coefficient))
    return _cross_entropy(log_s.exp(), mixed)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of the above
# ---------------------------------------------------------------------------------------------------------------------


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
    log_s, log_w = _log_probabilities(logits, weak_logits)
    target = _log_softmax(beta * log_s.detach() + alpha * log_w).exp()
    return _cross_entropy(target, log_s)


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
    log_s, log_w = _log_probabilities(logits, weak_logits)
    w = log_w.exp()
    uniform = 1 / w.shape[-1]
    sureness = ((w.max(-1).values - uniform) / (1 - uniform)).clamp(min=0) / 2
    sure = sureness >= (threshold if quantile is None else torch.quantile(sureness, quantile))
    log_w = log_w.masked_fill(sure[:, None], 0.0)  # keeps 0 * inf of unused reverse losses out of the gradient
    _refuse_hard(log_w)
    return torch.where(sure, _cross_entropy(w, log_s), _cross_entropy(log_s.exp(), log_w))


@needs_soft_labels
def symmetric(logits: Tensor, weak_logits: Tensor, progress: float = 1.0, *, a: float = 1.0, b: float = 0.1) -> Tensor:
    """Symmetric cross entropy: a weighted sum of the forward and the reverse cross entropy.

    Args:
        logits: [B, C] of the student.
        weak_logits: [B, C] of the weak model, finite.
        progress: not used.
        a: weight of the forward loss.
        b: weight of the reverse loss.

    Returns:
        [B] ``a CE(w, s) + b CE(s, w)``.

    Raises:
        UserError: a weak logit is infinite (a hard label).

    >>> symmetric(torch.tensor([[1.5, 0.0], [4.0, 0.0]]), torch.tensor([[0.5, 0.0], [-2.0, 0.0]]))
    tensor([0.8243, 3.7504])

    References:
        Wang et al. 2019, arXiv 1908.06112; SL_a1_b0.1 in the code of arXiv 2505.24313.
    """
    log_s, log_w = _log_probabilities(logits, weak_logits)
    return a * _cross_entropy(log_w.exp(), log_s) + b * _cross_entropy(log_s.exp(), log_w)


@needs_soft_labels
def jeffreys(logits: Tensor, weak_logits: Tensor, progress: float = 1.0) -> Tensor:
    """Jeffreys divergence: the forward plus the reverse KL divergence, the same in both arguments.

    Args:
        logits: [B, C] of the student.
        weak_logits: [B, C] of the weak model, finite.
        progress: not used.

    Returns:
        [B] ``KL(w || s) + KL(s || w) = sum_k (s_k - w_k) (log s_k - log w_k)``.

    Raises:
        UserError: a weak logit is infinite (a hard label).

    >>> jeffreys(torch.tensor([[1.5, 0.0], [4.0, 0.0]]), torch.tensor([[0.5, 0.0], [-2.0, 0.0]]))
    tensor([0.1951, 5.1769])

    References:
        Jeffreys 1946, doi 10.1098/rspa.1946.0056.
    """
    log_s, log_w = _log_probabilities(logits, weak_logits)
    return ((log_s.exp() - log_w.exp()) * (log_s - log_w)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Labels as logits
# ---------------------------------------------------------------------------------------------------------------------


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
        raise UserError(f"training.hard_label_clamp: must lie between 0 and 0.5 (got {gamma})")
    weak_logits = _full_precision(weak_logits)
    hard = weak_logits.isinf().any(-1)
    least, most = math.log(gamma / (weak_logits.shape[-1] - 1)), math.log1p(-gamma)
    return torch.where(hard[:, None], _log_softmax(weak_logits).clamp(least, most), weak_logits), hard


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
        raise UserError(f"training.label_smoothing: must be at least 0 and below 1 (got {epsilon})")
    if epsilon == 0:
        return weak_logits
    log_w = _log_softmax(_full_precision(weak_logits))
    floor = torch.full_like(log_w, math.log(epsilon / log_w.shape[-1]))
    return torch.logaddexp(log_w + math.log1p(-epsilon), floor)


# ---------------------------------------------------------------------------------------------------------------------
# Shared pieces
# ---------------------------------------------------------------------------------------------------------------------


def _log_probabilities(logits: Tensor, weak_logits: Tensor) -> tuple[Tensor, Tensor]:
    """log s with gradient and log w without, both [B, C] and of one precision."""
    if logits.ndim != 2 or logits.shape != weak_logits.shape:
        raise ValueError(
            f"a loss takes two [B, C] of the same shape; got logits {list(logits.shape)} "
            f"and weak logits {list(weak_logits.shape)}"
        )
    precision = torch.promote_types(logits.dtype, _full_precision(weak_logits).dtype)
    return _log_softmax(logits.to(precision)), _log_softmax(weak_logits.detach().to(precision))


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_softmax(logits: Tensor) -> Tensor:
    """Logarithm of the softmax over classes, accurate to the last digits also where a probability is nearly 1.

    torch's own returns 0 there (from z = 17 in fp32) and its gradient is a difference of numbers near 1; the reverse
    losses need the small numbers. This one also takes a logit of +inf or -inf.
    """
    best = logits.argmax(-1, keepdim=True)
    is_best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)
    below = (logits - logits.gather(-1, best)).masked_fill(is_best, 0.0)
    others = below.exp().masked_fill(is_best, 0.0).sum(-1, keepdim=True)
    return below - torch.log1p(others)


def _cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    return -(p * log_q).sum(-1)


def _refuse_hard(log_w: Tensor) -> None:
    if log_w.isinf().any():
        raise UserError(
            "training.hard_label_clamp: this loss is infinite on hard labels (0 or 1); set it, for instance to 0.001, "
            "or soften them with training.label_smoothing"
        )


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
