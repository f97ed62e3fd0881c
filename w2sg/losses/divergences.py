"""Forward, reverse and symmetric cross entropies and KL divergences between weak label and student.

Forward: the weak label is the reference distribution. Reverse: the student is, and carries gradient in that place.
"""

from __future__ import annotations

from torch import Tensor

from w2sg.losses.marks import needs_soft_labels
from w2sg.losses.probabilities import expected_cost, log_probabilities


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
    log_s, log_w = log_probabilities(logits, weak_logits)
    return expected_cost(log_w.exp(), log_s)


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
    log_s, log_w = log_probabilities(logits, weak_logits)
    w = log_w.exp()
    return (w * (log_w.masked_fill(w == 0, 0.0) - log_s)).sum(-1)  # 0 log 0 = 0


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
    log_s, log_w = log_probabilities(logits, weak_logits)
    return expected_cost(log_s.exp(), log_w)


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
    log_s, log_w = log_probabilities(logits, weak_logits)
    return (log_s.exp() * (log_s - log_w)).sum(-1)


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
    log_s, log_w = log_probabilities(logits, weak_logits)
    return a * expected_cost(log_w.exp(), log_s) + b * expected_cost(log_s.exp(), log_w)


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
    log_s, log_w = log_probabilities(logits, weak_logits)
    return ((log_s.exp() - log_w.exp()) * (log_s - log_w)).sum(-1)
