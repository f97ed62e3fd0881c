"""Fits and readings that stay within memory: the longest batch is tried before the first step, and what ran out of
memory is done again, cut smaller. The result is the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from w2sg.data.loading import Batch
from w2sg.errors import UserError
from w2sg.memory import Budget, free_bytes, in_parts, padded, power_of_two, ran_out, release
from w2sg.models import footprint
from w2sg.progress import part as micro_batch_begins
from w2sg.training.random_state import random_state, set_random_state
from w2sg.training.sharding import Sharded

log = logging.getLogger(__name__)
T = TypeVar("T")
MOST = 65536  # tokens of a forward: more make a GPU no quicker


def read_batch(budget: Budget, batch: Batch, read: Callable[[dict[str, Tensor], slice], T]) -> list[T]:
    """What ``read(inputs, rows)`` finds of the rows of a batch, in as many parts as memory asks for."""
    ready = {(rows.start, rows.stop): inputs for rows, inputs in zip(batch.parts, batch.micro, strict=True)}

    def one(rows: slice) -> T:
        inputs = ready.pop((rows.start, rows.stop), None)
        if inputs is None:
            inputs = {k: v.to(batch.index.device) for k, v in batch.collate(rows).items()}
        return read(inputs, rows)

    return in_parts(budget, batch.costs, one, batch.index.device, batch.parts)


class WithinMemory(L.LightningModule):
    """The part of a fit that has to do with memory. The whole has a ``scorer``, ``options`` and `backward_pass`.

    Args:
        budget: of a step. What is read between steps has another, ``reads``.
    """

    scorer: nn.Module
    options: Any

    def __init__(self, budget: Budget):
        super().__init__()
        self.budget, self.reads = budget, Budget()
        self._last = self._exchanging = self._tried = False
        self._everyone: list[Tensor] | None = None  # by this step from all devices, which a step done again needs anew

    def backward_pass(self, batch: Batch, parts: tuple[Tensor, ...], progress: float) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def on_fit_start(self) -> None:
        self.budget.alone = self.reads.alone = not isinstance(self.trainer.strategy, Sharded)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # from here on other devices wait for this one's gradients, or have some of them
        self._exchanging = self._last and self.trainer.world_size > 1
        super().manual_backward(loss, *args, **kwargs)

    def backward_within_memory(self, batch: Batch, progress: float) -> tuple[Batch, Tensor, Any]:
        """`backward_pass`, done again from the start and cut smaller where memory runs out.

        Returns:
            The batch as it was cut, and what `backward_pass` gives.

        Raises:
            UserError: a single row does not fit, or devices were exchanging gradients.
        """
        if not self._tried:
            self._tried = True
            data = getattr(self.trainer, "datamodule", None)  # none where only batches were given
            if self.budget.tokens is None and self.budget.rows is None and data is not None and has_limit(self.device):
                self._choose_tokens(data.longest().to(self.device))
        # it may have been cut before less was allowed
        if self.budget.tokens is not None and len(self.budget.cut(batch.costs)) > len(batch.parts):
            batch = batch.cut(self.budget)
        state, self._everyone = random_state(), None
        while True:
            self._exchanging = False
            parts = torch.arange(len(batch.ids), device=self.device).split([p.stop - p.start for p in batch.parts])
            try:
                return batch, *self.backward_pass(batch, parts, progress)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            # the error is gone, and with it the frames that hold activations
            runs = [run for run in batch.parts if run.stop - run.start > 1] or batch.parts
            worst = max(runs, key=lambda run: padded(batch.costs, run))
            if self._exchanging:
                raise UserError(
                    "memory ran out while devices exchanged gradients, where a step cannot be done again; set "
                    f"{self.budget.option}={power_of_two(padded(batch.costs, worst) - 1)}"
                )
            self.budget.exceeded(padded(batch.costs, worst), worst.stop - worst.start)
            self.zero_grad(set_to_none=True)
            set_random_state(state)
            release(self.device)
            batch = batch.cut(self.budget)

    def _synchronised(self, place: int, of: int) -> contextlib.AbstractContextManager[Any]:
        """Devices exchange gradients once per step, at the last micro-batch. ``place``: of this one among so many."""
        micro_batch_begins(place / of)
        self._last = place == of - 1
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return contextlib.nullcontext() if self._last or block is None else block()

    # -- before the first step ----------------------------------------------------------------------------------------

    def _choose_tokens(self, batch: Batch) -> None:
        """Try the longest batch that there is, and half as many tokens at once until it fits; nothing is learned."""
        state = random_state()
        whole = padded(batch.costs, slice(0, len(batch.costs)))
        with self._states_to_come():
            if self.budget.alone:
                tokens = self._tried_down(batch, power_of_two(2 * whole - 1))
            else:
                tokens = self._measured(batch)
        self.zero_grad(set_to_none=True)
        set_random_state(state)
        release(self.device)
        if self.trainer.world_size > 1:
            least = torch.tensor(tokens, device=self.device)
            tokens = int(self.trainer.strategy.reduce(least, reduce_op="min"))
        if tokens < whole:
            self.budget.tokens = tokens
            log.info("the longest batch has %d tokens; at most %d go through the model at once", whole, tokens)

    def _tried_down(self, batch: Batch, tokens: int) -> int:
        """The largest power of two, from this one down, that fits. No device waits for another."""
        while True:
            runs = Budget(tokens).cut(batch.costs)
            # gradients are there from the second micro-batch on
            if self._fits(batch, runs[0], min(2, len(runs))):
                return tokens
            size = runs[0].stop - runs[0].start
            if size == 1:
                self.budget.exceeded(padded(batch.costs, runs[0]), 1)
            tokens = power_of_two(min(tokens, padded(batch.costs, runs[0])) - 1)
            self.zero_grad(set_to_none=True)
            release(self.device)

    def _measured(self, batch: Batch) -> int:
        """The power of two that fits, by what one row and two take: where a device ran out the others would wait."""
        runs = [slice(0, rows) for rows in (1, min(2, len(batch.costs)))]
        peaks, tokens = [self._peak(batch, run) for run in runs], [padded(batch.costs, run) for run in runs]
        each = max(1.0, (peaks[1] - peaks[0]) / (tokens[1] - tokens[0])) if len(batch.costs) > 1 else peaks[0]
        room = free_bytes(self.device) - (peaks[0] - each * tokens[0])  # less what does not grow with the tokens
        return max(tokens[0], power_of_two(room / each))

    def _peak(self, batch: Batch, rows: slice) -> int:
        """Bytes that a step over these rows takes at its peak, gradients included."""
        self.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        if not self._fits(batch, rows, 1):
            self.budget.exceeded(padded(batch.costs, rows), rows.stop - rows.start)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _fits(self, batch: Batch, rows: slice, times: int) -> bool:
        """Whether a forward and a backward of these rows find memory; gradients stay on this device."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        self._last = False
        try:
            for _ in range(times):
                inputs = {k: v.to(self.device) for k, v in batch.collate(rows).items()}
                loss = self.scorer(inputs).float().sum()
                with contextlib.nullcontext() if block is None else block():
                    self.manual_backward(loss)
            return True
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return False

    @contextlib.contextmanager
    def _states_to_come(self) -> Iterator[None]:
        """Room is taken for what the optimizer will hold from its first step on.

        Raises:
            UserError: there is none.
        """
        optimizer, size = self.optimizers(), 0
        if not optimizer.state:
            mine = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters() if p.requires_grad]
            size = sum(p.nbytes for p in mine if p.device == self.device)  # others stay in host memory
            size = size * footprint.STATES.get(self.options.optimizer, 8) // 4
        room = None
        try:
            room = torch.empty(size, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            if not ran_out(error):
                raise
        if room is None:
            raise UserError(
                f"the states of the optimizer ({size / 2**30:.1f} GiB) do not fit into memory beside the weights: "
                f"train fewer weights ({self.budget.option.partition('.')[0]}.tune=lora), or cut the model over more "
                "devices (trainer=fsdp)"
            )
        yield
        del room


def has_limit(device: torch.device) -> bool:
    """Whether memory of a device ends sooner than patience does: on a GPU, which has no disk to go on on."""
    return device.type == "cuda"


def tokens_at_once(
    devices: Any, model: nn.Module, rows: int | None = None, written: int | None = None, longest: int = 1
) -> int | None:
    """Padded tokens that each device reads at once, the same on all; asked once the model is where it works.

    Args:
        devices: a `w2sg.training.devices.Devices`.
        rows: that are read at once; None goes by tokens alone. written, longest: as in `room_to_write`.
    """
    device = devices.fabric.device
    if rows is not None:
        room = None if written is None else room_to_write(model, device, int(longest), written, devices.mixed)
    else:
        room = devices.config.eval_tokens or room_to_read(model, device, devices.mixed) or devices.eval_tokens
    return min(devices.everyone(room)) if room is not None and has_limit(device) else room


def least_of(devices: Any, budget: Budget, stage: str) -> dict[str, int]:
    """The fewest tokens that any device kept to, for what the store notes of a stage; rank 0 speaks for the others."""
    tokens = [each for each in devices.everyone(budget.tokens) if each is not None]
    if not tokens:
        return {}
    if budget.tokens != min(tokens) and devices.main:
        log.warning("%s: another device ran out of memory, and went on with %d tokens at once", stage, min(tokens))
    return {"micro_tokens": min(tokens)}


def room_to_read(model: nn.Module, device: torch.device, mixed: bool = False) -> int | None:
    """Padded tokens that a model may read at once in what its device has left; None for a device without a limit.

    Args:
        mixed: in mixed precision, where products and what they give are in bf16.
    """
    free = free_bytes(device)
    if free is None:
        return None
    each = max((_block(part, mixed) for part in backbones(model)), default=0.0)
    return MOST if not each else min(MOST, power_of_two(free / each))


def room_to_write(
    model: nn.Module, device: torch.device, longest: int, written: int, mixed: bool = False
) -> int | None:
    """Tokens of prompts and replies for whose keys and values a device has room beside all models that take part.

    Args:
        longest: tokens of the longest prompt with its reply. written: replies in the making for each prompt.
    """
    free = free_bytes(device)
    if free is None:
        return None
    held = 0.0
    for part in backbones(model):
        dtype = "bfloat16" if mixed or part.dtype != torch.float32 else "float32"
        held += _counted(part, lambda dtype=dtype, part=part: footprint.cache_bytes(part.config, longest, dtype))
    # a cache that grows moves into buffers with half as much room again
    each = 1.5 * written * held / longest + max((_block(part, mixed) for part in backbones(model)), default=0.0)
    return max(1, int(free / each)) if each else None


def _block(part: Any, mixed: bool) -> float:
    """Bytes of a token in one block, which is about what a forward without gradients has in hand."""
    use = footprint.Use(None, "bf16-mixed" if mixed else "32-true", str(part.dtype).removeprefix("torch."))
    return _counted(part, lambda: footprint.kept(part.config, use).block)


def _counted(part: Any, count: Callable[[], float]) -> float:
    try:
        return count()
    except Exception:  # code of a model's own may need more than a configuration; then it shows when memory runs out
        log.info("%s: what it takes in memory is not known", type(part).__name__, exc_info=True)
        return 0.0


def backbones(model: nn.Module) -> list[Any]:
    """The models of transformers in a module, each as a whole."""
    from transformers import PreTrainedModel

    found: list[Any] = []
    for part in model.modules():  # from the outside in
        if isinstance(part, PreTrainedModel) and not any(part in set(whole.modules()) for whole in found):
            found.append(part)
    return found
