"""A frozen model over the devices of one process: its blocks on several GPUs, in host memory or on disk (accelerate).

What is not a block (embeddings, the last norm, the output layer) stays on one device, the main one, where tokens come
in and logits come out. So whoever reads with the model sees a model on that device.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from w2sg.errors import UserError

log = logging.getLogger(__name__)
Place = int | str  # a GPU's number, cpu or disk
RULES = ("auto", "balanced", "sequential")
_computes: ContextVar[torch.device | None] = ContextVar("computes", default=None)


def compute_on(device: torch.device) -> None:
    """Models that are loaded from now on take tokens, and give logits, on this device."""
    _computes.set(device)


def main_place() -> Place:
    """That device, as a place: a GPU's number, or cpu."""
    device = _computes.get() or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (device.index or 0) if device.type == "cuda" else "cpu"


@dataclass(frozen=True)
class Spread:
    """Where the parts of a model are.

    Attributes:
        places: by names of modules, which together have all weights: the blocks in order, then what is not a block.
        blocks: names of the blocks. main: the place of all else.
        folder: for what is on disk and in no file of the model's; it goes with the model.
    """

    places: dict[str, Place]
    blocks: list[str]
    main: Place
    folder: Any = field(default=None, repr=False)

    @property
    def several(self) -> bool:
        """Whether there is more than one place."""
        return len(set(self.places.values())) > 1 or "disk" in self.places.values()

    @property
    def away(self) -> bool:
        """Whether some weights are not where they are computed with."""
        return bool({"cpu", "disk"} & ({*self.places.values()} - {self.main}))

    def words(self) -> str:
        """How many blocks are where."""
        counts = Counter(self.places[block] for block in self.blocks)
        named = {"cpu": "in host memory", "disk": "on disk"}
        return ", ".join(f"{n} {named.get(str(place), f'on GPU {place}')}" for place, n in counts.items() if n)


def spread(model: nn.Module, wanted: str | dict[str, Place], memory: dict[Place, str] | None, role: str) -> Spread:
    """Where the parts of a model go.

    Args:
        model: a model of transformers, on torch's meta device.
        wanted: a rule of `RULES`, or the places of blocks by their names or what these begin with; others are on the
            main device.
        memory: what each place may hold of the model, as ``{0: 30GiB, cpu: 200GiB}``; None is what is free.

    Raises:
        UserError: a name that is of no block, a place that is not there, or no room.
    """
    blocks, rest = _parts(model)
    key = f"{role}.device_map"
    if not blocks:
        raise UserError(f"{key}: {type(model).__name__} does not say which of its parts are blocks; set it to null")
    if isinstance(wanted, str):
        places = _by_rule(model, wanted, memory, blocks, rest)
        if lost := [name for name in blocks if name not in places]:
            raise UserError(f"{key}: there is no place for {len(lost)} of {len(blocks)} blocks; raise max_memory")
    else:
        places = _as_named(key, wanted, blocks)
    main = main_place()
    found = {**places, **dict.fromkeys(rest, main)}
    folder = tempfile.TemporaryDirectory(prefix="w2sg-offload-") if "disk" in found.values() else None
    return Spread(found, blocks, main, folder)


def blocks_of(model: nn.Module) -> list[str]:
    """Names of a model's blocks, in order."""
    kinds = set(model._no_split_modules or ())
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    return [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]


def _parts(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the blocks in order, and of the outermost modules beside them that have weights or buffers."""
    blocks = blocks_of(model)
    above = {name.rpartition(".")[0] for name in blocks}
    while any(name for name in above if name.rpartition(".")[0] not in above):
        above |= {name.rpartition(".")[0] for name in above}
    rest = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        beside = name and name not in above and name not in blocks and parent in above
        if beside and any(True for _ in (*module.parameters(), *module.buffers())):
            rest.append(name)
    return blocks, rest


def _by_rule(
    model: nn.Module, rule: str, memory: dict[Place, str] | None, blocks: list[str], rest: list[str]
) -> dict[str, Place]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    kinds = model._no_split_modules
    main = main_place()
    limits = get_max_memory(memory)
    if main == "cpu":  # a run on the CPU leaves GPUs alone
        limits = {place: most for place, most in limits.items() if not isinstance(place, int)}
    limits = {main: limits[main], **limits}
    if rule != "sequential":
        limits = get_balanced_memory(model, limits, kinds, low_zero=False)
    # all that is not a block is on the main device, and not where its turn comes
    held = {id(p): p.numel() * p.element_size() for name in rest for p in model.get_submodule(name).parameters()}
    embedded = model.get_input_embeddings().weight
    limits[main] = max(0, limits[main] - sum(held.values()) + embedded.numel() * embedded.element_size())
    found = infer_auto_device_map(model, limits, kinds)
    return {block: place for block in blocks if (place := place_of(found, block)) is not None}


def place_of(places: dict[str, Any], name: str) -> Any:
    """Of a module, by its name or the longest part that it begins with."""
    while name:
        if name in places:
            return places[name]
        name = name.rpartition(".")[0]
    return places.get("")


def _as_named(key: str, wanted: dict[str, Place], blocks: list[str]) -> dict[str, Place]:
    for name in wanted:
        if name and not any(b == name or b.startswith(f"{name}.") for b in blocks):
            raise UserError(
                f"{key}: {name} is no block of the model, nor the beginning of one, as {blocks[0]} is; all else "
                "stays on the device that computes"
            )
    main = main_place()
    count = 0 if main == "cpu" else torch.cuda.device_count()
    for place in wanted.values():
        if isinstance(place, int) and place >= count:
            raise UserError(f"{key}: there is no GPU {place} in this run, which has {count}; name others, cpu or disk")
    return {block: main if (place := place_of(wanted, block)) is None else place for block in blocks}


def dispatch(model: nn.Module, where: Spread) -> None:
    """Move the parts of a model to their places, and have each block fetch what it reads."""
    from accelerate import dispatch_model

    if not hasattr(model, "hf_device_map"):
        skip = getattr(model, "_skip_keys_device_placement", None)
        folder = None if where.folder is None else where.folder.name
        dispatch_model(model, where.places, main_device=where.main, offload_dir=folder, skip_keys=skip)
    keep_in_place(model)
    if where.folder is not None:
        weakref.finalize(model, where.folder.cleanup)


def keep_in_place(model: nn.Module) -> None:
    """Let nobody move the model as a whole: Lightning would bring all of it to one device."""
    model._apply = lambda *_, **__: model


def placed(module: nn.Module) -> list[str]:
    """Where the blocks of models are, of those that are spread, in words for the report."""
    return [part.placed_in_words for part in module.modules() if hasattr(part, "placed_in_words")]


def is_spread(module: nn.Module) -> bool:
    """Whether parts of a model stand on several devices."""
    return any(len(set(getattr(part, "hf_device_map", {}).values())) > 1 for part in module.modules())


def weights_at_hand(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name, each while it is there: of a model that is spread some are on disk otherwise."""
    if not hasattr(model, "hf_device_map"):
        yield from model.named_parameters()
        return
    from accelerate.utils import align_module_device

    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            with align_module_device(module):
                yield from ((f"{name}.{key}", weight) for key, weight in module.named_parameters(recurse=False))


def say_places(model: nn.Module, words: str, where: Spread) -> None:
    """Say where blocks are, and what it costs that some are away."""
    model.placed_in_words = words
    if where.away:
        log.warning("%s; those away from the device that computes go there at every token, which is slow", words)
    else:
        log.info("%s", words)
