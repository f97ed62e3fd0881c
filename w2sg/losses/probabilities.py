"""Logits as log-probabilities, of one precision and exact to the last digits, and what losses are sums of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from w2sg.errors import UserError


def log_probabilities(logits: Tensor, weak_logits: Tensor) -> tuple[Tensor, Tensor]:
    """log s with gradient and log w without, both [B, C] and of one precision."""
    if logits.ndim != 2 or logits.shape != weak_logits.shape:
        raise ValueError(
            f"a loss takes two [B, C] of the same shape; got logits {list(logits.shape)} "
            f"and weak logits {list(weak_logits.shape)}"
        )
    precision = torch.promote_types(logits.dtype, full_precision(weak_logits).dtype)
    return log_softmax(logits.to(precision)), log_softmax(weak_logits.detach().to(precision))


def full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_softmax(logits: Tensor) -> Tensor:
    """Logarithm of the softmax over classes, accurate to the last digits also where a probability is nearly 1.

    torch's own returns 0 there (from z = 17 in fp32) and its gradient is a difference of numbers near 1; the reverse
    losses need the small numbers. This one also takes a logit of +inf or -inf.
    """
    best = logits.argmax(-1, keepdim=True)
    is_best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)
    below = (logits - logits.gather(-1, best)).masked_fill(is_best, 0.0)
    others = below.exp().masked_fill(is_best, 0.0).sum(-1, keepdim=True)
    return below - torch.log1p(others)


def expected_cost(p: Tensor, log_q: Tensor) -> Tensor:
    return -(p * log_q).sum(-1)


_LOOKED_AT: ContextVar[bool] = ContextVar("labels_looked_at", default=False)


@contextlib.contextmanager
def soft_labels() -> Iterator[None]:
    """For labels that were looked at once and none is hard: to look again at each step would wait for the device."""
    before = _LOOKED_AT.set(True)
    try:
        yield
    finally:
        _LOOKED_AT.reset(before)


def refuse_hard(log_w: Tensor) -> None:
    if not _LOOKED_AT.get() and log_w.isinf().any():
        raise UserError(
            "optim.hard_label_clamp: this loss is infinite on hard labels (0 or 1); set it, for instance to 0.001, "
            "or soften them with optim.label_smoothing"
        )
