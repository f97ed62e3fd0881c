"""Which attention a model is read with: what was asked for, what the model has, and what this machine can do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from w2sg.data import blocks
from w2sg.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from w2sg.config.model_schema import ModelConfig


# architectures that do not say that they have FlexAttention, and ask for attention as if they had
FLEX = ("gpt2",)


def _class_of(config: PretrainedConfig) -> Any:
    from transformers.models.auto import modeling_auto as auto

    return auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or auto.MODEL_MAPPING.get(type(config), None)


def _has_sdpa(known: Any, config: PretrainedConfig) -> bool:
    """Whether SDPA computes what a model is; before transformers 5.23 Gemma 2 said so, and lost its softcap in it."""
    return getattr(known, "_supports_sdpa", False) and getattr(config, "attn_logit_softcapping", None) is None


def is_kernel(attention: str) -> bool:
    """Whether it is a FlashAttention kernel, which takes no mask and reads on a GPU alone."""
    return attention.startswith("flash_") or "/" in attention


def attention_of(config: PretrainedConfig, spec: ModelConfig, role: str) -> tuple[str, list[str]]:
    """The attention that a model is read with, of what was asked for, and what has to be said of it.

    Raises:
        UserError: a kernel that it does not have.
    """
    wanted, known = spec.attention, _class_of(config)
    if wanted == "eager":
        return wanted, []
    if known is None:
        return "sdpa" if wanted == "auto" else wanted, []
    here = f"{role}.attention: {known.__name__} has no"
    if is_kernel(wanted):
        if not getattr(known, "_supports_flash_attn", False):
            raise UserError(f"{here} flash attention; use {role}.attention=auto")
        return wanted, []
    sdpa, flex = _has_sdpa(known, config), getattr(known, "_supports_flex_attn", False)
    flex = flex or config.model_type in FLEX
    if wanted == "flex_attention":
        if not flex:
            raise UserError(f"{here} flex_attention; use {role}.attention=auto")
        return wanted, []
    if sdpa:
        plain = not spec.dropout and not hasattr(config, "kv_lora_rank")  # what the kernel has, and was tried with
        return "flex_attention" if wanted == "auto" and flex and plain and torch.cuda.is_available() else "sdpa", []
    if getattr(known, "_is_stateful", False) and not hasattr(config, "num_attention_heads"):
        return "eager", []  # it has no attention at all
    line = f"{role}: {known.__name__} has no attention=sdpa, so that {spec.name} is read with attention=eager"
    return "eager", [line]


def implementation(config: PretrainedConfig, attention: str) -> str:
    """What transformers calls it. FlexAttention is for rows that texts share; others take SDPA's causal kernel."""
    if attention == "auto":  # a model that nobody has looked for yet
        return "sdpa"
    known = _class_of(config)
    if attention == "flex_attention" and (known is None or _has_sdpa(known, config)):
        return blocks.offer()
    return attention


def in_words(attention: str, device: torch.device) -> str:
    """What is used on a device, for the report."""
    if attention == "flex_attention" and device.type not in blocks.DEVICES:
        return "sdpa"
    return attention


@contextlib.contextmanager
def on_any_device(model: nn.Module) -> Iterator[None]:
    """A model whose kernel is for GPUs can be read where it is: on a CPU before it moves, to see how it reads."""
    config = model.config
    usual = config._attn_implementation
    gpus = is_kernel(usual or "") or usual == "flex_attention"
    if not gpus or next(model.parameters()).device.type != "cpu":
        yield
        return
    config._attn_implementation = "sdpa" if _has_sdpa(model, config) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = usual
