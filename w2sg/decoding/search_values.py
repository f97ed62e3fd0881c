"""What a hypothesis of a search is worth: the log-ratio of a tuned and an untuned model, a reward, or a mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.decoding.engine import Scorer
from w2sg.decoding.search import Hypothesis, Value
from w2sg.losses.logprobs import log_ratio

Normalise = Literal["sum", "mean", "length_alpha"]


class ImplicitValue:
    """beta log(tuned / untuned) of the reply so far (weak-to-strong search, arXiv 2405.19262, equation 4).

    Each token is read once. With another tokenizer than the strong model's the text so far is tokenised anew after each
    chunk, and what came out otherwise than before is taken back and read again. The token that ends a reply counts for
    finished replies alone: the one that was written where it ends the guide's replies as well, else the guide's own. Of
    a reply that is longer than the guide has positions, what it could read counts. A token that both models rule out
    has no ratio, and counts nothing (`w2sg.losses.logprobs.log_ratio`).

    Args:
        engine: of two models, tuned and untuned. chat: how they write dialogues.
        shared: whether token ids of the strong model are theirs as well.
        stop: tokens that end a reply of the strong model.
        normalise: over the guide's tokens: their sum, their mean, or the sum over ``length ** alpha``.
    """

    def __init__(
        self,
        engine: Scorer,
        chat: Chat,
        shared: bool,
        stop: Sequence[int],
        beta: float = 1.0,
        normalise: Normalise = "sum",
        alpha: float = 1.0,
    ):
        self.engine, self.chat, self.shared, self.stop = engine, chat, shared, set(stop)
        self.beta, self.normalise, self.alpha = beta, normalise, alpha

    @torch.inference_mode()
    def start(self, prompts: Sequence[Dialogue]) -> None:
        ids = self.chat.prompts(prompts)
        self.engine.start(ids)
        limit = self.engine.limit  # of the last token no state is needed
        self.room = [None if limit is None else max(limit + 1 - len(row), 0) for row in ids]
        self.tokens = [np.zeros(0, np.int64) for _ in prompts]
        self.ratios = [np.zeros(0) for _ in prompts]

    @torch.inference_mode()
    def extend(self, grown: Sequence[Hypothesis]) -> np.ndarray:
        self.select([h.parent for h in grown])
        wanted = [self.encode(h)[:room] for h, room in zip(grown, self.room, strict=True)]
        common = [common_start(old, new) for old, new in zip(self.tokens, wanted, strict=True)]
        self.engine.rollback(np.array([len(old) - n for old, n in zip(self.tokens, common, strict=True)]))
        parts = self.engine.read([new[n:] for new, n in zip(wanted, common, strict=True)])
        self.tokens = wanted
        self.ratios = [
            np.append(old[:n], log_ratio(*part.T.astype(np.float64)))
            for old, n, part in zip(self.ratios, common, parts, strict=True)
        ]
        return np.array([self.value(ratios) for ratios in self.ratios])

    def encode(self, h: Hypothesis) -> np.ndarray:
        """The reply as the guide's tokens."""
        if self.shared and h.tokens is not None:
            ended = len(h.tokens) and int(h.tokens[-1]) in self.stop
            ids = h.tokens[:-1] if ended else h.tokens
            if ended and h.finished and int(h.tokens[-1]) in self.chat.stop:
                return np.asarray(h.tokens, np.int64)
        else:
            # a character of several bytes may be cut at the end of a chunk: what is there of it is not text
            text = h.text if h.finished else h.text.rstrip("\N{REPLACEMENT CHARACTER}")
            ids = self.chat.replies([text], [h.finished])[0] if text.strip() else np.zeros(0, np.int64)
        return np.append(ids, self.chat.end) if h.finished else np.asarray(ids, np.int64)

    def value(self, ratios: np.ndarray) -> float:
        """Of the log-ratios of a reply's tokens."""
        total = float(ratios.sum())
        length = max(len(ratios), 1)
        scale = {"sum": 1.0, "mean": float(length), "length_alpha": length**self.alpha}[self.normalise]
        return self.beta * total / scale

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        if rows != list(range(len(self.tokens))):
            if rows:
                self.engine.select(torch.tensor(rows))
            self.tokens, self.ratios = [self.tokens[r] for r in rows], [self.ratios[r] for r in rows]
            self.room = [self.room[r] for r in rows]


def common_start(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


class RewardValue:
    """A reward model's opinion of the text so far; it reads every reply from its start after every chunk.

    Args:
        rewards: of prompts and replies, [B].
    """

    def __init__(self, rewards: Callable[[Sequence[Dialogue], Sequence[str]], np.ndarray]):
        self.rewards = rewards

    def start(self, prompts: Sequence[Dialogue]) -> None:
        self.prompts = list(prompts)

    def extend(self, grown: Sequence[Hypothesis]) -> np.ndarray:
        return np.asarray(
            self.rewards([self.prompts[h.prompt] for h in grown], [h.text.strip() for h in grown]), np.float64
        )

    def select(self, rows: Sequence[int]) -> None:
        pass


class Mixture:
    """A weighted sum of values."""

    def __init__(self, parts: Sequence[tuple[float, Value]]):
        self.parts = list(parts)

    def start(self, prompts: Sequence[Dialogue]) -> None:
        for _, value in self.parts:
            value.start(prompts)

    def extend(self, grown: Sequence[Hypothesis]) -> np.ndarray:
        return sum(weight * value.extend(grown) for weight, value in self.parts)

    def select(self, rows: Sequence[int]) -> None:
        for _, value in self.parts:
            value.select(rows)
