"""Losses, from tensors to tensors: of labels (this face), of preferences, and log-probabilities of replies."""

from w2sg.losses.labels import (
    cace,
    clamp_hard,
    confidence,
    cross_entropy,
    forward_kl,
    hard_logits,
    jeffreys,
    needs_whole_batch,
    product,
    reverse_confidence,
    reverse_cross_entropy,
    reverse_kl,
    smooth,
    symmetric,
    whole_batch,
)

__all__ = [
    "cace",
    "clamp_hard",
    "confidence",
    "cross_entropy",
    "forward_kl",
    "hard_logits",
    "jeffreys",
    "needs_whole_batch",
    "product",
    "reverse_confidence",
    "reverse_cross_entropy",
    "reverse_kl",
    "smooth",
    "symmetric",
    "whole_batch",
]
