"""A model cut over the devices (FSDP2), and made whole again for checkpoints and for what is saved."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from w2sg.models.low_bits import in_few_bits
from w2sg.models.tensor_parallel import cut as cut_layers
from w2sg.models.tensor_parallel import parallel, work_locally
from w2sg.training import pieces
from w2sg.training.line import Line, OnLine
from w2sg.training.sending import part_of, send

log = logging.getLogger(__name__)
ROOM = 0.1  # of a GPU's memory, for whole gradients between micro-batches


class Sharded(OnLine, ModelParallelStrategy):
    """Weights, gradients and optimizer state cut over all devices: FSDP2, which unlike FSDP1 also runs on CPUs.

    Each rank writes its part of a checkpoint (`w2sg.training.pieces`), and a fit goes on from it on any devices.

    Args:
        world: devices.
        mixed: weights are gathered and multiplied in bf16, and their gradients summed in fp32. Autocast would leave a
            bf16 copy of the whole model on every device until the backward pass (pytorch/torchtitan#600).
        copies: so many groups of devices hold all of the model, those of a machine one (HSDP).
        offload: parts stay in host memory, where the optimizer works.
    """

    def __init__(self, line: Line, world: int, mixed: bool = False, copies: int = 1, offload: bool = False):
        self.line = line
        super().__init__(copies, world // copies, save_distributed_checkpoint=False)
        self.mixed, self.copies, self.offload = mixed, copies, offload

    def place(self, model: nn.Module) -> None:
        """Cut a `large` model over the devices, and send its weights to them."""
        # Lightning's names of the two dimensions are of another use: copies, and parts of each
        if self.mixed and (wide := _wide(model)):
            log.warning(
                "%s is meant to compute in fp32, and is rounded to bf16 by trainer=fsdp under bf16-mixed; "
                "trainer.precision=32-true keeps it",
                ", ".join(wide),
            )
        mesh = self.device_mesh if self.copies > 1 else self.device_mesh["tensor_parallel"]
        at = torch.device("cpu") if self.offload else self.root_device
        send(model, self.root_device, lambda: shard(model, mesh, self.mixed, self.offload), at)

    def model_to_device(self) -> None:
        """Nothing: `place` has put everything where it belongs."""

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """The gradients of a micro-batch are kept whole here, until those of the last one are summed over devices.

        Where they would take more than `ROOM`, they are summed at once.
        """
        parts = [part for part in self.lightning_module.modules() if isinstance(part, FSDPModule)]
        parts = parts if self._room_for_gradients() else []
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    def _room_for_gradients(self) -> bool:
        if self.root_device.type != "cuda":
            return True
        trained = sum(4 * p.numel() for p in self.lightning_module.parameters() if p.requires_grad)
        return trained <= ROOM * torch.cuda.get_device_properties(self.root_device).total_memory

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.begin(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of any number of ranks: this rank's parts of what this many have written or more, or fewer."""
        if not Path(checkpoint_path).is_dir():
            return self.checkpoint_io.load_checkpoint(checkpoint_path, None, weights_only)
        return pieces.read(Path(checkpoint_path), self._like, self.checkpoint_io.group)

    def _like(self, place: list[str | int], dtype: torch.dtype) -> Tensor:
        """Something to read a sharded tensor of a checkpoint into."""
        if place[0] == "state_dict":
            return torch.empty_like(self.lightning_module.state_dict()[place[1]], dtype=dtype)
        _, optimizer, _, number, _ = place
        parameters = [p for group in self.optimizers[optimizer].param_groups for p in group["params"]]
        return torch.empty_like(parameters[number].detach(), dtype=dtype)

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


def place(model: nn.Module, trainer: L.Trainer) -> None:
    """Give each device its part of a model that one rank has read, or all of it: when Lightning configures models."""
    if isinstance(trainer.strategy, Sharded):
        trainer.strategy.place(model)
        return
    device = trainer.strategy.root_device
    for part in _models(model) if trainer.world_size > 1 else ():
        if in_few_bits(part):  # of which each rank has read its own
            continue
        if parallel(part):
            mesh = init_device_mesh(device.type, (trainer.world_size,))
            send(part, device, partial(cut_layers, part, mesh))
            work_locally(part)
        elif large(part):
            send(part, device)


def in_place(model: nn.Module) -> list[str]:
    """Names of weights and buffers that each device has as it needs them, once a model is placed."""
    names = {part: name for name, part in model.named_modules()}
    return [
        f"{names[part]}.{name}".removeprefix(".")
        for part in _models(model)
        if large(part)
        for name, _ in (*part.named_parameters(), *part.named_buffers())
    ]


def _models(module: nn.Module) -> list[nn.Module]:
    """The models in a module that may be a list of them."""
    return [m for inner in module for m in _models(inner)] if isinstance(module, nn.ModuleList) else [module]


def _wide(model: nn.Module) -> list[str]:
    """Kinds of weights that an architecture asks to be kept in fp32 (routers of some mixtures of experts)."""
    kinds = {kind for part in model.modules() for kind in getattr(part, "_keep_in_fp32_modules_strict", None) or ()}
    return sorted(kind for kind in kinds if any(kind in name for name, _ in model.named_parameters()))


def leave(model: nn.Module, trainer: L.Trainer) -> None:
    """Rank 0 alone keeps a large model that every rank has trained, so that no other moves it to the host's memory."""
    if large(model) and not trainer.is_global_zero and not isinstance(trainer.strategy, Sharded):
        for weight in model.parameters():
            weight.data = torch.empty(0, dtype=weight.dtype)


def shard(model: nn.Module, mesh: DeviceMesh, mixed: bool = False, offload: bool = False) -> None:
    """Cut a `large` model over the devices of a mesh, part by part, so that one part at a time is whole.

    Args:
        mesh: of one dimension, or of two: copies, and the parts of each.
        mixed: it computes in bf16, but for parts that are kept exact.
        offload: parts stay in host memory.
    """
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    where = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for module, exact in model.sharded_parts():
        policy = bf16 if mixed and not exact else MixedPrecisionPolicy()
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=where)


def gathered_bytes(model: nn.Module, mixed: bool = False) -> int:
    """What stands whole on a device at once of a model that is cut: the outermost part, a block, and the next one."""
    parts, seen, outer, blocks = model.sharded_parts(), set[int](), 0, [0, 0]
    for part, exact in parts:
        weights = [p for p in part.parameters() if id(p) not in seen]
        seen |= {id(p) for p in weights}
        size = sum(p.numel() * (2 if mixed and not exact else p.element_size()) for p in weights)
        within = set(part.modules()) - {part}
        if any(other in within for other, _ in parts):
            outer += size
        else:
            blocks.append(size)
    return outer + sum(sorted(blocks)[-2:])


def unshard(module: nn.Module) -> None:
    """Make a sharded module an ordinary one again, on rank 0, in host memory; the other ranks keep nothing of it.

    What adapters stand on is saved with none of them, and stays empty.
    """
    _reshard(module)
    adapted = any(hasattr(part, "peft_config") for part in module.modules())
    made: dict[Tensor, nn.Parameter] = {}  # what is tied stays tied
    for part in module.modules():
        for name, weight in part._parameters.items():
            if not isinstance(weight, DTensor):
                continue
            if weight not in made:
                full = whole(weight.detach()) if weight.requires_grad or not adapted else None
                full = torch.empty(0, dtype=weight.dtype) if full is None else full
                made[weight] = nn.Parameter(full, weight.requires_grad)
            part._parameters[name] = made[weight]


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
    if isinstance(full, DTensor) or not (
        isinstance(full, Tensor) and isinstance(like, DTensor) and full.shape == like.shape
    ):
        return full
    return part_of(full, like)
