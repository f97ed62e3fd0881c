"""Activations that transformers writes as many small operations, each of which keeps its input for the backward pass.

GPT-2's ``gelu_new`` is nine of them. One kernel gives the same values to 1e-6, and keeps one tensor.
"""

from __future__ import annotations

from torch import nn


def in_one_kernel(model: nn.Module) -> None:
    """Replace them, in place. The configuration stays, so that a saved model is what it would have been."""
    from transformers.activations import FastGELUActivation, NewGELUActivation
    from transformers.models.bloom.modeling_bloom import BloomGelu

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation | FastGELUActivation | BloomGelu):
                setattr(parent, name, nn.GELU("tanh"))
