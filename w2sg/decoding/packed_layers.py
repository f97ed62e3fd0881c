"""Linear layers of frozen models on a CPU, with weights laid out once as oneDNN reads them.

A matrix product with few rows, as decoding makes at every token, otherwise lays its weights out anew each time: with 32
rows that is a third of the time in the blocks and more than half of it in a large output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_WORTH = 2**15  # weights; calling oneDNN costs more than laying out fewer, those of adapters say
# of transformers' modules: layers that are given the same
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PACKED = "_packed_version"  # of a module: the version of the weights that were laid out


def pack(model: nn.Module) -> None:
    """Lay out the linear layers of a model that is only read; this takes as much memory again as their weights.

    Nothing is done to layers on other devices, in other types than fp32, cut into shards, or of other kinds; where
    weights have been changed since, they are laid out anew. State dicts are as before.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return
    together: set[nn.Module] = set()
    for parent in model.modules():
        for names in _SIBLINGS:
            siblings = [getattr(parent, name, None) for name in names]
            if all(type(module) is nn.Linear and _plain(module.weight) for module in siblings):
                _lay_out(siblings)
                together.update(siblings)
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D) and module not in together and _plain(module.weight):
            _lay_out([module])


def unpack(model: nn.Module) -> None:
    """Take back what `pack` did, for a model that may be trained again by whoever owns it."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _Packed):
            del module.forward
            vars(module).pop(_PACKED, None)


def _lay_out(modules: Sequence[nn.Module]) -> None:
    """Lay out layers that read the same as one; none of them where this has been done."""
    parts = [part for module in modules for part in (module.weight, module.bias) if part is not None]
    version = tuple((id(part), part._version) for part in parts)
    if getattr(modules[0], _PACKED, None) == version:
        return
    with torch.no_grad():
        weights = [module.weight.T if isinstance(module, Conv1D) else module.weight for module in modules]
        biases = [module.bias for module in modules]
        if any(bias is not None for bias in biases):
            biases = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            bias = biases[0] if len(modules) == 1 else torch.cat(biases)
        else:
            bias = None
        weight = weights[0].contiguous() if len(modules) == 1 else torch.cat(weights)
        layer = _Layer(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None), bias, [len(w) for w in weights])
    for place, module in enumerate(modules):
        module.forward = _Packed(module, layer, place)
        setattr(module, _PACKED, version)


def _plain(weight: Any) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not weight.is_inference()
        and weight.numel() >= _WORTH
    )


class _Layer:
    """One product for all layers that read the same; the first that is called computes what the others then take."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]):
        self.weight, self.bias, self.sizes = weight, bias, sizes
        self.inputs: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, inputs: Tensor, place: int) -> Tensor:
        # the same tensor, by identity: siblings are given one and the same, and no product outlives its readers
        if self.inputs is not inputs or place not in self.outputs:
            output = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            if len(self.sizes) == 1:
                return output
            self.inputs, self.outputs = inputs, dict(enumerate(output.split(self.sizes, -1)))
        output = self.outputs.pop(place)
        if not self.outputs:
            self.inputs = None
        return output


class _Packed:
    """The forward of one module; a copy of the module is an ordinary one again."""

    def __init__(self, module: nn.Module, layer: _Layer | None = None, place: int = 0):
        self.module, self.layer, self.place = module, layer, place

    def __call__(self, inputs: Tensor) -> Tensor:
        module = self.module
        wants_gradient = torch.is_grad_enabled() and (inputs.requires_grad or module.weight.requires_grad)
        if self.layer is None or wants_gradient or inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return type(module).forward(module, inputs)
        return self.layer(inputs, self.place)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)
