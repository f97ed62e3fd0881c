"""Label noise: which rows are hit is decided by (seed, id) alone, so 10 % of noise is a part of 20 %."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from w2sg.data.table import uniform


def draw(seed: int, example: str) -> float:
    """The uniform number of one example: it is hit where this is below the rate."""
    return uniform(seed, example)


def problems(options: dict[str, Any], classes: int) -> list[str]:
    """What is wrong with noise options for C classes; one line each, empty where nothing is."""
    rates = options.get("rates")
    if options["kind"] == "class_conditional" and rates is not None and len(rates) != classes:
        return [f"dataset.noise.rates: needs one rate for each of the {classes} classes (got {len(rates)})"]
    if options["kind"] == "shrink" and options["shrink"] < 0 and classes > 2:
        return [
            f"dataset.noise.shrink: below 0 it turns labels of {classes} classes into something that is no "
            "distribution; use 0 to 1, or kind=flip"
        ]
    return []


def apply_noise(
    logits: Tensor, ids: list[str], gold: Tensor, options: dict[str, Any], seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Disturb label logits.

    Kinds: ``flip`` swaps the label with the other class (C > 2: the largest logit with another class drawn by hash);
    ``shrink`` moves w to 1/C + k (w - 1/C), k = ``shrink`` (1 nothing, 0 uninformative, -1 flips a pair);
    ``hard_flip`` puts the flipped label down as certain (0 and -inf); ``class_conditional`` flips with the rate of the
    label's own class.

    Args:
        logits: [N, C].
        ids: [N] content hashes.
        gold: [N] gold classes, for the report only.
        options: ``kind``, ``rate``, ``shrink``, ``rates``.

    Returns:
        The logits, and what was really done: rows hit, and the labels' accuracy before and after.
    """
    kind = options["kind"]
    draws = torch.tensor([draw(seed, i) for i in ids], dtype=torch.float64)
    if kind == "class_conditional":
        rate = torch.tensor(options["rates"], dtype=torch.float64)[logits.argmax(1)]
    else:
        rate = torch.full_like(draws, options["rate"] if kind != "none" else 0.0)
    hit = draws < rate
    noisy = logits.clone()
    if kind == "shrink":
        noisy[hit] = _shrink(logits[hit], options["shrink"])
    elif kind != "none":
        other = _other(logits[hit], [i for i, h in zip(ids, hit.tolist(), strict=True) if h], seed)
        if kind == "hard_flip":
            noisy[hit] = torch.full_like(logits[hit], -torch.inf).scatter_(1, other[:, None], 0.0)
        else:
            noisy[hit] = _swap(logits[hit], other)
    report = {
        "kind": kind,
        "rows_hit": int(hit.sum()),
        "rate_applied": round(float(hit.double().mean()), 4),
        "label_accuracy_before": round(float((logits.argmax(1) == gold).double().mean()), 4),
        "label_accuracy_after": round(float((noisy.argmax(1) == gold).double().mean()), 4),
    }
    if kind == "class_conditional":
        report["rates_asked"] = options["rates"]
    elif kind != "none":
        report["rate_asked"] = options["rate"]
    return noisy, report


def _other(logits: Tensor, ids: list[str], seed: int) -> Tensor:
    """[N] a class that is not the label's, drawn by (seed, id)."""
    classes = logits.shape[1]
    steps = [1 + int(uniform(seed, "other", i) * (classes - 1)) for i in ids]
    return (logits.argmax(1) + torch.tensor(steps, dtype=torch.long)) % classes


def _swap(logits: Tensor, other: Tensor) -> Tensor:
    top, rows = logits.argmax(1), torch.arange(len(logits))
    flipped = logits.clone()
    flipped[rows, top], flipped[rows, other] = logits[rows, other], logits[rows, top]
    return flipped


def _shrink(logits: Tensor, k: float) -> Tensor:
    if k == -1.0 and logits.shape[1] == 2:
        return logits.flip(1)
    if k == 1.0:
        return logits
    # k w + (1 - k)/C and not 1/C + k (w - 1/C), which loses a small w
    w = logits.double().softmax(1)
    return (k * w + (1.0 - k) / logits.shape[1]).clamp_min(0.0).log().to(logits.dtype)
