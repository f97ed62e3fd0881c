"""Batches for Lightning: what a device reads in one optimizer step, the same global batches on one device or many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor

from w2sg.data.ahead import Ahead
from w2sg.data.rows import ByPlace, Rows, costs_of, epoch_plan, split_by_rank, token_plan
from w2sg.memory import Budget


class Inputs(Protocol):
    """What a model reads, row by row: packed tokens (`Rows`), frozen features (`Features`), prompts with replies."""

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def useful(self) -> np.ndarray: ...

    @property
    def sizes(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]: ...


class Features(ByPlace):
    """Frozen states of a table's texts, in its order: [N, n, D]. They do not differ in cost, and no token is read."""

    def __init__(self, states: Tensor):
        super().__init__(np.ones(len(states)))
        self.states = states

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]:
        """``features``: [b, n, D]."""
        return {"features": self.states[torch.as_tensor(np.asarray(index))]}


@dataclass(frozen=True)
class Examples:
    """Rows to train on or to score.

    Attributes:
        inputs: what the model reads.
        ids: [N] content hashes.
        first: [N] which text of a pair is "first" (0 or 1); zeros for classification.
        targets: [N, C] label logits, first reply first; +-inf for hard labels. None when only scoring.
        gold: [N] gold classes, for selection on gold labels only.
    """

    inputs: Inputs
    ids: list[str]
    first: Tensor
    targets: Tensor | None = None
    gold: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def looked_up(self) -> bool:
        """Whether a batch of them is a few rows of a matrix, so that there is nothing to lay out."""
        inputs = self.inputs
        while isinstance(inputs, _Subset):
            inputs = inputs.inputs
        return isinstance(inputs, ByPlace)

    def take(self, index: np.ndarray) -> Examples:
        return Examples(
            _Subset(self.inputs, index),
            [self.ids[i] for i in index],
            self.first[index],
            None if self.targets is None else self.targets[index],
            None if self.gold is None else self.gold[index],
        )


@dataclass(frozen=True)
class _Subset:
    inputs: Inputs
    index: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.inputs.lengths[self.index]

    @cached_property
    def useful(self) -> np.ndarray:
        return self.inputs.useful[self.index]

    @cached_property
    def sizes(self) -> np.ndarray:
        return self.inputs.sizes[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]:
        return self.inputs.collate(self.index[np.asarray(index)])


@dataclass
class Batch:
    """This device's part of one global batch, cut into micro-batches that go through one forward each.

    ``first``, ``targets`` and ``weight`` are in the order of the concatenated micro-batches.

    Attributes:
        micro: inputs of each forward.
        weight: [b] 1, or 0 for a row repeated to give every device the same number.
        total: examples in the global batch.
        real: how many rows are this device's own; they come first.
        sizes: [n] tokens of the first, second, ... texts of all examples of the global batch.
        useful, padded: tokens that had to be read, and tokens with the filling, on this device.
        costs: [b] tokens of each row, once padded: the longest of those at its place on all devices, so that all of
            them cut alike.
        collate: rows as one micro-batch, in host memory; for those that do not fit into memory together.
    """

    micro: list[dict[str, Tensor]]
    ids: list[str]
    index: Tensor
    first: Tensor
    weight: Tensor
    total: int
    real: int
    sizes: list[int]
    useful: int
    padded: int
    targets: Tensor | None = None
    gold: Tensor | None = None
    costs: np.ndarray | None = None
    collate: Callable[[slice], dict[str, Tensor]] | None = None

    @property
    def parts(self) -> list[slice]:
        """The rows of each micro-batch."""
        # a text may have a row of its own, so a micro-batch's examples are counted by what each has one of
        keys = ("features", "ends", "sizes", "row")
        sizes = (len(next(m[key] for key in keys if key in m)) for m in self.micro)
        return list(itertools.starmap(slice, itertools.pairwise(itertools.accumulate(sizes, initial=0))))

    def cut(self, budget: Budget) -> Batch:
        """The same rows in micro-batches that a budget allows, on the device where this batch is."""
        device = self.index.device
        micro = [self.collate(rows) for rows in budget.cut(self.costs)]
        micro = [{k: v.to(device) for k, v in m.items()} for m in micro]
        return replace(self, micro=micro, padded=_padded(micro))

    def to(self, device: torch.device) -> Batch:
        """On a device; nothing waits for the copy of what is `pinned`."""
        waits = torch.device(device).type != "cuda"
        return self._each(lambda x: x.to(device, non_blocking=not waits))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, act: Callable[[Tensor], Tensor]) -> Batch:
        micro = [{k: act(v) for k, v in m.items()} for m in self.micro]
        tensors = {k: getattr(self, k) for k in ("index", "first", "weight", "targets", "gold")}
        done = {k: None if v is None else act(v) for k, v in tensors.items()}
        return replace(self, micro=micro, **done)


def _padded(micro: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(m["input_ids"].numel() for m in micro if "input_ids" in m)


def make_batch(examples: Examples, rows: np.ndarray, rank: int, world: int, budget: Budget | None = None) -> Batch:
    """Collate this device's rows of the global batch ``rows``, in micro-batches that the budget allows."""
    mine, weight = split_by_rank(rows, rank, world)
    costs = costs_of(examples.inputs.lengths, rows, world)

    def collate(part: slice) -> dict[str, Tensor]:
        return examples.inputs.collate(mine[part])

    micro = [collate(part) for part in (budget or Budget()).cut(costs)]
    return Batch(
        micro,
        [examples.ids[i] for i in mine],
        torch.from_numpy(mine),
        examples.first[mine],
        torch.from_numpy(weight),
        len(rows),
        len(range(rank, len(rows), world)),
        examples.inputs.sizes[rows].sum(0).tolist(),
        int(examples.inputs.useful[mine][weight > 0].sum()),
        _padded(micro),
        None if examples.targets is None else examples.targets[mine],
        None if examples.gold is None else examples.gold[mine],
        costs,
        collate,
    )


@dataclass
class Loader:
    """Epochs of batches, one per iteration, that can begin in the middle of one.

    Batches are made beside the steps (`w2sg.data.ahead`), save where making one is a look-up and no GPU waits for it.

    Attributes:
        plan: epoch -> global batches, the same number in every epoch.
        budget: what goes through the model at once, and may become less while batches are given out.
        given: batches given out since the beginning, which is what says where we are.
        gpu: the one that batches are pinned for; None for another device.
    """

    examples: Examples
    plan: Callable[[int], list[np.ndarray]]
    budget: Budget = field(default_factory=Budget)
    rank: int = 0
    world: int = 1
    given: int = 0
    gpu: torch.device | None = None
    ahead: Ahead[Batch] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.plan(0))

    def __iter__(self) -> Iterator[Batch]:
        epoch, position = divmod(self.given, len(self))
        places = self.plan(epoch)[position:]
        batches: Any = map(self._make, places)
        if self.gpu is not None or not self.examples.looked_up:
            batches = self.ahead = Ahead(self._make, places)
        for batch in batches:
            self.given += 1
            yield batch

    def _make(self, rows: np.ndarray) -> Batch:
        batch = make_batch(self.examples, rows, self.rank, self.world, self.budget)
        if self.gpu is None:
            return batch
        with torch.cuda.device(self.gpu):  # a thread begins on the first one
            return batch.pinned()

    def close(self) -> None:
        """End what is at work beside the steps, in the middle of an epoch."""
        if self.ahead is not None:
            self.ahead.close()


class StageData(L.LightningDataModule):
    """The data of one stage.

    Args:
        train: rows to train on, or None.
        held_out: rows for early stopping and model selection, or None.
        score: rows to score, or None.
        batch_size: examples per optimizer step over all devices. budget: of each device's forwards in a step.
        eval_tokens: padded tokens per forward when scoring, or what says so once the model is on its device.
        eval_rows: rows per forward and device when scoring; None goes by tokens alone.
        seed: of the batch order.
        watched: rows that the model is measured on during training, by name.
        together: all devices read the same rows, each with its part of a model.
    """

    def __init__(
        self,
        train: Examples | None = None,
        held_out: Examples | None = None,
        score: Examples | None = None,
        batch_size: int = 32,
        budget: Budget | None = None,
        eval_tokens: int | Callable[[], int | None] = 16384,
        seed: int = 0,
        eval_rows: int | None = None,
        watched: Mapping[str, Examples] | None = None,
        together: bool = False,
    ):
        super().__init__()
        self.together = together
        self.train, self.held_out, self.score = train, held_out, score
        self.batch_size, self.budget = batch_size, budget or Budget()
        self.eval_tokens, self.eval_rows, self.seed = eval_tokens, eval_rows, seed
        self.watched = dict(watched or {})
        self._loaders: list[Loader] = []

    def _loader(self, *given: Any, **more: Any) -> Loader:
        """A loader of this device, which ends with the stage."""
        device = self.trainer.strategy.root_device
        ranks = {} if self.together else {"rank": self.trainer.global_rank, "world": self.trainer.world_size}
        loader = Loader(*given, **ranks, **more, gpu=device if device.type == "cuda" else None)
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        """When the stage is done."""
        while self._loaders:
            self._loaders.pop().close()

    def on_exception(self, exception: BaseException) -> None:
        """When it is not going to be."""
        self.teardown("")

    def train_dataloader(self) -> Loader:
        lengths, memory = self.train.inputs.lengths, {}

        def plan(epoch: int) -> list[np.ndarray]:
            if epoch not in memory:
                memory.clear()
                memory[epoch] = epoch_plan(lengths, self.batch_size, self.seed, epoch)
            return memory[epoch]

        # A step is a batch, so the steps of a restored checkpoint say where to go on.
        return self._loader(self.train, plan, self.budget, given=self.trainer.global_step)

    def longest(self) -> Batch:
        """The longest batch that any epoch can have, as one micro-batch."""
        rows = np.argsort(-self.train.inputs.lengths, kind="stable")[: self.batch_size]
        return make_batch(self.train, rows, self.trainer.global_rank, self.trainer.world_size)

    def reading(self, examples: Examples) -> Loader:
        """Each row once, in batches for forwards without a gradient."""
        # A batch is shared out between the devices, so it may hold that many times the tokens of one forward.
        tokens = self.eval_tokens() if callable(self.eval_tokens) else self.eval_tokens
        world = 1 if self.together else self.trainer.world_size
        batches = token_plan(examples.inputs.lengths, tokens, self.eval_rows, world)
        return self._loader(examples, lambda _: batches)

    def val_dataloader(self) -> Loader | list:
        return self.reading(self.held_out) if self.held_out is not None else []

    def predict_dataloader(self) -> Loader:
        return self.reading(self.score)


__all__ = ["Batch", "Examples", "Features", "Inputs", "Loader", "Rows", "StageData", "make_batch"]
