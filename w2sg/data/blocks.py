"""FlexAttention for rows that several texts share: a kernel that leaves out the blocks of a mask where nothing is seen.

No mask of [B, L, L] is kept for the backward pass, and keys are not repeated where heads share them. Rows of one text
need no mask at all, so the same model reads them by SDPA's causal kernel, which is FlashAttention in bf16. Known for
preference pairs as prefix sharing (arXiv 2410.20305).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
NAME = "w2sg_blocks"  # of this attention, among those of transformers
DEVICES = {"cuda"}  # on a CPU the kernel has no backward pass
SAID: list[str] = []  # what a report has to say of this process
# columns: shorter rows have small masks and hardly a block to leave out, and each kernel has to be compiled
LEAST = 256
# kinds of rows that a kernel may be compiled for (dtypes, heads, windows of several models, one row or more); past the
# limit, which is 8, torch would quietly compute whole matrices of scores
RECOMPILED = 64


def offer() -> str:
    """Make it known to transformers; its name there is returned."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any
) -> tuple[Tensor, Tensor | None]:
    """The interface of attention functions in transformers: the kernel goes by the mask."""
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    forward = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, **rest)


def mask(name: str, rule: Callable[..., Tensor], rows: int, computing: torch.dtype, **rest: Any) -> Any:
    """A mask of blocks, where an attention takes it: it is worth it there, and the kernel is there, and right.

    Args:
        rule: transformers' for (row, head, query, key). rows: in the batch. computing: the dtype of attention.
        rest: what transformers gives to functions that make masks.

    Returns:
        None where the mask is to be made otherwise, if there is to be one.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    if name not in (NAME, "flex_attention"):
        return None
    length, device, local = rest["kv_length"], rest["device"], rest.get("local_size")
    if name == NAME:  # the others have no attention besides that could read these rows
        causal = rest.get("allow_is_causal_skip", True) and (local is None or length < local)
        if causal or device.type not in DEVICES or length < LEAST:
            return None
        config = rest["config"]
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        if not works(rule, (min(rows, 2), heads, groups, length, size), device, computing, local is not None):
            return None
    return create_block_mask(rule, rows, None, length, length, device=device)


def works(
    rule: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, local: bool
) -> bool:
    """Whether the kernel gives the numbers and gradients of SDPA here, tried once for each kind of mask; said if not.

    Args:
        rule: what is seen, of the first batch.
        shape: rows, heads of queries, heads of keys, length, size of a head.
        local: whether a window is part of it.
    """
    kind = (*shape[1:3], shape[4], device, dtype, local, torch.is_grad_enabled())
    if kind not in _TRIED:
        _TRIED[kind] = _try(rule, shape, device, dtype)
    return _TRIED[kind]


_TRIED: dict[tuple, bool] = {}


def _try(rule: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    try:
        worst = _difference(rule, shape, device, dtype)
    except Exception as error:  # of dynamo, inductor, triton or the driver, each of its own kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    else:
        if worst <= 3e-2:
            return True
        reason = f"its numbers are off by {worst:.1%}"
    line = f"FlexAttention does not work here ({reason}), so rows that texts share are read by SDPA with a mask"
    log.warning("%s", line)
    SAID.append(line)
    return False


def _difference(rule: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> float:
    """By how much states differ from SDPA's, relative to their size, and gradients where there are any."""
    from torch.nn.attention.flex_attention import create_block_mask, create_mask
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILED)
    rows, heads, groups, length, size = shape
    draw = torch.Generator().manual_seed(0)  # a run's own numbers must not hang on this
    shapes = [(rows, n, length, size) for n in (heads, groups, groups)]
    learns = torch.is_grad_enabled()  # a rule that is made while a model is only read could not be kept for gradients
    inputs = [torch.randn(one, generator=draw).to(device, dtype).requires_grad_(learns) for one in shapes]
    made = create_block_mask(rule, rows, None, length, length, device=device)
    seen = create_mask(rule, rows, None, length, length, device=device)
    with torch.autocast(device.type, enabled=False):
        ours = compile_friendly_flex_attention(*inputs, block_mask=made, enable_gqa=heads != groups, training=learns)
        query, key, value = inputs
        repeated = [x.repeat_interleave(heads // groups, 1) for x in (key, value)]
        theirs = scaled_dot_product_attention(query, *repeated, attn_mask=seen)
        pairs = [(ours, theirs)]
        if learns:
            pairs += zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (ours, theirs)), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
