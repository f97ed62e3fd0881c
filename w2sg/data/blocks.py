"""FlexAttention for rows that several texts share: a kernel that leaves out the blocks of a mask where nothing is seen.

No mask of [B, L, L] is kept for the backward pass, and keys are not repeated where heads share them. Rows of one text
need no mask at all, so the same model reads them by SDPA's causal kernel, which is FlashAttention in bf16. Known for
preference pairs as prefix sharing (arXiv 2410.20305).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
NAME = "w2sg_blocks"  # of this attention, among those of transformers
DEVICES = {"cuda"}  # on a CPU the kernel has no backward pass
SAID: list[str] = []  # what a report has to say of this process
RECOMPILED = 64  # kinds of rows that a kernel may be compiled for: dtypes, heads and windows of several models


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


def used(name: str, device: torch.device, dtype: torch.dtype, config: Any) -> bool:
    """Whether masks of this attention are made of blocks on a device: where the kernel is there, and right."""
    if name not in (NAME, "flex_attention"):
        return False
    if name == "flex_attention":  # the model has no other that could read its rows
        return True
    if device.type not in DEVICES:
        return False
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return works(device, dtype, heads, groups, size)


def mask(rule: Callable[..., Tensor], rows: int, name: str, **rest: Any) -> Any:
    """The mask of ``rows`` rows by transformers' rule for (row, head, query, key); None where causality is all of it.

    Args:
        rest: what transformers gives to functions that make masks.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    length, local = rest["kv_length"], rest.get("local_size")
    if name == NAME and rest.get("allow_is_causal_skip", True) and (local is None or length < local):
        return None
    return create_block_mask(rule, rows, None, rest["q_length"], length, device=rest["device"])


@functools.cache
def works(device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int) -> bool:
    """Whether the kernel gives the numbers and gradients of SDPA here, tried once with a few tokens; said if not.

    Args:
        heads, groups: of queries, and of keys and values. size: of a head.
    """
    try:
        worst = _difference(device, dtype, heads, groups, size)
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


@torch.inference_mode(False)
@torch.enable_grad()
def _difference(device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int) -> float:
    """By how much states and gradients differ from SDPA's, relative to their size."""
    from torch.nn.attention.flex_attention import create_block_mask, create_mask
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILED)
    length, draw = 200, torch.Generator().manual_seed(0)  # a run's own numbers must not hang on this
    part = (torch.arange(length, device=device) // 70)[None].expand(2, -1).contiguous()

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((part[row, query] == part[row, key]) | (part[row, key] == 0))

    shapes = [(2, n, length, size) for n in (heads, groups, groups)]
    inputs = [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes]
    blocks = create_block_mask(rule, 2, None, length, length, device=device)
    seen = create_mask(rule, 2, None, length, length, device=device)
    with torch.autocast(device.type, enabled=False):
        ours = compile_friendly_flex_attention(*inputs, block_mask=blocks, enable_gqa=heads != groups, training=True)
        query, key, value = inputs
        repeated = [x.repeat_interleave(heads // groups, 1) for x in (key, value)]
        theirs = scaled_dot_product_attention(query, *repeated, attn_mask=seen)
        pairs = [(ours, theirs)]
        pairs += zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (ours, theirs)), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
