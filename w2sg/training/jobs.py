"""What stages are asked to do: train a model, or read rows with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from w2sg.config.schema import FitOptions
from w2sg.data.loading import Examples
from w2sg.store.shards import Found
from w2sg.training.foreseen import Foreseen
from w2sg.training.label_modules import FitContext, FitModule


@dataclass
class FitJob:
    """What `Stages.fit` trains.

    Attributes:
        scorer: a module with ``forward(inputs)`` and ``save(folder)``.
        module: ``(FitContext) -> FitModule``, which is the objective.
        train, held_out: rows; ``held_out`` (or None) decides early stopping and the best epoch.
        notes: anything the report should know (clamped labels, truncated texts, ...).
        watched: rows that the model is measured on during training, by name; none where that is not wanted.
        micro_batch, micro_tokens: rows and tokens of a forward, options of this ``role``; None leaves it to memory.
    """

    scorer: nn.Module
    module: Callable[[FitContext], FitModule]
    train: Examples
    held_out: Examples | None
    options: FitOptions
    seed: int
    micro_batch: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    watched: dict[str, Examples] = field(default_factory=dict)
    micro_tokens: int | None = None
    role: str = "strong"


@dataclass
class ReadJob:
    """What `Stages.read` runs: ``read(inputs)`` of a frozen model over the rows of ``examples``.

    Attributes:
        read: gives [b, ...] values, or `Found` where rows have several each.
        rows: at once on one device; None fills a forward up to a number of tokens.
        written: replies in the making for each row, a prompt with its reply: a GPU takes rows for which it has room.
        verb, unit: what is done with rows and what they are, for `w2sg.progress`.
        beside: folder of another stage whose values ``read`` finds as well (`Found`); they are kept by its name.
        foreseen: what a plan takes for the values; None where it cannot go on without them.
    """

    model: nn.Module
    read: Callable[[dict[str, Tensor]], Tensor | Found]
    examples: Examples
    notes: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    written: int | None = None
    verb: str = "reading"
    unit: str = "rows"
    beside: str | None = None
    foreseen: Callable[[], Foreseen] | None = None


@dataclass
class StageRecord:
    """One line of the report's stage list."""

    name: str
    key: str
    cached: bool
    seconds: float
    tokens: int
    useful_token_fraction: float | None
    info: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "info"}
