"""What a decoder wrote to many prompts, as its readers see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from w2sg.data.messages import Dialogue
from w2sg.data.replies import Prompts, Replies
from w2sg.decoding.decoders import Decoder, Written
from w2sg.experiment.context import Context
from w2sg.models.trained import Trained


@dataclass(frozen=True)
class Pair:
    """The weak model after and before its alignment."""

    tuned: Trained
    untuned: Trained


@dataclass(frozen=True)
class Steered:
    """What a decoder wrote: the reply that was chosen to each prompt, and everything it was chosen from.

    Attributes:
        replies: one to each prompt.
        candidates: all that were left, in the order of their values; of best-of-n all samples. values: of them.
        facts: of each reply, as `Decoder.facts` has them.
        drafted: [N] of [n] bool, the tokens of the draft that each reply begins with.
        stage: its name in the store.
    """

    replies: Replies
    candidates: Replies
    values: np.ndarray
    facts: list[dict[str, Any]]
    drafted: list[np.ndarray]
    stage: str


def steered(
    run: Context, decoder: Decoder, strong: Trained, prompts: Prompts, written: list[Written], stage: str
) -> Steered:
    """Replies without thoughts, and cut where a string ends them.

    Args:
        strong: whose tokens they have. written: [P] to each prompt. stage: that wrote them.
    """
    chat = strong.source.chat
    flat = [(p, k, one) for p, reply in enumerate(written) for k, one in enumerate((reply, *reply.candidates))]
    texts = bool(flat) and flat[0][2].tokens is None  # a server's
    heard = [one.as_heard(chat) if texts else one.as_said(chat, decoder.given(one)) for _, _, one in flat]
    closed = [ended for _, ended in heard if ended is not None]
    run.reading.thoughts(decoder.kind, len(closed), closed.count(False))
    replies = [one for one, _ in heard]
    candidates = Replies(
        ids=[prompts.ids[p] for p, _, _ in flat],
        prompts=[prompts.texts[p] for p, _, _ in flat],
        texts=[one.text for one in replies],
        finished=np.array([one.finished for one in replies]),
        sample=np.array([number for _, number, _ in flat]),
        group=np.zeros(len(flat), np.int64),
        key={"stage": stage},
        tokens=[one.tokens for one in replies],
        log_probabilities=None if texts else [one.log_probabilities[:, None] for one in replies],
        fingerprint=chat.fingerprint,
    )
    chosen = [row for row, (_, number, _) in enumerate(flat) if number == 0]
    return Steered(
        candidates.take(chosen),
        candidates,
        np.array([one.value for one in replies]),
        [decoder.facts(replies[row]) for row in chosen],
        [replies[row].beginning for row in chosen],
        stage,
    )


def trace_of(prompt: Dialogue, reply: Written) -> dict[str, Any]:
    """The rounds of one reply, as the page shows them."""
    about = {"rule": reply.rule, "best": reply.text, "value": reply.value, "rounds": reply.trace}
    return {"prompt": prompt.text, **about}
