"""How the ranks of a run wait for each other and tell each other things, with no collective pending.

A process group gives a collective up after `trainer.timeout_minutes`. That is right for a step of training and wrong
for those who wait until rank 0 has a lock that another run holds, or has done what it does alone. So ranks meet in the
key-value store that their process group was started with: each looks there, and sleeps in between, as long as it takes.
It hears signals meanwhile, and learns that another rank has ended.
"""

from __future__ import annotations

import atexit
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.pytorch import strategies
from torch.distributed.rendezvous import rendezvous

from w2sg import stops
from w2sg.errors import UserError, first_line

T = TypeVar("T")
JOINING = timedelta(hours=3)  # until the last rank of a run has started: it may hash and read data before
SHORT, LONG = 5e-5, 0.2  # seconds between two looks; each is twice the one before
ASIDE, PARTING = 1.0, 5.0  # seconds: for a signal that may be on its way; for the others to have read the last word
SPEAKS = 1 << 20  # counted once for each rank that has something to say; more than there are ranks


class Elsewhere(SystemExit):
    """Another rank has failed, and says why. This one ends with status 1 and without a word."""

    def __init__(self) -> None:
        super().__init__(1)


class Line:
    """One rank's end.

    Every rank calls the same methods in the same order.

    Args:
        store: which all ranks of the run share.
        rank, world: of this process, and how many there are.

    Attributes:
        failed: this rank has told the others that it failed.
    """

    def __init__(self, store: dist.Store, rank: int, world: int):
        self.store, self.rank, self.world = dist.PrefixStore("w2sg", store), rank, world
        self.turn, self.failed = 0, False
        self._alone = False
        self._mine: list[str] = []  # keys of this rank that somebody may still have to read

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank. It runs there alone, and the others wait as long as it takes.

        Raises:
            Elsewhere: on the other ranks, where it failed on rank 0.
        """
        key = self._next("word")
        if self.rank:
            self._until(lambda: self.store.check([key]))
            worked, value = pickle.loads(self.store.get(key))
            if not worked:
                self._lost()
            return value
        self._alone = True
        try:
            value = work()
            word = pickle.dumps((True, value))
        except Exception:
            self.failed = True
            self.store.set(key, pickle.dumps((False, None)))
            raise
        finally:
            self._alone = False
        self.store.set(key, word)
        self._mine.append(key)
        return value

    def _next(self, kind: str) -> str:
        if self._alone:
            raise RuntimeError("rank 0 asks the others to take part in what it does alone, of which they know nothing")
        self.turn += 1
        return f"{kind} {self.turn}"

    def everyone(self, value: Any = None, limit: timedelta | None = None) -> dict[int, Any]:
        """What the ranks have to say, by rank, once every one is here; those that gave None are left out.

        Raises:
            UserError: they are not, after ``limit``.
        """
        key, mine = self._next("all"), list[str]()
        if value is not None:
            mine.append(f"{key} {self.rank}")
            self.store.set(mine[0], pickle.dumps(value))
        if not self.rank:
            mine.append(key)
        count = self.store.add(key, 1 if value is None else SPEAKS + 1)

        def here() -> bool:
            nonlocal count
            if count % SPEAKS < self.world:
                count = self.store.add(key, 0)
            return count % SPEAKS == self.world

        self._until(here, limit)
        found: dict[int, Any] = {}
        if count >= SPEAKS:
            for rank in range(self.world):
                if self.store.check([f"{key} {rank}"]):
                    found[rank] = pickle.loads(self.store.get(f"{key} {rank}"))
        for old in self._mine:  # of earlier turns, which all have left
            self.store.delete_key(old)
        self._mine = mine
        return found

    def _until(self, holds: Callable[[], bool], limit: timedelta | None = None) -> None:
        pause, begun = SHORT, time.monotonic()
        try:
            while not holds():
                if pause > LONG / 10 and (stops.left() or self.store.check(["gone"])) and not holds():
                    break
                if limit is not None and time.monotonic() - begun > limit.total_seconds():
                    raise UserError(
                        f"trainer: not all {self.world} processes of this run have started within "
                        f"{limit.total_seconds() / 3600:g} hours; see what the others say"
                    )
                time.sleep(pause)
                pause = min(2 * pause, LONG)
            else:
                return
        except dist.DistError:  # rank 0, whose store it is, has ended
            pass
        self._lost()

    def _lost(self) -> None:
        """End because another rank has."""
        time.sleep(ASIDE)
        if stops.requested() is not None:
            stops.leave()
        if self.rank:
            raise Elsewhere
        raise UserError(
            "another process of this run has failed (see what it says), so this one ends; finished stages are kept"
        )

    def echoes(self, error: UserError) -> bool:
        """Whether rank 0 ends with the same words as this other rank, which then need not be said again."""
        if not self.rank:
            self.failed = True
            self.store.set("words", str(error))
            return False
        begun = time.monotonic()
        try:
            while time.monotonic() - begun < 2 * ASIDE:
                if self.store.check(["words"]):
                    return self.store.get("words").decode() == str(error)
                time.sleep(LONG / 10)
        except dist.DistError:  # rank 0 has ended
            pass
        return False

    def part(self, wait: bool) -> None:
        """Say that this rank takes part no longer. Rank 0, whose store it may be, stays until the others have too."""
        try:
            self.store.set("gone", "")
            count, begun = self.store.add("parted", 1), time.monotonic()
            while not self.rank and wait and count < self.world and time.monotonic() - begun < PARTING:
                time.sleep(LONG / 10)
                count = self.store.add("parted", 0)
        except RuntimeError:  # rank 0 has ended
            pass


_line: Line | None = None  # of this process's group


def join(
    environment: ClusterEnvironment,
    rank: int,
    world: int,
    device: torch.device,
    timeout: timedelta,
    on_host: bool = False,
) -> Line:
    """Start this process's part of the process group, or find it started by an earlier job.

    Args:
        timeout: of a collective.
        on_host: tensors in host memory are exchanged as well.

    Raises:
        UserError: the others do not come.
    """
    global _line
    if _line is None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        try:
            store, *_ = next(rendezvous("env://", rank, world, timeout=JOINING))
        except dist.DistError as error:
            raise UserError(
                f"trainer: rank {rank} cannot reach rank 0 at {environment.main_address} port "
                f"{environment.main_port}: {first_line(error)}"
            ) from error
        _line = Line(store, rank, world)
        _line.everyone(limit=JOINING)
        if not dist.is_initialized():
            backend = dist.Backend.default_device_backend_map.get(device.type, "gloo")
            if on_host and device.type != "cpu":
                backend = f"cpu:gloo,{device.type}:{backend}"
            group = dist.PrefixStore("group", store)
            card = None if device.type == "cpu" else device
            dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=timeout, device_id=card)
    return _line


@atexit.register
def leave() -> None:
    """Take part no longer in the run's group, if there is one."""
    global _line
    if _line is None:
        return
    line, _line = _line, None
    stopping = stops.ended()
    line.part(wait=not stopping)
    if dist.is_initialized() and "nccl" in dist.get_backend() and not stopping:  # torch warns of one that is left
        dist.destroy_process_group()


def failed() -> bool:
    """Whether this process has told the others that it failed: that they end is its doing."""
    return _line is not None and _line.failed


class Joining(DDPStrategy):
    """Fabric's way to start ranks and join them, with a `Line` between them.

    Args:
        timeout: of a collective. on_host: tensors in host memory are exchanged as well.
    """

    line: Line

    def __init__(self, timeout: timedelta, on_host: bool = False):
        super().__init__(timeout=timeout)
        self.timeout, self.on_host = timeout, on_host

    def _setup_distributed(self) -> None:
        rank, world = self.node_rank * self.num_processes + self.local_rank, self.num_nodes * self.num_processes
        self.line = join(self.cluster_environment, rank, world, self.root_device, self.timeout, self.on_host)
        super()._setup_distributed()  # finds the group, and tells Lightning which rank this is


class OnLine:
    """For Lightning's strategies: ranks wait for each other on a `Line`, while rank 0 writes a checkpoint, say."""

    line: Line

    def barrier(self, *_: Any, **__: Any) -> None:
        self.line.everyone()

    def broadcast(self, obj: T, src: int = 0) -> T:
        return self.line.everyone((obj,) if self.line.rank == src else None)[src][0]


class Replicated(OnLine, strategies.DDPStrategy):
    """The whole model on each device. Gradients are kept once, in the buckets that they are sent in.

    The graph is not declared static: micro-batches differ in number from step to step.
    """

    def __init__(self, line: Line):
        super().__init__(gradient_as_bucket_view=True)
        self.line = line
