"""How much goes through a model at once: chosen from the memory that is free, and halved where that runs out.

Steps, readings and replies share this. Rows that are read in smaller parts give the same numbers, so nothing but time
hangs on it.

Shapes: b rows of a batch on one device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from w2sg.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

RESERVE = 0.1  # of what is free: for kernels' workspaces, and for what the allocator cannot use
# how torch says it, where it has no class for it: of a CPU, and of Apple's GPUs
_WORDS = ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory", "MPS backend out of memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):  # the same class as torch.cuda.OutOfMemoryError
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def free_bytes(device: torch.device) -> int | None:
    """What a device has left, with what torch holds and does not use, less a reserve; None for a CPU, which swaps."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((torch.cuda.mem_get_info(device)[0] + unused) * (1 - RESERVE))


def release(device: torch.device) -> None:
    """Give back what torch holds and does not use: pieces of it may be too small for anything else."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def power_of_two(number: float) -> int:
    """The largest one that is no more than a number, at least 1.

    >>> [power_of_two(x) for x in (0, 1, 5.5, 8)]
    [1, 1, 4, 8]
    """
    return 1 << max(0, int(number).bit_length() - 1)


@dataclass
class Budget:
    """Padded tokens that go through a model at once on this device.

    Attributes:
        tokens: at most so many, or a single row; None for no limit.
        rows: at most so many rows; None for no limit.
        option: the option that sets ``tokens``. smaller: what to do where a single row does not fit.
        alone: whether this device may cut smaller by itself. Devices that hold a model together all read in step.
    """

    tokens: int | None = None
    rows: int | None = None
    option: str = "trainer.tokens_per_eval_batch"
    smaller: str = "lower max_length"
    alone: bool = True

    @classmethod
    def of_role(cls, role: str, tokens: int | None = None, rows: int | None = None) -> Budget:
        """Of a model that is trained."""
        smaller = f"lower {role}.max_length, or set {role}.gradient_checkpointing=true or {role}.tune=lora"
        return cls(tokens, rows, f"{role}.micro_tokens", smaller)

    @classmethod
    def of_replies(cls) -> Budget:
        """Of prompts that replies are written to."""
        return cls(option="", smaller="lower max_new_tokens, or fewer candidates for each prompt")

    def cut(self, costs: np.ndarray, within: slice | None = None) -> list[slice]:
        """Runs of rows that go through the model together; see `cut`."""
        return cut(costs, self.tokens, self.rows, within)

    def exceeded(self, tokens: int, rows: int) -> None:
        """Memory ran out at so many padded tokens in so many rows: allow half as many, and say so.

        Raises:
            UserError: it was a single row, or devices read in step.
        """
        if rows <= 1:
            raise UserError(f"a single row of {tokens} tokens does not fit into memory: {self.smaller}")
        self.tokens = power_of_two(tokens - 1)
        if not self.alone:
            raise UserError(
                f"{tokens} tokens at once do not fit into memory, and devices that hold a model together cannot cut "
                f"smaller one by one; set {self.option}={self.tokens}"
            )
        hint = f" ({self.option}={self.tokens} begins so)" if self.option else ""
        line = "memory ran out at %d tokens at once; going on with at most %d, which changes no result%s"
        log.warning(line, tokens, self.tokens, hint)


def cut(costs: np.ndarray, tokens: int | None = None, rows: int | None = None, within: slice | None = None) -> list:
    """Neighbouring rows that go through a model together, each run at most so many tokens, once padded, and rows.

    Args:
        costs: [b] tokens of each row; a run is padded to its longest. within: of these rows alone.

    Returns:
        Slices; a row that is longer than ``tokens`` stands alone.

    >>> cut(np.array([5, 4, 4, 1]), tokens=10)
    [slice(0, 2, None), slice(2, 4, None)]
    >>> cut(np.array([5, 4, 4, 1]), rows=3)
    [slice(0, 3, None), slice(3, 4, None)]
    """
    begin, stop = (0, len(costs)) if within is None else (within.start, within.stop)
    if tokens is None:
        size = rows or max(1, stop - begin)
        return [slice(start, min(start + size, stop)) for start in range(begin, stop, size)]
    runs: list[slice] = []
    while begin < stop:
        end, longest = begin + 1, int(costs[begin])
        while end < stop and (rows is None or end - begin < rows):
            longest = max(longest, int(costs[end]))
            if longest * (end + 1 - begin) > tokens:
                break
            end += 1
        runs.append(slice(begin, end))
        begin = end
    return runs


def padded(costs: np.ndarray, run: slice) -> int:
    """Tokens of a run of rows, once padded."""
    return int(costs[run].max()) * (run.stop - run.start)


def in_parts(
    budget: Budget,
    costs: np.ndarray,
    read: Callable[[slice], T],
    device: torch.device,
    parts: Sequence[slice] | None = None,
) -> list[T]:
    """What ``read(rows)`` finds of all rows, a run of them at a time. Where memory runs out, those rows are read again
    in smaller runs, and so are all that follow; what was found before is kept.

    Args:
        costs: [b] tokens of each row.
        parts: the runs to begin with; default is what the budget allows.

    Raises:
        UserError: a single row does not fit.
    """
    found: list[T] = []
    todo = list(budget.cut(costs) if parts is None else parts)
    while todo:
        run = todo[0]
        size, tokens = run.stop - run.start, padded(costs, run)
        if size > 1 and budget.tokens is not None and tokens > budget.tokens:
            todo[:1] = budget.cut(costs, run)
            continue
        done = False
        try:
            found.append(read(run))
            done = True
        except RuntimeError as error:
            if not ran_out(error):
                raise
        # here the error is gone, and with it the frames that hold what was computed
        if done:
            todo.pop(0)
        else:
            budget.exceeded(tokens, size)
            release(device)
    return found
