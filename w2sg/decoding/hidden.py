"""Masks of rows whose hidden columns the host knows: transformers would ask the device at every forward whether any is.

Shapes: B rows, L new tokens, C columns of the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from w2sg.data.masks import additive, computing


@contextlib.contextmanager
def columns_hidden(config: Any, hidden: bool, columns: int | None = None) -> Iterator[None]:
    """Masks that models of this configuration make go by what the host knows of the columns that rows have.

    Args:
        hidden: whether a row lacks any of them. columns: of a static cache, whose later ones are always hidden.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as functions

    name = getattr(config, "_attn_implementation", None)
    usual = functions.get(name)
    if usual is None or columns is not None:  # this attention takes no mask, or its masks are made without a question
        yield
        return
    functions[name] = partial(_mask, usual, hidden)
    try:
        yield
    finally:
        functions[name] = usual


def _mask(usual: Callable[..., Any], hidden: bool, *, attention_mask: Tensor | None = None, **rest: Any) -> Any:
    """The interface of mask functions in transformers."""
    if not hidden:
        return usual(attention_mask=None, **rest)
    rest["allow_is_causal_skip"] = False
    mask = usual(attention_mask=attention_mask, **rest)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 4:
        return additive(mask, computing(mask.device, rest.get("dtype")))  # else SDPA makes it so in every layer
    return mask
