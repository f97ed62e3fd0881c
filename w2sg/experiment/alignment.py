"""The weak model before and after its alignment by preference optimisation (DPO)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from w2sg.config.options import Alignment, PlainSampling
from w2sg.data.replies import Replies, ReplyPairs, best_and_worst, gold_pairs
from w2sg.experiment.context import Context
from w2sg.experiment.fit_text import dpo, one_vocabulary
from w2sg.experiment.generate import generate
from w2sg.models.trained import Trained

Ranker = Callable[[str, Replies], tuple[np.ndarray, dict[str, Any]]]


class Aligned(NamedTuple):
    """The weak model ``before`` and ``after`` its alignment, and the ``pairs`` it was aligned on.

    ``pairs`` is None where both models were given, so that nothing was trained.
    """

    before: Trained
    after: Trained
    pairs: ReplyPairs | None


def align(
    run: Context, options: Alignment, sampling: PlainSampling | None = None, ranker: Ranker | None = None
) -> Aligned:
    """Align the weak model on the ground-truth split, or take the two models that the user gave.

    Args:
        run: the run.
        options: of the training.
        sampling: of the weak model's own replies, where they are what is ranked.
        ranker: rewards of replies [N] and their key, where the pairs are on-policy: a reward model that was trained on
            the ground-truth split, since the pairs that measure later take no part in it.
    """
    if run.untuned is not None:
        one_vocabulary(run.weak, run.untuned)
        return Aligned(Trained("untuned", run.untuned), Trained("weak", run.weak), None)
    before, pairs = Trained("untuned", run.weak), gold_pairs(run.data.ground_truth)
    if options.pairs == "on_policy":
        prompts = run.prompts("ground_truth")
        replies = generate(run, "untuned-samples", before, prompts, sampling, samples=options.samples)
        rewards, key = ranker("untuned-samples", replies)
        pairs = best_and_worst(replies, rewards, {"replies": replies.key, "rewards": key})
    return Aligned(before, dpo(run, "weak", before, pairs, options), pairs)
