"""Weights that one rank has read (`w2sg.models.once`) go to the others: whole to each, or cut over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def send(
    model: nn.Module, device: torch.device, cut: Callable[[], None] | None = None, at: torch.device | None = None
) -> None:
    """Give a model its weights, whether this rank has them, or rank 0 has and this one does not.

    At no time is more than one tensor whole on a rank that has not read them.

    Args:
        device: that computes.
        cut: shards the model, which has no weights when it is called.
        at: where parts of sharded weights are to stay, if not on that device.
    """
    kept = _lifted(model)
    described = _agreed(_described(model, kept)) if dist.is_initialized() else _described(model, kept)
    _be_as(model, described)
    if cut is not None:
        cut()
        model.to_empty(device=at or device)  # which keeps sharded weights tied
    _replaced(model, lambda tensor: torch.empty_like(tensor, device=device))
    places = dict(_tensors(model))
    with torch.no_grad():
        for name, shape, dtype, _ in described["tensors"]:
            _fill(places[name], kept.get(name), torch.Size(shape), dtype)


def part_of(full: Tensor, like: DTensor) -> DTensor:
    """This rank's part of a tensor that rank 0 has whole, cut as another one is and on its device."""
    mesh = like.device_mesh
    cut = distribute_tensor(full.to(mesh.device_type), mesh, like.placements)
    if cut.device == like.device:
        return cut
    local = cut.to_local().to(like.device)
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers by name, what is tied once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _lifted(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers that a model had, which has none after this. What was tied is tied still."""
    kept = {name: tensor.detach() for name, tensor in _tensors(model) if not tensor.is_meta}
    _replaced(model, lambda tensor: tensor.to("meta"))
    return kept


def _replaced(model: nn.Module, by: Callable[[Tensor], Tensor]) -> None:
    """Put other tensors in the places of all that are not sharded; `nn.Module.to` would untie those that are tied."""
    others: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in others:
                    other, parameter = by(tensor.detach()), isinstance(tensor, nn.Parameter)
                    others[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if parameter else other
                tensors[name] = others[id(tensor)]


def _described(model: nn.Module, kept: dict[str, Tensor]) -> dict[str, Any]:
    """All of a model but its weights: their shapes, and what stands in plain attributes of its modules."""
    plain = {
        (place, name): value
        for place, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return {
        "tensors": [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in _tensors(model)],
        "plain": plain if kept else {},
    }


def _agreed(described: dict[str, Any]) -> dict[str, Any]:
    box = [described]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _be_as(model: nn.Module, described: dict[str, Any]) -> None:
    """Have the dtypes of the model that was read; which weights are trained must be the same anyway.

    Raises:
        RuntimeError: it is another model.
    """
    ours = {name: tensor for name, tensor in _tensors(model)}
    theirs = {name: rest for name, *rest in described["tensors"]}
    if {n: (tuple(t.shape), t.requires_grad) for n, t in ours.items()} != {
        n: (shape, grad) for n, (shape, _, grad) in theirs.items()
    }:
        other = sorted(ours.keys() ^ theirs.keys()) or sorted(
            n for n, t in ours.items() if [tuple(t.shape), t.requires_grad] != [theirs[n][0], theirs[n][2]]
        )
        raise RuntimeError(f"rank 0 has read another model than this rank has built; they differ in {other[:3]}")
    with torch.no_grad():
        for name, tensor in ours.items():
            if tensor.dtype != theirs[name][1]:
                tensor.data = tensor.data.to(theirs[name][1])
    modules = dict(model.named_modules())
    for (place, name), value in described["plain"].items():
        setattr(modules[place], name, value)


def _fill(place: Tensor, full: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> None:
    """Copy a tensor of rank 0 into the place that it has on this rank."""
    alone = not dist.is_initialized()
    device = place.device_mesh.device_type if isinstance(place, DTensor) else place.device
    reads = alone or dist.get_rank() == 0
    full = full.to(device) if reads else torch.empty(shape, dtype=dtype, device=device)
    if isinstance(place, DTensor):
        place.to_local().copy_(part_of(full, place).to_local())
        return
    if not alone:
        full = full.contiguous()
        dist.broadcast(full, 0)
    place.copy_(full)
