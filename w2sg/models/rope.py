"""Rotary positions whose frequencies hang on the length of a text (longrope, dynamic NTK), for each row by itself.

transformers takes the longest text of a batch for all its rows, and dynamic NTK remembers the longest text so far. A
text's numbers would then hang on what else is read with it, or was read before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def borders(config: Any) -> list[int]:
    """Tokens above which a model's rotary frequencies are others; none for most models."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]  # a layer type has its own
    limits = set()
    for one in nested or [settings]:
        kind = one.get("rope_type") or ""
        if kind == "longrope":
            limits.add(one.get("original_max_position_embeddings"))
        elif "dynamic" in kind:
            limits.add(config.max_position_embeddings)
    return sorted(int(border) for border in limits if border)


def sides(config: Any, lengths: Tensor) -> Tensor:
    """Which frequencies texts of these lengths have, as a number; past a border of dynamic NTK all differ."""
    passed = torch.bucketize(lengths, torch.tensor(borders(config), device=lengths.device))  # borders passed
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [one.get("rope_type") or "" for one in (settings, *settings.values()) if isinstance(one, dict)]
    return torch.where(passed > 0, lengths, 0) if any("dynamic" in kind for kind in kinds) else passed


def rows_by_themselves(model: nn.Module) -> None:
    """Let each row of a batch have the frequencies of its own length, in place."""
    if not borders(model.config):
        return
    for module in model.modules():
        if _kinds(module) and not isinstance(module, _ByRow):
            module.__class__ = _by_row(type(module))


def _kinds(module: nn.Module) -> list[str]:
    kinds = getattr(module, "rope_type", None)
    kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    return [kind for kind in kinds if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)]


class _ByRow:
    """A rotary embedding that is asked for rows of one kind of length at a time."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        group = sides(self.config, position_ids.amax(-1) + 1)
        dynamic = any("dynamic" in kind for kind in _kinds(self))
        if dynamic:
            self._forget()
        if position_ids.ndim != 2 or bool((group == group[0]).all()):
            return super().forward(x, position_ids, *args, **kwargs)
        cos, sin = None, None
        for one in group.unique():
            rows = group == one
            if dynamic:
                self._forget()
            parts = super().forward(x, position_ids[rows], *args, **kwargs)
            if cos is None:
                cos, sin = (part.new_empty((len(group), *part.shape[1:])) for part in parts)
            cos[rows], sin[rows] = parts
        return cos, sin

    def _forget(self) -> None:
        """What was read before."""
        for name in [name for name in self.__dict__ if name.endswith("max_seq_len_cached")]:
            setattr(self, name, self.original_max_seq_len)
        for name in [name for name in (*self._buffers, *self.__dict__) if name.endswith("original_inv_freq")]:
            frequencies = getattr(self, name)
            now = getattr(self, name.replace("original_", ""))
            self.register_buffer(name.replace("original_", ""), frequencies.to(now.device), persistent=False)


@functools.cache
def _by_row(kind: type) -> type:
    return type(kind.__name__, (_ByRow, kind), {})
