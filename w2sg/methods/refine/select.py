"""From several refined answers to one: votes, and the product of contexts.

Shapes: m contexts, K candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from w2sg.decoding.engine import Scorer


def agreement(answers: Sequence[str]) -> list[int]:
    """[K] how many of the candidates give each one's answer, itself included."""
    counts = Counter(answers)
    return [counts[answer] for answer in answers]


def vote(answers: Sequence[str], log_probabilities: Sequence[float]) -> int:
    """Of the candidates with the most common answer the likeliest (self-consistency, arXiv 2203.11171).

    >>> vote(["4", "5", "4"], [-3.0, -1.0, -2.0])
    2
    """
    counts = agreement(answers)
    return max(range(len(answers)), key=lambda k: (counts[k], log_probabilities[k], -k))


@torch.inference_mode()
def log_likelihoods(engine: Scorer, prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probability of each reply after each prompt, by teacher forcing: [prompts, replies].

    Args:
        engine: of one model. prompts, replies: token ids.
    """
    engine.start(prompts)
    engine.select(torch.arange(len(prompts)).repeat_interleave(len(replies)))
    parts = engine.read([np.asarray(reply) for _ in prompts for reply in replies])
    sums = [float(np.asarray(part, np.float64)[:, 0].sum()) for part in parts]
    return np.array(sums).reshape(len(prompts), len(replies))


def product_of_contexts(scores: np.ndarray) -> np.ndarray:
    """sum_j log p(y | ctx_j, x) - (m - 1) log p(y | x), up to a constant log p(y | ctx_1 .. ctx_m, x): [K].

    Exact where contexts are independent given what y depends on, so m contexts of n exemplars count as one of m n.

    Args:
        scores: [m + 1, K] log-probabilities of the candidates, after each context and, in the last row, after none.
    """
    return scores[:-1].sum(0) - (len(scores) - 2) * scores[-1]
