"""Next-token logits of one or two models over a batch of growing rows, with their caches.

Shapes: m models, B rows, V tokens in the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from w2sg.decoding.packed import pack
from w2sg.errors import UserError
from w2sg.language import Policy


class Engine(Protocol):
    """What a decoder asks of models.

    Attributes:
        limit: tokens that a row may have; None where there is no limit.
    """

    limit: int | None

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Read prompts, a row each: [m, B, V] logits of the next token."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Append a token [B] to every row: [m, B, V]."""

    def select(self, rows: Tensor) -> None:
        """Go on with these rows [B'] alone; a row may be named more than once."""


def _cache(config: Any) -> Any:
    """A cache that appends in place; transformers' own copies all it holds at every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        _buffers: tuple[Tensor, Tensor] | None = None

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            old = self.get_seq_length()
            new = old + keys.shape[-2]
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            if self._buffers is None or self._buffers[0].shape[-2] < new:
                room = new + max(64, new // 2)
                grown = []
                for part, held in zip((keys, values), (self.keys, self.values), strict=True):
                    buffer = part.new_empty((*part.shape[:-2], room, part.shape[-1]))
                    if old:
                        buffer[..., :old, :] = held
                    grown.append(buffer)
                self._buffers = tuple(grown)
            for buffer, part in zip(self._buffers, (keys, values), strict=True):
                buffer[..., old:new, :] = part
            self.keys, self.values = (buffer[..., :new, :] for buffer in self._buffers)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            length = self.get_seq_length()
            self._buffers = tuple(buffer[indices] for buffer in self._buffers)
            self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)

    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class TransformersEngine:
    """One model of transformers; or a base model and its adapters as two, which share every read of the weights.

    Rows are padded on the left and carry their own positions. What all prompts begin with, the system prompt of a chat
    template say, is read once.

    Args:
        policy: the model; it must not be in training mode.
        base_too: for a policy with adapters: the logits are those of the adapted model, then those of its base.
    """

    def __init__(self, policy: Policy, base_too: bool = False):
        if base_too and not policy.adapted:
            raise ValueError("base_too needs a model with adapters")
        self.policy, self.base_too = policy, base_too
        pack(policy)
        self.device = next(policy.parameters()).device
        self.limit = getattr(policy.plain.config, "max_position_embeddings", None)

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self.cache = _cache(self.policy.plain.config)
        shared = _common_start(prompts)
        if shared:
            start = torch.as_tensor(np.asarray(prompts[0][:shared]), device=self.device)[None]
            self.mask = torch.ones_like(start)
            self.next = self.mask.sum(1)
            self._forward(start, torch.arange(shared, device=self.device)[None])
            self.select(torch.zeros(len(prompts), dtype=torch.long, device=self.device))
        longest = max(map(len, prompts)) - shared
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        own = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            rest = np.asarray(prompt[shared:])
            ids[row, longest - len(rest) :] = torch.from_numpy(rest)
            own[row, longest - len(rest) :] = 1
        ids, own = ids.to(self.device), own.to(self.device)
        self.mask = torch.cat([own.new_ones((len(prompts), shared)), own], 1)
        self.next = self.mask.sum(1)
        return self._forward(ids, shared + (own.cumsum(1) - 1).clamp(min=0))

    def extend(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), 1))], 1)
        # rows that have ended may go on for a while, and nobody looks at what they say
        positions = self.next[:, None] if self.limit is None else self.next[:, None].clamp(max=self.limit - 1)
        self.next = positions[:, 0] + 1
        return self._forward(tokens[:, None], positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        if self.limit is not None and int(self.next.max()) > self.limit:
            raise UserError(
                f"a prompt of {int(self.next.max())} tokens is longer than the {self.limit} positions of the model; "
                "lower max_length"
            )
        rows, mask = len(ids), self.mask
        if self.base_too:
            ids, positions, mask = (torch.cat([x, x]) for x in (ids, positions, mask))
        with _first_half_adapted(self.policy.model) if self.base_too else contextlib.nullcontext():
            logits = self.policy.plain(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        return logits.float().view(2 if self.base_too else 1, rows, -1)

    def select(self, rows: Tensor) -> None:
        count = len(self.mask)
        self.mask, self.next = self.mask[rows], self.next[rows]
        # columns in which no row has a token any more are kept: cutting them would copy the cache again
        self.cache.batch_select_indices(torch.cat([rows, rows + count]) if self.base_too else rows)


def _common_start(prompts: Sequence[np.ndarray], worth: int = 8) -> int:
    """Tokens that all prompts begin with, one short of the shortest; 0 where too few are worth a forward."""
    if len(prompts) < 2:
        return 0
    first, shared = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        differs = np.flatnonzero(np.asarray(first[:shared]) != np.asarray(prompt[:shared]))
        shared = int(differs[0]) if len(differs) else shared
    return shared if shared >= worth else 0


@contextlib.contextmanager
def _first_half_adapted(model: Any) -> Iterator[None]:
    """Low-rank adapters act on the first half of the rows alone, in place.

    peft has the same (``adapter_names``), but gathers and scatters the rows of every layer by index.
    """
    from peft.tuners.lora import LoraLayer

    adapter = model.active_adapter

    def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        half = len(output) // 2
        low = layer.lora_A[adapter](inputs[0][:half])
        output[:half].add_(layer.lora_B[adapter](low), alpha=layer.scaling[adapter])

    handles = [
        layer.register_forward_hook(add)
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    ]
    try:
        with model.disable_adapter():
            yield
    finally:
        for handle in handles:
            handle.remove()


class Several:
    """Several engines as one: their logits one after the other, in the order given.

    Args:
        engines: of models that share one vocabulary.
    """

    def __init__(self, *engines: Engine):
        self.engines = engines
        limits = [engine.limit for engine in engines if engine.limit is not None]
        self.limit = min(limits, default=None)

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        return self._together([engine.start(prompts) for engine in self.engines])

    def extend(self, tokens: Tensor) -> Tensor:
        return self._together([engine.extend(tokens) for engine in self.engines])

    def select(self, rows: Tensor) -> None:
        for engine in self.engines:
            engine.select(rows)

    @staticmethod
    def _together(logits: list[Tensor]) -> Tensor:
        least = min(x.shape[-1] for x in logits)  # some models pad their vocabulary, each by its own amount
        return torch.cat([x[..., :least] for x in logits])
