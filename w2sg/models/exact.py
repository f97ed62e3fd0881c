"""Computing in fp32 with weights of 16 bits as they are, to ask what a model's code does and not how it rounds.

In bf16 a deep model gives states that differ by a tenth where sums are taken in another order, if its tokens do not
make sense together. That hides whether its cache, or its output layer, is read as it ought to be.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from w2sg.models.attention import is_kernel

log = logging.getLogger(__name__)
T = TypeVar("T")
_aten = torch.ops.aten
_NARROW = {torch.bfloat16, torch.float16}
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
_PLAIN = {_aten.mm.dtype: torch.mm, _aten.bmm.dtype: torch.bmm, _aten.addmm.dtype: torch.addmm}  # results in a dtype


def ordinary(vocabulary: int, count: int) -> np.ndarray:
    """Different ids from all over a vocabulary, without the lowest, which tend to be special."""
    low = min(5, vocabulary - 1)
    return low + np.random.default_rng(0).permutation(max(1, vocabulary - low))[np.arange(count) % (vocabulary - low)]


def can_be_exact(model: nn.Module) -> bool:
    """Whether all that a model computes can be computed in fp32: not by weights in few bits, or kernels for 16 bits."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return not is_kernel(attention or "") and all(p.is_floating_point() and p.itemsize > 1 for p in model.parameters())


@contextlib.contextmanager
def exactly(model: nn.Module) -> Iterator[bool]:
    """What a model computes in here, it computes in fp32, autocast or not; whether that can be done.

    One weight at a time is widened, while it is used.
    """
    if not can_be_exact(model):
        yield False
        return
    away = {name: p.dtype for name, p in model.named_parameters() if p.device.type == "meta"}
    try:
        with contextlib.ExitStack() as stack:
            for kind in {p.device.type for p in model.parameters()} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if any(t.dtype in _NARROW for t in (*model.parameters(), *model.buffers())):
                stack.enter_context(_WideConvolution())
                stack.enter_context(_Wide())
            yield True
    finally:
        for name, dtype in away.items():  # what is read from a disk for each forward was wide, and so is its place
            place = model.get_parameter(name)
            if place.dtype != dtype:
                place.data = place.data.to(dtype)


def asked(model: nn.Module, ask: Callable[[], T]) -> tuple[T, bool]:
    """What is found in fp32, and True; or, where a model cannot be read so, what is found as it is, and False."""
    try:
        with exactly(model) as exact:
            if exact:
                return ask(), True
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        log.debug("%s is not read in fp32: %s", type(model).__name__, error)
    return ask(), False


class _WideConvolution(TorchFunctionMode):
    """Convolutions look at the types of their arguments before any operation is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.conv1d, torch.conv2d):
            args, kwargs = tree_map(_wide, args), tree_map(_wide, kwargs)
        return func(*args, **kwargs)


class _Wide(TorchDispatchMode):
    """Every operation takes and makes fp32 where it would take or make 16 bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.embedding.default:  # the rows that were looked up, not the table
            return _wide(func(*args, **kwargs))
        # a weight on its way to where it is used, and bytes that are said to be one
        if func is _aten.view.dtype or ((func.is_view or func in _MOVES) and args[0].dtype in _NARROW):
            return func(*args, **kwargs)
        args, kwargs = tree_map(_wide, args), tree_map(_wide, kwargs)
        if func in _PLAIN:
            return _PLAIN[func](*(one for one in args if not isinstance(one, torch.dtype)))
        return func(*args, **kwargs)


def _wide(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float32 if x in _NARROW else x
    return x.float() if isinstance(x, Tensor) and x.dtype in _NARROW else x
