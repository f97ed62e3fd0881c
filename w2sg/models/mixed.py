"""Mixed precision: weights that nothing trains are held in bf16, and what heads say is computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def hold_in_bf16(module: nn.Module, trained: bool = True) -> int:
    """Cast to bf16, in place, the weights of pretrained models that autocast would cast anew at each forward.

    Autocast remembers its casts of weights that are trained alone. So a frozen linear layer in fp32 is read, written
    in bf16 and read again at every token that a model writes: 10 bytes a weight in place of 2. The products are the
    same, bit for bit. Embeddings, norms, convolutions, output layers and heads are not cast by autocast, or read in
    fp32 on purpose; they stay as they are.

    Args:
        module: has ``PreTrainedModel`` somewhere inside, or nothing is done.
        trained: False leaves weights alone that require a gradient, as adapters do in training.

    Returns:
        How many weights were cast.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    cast = 0
    for model in (part for part in module.modules() if isinstance(part, PreTrainedModel)):
        tops = [model.get_output_embeddings(), getattr(model, "score", None)]
        tops += [part for part in model.modules() if isinstance(part, nn.Embedding)]
        kept = {id(p) for top in tops if top is not None for p in top.parameters()}
        wide = model._keep_in_fp32_modules_strict or ()
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.Linear | Conv1D) or not {*name.split(".")}.isdisjoint(wide):
                continue
            for weight in layer.parameters(recurse=False):
                if weight.dtype == torch.float32 and id(weight) not in kept and (trained or not weight.requires_grad):
                    weight.data = weight.data.to(torch.bfloat16)
                    cast += weight.numel()
    return cast


def in_fp32(like: Tensor) -> torch.autocast:
    """Where autocast casts nothing, on the device of a tensor: scores in bf16 would have 3 digits."""
    return torch.autocast(like.device.type, enabled=False)
