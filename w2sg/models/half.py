"""A saved model with its weights rounded to bf16: half the size of fp32."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from w2sg.store.files import read_json, write_json

EXACT = re.compile(r"(^|\.)score\.")  # heads that w2sg trains are small, and read in fp32


def to_bf16(folder: Path) -> None:
    """Round the weights of a ``save_pretrained`` folder, a file at a time; its head stays as it is."""
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            about = tensors.metadata()
            state = {name: _rounded(name, tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
        save_file(state, file, about)
        size += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": "bfloat16"})
    for file in folder.glob("*.index.json"):
        index = read_json(file)
        index.setdefault("metadata", {})["total_size"] = size
        write_json(file, index)


def _rounded(name: str, tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and not EXACT.search(name) else tensor.clone()
