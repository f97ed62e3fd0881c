"""A model cut over the devices (FSDP2), and made whole again for checkpoints and for what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from w2sg.training.line import Line, OnLine


class Sharded(OnLine, ModelParallelStrategy):
    """Weights, gradients and optimizer state cut over all devices: FSDP2, which unlike FSDP1 also runs on CPUs.

    A checkpoint is that of a single device, so a fit begun on some devices can go on on any others. It is assembled on
    rank 0 tensor by tensor, in host memory.
    """

    def __init__(self, line: Line, world: int):
        self.line = line
        super().__init__(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return whole(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # mapped, not read: the ranks of a machine share its pages
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_weights(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in state["param_groups"] for i in group["params"]]
            of = dict(zip(numbers, parameters, strict=True))
            cuts = {i: {k: cut(v, of[i]) for k, v in values.items()} for i, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": cuts})


def large(model: nn.Module) -> bool:
    """Whether a model is worth cutting over devices: a pretrained backbone is, a head of a few thousand weights not."""
    return hasattr(model, "sharded_parts")


def shard(model: nn.Module, mesh: Any) -> None:
    """Cut a `large` model over the devices of a mesh, part by part, so that one part at a time is whole."""
    for module in model.sharded_parts():
        fully_shard(module, mesh=mesh)


def unshard(module: nn.Module) -> None:
    """Make a sharded module an ordinary one again, on rank 0, in host memory; the other ranks keep nothing of it."""
    _reshard(module)
    for part in module.modules():
        for name, weight in part._parameters.items():
            if isinstance(weight, DTensor):
                full = whole(weight.detach())
                empty = torch.empty(0, dtype=weight.dtype)
                part._parameters[name] = nn.Parameter(empty if full is None else full, weight.requires_grad)


@torch.no_grad()
def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module, sharded or not, the whole weights of a checkpoint, which holds none of what is frozen."""
    _reshard(module)
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if name in state:
            weight.copy_(cut(state[name], weight))


def _reshard(module: nn.Module) -> None:
    """Free what the last forward gathered and left: without a backward, the outermost weights."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(state: Any) -> Any:
    """Nested state with its sharded tensors whole, in host memory: on rank 0, and None in their place elsewhere."""
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value) for value in state)
    if isinstance(state, DTensor):
        full = state.full_tensor()  # every rank takes part
        return full.cpu() if dist.get_rank() == 0 else None
    return state


def cut(full: Any, like: Tensor) -> Any:
    """A whole tensor as this rank's part, cut as another is; what that has no part in (a step count) as it is."""
    if not (isinstance(full, Tensor) and isinstance(like, DTensor) and full.shape == like.shape):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)
