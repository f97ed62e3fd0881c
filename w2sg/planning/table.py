"""A plan in lines of at most 80 columns, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from w2sg.config.gpus import GIB, GPUS, Gpu
from w2sg.planning.walk import Plan
from w2sg.planning.work import Planned
from w2sg.training.cpu_speed import bf16_speedup

READING = 0.6  # of the memory's bandwidth, which is what bounds writing token by token
MOST = 44  # stages of a table
SMALL = 0.05 * GIB  # of heads and bags of words nobody has to know whether they fit


class Machine:
    """The devices of a plan, with their rates.

    Attributes:
        devices: of the plan. gpu: its rates, and rate: of products, TFLOP/s; None where it has no name in the table.
    """

    def __init__(self, plan: Plan):
        self.devices, trainer = plan.devices, plan.config.trainer
        self.gpu: Gpu | None = GPUS.get(plan.config.plan.gpu or "")
        self.utilisation = plan.config.plan.utilisation
        kind = "bf16" if trainer.precision == "bf16-mixed" else "tf32" if trainer.matmul == "high" else "fp32"
        self.rate = None if self.gpu is None else getattr(self.gpu, kind)
        self.kind = {"bf16": "bf16-mixed", "tf32": "fp32 with TF32 products", "fp32": "fp32"}[kind]

    def hours(self, stage: Planned) -> float | None:
        """How long a stage takes; None where nothing is known of the device."""
        if self.rate is None or stage.cached:
            return None
        computing = stage.flops / (self.rate * 1e12 * self.utilisation)
        moving = stage.moved / (self.gpu.bandwidth * 1e12 * READING)
        return max(computing, moving) / self.devices.world / 3600

    def fits(self, total: float) -> str:
        if self.devices.memory is None:
            return "-"
        return "yes" if self.devices.fits(total) else "NO"

    def lines(self) -> Iterator[str]:
        """What the numbers are for."""
        devices, memory = self.devices, self.devices.memory
        name = f"{devices.world} x {devices.name}" if devices.world > 1 else devices.name
        yield f"for {name}{'' if memory is None else f' ({memory / GIB:.1f} GiB each)'}, {self.kind}"
        if self.rate is not None:
            yield f"time: products at {self.utilisation:.0%} of {self.rate:g} TFLOP/s (plan.utilisation),"
            yield f"writing at {READING:.0%} of the memory's {self.gpu.bandwidth:g} TB/s at most"
        else:
            yield "time, and whether it fits, is told for a named GPU: plan.gpu=" + "|".join(GPUS)
        if not devices.on_gpu:
            speed = bf16_speedup()
            faster = f"bf16 is {speed:.1f} times as fast" if speed > 1 else f"fp32 is {1 / speed:.1f} times as fast"
            yield f"of matrix products on this CPU {faster}"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def amount(value: float | None, bound: bool = False) -> str:
    """A number in four or five signs.

    >>> amount(950), amount(38_200), amount(1_557_611_200), amount(None), amount(2_000_000, bound=True)
    ('950', '38.2k', '1.56B', '-', '<2M')
    """
    if value is None:
        return "-"
    for size, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{'<' * bound}{value / size:.3g}{sign}"
    return f"{'<' * bound}{value:.3g}"


def flops(value: float) -> str:
    """Operations.

    >>> flops(3.2e15), flops(0.0), flops(4e10)
    ('3.2P', '-', '40G')
    """
    for size, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{sign}"
    return "<1G" if value else "-"


def gib(value: float) -> str:
    """Bytes in GiB."""
    return "-" if not value else f"{value / GIB:.2f}" if value < 10 * GIB else f"{value / GIB:.1f}"


def disk(value: float) -> str:
    """Bytes of a file in decimal units."""
    for size, sign in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {sign}"
    return "-" if not value else f"{max(1, round(value / 1e3))} kB"


def duration(hours: float | None) -> str:
    """A time in seconds, minutes or hours.

    >>> duration(None), duration(0.0001), duration(0.02), duration(0.5), duration(30.0)
    ('-', '<1 s', '72 s', '30 min', '30.0 h')
    """
    if hours is None:
        return "-"
    seconds = 3600 * hours
    if seconds < 1:
        return "<1 s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{hours:.1f} h"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def of_run(plan: Plan) -> Iterator[str]:
    """The plan of one run."""
    machine = Machine(plan)
    yield from machine.lines()
    yield ""
    yield f"{'stage':25.25} {'store':>6} {'rows':>7} {'tokens':>8} {'FLOP':>6} {'GiB':>6} {'time':>7} {'disk':>8}"
    for stage in plan.stages:
        yield _line(stage, machine)
    yield from _ending(plan)
    made = [stage for stage in plan.stages if not stage.cached]
    yield ""
    yield f"{len(plan.stages)} stages, {len(plan.stages) - len(made)} in the store" + _sum(made, machine)
    yield ""
    yield from memory(made, machine)
    yield from _notes(plan.notes)


def _line(stage: Planned, machine: Machine) -> str:
    where = "cached" if stage.cached else "new" if stage.foreseeable else "new ?"
    peak = gib(stage.peak.total) if not stage.cached else "-"
    numbers = f"{amount(stage.rows, stage.at_most):>7} {amount(stage.tokens, stage.at_most):>8} {flops(stage.flops):>6}"
    time = duration(machine.hours(stage))
    return f"{stage.name:25.25} {where:>6} {numbers} {peak:>6} {time:>7} {disk(stage.disk):>8}"


def _ending(plan: Plan) -> Iterator[str]:
    if any(not stage.foreseeable for stage in plan.stages):
        yield "?: its key hangs on texts that are still to be written, or on weights that are not here"
    if any(stage.at_most for stage in plan.stages):
        yield "<: at most, if every reply becomes as long as it may; of what reads replies, about"
    if plan.ends is not None:
        yield f"more stages follow that cannot be foreseen: {plan.ends}"


def _sum(stages: Sequence[Planned], machine: Machine) -> str:
    """What is left to do, in one line."""
    hours = [machine.hours(stage) for stage in stages]
    parts = [f"{flops(sum(stage.flops for stage in stages))} FLOP"]
    if machine.rate is not None:
        parts.append(duration(sum(h or 0.0 for h in hours)))
    parts.append(f"{disk(sum(stage.disk for stage in stages))} of disk")
    return "; still to do: " + ", ".join(parts) if stages else "; nothing is left to do"


def memory(stages: Sequence[Planned], machine: Machine) -> Iterator[str]:
    """Peak memory of each device by model and micro-batch, and whether it fits."""
    largest: dict[tuple[Any, ...], Planned] = {}
    for stage in stages:
        if stage.peak.total < SMALL:
            continue
        case = (stage.kind, stage.models)
        if case not in largest or stage.peak.total > largest[case].peak.total:
            largest[case] = stage
    if not largest:
        return
    yield "peak memory of each device in GiB, at the largest batch"
    head = f"{'model':22} {'work':5} {'params':>6} {'trained':>7} {'weights':>7} {'states':>6} {'batch':>7} {'peak':>6}"
    yield f"{head} fits"
    for (kind, models), stage in largest.items():
        peak = stage.peak
        name, states = "+".join(models), peak.gradients + peak.optimizer
        fits = machine.fits(peak.total)
        about, batch = "" if peak.measured else " ~", peak.activations + peak.hand + peak.cache
        yield (
            f"{name:22.22} {kind:5} {amount(stage.parameters):>6} {amount(stage.trained or None):>7} "
            f"{gib(peak.weights):>7} {gib(states):>6} {gib(batch):>7} {gib(peak.total):>6} {fits}{about}"
        )
        if stage.micro_tokens is not None:
            yield f"   micro-batches of at most {stage.micro_tokens:,} tokens, as a run would choose"
        for tokens, total in stage.by_micro:
            if tokens != stage.micro_tokens:
                yield f"{'':3}{f'micro_tokens={tokens}':60} {gib(total):>7} {machine.fits(total)}"
    yield "states: gradients and optimizer. batch: activations, logits, keys and values."
    if any(not stage.peak.measured for stage in largest.values()):
        yield "~: by a rule of thumb, since the model cannot be run without its weights"


def of_sweep(plans: Sequence[Plan]) -> Iterator[str]:
    """One table of all runs: a stage that several ask for is made once."""
    machine = Machine(plans[0])
    yield from machine.lines()
    distinct: dict[str, Planned] = {}
    asked: dict[str, int] = {}
    for stage in (stage for plan in plans for stage in plan.stages):
        distinct.setdefault(stage.key, stage)
        asked[stage.key] = asked.get(stage.key, 0) + 1
    groups: dict[tuple[Any, ...], list[Planned]] = {}
    for stage in distinct.values():
        groups.setdefault((stage.name, stage.models), []).append(stage)
    yield ""
    yield f"{'stage':20.20} {'of':13} {'made':>5} {'asked':>6} {'tokens':>8} {'FLOP':>6} {'time':>7} {'disk':>8}"
    for (name, models), stages in list(groups.items())[:MOST]:
        new = [stage for stage in stages if not stage.cached]
        total = sum(stage.tokens or 0 for stage in new) or None
        hours = sum(machine.hours(stage) or 0.0 for stage in new) if machine.rate is not None and new else None
        yield (
            f"{name:20.20} {'+'.join(models):13.13} {len(new):>5} {sum(asked[s.key] for s in stages):>6} "
            f"{amount(total, any(s.at_most for s in new)):>8} {flops(sum(s.flops for s in new)):>6} "
            f"{duration(hours):>7} {disk(sum(s.disk for s in new)):>8}"
        )
    if len(groups) > MOST:
        yield f"... and {len(groups) - MOST} more, which plan.file has"
    made = [stage for stage in distinct.values() if not stage.cached]
    every = [stage for plan in plans for stage in plan.stages if not stage.cached]
    yield ""
    yield (
        f"{len(plans)} runs ask for {sum(asked.values()):,} stages, {len(distinct):,} of them distinct, "
        f"{len(distinct) - len(made):,} in the store"
    )
    yield _sum(made, machine).removeprefix("; ")
    if machine.rate is not None and made:
        apart, together = (sum(machine.hours(s) or 0.0 for s in some) for some in (every, made))
        yield f"runs that share nothing would take {duration(apart)} in place of {duration(together)}"
    for ends in dict.fromkeys(plan.ends for plan in plans if plan.ends is not None):
        yield f"some runs have more stages, which cannot be foreseen: {ends}"
    yield ""
    yield from memory(made, machine)
    yield from _notes(dict.fromkeys(note for plan in plans for note in plan.notes))


def _notes(notes: Any) -> Iterator[str]:
    found = list(notes)
    if found:
        yield ""
    for note in found[:12]:
        yield f"note: {note}"


def as_dict(plans: Sequence[Plan]) -> dict[str, Any]:
    """The plan as JSON has it: bytes, operations and hours as numbers."""
    runs = []
    for plan in plans:
        machine = Machine(plan)
        stages = []
        for stage in plan.stages:
            fits = None if stage.cached else machine.devices.fits(stage.peak.total)
            stages.append(asdict(stage) | {"fits": fits, "hours": machine.hours(stage)})
        runs.append(
            {
                "overrides": plan.words,
                "device": plan.devices.name,
                "devices": plan.devices.world,
                "memory": plan.devices.memory,
                "precision": plan.config.trainer.precision,
                "utilisation": machine.utilisation,
                "stages": stages,
                "ends": plan.ends,
                "notes": plan.notes,
            }
        )
    return {"runs": runs}
