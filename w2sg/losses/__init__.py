"""Losses: pure functions from tensors to tensors, one loss per example. This face is that of losses of labels.

Every loss is ``(logits[B, C], weak_logits[B, C], progress, *, options) -> loss[B]``. B examples, C classes; for pairs
C = 2 and the logits are the rewards ``[r_first, r_second]``, so that class 0 is "the first reply is preferred".
In the formulas s = softmax(logits) is the student, w = softmax(weak_logits) the weak label, H the entropy (nats).

Weak labels come as logits because the probability of a sure teacher rounds to exactly 1 (from logit 6.25 in bf16, 16.75
in fp32) and its logarithm is lost. Everything is computed in fp32 (in fp64 where an input is), and no gradient reaches
the weak logits. ``-inf`` in weak logits is a hard label: exact in the forward losses, infinite and therefore refused in
the reverse ones (see `clamp_hard`). ``progress`` is the part of training that is done, for warm-ups.

Losses of preferences (DPO, IPO, SimPO, ...) are in `w2sg.losses.preferences`, log-probabilities of replies in
`w2sg.losses.logprobs`.

>>> import torch
>>> from w2sg import losses
>>> losses.reverse_kl(torch.tensor([[1.5, 0.0]]), torch.tensor([[0.5, 0.0]])).mean()  # in a training loop: .backward()
tensor(0.0902)
"""

from w2sg.losses import logprobs, preferences
from w2sg.losses.adaptive import cace, confidence, product, reverse_confidence
from w2sg.losses.divergences import cross_entropy, forward_kl, jeffreys, reverse_cross_entropy, reverse_kl, symmetric
from w2sg.losses.labels import clamp_hard, hard_logits, smooth
from w2sg.losses.marks import needs_soft_labels, needs_whole_batch, takes_hard_labels, whole_batch

__all__ = [
    "cace",
    "clamp_hard",
    "confidence",
    "cross_entropy",
    "forward_kl",
    "hard_logits",
    "jeffreys",
    "logprobs",
    "needs_soft_labels",
    "needs_whole_batch",
    "preferences",
    "product",
    "reverse_confidence",
    "reverse_cross_entropy",
    "reverse_kl",
    "smooth",
    "symmetric",
    "takes_hard_labels",
    "whole_batch",
]
