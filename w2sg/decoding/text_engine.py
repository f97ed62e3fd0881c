"""What one model does by itself, its logits staying where they are: write, and say how likely texts are.

Engines of other libraries (`w2sg.decoding.vllm`) and servers do this. Pairs of models, whose logits are combined, need
`w2sg.decoding.engine.Engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from w2sg.decoding.contrastive import Decoded, ReplyRows


class TextEngine(Protocol):
    """One model in an engine of its own.

    It is made before it is known whether anything is computed, so it starts when it is first asked.

    Attributes:
        name: of the engine, in words, as ``vLLM``.
        max_length: tokens of prompt and reply that it has room for.
        share: of so many ranks of a run one asks, with the devices of all of them.
    """

    name: str
    max_length: int
    share: int

    def key(self) -> dict[str, Any]:
        """What of it changes results, for cache keys: never an address or a secret."""

    def ready(self) -> None:
        """What all ranks do together before any of them asks."""

    def sample(self, rows: ReplyRows, stop: Sequence[int]) -> Decoded:
        """A reply to each row.

        Args:
            rows: prompts, settings and seeds; without a contrast or a repetition penalty.
            stop: tokens that end a reply.

        Returns:
            Log-probabilities of [length, 1], of the model as it is, before temperature and top-p; NaN where the engine
            has none.
        """

    def label_log_probabilities(self, prompts: Sequence[np.ndarray], labels: Sequence[Sequence[int]]) -> np.ndarray:
        """[N, K] log-probabilities of each label [K] of token ids as what follows each prompt [N] of token ids."""

    def token_log_probabilities(self, prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]) -> list[np.ndarray]:
        """[N] of [length]: the log-probability of each token of a reply after its prompt.

        Raises:
            UserError: the engine does not say them.
        """

    def sleep(self) -> None:
        """Let go of the device's memory; the next question wakes it."""

    def close(self) -> None:
        """Let go of everything; the next question starts it anew."""


class Kept:
    """The engines that a run has made, one for each model, alive over its stages."""

    def __init__(self):
        self._engines: dict[str, TextEngine] = {}
        self.at_end: list[Callable[[], None]] = []  # what is done once all are gone

    def get(self, key: str, make: Callable[[], TextEngine]) -> TextEngine:
        """The engine of this key, made where it is not there."""
        if key not in self._engines:
            self._engines[key] = make()
        return self._engines[key]

    def alone(self, key: str) -> None:
        """Let all but this one go: before it loads a model."""
        for other, engine in self._engines.items():
            if other != key:
                engine.close()

    def sleep(self) -> None:
        """Let all give their memory back: before a model is loaded in this process."""
        for engine in self._engines.values():
            engine.sleep()

    def close(self) -> None:
        """Let all go, at the end."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        while self.at_end:
            self.at_end.pop()()
