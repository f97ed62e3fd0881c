"""What each token of a row may look at, layer by layer, where several texts share the row.

A model knows best what its layers see: all that is before, a sliding window, a chunk. So it is left to make its masks
itself, and is asked for them in positions of a text instead of columns of a row, of one text at a time. A window then
counts the tokens of a text, whatever else stands between them in the row.

Shapes: B rows, L tokens in the longest row.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from w2sg.data import blocks

Sight = Callable[[Tensor, Tensor, Tensor], Tensor]  # of row, query and key
START, PADDING = 0, -1  # parts of a row: what all texts of an example begin with, and filling; its texts are 1, 2...


def sight(part: Tensor, example: Tensor | None = None) -> Sight:
    """What a query may look at among the keys of its row: backwards, in its own text or its start.

    Args:
        part: [B, L] the text of each token, `START` where all texts of the example have it, `PADDING` where none has.
        example: [B, L] whose it is, where a row holds several examples.

    Returns:
        A function of indices (row, query, key) that can be broadcast, True where the key is seen.
    """

    def seen(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = (key <= query) & ((part[row, query] == part[row, key]) | (part[row, key] == START))
        return found if example is None else found & (example[row, query] == example[row, key])

    return seen


@contextlib.contextmanager
def making_masks(config: Any, seen: Sight | None, positions: Tensor) -> Iterator[None]:
    """The masks that models of this configuration make keep the texts of a row apart, and count in positions.

    Each mask is made once for all layers of a kind, in the form that the kernel reads without another copy.

    Args:
        seen: what a token may see at most, as from `sight`; None where each row is one text, filled on the right.
        positions: [B, L] each token's place in its own text.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as functions

    name = getattr(config, "_attn_implementation", None)
    usual = functions.get(name)
    if usual is None:  # this attention takes no mask
        yield
        return
    functions[name] = partial(_mask, name, usual, seen, positions)
    try:
        yield
    finally:
        functions[name] = usual


def _mask(
    name: str,
    usual: Callable[..., Any],
    seen: Sight | None,
    positions: Tensor,
    *,
    mask_function: Callable[..., Tensor],
    **rest: Any,
) -> Any:
    """The interface of mask functions in transformers, for our rows."""

    def one_text(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen(row, query, key) & mask_function(row, head, positions[row, query], positions[row, key])

    # No token sees the filling after it, so it needs no mask, and nobody has to ask the device whether there is any.
    rest["attention_mask"] = None
    rule = mask_function if seen is None else one_text
    if seen is not None:
        rest["allow_is_causal_skip"] = False  # what a kernel knows without a mask, it knows of columns
    dtype = computing(positions.device, rest.get("dtype"))
    mask = blocks.mask(name, rule, len(positions), dtype, **rest)
    if mask is None:
        mask = usual(mask_function=rule, **rest)
    return additive(mask, dtype) if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 4 else mask


def computing(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which attention is computed, of a model whose states have this one."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype or torch.float32


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L] what is added to scores: 0 where ``mask`` is True, else minus infinity.

    SDPA would make this of a boolean mask in every layer, and keep each copy for the backward pass. Lines begin at
    multiples of 8 numbers, or its memory-efficient kernel would copy them once more.
    """
    one = mask[:1] if mask.stride(0) == 0 else mask  # the same for all rows
    room = -(-mask.shape[-1] // 8) * 8
    made = torch.full((*one.shape[:-1], room), -torch.inf, dtype=dtype, device=mask.device)[..., : mask.shape[-1]]
    return made.masked_fill_(one, 0.0).expand(mask.shape)


def run_backbone(backbone: nn.Module, batch: Mapping[str, Tensor], seen: Sight | None = None) -> Any:
    """What a transformers model without its head returns for a batch of rows that are filled on the right.

    Args:
        batch: ``input_ids`` and ``position_ids``, [B, L].
        seen: what a token may see, where texts share rows. Without it each row is one text, and causality alone keeps
            the filling out of sight: the kernel gets no mask but where a window is shorter than the row.
    """
    ids, positions = batch["input_ids"], batch["position_ids"]
    # None would let transformers guess from the positions which texts share a row
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if "position_ids" in inspect.signature(getattr(backbone, "forward", backbone)).parameters:
        inputs["position_ids"] = positions
    with making_masks(getattr(backbone, "config", None), seen, positions):
        return backbone(**inputs)


def windows(config: Any) -> list[int]:
    """Lengths of text at which a model's layers begin to see less than all that is before: of windows and chunks."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "use_sliding_window", True) is False:
        return []
    sizes = []
    if kinds is None or any("sliding" in kind for kind in kinds):
        sizes += [getattr(config, name, None) for name in ("sliding_window", "attention_window_size")]
    if kinds is None or "chunked_attention" in kinds:
        sizes.append(getattr(config, "attention_chunk_size", None))
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        sizes.append(config.window_size)
    return sorted({int(size) for size in sizes if size})


def row_limits(config: Any) -> list[int]:
    """Columns of a row from which a model counts by columns and not by positions, so that texts cannot share it."""
    config = config.get_text_config()
    tuned = getattr(config, "attn_temperature_tuning", False)  # Llama 4
    return [int(config.floor_scale)] if tuned and getattr(config, "floor_scale", None) else []
