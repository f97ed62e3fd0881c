"""Linear layers of frozen models on a CPU, with weights laid out once as oneDNN reads them.

A matrix product with few rows, as decoding makes at every token, otherwise lays its weights out anew each time: with 32
rows that is a third of the time in the blocks and more than half of it in a large output layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_WORTH = 2**15  # weights; calling oneDNN costs more than laying out fewer, those of adapters say
_PACKED = "_packed_version"  # of a module: the version of the weights that were laid out


def pack(model: nn.Module) -> None:
    """Lay out the linear layers of a model that is only read; this takes as much memory again as their weights.

    Nothing is done to layers on other devices, in other types than fp32, cut into shards, or of other kinds; where
    weights have been changed since, they are laid out anew. State dicts are as before.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return
    for module in model.modules():
        if type(module) not in (nn.Linear, Conv1D) or not _plain(module.weight):
            continue
        version = (id(module.weight), module.weight._version)
        if getattr(module, _PACKED, None) == version:
            continue
        with torch.no_grad():
            weight = module.weight.T.contiguous() if isinstance(module, Conv1D) else module.weight
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        module.forward = _Packed(module, laid_out)
        setattr(module, _PACKED, version)


def _plain(weight: Any) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not weight.is_inference()
        and weight.numel() >= _WORTH
    )


class _Packed:
    """The forward of one module; a copy of the module is an ordinary one again."""

    def __init__(self, module: nn.Module, weight: Tensor | None):
        self.module, self.weight = module, weight

    def __call__(self, inputs: Tensor) -> Tensor:
        module = self.module
        wants_gradient = torch.is_grad_enabled() and (inputs.requires_grad or module.weight.requires_grad)
        if self.weight is None or wants_gradient or inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return type(module).forward(module, inputs)
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, module.bias, "none", [], "")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, None)
