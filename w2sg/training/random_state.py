"""The state of torch's random numbers, on the CPU and every GPU: taken and put back."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state() -> list[Tensor]:
    """Of the CPU, then of each GPU."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(state: list[Tensor]) -> None:
    """Put a state back; that of the GPUs only where there are as many."""
    torch.set_rng_state(state[0].cpu())
    if torch.cuda.is_available() and len(state) - 1 == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state[1:]])
