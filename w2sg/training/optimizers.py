"""The optimizers of a fit: torch's, those with states of 8 bits, and steps that bfloat16 weights cannot round away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from w2sg.config.machine import OF_BITSANDBYTES
from w2sg.config.schema import Optimization
from w2sg.errors import UserError
from w2sg.models.steps import LEAST, Rate

TORCHS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adafactor": torch.optim.Adafactor}


def make_optimizer(options: Optimization, rate: float, parameters: Sequence[Tensor]) -> Optimizer:
    """The optimizer that a fit's options name.

    On a CUDA GPU, torch's Adam runs as one fused kernel: it needs no copies of the size of the weights.

    Raises:
        UserError: weights of bfloat16 would round its steps away.
    """
    name, decay = options.optimizer, options.weight_decay
    low = any(p.dtype == torch.bfloat16 for p in parameters)
    if low and Rate(rate, name, options.stochastic_rounding).lost:
        raise UserError(
            f"steps of lr={rate:g} ({name}) are lost in weights of bfloat16, which round by up to {LEAST:.2g}; train "
            "weights of float32 with trainer.precision=bf16-mixed, adapters, or with stochastic_rounding=true"
        )
    rounds = low and options.stochastic_rounding
    if name in OF_BITSANDBYTES:
        return _of_8_bits(rounds)(parameters, lr=rate, weight_decay=decay, is_paged=name.startswith("paged"))
    if rounds:
        return RoundedAdamW(parameters, lr=rate, weight_decay=decay)
    more = {"fused": True} if name != "adafactor" and all(p.device.type == "cuda" for p in parameters) else {}
    return TORCHS[name](parameters, lr=rate, weight_decay=decay, **more)


def rounded(values: Tensor, seed: int) -> Tensor:
    """Numbers of fp32 in bf16, each rounded to one of its two neighbours, by chance and right on average.

    Args:
        seed: draws the chance. Devices that hold the same weights must round them alike.

    >>> wide = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next number, which is 1 + 2^-7
    >>> found = rounded(wide, 0).float()
    >>> found.unique().tolist() == [1.0, 1 + 2**-7], round(float((found > 1).double().mean()), 2)
    (True, 0.25)
    """
    draws = torch.Generator(values.device).manual_seed(seed)
    chance = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=draws)
    # bf16 is the upper half of fp32's bits: what is added to the lower half carries over as often as it should
    return ((values.view(torch.int32) + chance) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def _seed(step: int, place: int) -> int:
    """Of one parameter's rounding in one step: the same on all devices and after a stop."""
    return step * 1_000_003 + place


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class RoundedAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) of bf16 weights, with moments in fp32, computed in fp32 and rounded by chance.

    A step far below what a weight can hold then moves it as often as it should. Gradients and weights take 2 bytes
    each and moments 8, against 16 of fp32 training.
    """

    def __init__(self, parameters: Any, lr: float, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state. torch alone would give moments the dtype of their weights."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name in ("exp_avg", "exp_avg_sq") if number in state_dict["state"] else ():
                self.state[p][name] = state_dict["state"][number][name].to(p.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())  # on the CPU: asked for at each step
                    state |= {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                state["step"] += 1
                self._move(p, state, group, place)

    @staticmethod
    def _move(p: Tensor, state: dict[str, Tensor], group: dict[str, Any], place: int) -> None:
        (first, second), step = group["betas"], int(state["step"])
        weight, grad = _local(p), _local(p.grad).float()
        mean, square = (_local(state[name]) for name in ("exp_avg", "exp_avg_sq"))
        mean.lerp_(grad, 1 - first)
        square.lerp_(grad.square_(), 1 - second)
        scale = square.div(1 - second**step).sqrt_().add_(group["eps"])
        wide = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        wide.addcdiv_(mean, scale, value=-group["lr"] / (1 - first**step))
        weight.copy_(rounded(wide, _seed(step, place)) if weight.dtype == torch.bfloat16 else wide)


def _of_8_bits(rounds: bool) -> type[Optimizer]:
    """AdamW of bitsandbytes with states of 8 bits (arXiv 2110.02861).

    Args:
        rounds: weights of bf16 are moved in fp32 and rounded by chance.
    """
    from bitsandbytes.optim import AdamW8bit

    if not rounds:
        return AdamW8bit

    class RoundedAdamW8bit(AdamW8bit):
        @torch.no_grad()
        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            low, grad = p.data, p.grad
            p.grad, p.data = None, low.float()  # of one parameter at a time
            p.grad = grad.float()
            super().update_step(group, p, gindex, pindex)
            wide, p.grad, p.data = p.data, None, low
            p.grad = grad
            low.copy_(rounded(wide, _seed(self.state[p]["step"], pindex)) if low.dtype == torch.bfloat16 else wide)

    return RoundedAdamW8bit
