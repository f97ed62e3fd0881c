"""The devices that a plan is for, which need not be here: one process speaks for all of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from w2sg.config.gpus import GIB, GPUS
from w2sg.config.schema import TrainConfig, TrainerConfig
from w2sg.errors import UserError
from w2sg.memory import RESERVE
from w2sg.training import precision
from w2sg.training.devices import Devices

T = TypeVar("T")


class PlanDevices(Devices):
    """Devices by their number and memory.

    Attributes:
        on_gpu: whether it is a GPU. kind: as torch names it. name: in words.
        memory: bytes of each GPU; None for a CPU, which swaps. here: bytes of this machine's, where no GPU is planned.

    Raises:
        UserError: nothing says which GPU it is.
    """

    rank, imagined = 0, True

    def __init__(self, config: TrainConfig):
        trainer, gpu = config.trainer, GPUS.get(config.plan.gpu or "")
        cuda = torch.cuda.is_available() and trainer.accelerator != "cpu"
        if gpu is None and not cuda and trainer.accelerator not in ("auto", "cpu"):
            raise UserError(
                f"plan.gpu: trainer.accelerator={trainer.accelerator}, and this machine has none; name the GPU that "
                "the plan is for, as plan.gpu=h100-80"
            )
        self.on_gpu, self.notes = gpu is not None or cuda, []
        self.kind = "cuda" if self.on_gpu else "cpu"
        self.fabric: Any = SimpleNamespace(device=torch.device(self.kind))  # all that is asked of it
        if gpu is not None:
            self.name, self.memory = config.plan.gpu, gpu.memory * GIB
        elif cuda:
            facts = torch.cuda.get_device_properties(0)
            self.name, self.memory = facts.name, float(facts.total_memory)
        else:
            self.name, self.memory = "this CPU", None
        count = _count(trainer.devices, gpu is None and cuda)
        if count is None:
            count = 1
            self.notes.append(f"trainer.devices={trainer.devices}: planned for one device; say how many there are")
        self._world = count * trainer.num_nodes
        self.config = _settled(trainer, gpu is not None, cuda)

    @property
    def world(self) -> int:
        return self._world

    @property
    def eval_tokens(self) -> int:
        return self.config.eval_tokens or (65536 if self.on_gpu else 2048)

    def fits(self, total: float) -> bool:
        """Whether so many bytes find room, by the reserve that a run keeps; a CPU has no limit."""
        return self.memory is None or total <= self.memory * (1 - RESERVE)

    def first(self, work: Callable[[], T]) -> T:
        return work()

    def everyone(self, value: T) -> list[T]:
        return [value]

    def wait(self) -> None:
        """There is nobody to wait for."""


def _count(devices: int | str, here: bool) -> int | None:
    """How many devices a node has; None where only the node would know."""
    if isinstance(devices, str) and "," in devices:
        return len(devices.split(","))
    if devices in ("auto", "-1", -1):
        return torch.cuda.device_count() if here else None
    return int(devices)


def _settled(trainer: TrainerConfig, named: bool, cuda: bool) -> Any:
    """With a precision in the place of ``auto``; every GPU that can be named has bf16 and TF32."""
    if not named:
        return precision.settled(trainer, torch.device("cuda" if cuda else "cpu"))
    chosen = {"precision": "bf16-mixed", "matmul": "high"}
    return trainer.model_copy(update={k: v for k, v in chosen.items() if getattr(trainer, k) == "auto"})
