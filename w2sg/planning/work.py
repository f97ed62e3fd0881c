"""What a job would do: its rows and tokens, operations, memory and disk; the job's own inputs say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from w2sg.data.loading import Examples, Features, make_batch
from w2sg.data.rows import epoch_plan, token_plan
from w2sg.losses import needs_whole_batch
from w2sg.memory import RESERVE, Budget, power_of_two
from w2sg.models.footprint import Use, kept
from w2sg.models.mixed import hold_in_bf16
from w2sg.planning.devices import PlanDevices
from w2sg.planning.flops import Shape, Work, shape_of
from w2sg.planning.memory import Peak, held, of_fit, of_reading, of_writing
from w2sg.planning.places import share
from w2sg.training.evaluating import interval
from w2sg.training.foreseen import Foreseen
from w2sg.training.jobs import FitJob, ReadJob
from w2sg.training.sharding import large
from w2sg.training.within_memory import MOST

LOOKED_AT = 400  # batches whose padding is looked at; those of a larger stage are counted from as many, evenly spaced


@dataclass(frozen=True)
class Planned:
    """One stage of a plan.

    Attributes:
        name, key: of its folder in the store. cached: it is there.
        foreseeable: the key is known; that of a stage which hangs on texts that are still to be written is not.
        kind: train | read | write | compute.
        models: the names of its models. parameters, trained: their numbers of weights.
        rows, tokens, padded: of all epochs; None where nothing of the kind is read.
        at_most: whether rows and tokens are bounds, since they hang on what is still to be written.
        flops: floating-point operations. moved: bytes that writing moves through memory, token by token.
        peak: on each device. micro: examples and padded tokens of the largest micro-batch.
        micro_tokens: what a run would choose for want of memory. by_micro: tokens of smaller micro-batches, and bytes
            at their peak.
        disk: bytes in the store.
        notes: what cannot be foreseen, in words.
    """

    name: str
    key: str
    cached: bool = False
    foreseeable: bool = True
    kind: str = "compute"
    models: tuple[str, ...] = ()
    parameters: int = 0
    trained: int = 0
    rows: int | None = None
    tokens: int | None = None
    padded: int | None = None
    at_most: bool = False
    flops: float = 0.0
    moved: float = 0.0
    peak: Peak = field(default_factory=Peak)
    micro: tuple[int, int] = (0, 0)
    micro_tokens: int | None = None
    by_micro: tuple[tuple[int, float], ...] = ()
    disk: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Batches:
    """Batches of a device, of which the largest decides what memory is needed.

    Attributes:
        work: of all, over all devices. largest: padded tokens of the largest forward, examples: in it.
        length: of its rows. asked: tokens whose log-probability it asks for. several: micro-batches of a step.
    """

    work: Work
    largest: int
    examples: int
    length: int
    asked: int
    several: bool


def _batches(examples: Examples, plan: Sequence[np.ndarray], world: int, budget: Budget | None = None) -> _Batches:
    lengths, on_features = examples.inputs.lengths, _on_features(examples)
    looked = np.unique(np.linspace(0, len(plan) - 1, min(len(plan), LOOKED_AT)).astype(int))
    biggest = int(np.argmax([len(rows) * lengths[rows].max(initial=0) for rows in plan]))
    total, seen, several = Work(), 0, False
    top = (-1, 0, 0, 0)
    for place in dict.fromkeys([*looked.tolist(), biggest]):
        batch = make_batch(examples, plan[place], 0, world, budget)
        several |= len(batch.micro) > 1
        work = Work()
        for inputs, rows in zip(batch.micro, batch.parts, strict=True):
            ids, asked = inputs.get("input_ids"), len(inputs["targets"]) if "targets" in inputs else 0
            size, length = (0, 0) if ids is None else (ids.numel(), ids.shape[1])
            count = rows.stop - rows.start
            work += Work(size, size * length, asked, count if on_features else 0)
            top = max(top, (size, count, length, asked))
        if place in looked:
            total, seen = total + work * world, seen + 1
    return _Batches(total * (len(plan) / max(seen, 1)), top[0], top[1], top[2], top[3], several)


def _on_features(examples: Examples) -> bool:
    """Whether rows are frozen states, of which no token is read."""
    return isinstance(getattr(examples.inputs, "inputs", examples.inputs), Features)


def of_fit_job(job: FitJob, devices: PlanDevices, eval_every: int | None) -> dict[str, Any]:
    """What a fit would do, as fields of `Planned`."""
    options, config, offload = job.options, config_of(job.scorer), devices.config.offload
    cut = devices.parts if devices.shards and large(job.scorer) else 1
    if devices.mixed and cut == 1:  # as `Stages.fit` does
        hold_in_bf16(job.scorer, trained=False)
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in job.scorer.modules())
    use = use_of(job.scorer, devices, options.optimizer, checkpointing, job.train)
    longest = [np.argsort(-job.train.inputs.lengths, kind="stable")[: options.batch_size]]

    def hardest(budget: Budget) -> tuple[_Batches, Peak]:
        """The longest batch that any epoch can have, by which a run chooses as well."""
        found = _batches(job.train, longest, devices.world, budget)
        sizes = found.largest, found.length, found.asked, found.several
        return found, of_fit(job.scorer, config, use, *sizes, cut, devices.on_gpu, devices.kind, offload)

    budget = Budget.of_role(job.role, job.micro_tokens, job.micro_batch)
    whole, chosen = hardest(Budget())[0].largest, None
    if devices.memory is not None and config is not None and budget.tokens is None and budget.rows is None:
        tokens = power_of_two(2 * whole - 1)
        while tokens > 1 and not devices.fits(hardest(Budget(tokens))[1].total):
            tokens = power_of_two(tokens - 1)
        if tokens < whole:
            chosen = budget.tokens = tokens
    smaller = []
    for tokens in (65536, 16384, 8192, 4096, 2048, 1024):
        if config is not None and tokens < whole and hardest(Budget(tokens))[0].largest <= tokens:
            smaller.append((tokens, hardest(Budget(tokens))[1].total))

    plan = epoch_plan(job.train.inputs.lengths, options.batch_size, job.seed, 0)
    batches = _batches(job.train, plan, devices.world, budget)
    shape = shape_of(job.scorer, config, checkpointing)
    flops = shape.step(batches.work) * options.epochs
    twice = batches.several and needs_whole_batch(getattr(job.module, "keywords", {}).get("loss"))
    flops += shape.forward(batches.work) * options.epochs * twice
    if job.held_out is not None:
        flops += options.epochs * shape.forward(_reading(job.held_out, devices, job.scorer).work)
    steps = len(plan) * options.epochs
    if job.watched and (every := interval(eval_every, steps)):
        for rows in job.watched.values():
            flops += (steps // every + 2) * shape.forward(_reading(rows, devices, job.scorer).work)
    trained = [p for p in job.scorer.parameters() if p.requires_grad]
    saved = trained if any(not p.requires_grad for p in job.scorer.parameters()) else [*job.scorer.parameters()]
    on_features = _on_features(job.train)
    top, peak = hardest(budget)
    return {
        "kind": "train",
        "parameters": sum(p.numel() for p in job.scorer.parameters()),
        "trained": sum(p.numel() for p in trained),
        "rows": len(job.train),
        "tokens": None if on_features else int(job.train.inputs.useful.sum()) * options.epochs,
        "padded": None if on_features else round(batches.work.tokens * options.epochs),
        "flops": flops,
        "peak": peak,
        "micro": (top.examples, top.largest),
        "micro_tokens": chosen,
        "by_micro": tuple(smaller),
        "disk": float(held(saved)),
    }


def _reading(examples: Examples, devices: PlanDevices, model: nn.Module, rows: int | None = None) -> _Batches:
    """Each row once, as many in a forward as a run would take."""
    tokens: int | None = devices.eval_tokens
    if rows is not None:
        tokens = None
    elif devices.memory is not None and devices.config.eval_tokens is None:
        parts = [m for m in models_of(model) if config_of(m) is not None]
        blocks = [kept(config_of(m), use_of(m, devices, None, False, examples)).block for m in parts]
        free = devices.memory * (1 - RESERVE) - held(model.parameters())
        tokens = MOST if not blocks else min(MOST, power_of_two(max(1.0, free / max(blocks))))
    plan = token_plan(examples.inputs.lengths, tokens, rows, devices.world)
    return _batches(examples, plan, devices.world)


def of_read_job(job: ReadJob, found: Foreseen, devices: PlanDevices, whole: bool) -> dict[str, Any]:
    """What a reading, or a writing, would do, as fields of `Planned`."""
    cut = devices.parts if devices.shards and not whole and large(job.model) else 1
    if devices.mixed and cut == 1:  # as `Stages.read` does
        hold_in_bf16(job.model)
    models = models_of(job.model)
    notes = tuple(share(models, devices))
    configs = [config for model in models if (config := config_of(model)) is not None]
    uses = [use_of(model, devices, None, False, job.examples) for model in models if config_of(model) is not None]
    shapes = [shape_of(model, config_of(model)) for model in models]
    fields: dict[str, Any] = {
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "rows": len(job.examples),
        "disk": float(sum(t.numel() * 4 for t in found.tensors.values())),
        **({"notes": notes} if notes else {}),
    }
    if found.writing is not None:
        return fields | _written(found, job.model, configs, uses, shapes, devices)
    on_features = _on_features(job.examples)
    batches = _reading(job.examples, devices, job.model, job.rows)
    work, largest, length = batches.work, batches.largest, batches.length
    useful = int(job.examples.inputs.useful.sum())
    if not work.tokens and useful and not on_features:  # rows that are looked up by their places
        lengths = job.examples.inputs.lengths
        longest = -np.sort(-lengths)[: (job.rows or 1)]
        work = Work(float(useful), float((lengths.astype(float) ** 2).sum()))
        largest, length = int(longest[0]) * len(longest), int(longest[0])
    return fields | {
        "kind": "read",
        "tokens": None if on_features else useful,
        "padded": None if on_features else round(work.tokens),
        "flops": sum(shape.forward(work) for shape in shapes),
        "peak": of_reading(
            job.model, configs, uses, largest, length, batches.asked, cut, devices.kind, devices.config.offload
        ),
        "micro": (batches.examples, largest),
    }


def _written(
    found: Foreseen,
    modules: nn.Module,
    configs: list[Any],
    uses: list[Use],
    shapes: list[Shape],
    devices: PlanDevices,
) -> dict[str, Any]:
    """Prompts are read and each reply is written token by token, by each model at most."""
    writing = found.writing
    whole = (writing.prompts + writing.replies).astype(float)
    work = Work(float(whole.sum()), float((whole**2).sum()), float(writing.replies.sum()))
    weights, longest, moved = held(modules.parameters()), int(whole.max()), 0.0
    rows = min(writing.rows, len(whole))
    if devices.memory is not None and configs:  # a run takes as many rows as there is room for
        one = of_writing(modules, configs, uses, 1, int(writing.prompts.max()), longest, devices.kind)
        room = (devices.memory * (1 - RESERVE) - one.weights) / max(1.0, one.total - one.weights)
        rows = max(1, min(rows, int(room)))
    order = np.argsort(-writing.prompts, kind="stable")
    for start in range(0, len(order), rows):  # each step reads the weights, for all rows of a batch
        moved += float(writing.replies[order[start : start + rows]].max()) * weights
    return {
        "kind": "write",
        "tokens": int(writing.replies.sum()),
        "padded": int(writing.replies.sum()),
        "at_most": True,
        "flops": sum(shape.forward(work) for shape in shapes),
        "moved": moved,
        "peak": of_writing(modules, configs, uses, rows, int(writing.prompts.max()), longest, devices.kind),
        "micro": (rows, rows * longest),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What a module is
# ---------------------------------------------------------------------------------------------------------------------


def models_of(module: nn.Module) -> list[nn.Module]:
    """The models in a module that may be a list of them."""
    return [m for inner in module for m in models_of(inner)] if isinstance(module, nn.ModuleList) else [module]


def source_of(model: nn.Module) -> nn.Module | None:
    """The transformers model in a scorer or a policy; None of a head or a bag of words."""
    return getattr(model, "plain", None) or getattr(model, "_plain", None)


def config_of(model: nn.Module) -> Any:
    """The configuration of a model's backbone; None where there is none."""
    return getattr(source_of(model), "config", None)


def use_of(
    model: nn.Module, devices: PlanDevices, optimizer: str | None, checkpointing: bool, examples: Examples
) -> Use:
    """How a model is used, for its footprint."""
    plain = source_of(model)
    if plain is None:
        return Use(train=None, optimizer=optimizer or "adamw")
    adapted = plain is not model.model
    lora = next(iter(model.model.peft_config.values())) if adapted else None
    targets = getattr(lora, "target_modules", "all-linear")
    inputs, attention = getattr(examples.inputs, "inputs", examples.inputs), plain.config._attn_implementation
    return Use(
        train=None if optimizer is None else "lora" if adapted else "full",
        precision=devices.config.precision,
        dtype=str(plain.dtype).removeprefix("torch."),
        checkpointing=checkpointing,
        packed=getattr(inputs, "packed", False) and inputs.sizes.shape[1] > 1 and attention in ("sdpa", "eager"),
        attention=attention,
        rank=getattr(lora, "r", 16),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        optimizer=optimizer or "adamw",
    )
