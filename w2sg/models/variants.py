"""Further models of a method, each said as what it changes of ``weak`` or ``strong``: ``{layers: 6}``.

A checkpoint (``revision``), a depth (``layers``), rounded weights (``quantise``) or another model altogether.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from w2sg.config.check import fit_options
from w2sg.config.schema import ModelConfig, TrainConfig
from w2sg.models.source import Source, find
from w2sg.models.steps import lost_steps


def variant(spec: ModelConfig, changes: Mapping[str, Any], where: str) -> Source:
    """A model that differs from another in these settings."""
    return find(_changed(spec, changes), where)


def problems(spec: ModelConfig, changes: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """What is wrong with such settings, one line each."""
    lines = []
    for place, change in enumerate(changes):
        try:
            _changed(spec, change)
        except ValidationError as error:
            for problem in error.errors():
                key = ".".join(str(part) for part in problem["loc"])
                lines.append(f"{where}[{place}]{'.' + key if key else ''}: {problem['msg']}")
    return lines


def label_problems(config: TrainConfig) -> list[str]:
    """What is wrong for every method that trains on labels, one line each."""
    lines = []
    for role in ("weak", "strong"):
        model = getattr(config, role)
        if model.untuned is not None:
            name = config.method["_target_"].rpartition(".")[2]
            lines.append(f"{role}.untuned: not read by method={name}; set it to null")
        batch = getattr(config.training, model.train).batch_size
        if model.micro_batch is not None and model.micro_batch > batch:
            lines.append(
                f"{role}.micro_batch: {model.micro_batch} is more than the batch of {batch} it is a part of; lower it, "
                f"or raise training.{model.train}.batch_size"
            )
        key = f"training.{model.train}.lr" if model.lr is None else f"{role}.lr"
        lines += lost_steps(model, role, {key: fit_options(config, model).lr})
    return lines


def _changed(spec: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate({**spec.model_dump(by_alias=True), **changes})
