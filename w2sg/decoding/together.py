"""Two models that write one reply together: a small aligned one and a large base one (drafting, nudging)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from w2sg.data.dialogue import Chat
from w2sg.decoding.engine import Engine, Scorer

SMALL, BASE = 0, 1
STREAMS = "draft", 0  # names of their random numbers: the base model's are those of its plain samples


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        engine: it, at work. chat: how it writes dialogues. columns: a row of `w2sg.decoding.sampling.Settings`.
    """

    engine: Scorer
    chat: Chat
    columns: Sequence[float]


class Together:
    """Both models at work on a batch of prompts.

    Args:
        small, base: the models.
        identities, seed: as in `w2sg.decoding.search.EngineGrower`.

    Attributes:
        shared: token ids of one model are those of the other as well.
        forwards: rows read one token further, summed over steps.
    """

    def __init__(self, small: Side, base: Side, identities: Sequence[str], seed: int):
        self.sides, self.identities, self.seed = (small, base), identities, seed
        self.shared = small.chat.vocabulary == base.chat.vocabulary
        self.forwards = 0


def room_of(engine: Engine, prompt: np.ndarray, most: int) -> int:
    """Tokens that a reply to this prompt may have."""
    return most if engine.limit is None else min(most, engine.limit - len(prompt) + 1)
