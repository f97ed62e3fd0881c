"""A weaker model of the same: its weights rounded to a few bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> int:
    """Round the weights of every linear layer but the output layer, in place; how many weights were rounded.

    To the nearest of the ``2 ** bits - 1`` multiples of a step that lie evenly about zero; each output has a step of
    its own, by its largest weight. What is stored stays in the dtype that it was.
    """
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers, stored the other way round

    kept = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    rounded = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in kept:
            weight = module.weight
            weight.copy_(rounded_to(weight, bits, dim=1 if isinstance(module, nn.Linear) else 0))
            rounded += weight.numel()
    return rounded


def rounded_to(weight: Tensor, bits: int, dim: int) -> Tensor:
    """A matrix whose entries are multiples of a step along ``dim``."""
    most = 2 ** (bits - 1) - 1
    step = weight.float().abs().amax(dim, keepdim=True) / most
    return torch.where(step > 0, (weight.float() / step).round() * step, 0.0).to(weight.dtype)
