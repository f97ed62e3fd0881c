"""Further models of a method, each said as what it changes of ``weak`` or ``strong``: ``{keep_layers: 6}``.

A checkpoint (``revision``), a depth (``layers``), rounded weights (``quantise``) or another model altogether.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from w2sg.config.model_schema import ModelConfig
from w2sg.models.source import Source, find


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


def _changed(spec: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate({**spec.model_dump(by_alias=True), **changes})
