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

START, PADDING = 0, -1  # parts of a row: what all texts of an example begin with, and filling; its texts are 1, 2...


def attention_mask(part: Tensor, example: Tensor | None = None) -> Tensor:
    """[B, L, L] True where a query (row) may look at a key (column): backwards, in its own text or its start.

    Args:
        part: [B, L] the text of each token, `START` where all texts of the example have it, `PADDING` where none has.
        example: [B, L] whose it is, where a row holds several examples.
    """
    length = part.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=part.device).tril()
    seen = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == START)
    if example is not None:
        seen = seen & (example[:, :, None] == example[:, None, :])
    return causal & seen


@contextlib.contextmanager
def sharing_rows(config: Any, seen: Tensor, positions: Tensor) -> Iterator[None]:
    """The masks that models of this configuration make keep the texts of a row apart, and count in positions.

    Args:
        seen: [B, L, L] what a token may see at most, as from `attention_mask`.
        positions: [B, L] each token's place in its own text.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as functions

    name = config._attn_implementation
    usual = functions.get(name)
    if usual is None:  # this attention takes no mask
        yield
        return
    functions[name] = partial(_mask, usual, seen, positions)
    try:
        yield
    finally:
        functions[name] = usual


def _mask(
    usual: Callable[..., Any], seen: Tensor, positions: Tensor, *, mask_function: Callable[..., Tensor], **rest: Any
) -> Any:
    """The interface of mask functions in transformers, for rows that several texts share."""

    def one_text(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rule = mask_function(row, head, positions[row, query], positions[row, key])
        return seen[row, query, key] & rule

    # what a kernel knows without a mask, it knows of columns
    return usual(mask_function=one_text, **{**rest, "allow_is_causal_skip": False, "attention_mask": None})


def run_backbone(backbone: nn.Module, batch: Mapping[str, Tensor], seen: Tensor | None = None) -> Any:
    """What a transformers model without its head returns for a batch of rows that are filled on the right.

    Args:
        batch: ``input_ids`` and ``position_ids``, [B, L].
        seen: what a token may see, where texts share rows. Without it each row is one text, and causality alone keeps
            the filling out of sight.
    """
    ids, positions = batch["input_ids"], batch["position_ids"]
    # None would let transformers guess from the positions which texts share a row
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if "position_ids" in inspect.signature(getattr(backbone, "forward", backbone)).parameters:
        inputs["position_ids"] = positions
    sharing = contextlib.nullcontext() if seen is None else sharing_rows(backbone.config, seen, positions)
    with sharing:
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
