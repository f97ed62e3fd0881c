"""Bytes that one device holds at the peak of a stage, without loading a model.

Weights, gradients and optimizer states are counted by their numbers. What a forward keeps for its backward is what
`w2sg.models.footprint` finds, by which micro-batches are cut as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from w2sg.models import footprint
from w2sg.training.precision import MIXED
from w2sg.training.sharding import gathered_bytes


@dataclass(frozen=True)
class Peak:
    """Bytes on one device, by what they are.

    Attributes:
        weights: of all models of the stage. gradients, optimizer: of what is trained.
        activations: what the largest micro-batch keeps for the backward. hand: its logits, and what a block has in hand
            at once. cache: keys and values.
        total: at the moment that needs most, which is not the sum where a single micro-batch makes a step: activations
            go as gradients come.
        measured: False where activations are by a rule of thumb.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    hand: float = 0.0
    cache: float = 0.0
    total: float = 0.0
    measured: bool = True


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each once."""
    sizes = {id(t): getattr(t, "bytes_held", t.numel() * t.element_size()) for t in tensors}  # some are in few bits
    return round(sum(sizes.values()))


def of_fit(
    model: nn.Module,
    config: Any,
    use: footprint.Use,
    tokens: int,
    length: int,
    asked: int = 0,
    several: bool = False,
    cut: int = 1,
    fused: bool = False,
    device: str = "cuda",
    offload: bool = False,
) -> Peak:
    """Of training.

    Args:
        model: on the meta device, or a small one. config: of its backbone; None for heads and bags of words.
        tokens, length: of the largest micro-batch, padded, and of its rows. asked: tokens whose log-probability is
            asked for.
        several: a step has more than one micro-batch, so that gradients stand beside activations.
        cut: devices that weights, gradients and states are cut over.
        fused: the optimizer makes nothing beside its states. device: its kind.
        offload: what is cut stays in host memory.
    """
    weights, trained = held(model.parameters()) / cut, [p for p in model.parameters() if p.requires_grad]
    gradients, numbers = held(trained) / cut, sum(p.numel() for p in trained) / cut
    states = numbers * footprint.STATES.get(use.optimizer, 8)
    if cut > 1:
        weights, gradients, states = (0.0 if offload else size for size in (weights, gradients, states))
        weights, use = weights + gathered_bytes(model, use.precision == MIXED), _gathered(use)
    activations, hand, measured = 0.0, 0.0, True
    if config is not None:  # gradients of a block take the place of what it kept, half a block later
        kept = footprint.kept(config, use, length)
        activations, hand, measured = kept.fixed + kept.token * tokens, kept.block * tokens / 2, kept.measured
        if asked:
            hand += footprint.logits_bytes(config.vocab_size, asked, device)
    beside = 0.0 if fused else gradients
    backward = hand + (activations + gradients if several else max(activations, gradients))
    total = weights + states + max(backward, gradients + beside)
    return Peak(weights, gradients, states, activations, hand, 0.0, total, measured)


def _gathered(use: footprint.Use) -> footprint.Use:
    """Of a model whose weights are cast as they are gathered: nothing is cast again, or kept for that."""
    return replace(use, precision="32-true", dtype="bfloat16") if use.precision == MIXED else use


def of_reading(
    models: nn.Module,
    configs: list[Any],
    uses: list[footprint.Use],
    tokens: int,
    length: int,
    asked: int = 0,
    cut: int = 1,
    device: str = "cuda",
    offload: bool = False,
) -> Peak:
    """Of frozen models that read rows of so many padded tokens together. Arguments as of `of_fit`."""
    weights = held(models.parameters()) / cut
    if cut > 1:
        mixed = any(use.precision == MIXED for use in uses)
        weights, uses = (0.0 if offload else weights) + gathered_bytes(models, mixed), [_gathered(use) for use in uses]
    kept = [footprint.kept(config, use, length) for config, use in zip(configs, uses, strict=True)]
    hand = max((k.block * tokens for k in kept), default=0.0)
    if asked and configs:
        hand += max(footprint.logits_bytes(config.vocab_size, asked, device) for config in configs)
    measured = all(k.measured for k in kept)
    return Peak(weights=weights, hand=hand, total=weights + hand, measured=measured)


def of_writing(
    models: nn.Module, configs: list[Any], uses: list[footprint.Use], rows: int, prompt: int, length: int, device: str
) -> Peak:
    """Of frozen models that write replies together.

    Args:
        rows: in flight. prompt: tokens of the longest prompt. length: with the longest reply.
    """
    reading = of_reading(models, configs, uses, rows * prompt, prompt, asked=rows, device=device)
    cache = (
        1.5
        * rows
        * sum(  # it grows by moving to a place half as large again
            footprint.cache_bytes(config, length, "bfloat16" if use.precision == "bf16-mixed" else use.dtype)
            for config, use in zip(configs, uses, strict=True)
        )
    )
    return replace(reading, cache=cache, total=reading.total + cache)
