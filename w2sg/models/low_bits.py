"""Pretrained weights held in 4 or 8 bits, by bitsandbytes: to be read, or below adapters that train (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

BYTES = {"4bit": 0.5 + 1 / 64 + 4 / 64 / 256, "8bit": 1.0}  # of a weight, with scales of 64 and scales of those
BLOCK = 64  # weights of a row that share a scale; bitsandbytes 0.50 on a CPU misreads rows that are no whole blocks


@torch.no_grad()
def hold_in_bits(model: nn.Module, load: str) -> int:
    """Replace the linear layers of a pretrained model, but for the output layer, by such of fewer bits, in place.

    Layers whose rows are no whole blocks stay as they are. Weights without numbers (torch's meta device) stay, too, and
    their attribute ``bytes_held`` says what they would take.

    4 bits are NF4 with scales that are rounded themselves (arXiv 2305.14314): about 0.52 bytes a weight. 8 bits are
    rows of int8 whose outliers are multiplied in fp16 (arXiv 2208.07339).

    Args:
        load: ``4bit`` or ``8bit``.

    Returns:
        How many weights were rounded.
    """
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers, stored the other way round

    kept = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    rounded = 0
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear | Conv1D) and id(layer) not in kept:
                weight = layer.weight.T.contiguous() if isinstance(layer, Conv1D) else layer.weight
                if load == "4bit" and weight.shape[1] % BLOCK:
                    continue
                rounded += weight.numel()
                if weight.is_meta:
                    layer.weight.bytes_held = weight.numel() * BYTES[load]
                else:
                    setattr(module, name, _layer(load)(weight.detach(), layer.bias))
    if not any(p.is_meta for p in model.parameters()):
        setattr(model, f"is_loaded_in_{load}", True)  # peft asks for it, and gives adapters that know such layers
    return rounded


def in_few_bits(module: nn.Module) -> bool:
    """Whether `hold_in_bits` was applied to a model that stands anywhere inside."""
    return any(getattr(part, f"is_loaded_in_{load}", False) for part in module.modules() for load in ("4bit", "8bit"))


@cache
def _layer(load: str) -> Callable[[Tensor, nn.Parameter | None], nn.Module]:
    """Makes a layer from its weight [out, in] and bias."""
    from bitsandbytes import nn as layers

    class Linear4bit(layers.Linear4bit):
        """Products in bf16 under autocast, as those of other layers are, else in the dtype of what it reads."""

        def __init__(self, weight: Tensor, bias: nn.Parameter | None):
            super().__init__(weight.shape[1], weight.shape[0], bias is not None, quant_type="nf4", device="meta")
            self.weight = layers.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=self
            ).to(weight.device)
            self.bias = bias
            # a CPU with bf16 would order weights anew that are still to go to a GPU
            self.support_avx512bf16_for_cpu, self.compute_type_is_set = False, True

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(_dtype(x))
            self.compute_dtype = x.dtype
            return super().forward(x)

    class Linear8bit(layers.Linear8bitLt):
        def __init__(self, weight: Tensor, bias: nn.Parameter | None):
            shape = weight.shape[1], weight.shape[0]
            super().__init__(*shape, bias is not None, has_fp16_weights=False, threshold=6.0, device="meta")
            self.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
            self.bias = bias

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(_dtype(x)))

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            if self.state.CB is not None:  # it has read once: what that moved elsewhere goes with the weight
                self.weight.CB, self.weight.SCB = self.state.CB, self.state.SCB
                self.state.CB = self.state.SCB = None
            return super()._apply(fn, recurse)

    return {"4bit": Linear4bit, "8bit": Linear8bit}[load]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
