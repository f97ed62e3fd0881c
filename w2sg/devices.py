"""One device or many: who we are, how ranks agree, and the Trainer of a stage."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from lightning.fabric import Fabric
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from w2sg.config import CONF, TrainerConfig

log = logging.getLogger(__name__)
T = TypeVar("T")


class Devices:
    """The devices of a run. Making one starts the other processes (unless torchrun or SLURM did).

    Every rank walks every stage in step; rank 0 alone takes locks and writes.
    """

    def __init__(self, config: TrainerConfig):
        quiet()
        _disband()  # the processes of the sweep's last job
        self.config = config
        self.fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy="ddp" if config.strategy == "fsdp" else config.strategy,  # here only for talking to each other
        )
        if self.fabric.world_size > 1:
            _gather(self.fabric)
            self.fabric.launch()
            if not self.main:
                logging.getLogger("w2sg").setLevel(logging.ERROR)  # rank 0 says it
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def world(self) -> int:
        return self.fabric.world_size

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether large models are cut over the devices."""
        return self.config.strategy == "fsdp" and self.world > 1

    @property
    def eval_tokens(self) -> int:
        """Padded tokens per forward when nothing is trained. A CPU is fastest while activations stay in its cache."""
        return self.config.eval_tokens or (2048 if self.fabric.device.type == "cpu" else 65536)

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.fabric.broadcast(value) if self.world > 1 else value

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            self.fabric.barrier()

    def total(self, value: float) -> float:
        """The sum of every rank's value."""
        if self.world == 1:
            return value
        return float(self.fabric.all_reduce(torch.tensor(float(value), dtype=torch.float64), reduce_op="sum"))

    def trainer(self, large: bool = False, **options: Any) -> L.Trainer:
        """A Lightning Trainer on these devices, with nothing on that we did not ask for.

        Args:
            large: the model is worth cutting over the devices, where the configuration says fsdp; a head of a few
                thousand weights is not.
        """
        config = self.config
        strategy: Any = config.strategy
        if strategy == "fsdp":
            strategy = "auto" if self.world == 1 else Sharded(self.world) if large else "ddp"
        return L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision=config.precision,
            inference_mode=not isinstance(strategy, Sharded),  # weights gathered in it could not be used outside
            enable_progress_bar=config.progress_bar and sys.stderr.isatty(),
            enable_model_summary=False,
            use_distributed_sampler=False,  # our loaders know their ranks
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # the module decides which steps are points of a curve
            **options,
        )


# ---------------------------------------------------------------------------------------------------------------------
# A model cut over the devices
# ---------------------------------------------------------------------------------------------------------------------


class Sharded(ModelParallelStrategy):
    """Weights, gradients and optimizer state cut over all devices: FSDP2, which unlike FSDP1 also runs on CPUs.

    A checkpoint is that of a single device, so a fit begun on some devices can go on on any others. It is assembled on
    rank 0 tensor by tensor, in host memory.
    """

    def __init__(self, world: int):
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


def shard(scorer: nn.Module, mesh: Any) -> None:
    """Cut a `LanguageScorer` over the devices of a mesh: each block by itself, so that one at a time is whole.

    The head is apart from the body, because frozen features are read from the body alone.
    """
    plain = scorer.model.get_base_model() if hasattr(scorer.model, "get_base_model") else scorer.model
    kinds = set(plain._no_split_modules or ())
    blocks = [module for module in plain.base_model.modules() if type(module).__name__ in kinds]
    for module in (*blocks, plain.base_model, plain.score):
        fully_shard(module, mesh=mesh)


def unshard(module: nn.Module) -> None:
    """Make a sharded module an ordinary one again, on rank 0, in host memory; the other ranks keep nothing of it."""
    _reshard(module)
    for part in module.modules():
        for name, own in part._parameters.items():
            if isinstance(own, DTensor):
                full = whole(own.detach())
                empty = torch.empty(0, dtype=own.dtype)
                part._parameters[name] = nn.Parameter(empty if full is None else full, own.requires_grad)


@torch.no_grad()
def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module, sharded or not, the whole weights of a checkpoint, which holds none of what is frozen."""
    _reshard(module)
    for name, own in (*module.named_parameters(), *module.named_buffers()):
        if name in state:
            own.copy_(cut(state[name], own))


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
    """A whole tensor as this rank's part, cut as another is; what has another shape is the same on all ranks."""
    if not (isinstance(full, Tensor) and full.ndim and isinstance(like, DTensor)):
        return full
    placements = like.placements if full.shape == like.shape else [Replicate()]
    return distribute_tensor(full.to(like.device), like.device_mesh, placements)


# ---------------------------------------------------------------------------------------------------------------------
# The other processes of a job
# ---------------------------------------------------------------------------------------------------------------------

RANKS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
PARENT = "W2SG_PARENT"  # who started this process
NOT_FOR_A_JOB = re.compile(r"^[+~]{0,2}hydra[./](mode|run|sweep|sweeper|launcher|output_subdir|job_logging)([.=@/]|$)")

_children: list[subprocess.Popen] = []
_over = threading.Event()  # the job that they belong to is
_before: dict[str, str | None] = {}  # what stood in the environment in place of the ranks


def _gather(fabric: Fabric) -> None:
    """Start this machine's other processes where nothing else does: each runs this one job, then ends.

    Lightning would repeat what was typed, which in a sweep is all of its jobs and under a launcher is not our command.
    """
    if PARENT in os.environ:
        threading.Thread(target=_follow, args=(int(os.environ[PARENT]),), daemon=True).start()
        return
    environment, count = fabric.strategy.cluster_environment, fabric.strategy.num_processes
    if environment.creates_processes_externally:  # torchrun, SLURM
        return
    if not HydraConfig.initialized():  # a script of the user's own: Lightning repeats it, and its ranks stay in step
        return
    ranks = (environment.main_address, environment.main_port, environment.node_rank(), 0, fabric.world_size)
    _before.update({name: os.environ.get(name) for name in RANKS})
    os.environ.update({name: str(value) for name, value in zip(RANKS, ranks, strict=True)})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    inherited = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ, PARENT: str(os.getpid())}
    command, folder = _command()
    for rank in range(1, count):
        _children.append(subprocess.Popen(command, env={**inherited, "LOCAL_RANK": str(rank)}, cwd=folder))
    _over.clear()
    threading.Thread(target=_watch, args=(list(_children), _over), daemon=True).start()


def _command() -> tuple[list[str], str]:
    """What runs this job again, and where."""
    hydra = HydraConfig.get()
    script = Path(sys.argv[0]).absolute()
    if script.stem != hydra.job.name:  # a launcher's own program
        script = CONF.parent / "train.py"
    command = [sys.executable, str(script), "--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        if source.provider in {"main", "command-line"}:
            command += ["--config-path" if source.provider == "main" else "--config-dir", source.path]
    quoted = str(Path(hydra.runtime.output_dir).absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return [
        *command,
        *(typed for typed in hydra.overrides.hydra if not NOT_FOR_A_JOB.match(typed)),
        *hydra.overrides.task,
        "hydra.mode=RUN",
        f"hydra.run.dir='{quoted}'",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",  # the log file is rank 0's
    ], hydra.runtime.cwd


def _watch(children: list[subprocess.Popen], over: threading.Event) -> None:
    """End this process when one of its others fails: it would wait for that one for ever."""
    while not over.wait(0.5):
        if any(child.poll() for child in children):
            if over.wait(5):  # the usual case: this process has noticed too, and says more
                return
            log.error("another process of this run failed (see above), so this one ends; finished stages are kept")
            _kill(children)
            logging.shutdown()
            os._exit(1)


def _follow(parent: int) -> None:
    """End with the process that started this one, however that ended: what is left would only hold its device."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@atexit.register
def _disband() -> None:
    """Leave the group of a job that is over and wait for its other processes to end."""
    if not _before:
        return
    _over.set()
    if dist.is_initialized():
        dist.destroy_process_group()
    deadline = time.monotonic() + 20
    for child in _children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    _kill(_children)
    _children.clear()
    for name, value in _before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _before.clear()


def _kill(children: list[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


def quiet() -> None:
    """Keep notices off the terminal that no user of ours can act on; each names where it comes from."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*is_gradient_checkpointing` is deprecated.*",  # peft 0.21 with transformers 5.23
        r".*isinstance\(treespec, LeafSpec\).*",  # lightning 2.6 with torch 2.13
        r"torch\.distributed\.nn\.functional\.all_gather is deprecated.*",  # lightning 2.6 with torch 2.13
        r"FSDP2-wrapped module .* returned a view tensor.*",  # we change none in place
        r".*does not have many workers.*",  # our batches are collated from memory
        r".*`weights_only` was not set.*",  # lightning 2.6: torch decides
        r"Checkpoint directory .* exists and is not empty.*",  # meant: a stage goes on in its folder
        r".*You're resuming from a checkpoint that ended before the epoch ended.*",  # our loader keeps its place
        r".*Consider setting `persistent_workers.*",
        r".*Starting from v1.9.0, `tensorboardX` has been removed.*",
        r"Using ModelCheckpoint with manual optimization.*",  # weights after the step are the ones to go on from
        r"You defined a `validation_step` but have no `val_dataloader`.*",
        r".*val_dataloader` was configured but.*",
    ):
        warnings.filterwarnings("ignore", message=message)
