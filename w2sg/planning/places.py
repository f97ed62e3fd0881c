"""Models that stand on several devices, or are cut over processes, as a plan counts them: what one device holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from w2sg.config.gpus import GIB
from w2sg.memory import RESERVE
from w2sg.models.spread import blocks_of, place_of
from w2sg.models.tensor_parallel import parallel
from w2sg.planning.memory import held

FILLED = 0.8  # of a GPU, by weights that are spread; the rest is for keys and values


def share(models: list[nn.Module], devices: Any) -> Iterator[str]:
    """Count of each model's weights what one device of a plan has, and say what was taken for it."""
    for model in models:
        for part in model.modules():
            if (wanted := getattr(part, "device_map_wanted", None)) is not None:
                yield _spread(part, wanted, devices)
        if parallel(model):
            yield f"{_name(model)}: each device has {held(model.parameters()) / GIB:.2f} GiB, its part of the weights"


def _spread(model: nn.Module, wanted: str | dict[str, Any], devices: Any) -> str:
    blocks, total = [model.get_submodule(name) for name in blocks_of(model)], held(model.parameters())
    if isinstance(wanted, dict):
        places = [place_of(wanted, name) for name in blocks_of(model)]
        away = [block for block, place in zip(blocks, places, strict=True) if place not in (None, places[0])]
        for block in away:
            for weight in block.parameters():
                weight.bytes_held = 0.0
        there = held(model.parameters()) / GIB
        return f"{_name(model)}: {there:.2f} of {total / GIB:.2f} GiB of weights are with the first block (device_map)"
    if devices.memory is None:
        return f"{_name(model)}: device_map={wanted} puts on disk what the memory of this machine does not hold"
    count = max(1, math.ceil(total / (devices.memory * (1 - RESERVE) * FILLED)))
    for block in blocks:
        for weight in block.parameters():
            weight.bytes_held = getattr(weight, "bytes_held", weight.numel() * weight.element_size()) / count
    return (
        f"{_name(model)}: {total / GIB:.1f} GiB of weights are planned over {count} GPUs (device_map={wanted}), of "
        "which one works at a time; with fewer, blocks go to host memory"
    )


def _name(model: nn.Module) -> str:
    inner = getattr(model, "plain", model)
    return str(getattr(inner.config, "_name_or_path", "") or type(inner).__name__)
