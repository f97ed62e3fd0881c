"""One device or many: who we are, how ranks agree, and the Trainer of a stage."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from w2sg import stops
from w2sg.config.schema import TrainerConfig
from w2sg.errors import UserError
from w2sg.models.once import read_by_one
from w2sg.models.spread import compute_on
from w2sg.peers import Peers
from w2sg.training import precision, processes
from w2sg.training.checkpoints import SealedFiles
from w2sg.training.line import Joining, Replicated
from w2sg.training.random_state import random_state, set_random_state
from w2sg.training.sharding import Sharded

T = TypeVar("T")


class Devices:
    """The devices of a run. Making one starts the other processes (unless torchrun or SLURM did).

    Every rank walks every stage in step; rank 0 alone takes locks and writes.

    Attributes:
        config: with the precision that this device has in the place of ``auto``.
        notes: what the report has to say of them.

    Raises:
        ConfigError: they do not have the precision that was asked for.
        UserError: SLURM started another number of tasks.
    """

    imagined = False  # of a plan, which one process makes for all of them

    def __init__(self, config: TrainerConfig):
        quiet()
        processes.disband()  # the processes of the sweep's last job
        self.environment = started_by(config.num_nodes)
        self._beside: dist.ProcessGroup | None = None
        try:
            self.fabric = self._fabric(config, "ddp" if config.strategy == "fsdp" else config.strategy)
            if self.fabric.world_size > 1:
                self.fabric = self._fabric(config, Joining(timedelta(minutes=config.timeout_minutes), config.offload))
                self.fabric.strategy.cluster_environment.validate_settings(
                    num_devices=self.fabric.strategy.num_processes, num_nodes=config.num_nodes
                )
        except (ValueError, RuntimeError, KeyError) as error:
            if not any(isinstance(environment, SLURMEnvironment) for environment in self.environment):
                raise
            raise UserError(
                f"trainer: SLURM started {os.environ.get('SLURM_NTASKS')} tasks, and the run asks for "
                f"trainer.devices={config.devices} on trainer.num_nodes={config.num_nodes}; give srun one task for "
                f"each device, --nodes={config.num_nodes} --ntasks-per-node={config.devices}"
            ) from error
        if self.fabric.world_size > 1:
            processes.gather(self.fabric)
            self.fabric.launch()
            self.line = self.fabric.strategy.line
            if not self.main:
                logging.getLogger("w2sg").setLevel(logging.ERROR)  # rank 0 says it
            stops.join(self._peers())
        self.config = self.first(lambda: precision.settled(config, self.fabric.device))
        self.notes = precision.notes(config, self.config, self.fabric.device) if self.main else []
        compute_on(self.fabric.device)
        torch.set_float32_matmul_precision(self.config.matmul)
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)

    def _fabric(self, config: TrainerConfig, strategy: Any) -> Fabric:
        """What starts ranks; it trains nothing."""
        return Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            plugins=self.environment,
        )

    def _peers(self) -> Peers:
        """How ranks tell each other of signals."""
        server, token = Peers.listen() if self.main else (None, b"")
        port, token = self.agree((server.getsockname()[1], token) if self.main else None)
        if server is not None:
            return Peers.accept(server, token, self.world - 1)
        return Peers(self.fabric.strategy.cluster_environment.main_address, port, token)

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
    def parts(self) -> int:
        """Devices over which a large model is cut, where it is."""
        return self.world // (self.config.num_nodes if self.config.shard_over == "node" else 1)

    @property
    def mixed(self) -> bool:
        """Whether matrix products are taken in bf16 while weights that are trained stay fp32."""
        return self.config.precision == precision.MIXED

    @property
    def eval_tokens(self) -> int:
        """Padded tokens per forward when nothing is trained. A CPU is fastest while activations stay in its cache."""
        return self.config.eval_tokens or (2048 if self.fabric.device.type == "cpu" else 65536)

    # Ranks meet on a line, where they wait as long as it takes: see `w2sg.training.line`.

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank: it runs there alone. Where it fails there, all ranks end."""
        return self.line.first(work) if self.world > 1 else work()

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.first(lambda: value)

    def everyone(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        return [told for _, told in sorted(self.line.everyone(value).items())] if self.world > 1 else [value]

    def echoes(self, error: UserError) -> bool:
        """Whether rank 0 ends with the same words as this other rank, which then need not be said again."""
        return self.world > 1 and self.line.echoes(error)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            self.line.everyone()

    @contextlib.contextmanager
    def reading_once(self) -> Iterator[None]:
        """Rank 0 alone reads the models that are loaded in here; all draw the same random numbers afterwards."""
        if self.world == 1:
            yield
            return
        with read_by_one(self.main, self.first, self.world):
            yield
        set_random_state(self.agree(random_state()))

    def group_beside(self) -> dist.ProcessGroup:
        """The ranks as a group of its own, for what a thread of each says to the others beside the main one."""
        if self._beside is None:
            self._beside = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        return self._beside

    def total(self, value: float) -> float:
        """The sum of every rank's value."""
        return sum(map(float, self.everyone(value)))

    def trainer(self, large: bool = False, files: SealedFiles | None = None, **options: Any) -> L.Trainer:
        """A Lightning Trainer on these devices, with nothing on that we did not ask for.

        Args:
            large: the model is worth cutting over the devices, where the configuration says fsdp; a head of a few
                thousand weights is not.
            files: how checkpoints are written.
        """
        config = self.config
        strategy: Any = "auto" if config.strategy == "fsdp" else config.strategy
        if self.world > 1:
            strategy = self._sharded() if self.shards and large else Replicated(self.line)
        trainer = L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision="32-true" if isinstance(strategy, Sharded) else config.precision,  # it rounds weights itself
            inference_mode=not isinstance(strategy, Sharded),  # weights gathered in it could not be used outside
            enable_progress_bar=False,  # w2sg.training.counting tells how far it is
            enable_model_summary=False,
            use_distributed_sampler=False,  # our loaders know their ranks
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # the module decides which steps are points of a curve
            plugins=[*self.environment, *([] if files is None else [files])],
            **options,
        )
        trainer._signal_connector = _NoSignals(trainer)
        # Lightning asks rank 0 before each step whether it has had a SIGTERM: an exchange, and a wait for the device
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        _leave_states(trainer)
        return trainer

    def _sharded(self) -> Sharded:
        return Sharded(self.line, self.world, self.mixed, self.world // self.parts, self.config.offload)


def started_by(nodes: int) -> list[ClusterEnvironment]:
    """Who starts the ranks, where the environment's variables could mislead; none where Lightning may look itself.

    Raises:
        UserError: several machines, and SLURM was not asked to start anything on them.
    """
    if TorchElasticEnvironment.detect():  # inside of a SLURM job, too
        return [TorchElasticEnvironment()]
    if "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return []
    if "SLURM_STEP_NUM_TASKS" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0":
        try:
            return [SLURMEnvironment(auto_requeue=False)]
        except RuntimeError as error:
            os.environ.setdefault("SLURM_NTASKS_PER_NODE", _per_node(error))
            return [SLURMEnvironment(auto_requeue=False)]
    # a script that sbatch runs once: its variables are of the job, and no other task is coming
    if nodes > 1:
        raise UserError(
            f"trainer.num_nodes={nodes}: SLURM has started this process alone; begin the command with srun, so that it "
            "is started on each machine"
        )
    return [LightningEnvironment()]


def _per_node(error: RuntimeError) -> str:
    """Tasks on each machine, which Lightning wants to read from a variable that --ntasks alone does not set."""
    tasks, nodes = (int(os.environ.get(name, "1")) for name in ("SLURM_NTASKS", "SLURM_NNODES"))
    if tasks % nodes:
        raise UserError(f"trainer: SLURM started {tasks} tasks on {nodes} machines; use --ntasks-per-node") from error
    return str(tasks // nodes)


def _leave_states(trainer: L.Trainer) -> None:
    """When a fit ends, Lightning moves weights and optimizer states of every rank to the host; nobody reads states."""
    strategy = trainer.strategy
    usual = strategy.teardown

    def teardown() -> None:
        strategy.optimizers = []
        usual()

    strategy.teardown = teardown


class _NoSignals(_SignalConnector):
    """Lightning's handler of SIGTERM waits for the other ranks inside of the signal; `w2sg.stops` hears them all."""

    def register_signal_handlers(self) -> None:
        """Registers none."""


def quiet() -> None:
    """Keep notices off the terminal that no user of ours can act on; each names where it comes from."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*is_gradient_checkpointing` is deprecated.*",  # peft 0.21 with transformers 5.23
        r".*isinstance\(treespec, LeafSpec\).*",  # lightning 2.6 with torch 2.13
        r"torch\.distributed\.nn\.functional\.all_gather is deprecated.*",  # lightning 2.6 with torch 2.13
        r"FSDP2-wrapped module .* returned a view tensor.*",  # we change none in place
        r".*It is recommended to use `self.log\('held_out_loss'.*",  # it is of all devices
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
