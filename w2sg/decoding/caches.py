"""Caches of keys and values that append in place, and what has to be known of any cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def growing_cache(config: Any) -> Any:
    """A cache that appends in place; transformers' own copies all it holds at every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        _buffers: tuple[Tensor, Tensor] | None = None
        _rows: Tensor | None = None  # to go on with; copied only when there is more to hold

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            old = self.get_seq_length()
            new = old + keys.shape[-2]
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            if self._buffers is None or self._rows is not None or self._buffers[0].shape[-2] < new:
                room = new + max(64, new // 2)
                self._buffers = tuple(
                    self._moved(held, part.new_empty((*part.shape[:-2], room, part.shape[-1])))
                    for part, held in zip((keys, values), (self.keys, self.values), strict=True)
                )
                self._rows = None
            for buffer, part in zip(self._buffers, (keys, values), strict=True):
                buffer[..., old:new, :] = part
            self.keys, self.values = (buffer[..., :new, :] for buffer in self._buffers)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            self._rows = indices if self._rows is None else self._rows[indices]

        def held(self) -> tuple[Tensor, Tensor]:
            """Keys and values of the rows that go on."""
            both = self.keys, self.values
            return both if self._rows is None else tuple(part.index_select(0, self._rows) for part in both)

        def _moved(self, held: Tensor, buffer: Tensor) -> Tensor:
            if not self.get_seq_length():
                return buffer
            start = buffer[..., : held.shape[-2], :]
            if self._rows is None:
                start.copy_(held)
            else:
                torch.index_select(held, 0, self._rows, out=start)
            return buffer

    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def empty_cache(config: Any, columns: int | None = None) -> Any:
    """A cache without tokens: of so many columns, all at once, or one that grows."""
    if columns is None:
        return growing_cache(config)
    from transformers import StaticCache

    return StaticCache(config=config, max_cache_len=columns)


def select_rows(cache: Any, rows: Tensor) -> None:
    """Go on with these rows of a cache alone."""
    for layer in cache.layers:
        # layers with a state have no other way to do it, or one that forgets the state; static ones have no other
        if has_state(layer) or not hasattr(layer, "batch_select_indices"):
            layer.reorder_cache(rows)
        else:
            layer.batch_select_indices(rows)


def has_state(layer: Any) -> bool:
    """Whether a layer of a cache holds a state in place of keys and values."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return isinstance(layer, LinearAttentionCacheLayerMixin)


def cache_argument(model: Any) -> str | None:
    """What a model calls its cache; None for one that has none, or another: some swallow any other name unsaid."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)
