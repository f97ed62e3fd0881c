"""What decoders ask of models, several models as one, and models given as tables.

Shapes: m models, B rows, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.losses.logprobs import log_ratio


class Engine(Protocol):
    """What a decoder asks of models: a batch of rows of tokens, and what comes next in each.

    Attributes:
        limit: tokens that a row may have; None where there is no limit.
        logits: [m, B, V] of each row's next token.
        count: tokens that each of the models has read.
        writable: [V] ids that may be written; None for all. Models have rows that no token of the tokenizer has, to
            fill their embeddings up to a round number, each by its own amount.
        name: of the model and its type of numbers, for errors.
    """

    limit: int | None
    logits: Tensor
    count: Count
    writable: Tensor | None
    name: str

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Read prompts, a row each: [m, B, V] logits of the next token."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Append a token [B] to every row: [m, B, V]."""

    def select(self, rows: Tensor) -> None:
        """Go on with these rows [B'] alone; a row may be named more than once, and then forks."""


def check(engine: Engine) -> None:
    """Raise what an engine has found out and could not say yet, for want of an answer of its device."""
    for one in getattr(engine, "engines", ()):
        check(one)
    late = getattr(engine, "check", None)
    if late is not None:
        late()


class Scorer(Engine, Protocol):
    """An engine that also reads given tokens, and takes tokens back."""

    def read(self, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Append tokens to each row, as many as it has: [B] of [n, m], their log-probabilities."""

    def rollback(self, counts: np.ndarray) -> None:
        """Take the last tokens [B] of each row back."""


@dataclass
class Count:
    """Tokens read.

    Attributes:
        prompt: of prompts, each counted whole whatever is read in one batch with it, though a start that all of a batch
            have in common is read once. written: one by one, in `Engine.extend`. given: in
            `Scorer.read`, those that were read again after a rollback included.
        computed: positions that went through the model, filling and rows that no longer count included.
    """

    prompt: int = 0
    written: int = 0
    given: int = 0
    computed: int = 0

    @property
    def total(self) -> int:
        """All of them, without filling."""
        return self.prompt + self.written + self.given


class Several:
    """Several engines as one: their logits one after the other, in the order given.

    Some models fill their vocabulary up, each by its own amount. An id that a model does not have is ruled out by it,
    so that each is normalised over its own ids, as where it reads by itself; only ids that all have may be written.

    Args:
        engines: of models that share one vocabulary.

    Attributes:
        common: ids that all models have, once there are logits.
    """

    def __init__(self, *engines: Engine):
        self.engines = engines
        self.common = self._most = 0
        limits = [engine.limit for engine in engines if engine.limit is not None]
        self.limit = min(limits, default=None)

    @property
    def logits(self) -> Tensor:
        """[m, B, V]."""
        return self._together([engine.logits for engine in self.engines])

    @property
    def count(self) -> Count:
        """Of the first model; the others read the same."""
        return self.engines[0].count

    @property
    def writable(self) -> Tensor | None:
        """[V] what every model may write."""
        masks = [mask for engine in self.engines if (mask := getattr(engine, "writable", None)) is not None]
        if self.common < self._most:
            masks.append(torch.ones(self.common, dtype=torch.bool, device=self.engines[0].logits.device))
        return torch.stack([_fitted(mask, self._most) for mask in masks]).all(0) if masks else None

    @property
    def name(self) -> str:
        """Of the models."""
        return " and ".join(dict.fromkeys(getattr(engine, "name", "the model") for engine in self.engines))

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        return self._together([engine.start(prompts) for engine in self.engines])

    def extend(self, tokens: Tensor) -> Tensor:
        return self._together([engine.extend(tokens) for engine in self.engines])

    def read(self, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
        values = [engine.read(chunks) for engine in self.engines]
        return [np.concatenate(parts, 1) for parts in zip(*values, strict=True)]

    def rollback(self, counts: np.ndarray) -> None:
        for engine in self.engines:
            engine.rollback(counts)

    def select(self, rows: Tensor) -> None:
        for engine in self.engines:
            engine.select(rows)

    def _together(self, logits: list[Tensor]) -> Tensor:
        counts = [x.shape[-1] for x in logits]
        owned = [getattr(engine, "common", count) for engine, count in zip(self.engines, counts, strict=True)]
        self.common, self._most = min(owned), max(counts)
        return torch.cat([nn.functional.pad(x, (0, self._most - x.shape[-1]), value=-torch.inf) for x in logits])


def _fitted(mask: Tensor, count: int) -> Tensor:
    """A mask of ids of this many."""
    return mask[:count] if len(mask) >= count else torch.cat([mask, mask.new_zeros(count - len(mask))])


class Tilted:
    """A base model's logits moved by what tuning did to a small one: base + beta (tuned - untuned), as one model.

    Emulated fine-tuning (Mitchell et al. 2023, arXiv 2310.12962) and proxy-tuning (Liu et al. 2024, arXiv 2401.08565).
    Temperature comes after. The law of a reply is not that of the base times the ratio of replies to the power of beta:
    each token is normalised by itself.

    Args:
        base: one model. pair: the small model tuned, and untuned. beta: 0 is the base alone.
    """

    def __init__(self, base: Engine, pair: Engine, beta: float):
        self.base, self.pair, self.beta = base, pair, beta
        self._both = Several(base, pair)
        self.engines = self._both.engines
        self.limit = self._both.limit

    @property
    def logits(self) -> Tensor:
        """[1, B, V]."""
        return self._tilt(self._both.logits)

    @property
    def count(self) -> Count:
        """Of the base."""
        return self.base.count

    @property
    def writable(self) -> Tensor | None:
        """[V] what all three may write."""
        mask = self._both.writable
        return None if mask is None else mask[: self._both.common]

    @property
    def name(self) -> str:
        """Of the models."""
        return self._both.name

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        return self._tilt(self._both.start(prompts))

    def extend(self, tokens: Tensor) -> Tensor:
        return self._tilt(self._both.extend(tokens))

    def select(self, rows: Tensor) -> None:
        self._both.select(rows)

    def _tilt(self, logits: Tensor) -> Tensor:
        base, tuned, untuned = logits[..., : self._both.common]  # of other ids there is no ratio
        return (base + self.beta * log_ratio(tuned, untuned))[None]


class TabularEngine:
    """Models that know only the last token, given as tables: everything about them can be worked out by hand.

    Args:
        tables: [m, 1 + V, V] probabilities of the next token: after nothing, and after each token.
    """

    def __init__(self, tables: np.ndarray):
        self.tables = torch.as_tensor(np.asarray(tables), dtype=torch.float64).log()
        self.limit, self.count, self.writable, self.name = None, Count(), None, "tables"

    @property
    def logits(self) -> Tensor:
        """[m, B, V]."""
        last = torch.tensor([row[-1] + 1 if row else 0 for row in self.rows])
        return self.tables[:, last]

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self.rows = [list(map(int, prompt)) for prompt in prompts]
        self.count.prompt += sum(map(len, prompts))
        return self.logits

    def extend(self, tokens: Tensor) -> Tensor:
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        self.count.written += len(tokens)
        return self.logits

    def read(self, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
        logs = []
        for row, chunk in zip(self.rows, chunks, strict=True):
            values = []
            for token in map(int, chunk):
                values.append(self.tables[:, row[-1] + 1 if row else 0, token].numpy())
                row.append(token)
            logs.append(np.array(values).reshape(-1, len(self.tables)))
        self.count.given += sum(map(len, chunks))
        return logs

    def rollback(self, counts: np.ndarray) -> None:
        for row, count in zip(self.rows, counts, strict=True):
            del row[len(row) - int(count) :]

    def select(self, rows: Tensor) -> None:
        self.rows = [list(self.rows[row]) for row in rows.tolist()]
