"""Models as parts of cache keys: the one place that says what of a model decides a stage's output."""

from __future__ import annotations

from typing import Any

from w2sg.config.model_schema import ModelConfig
from w2sg.data.table import Table
from w2sg.experiment.context import Context
from w2sg.models.packing import rules_key
from w2sg.models.source import Source
from w2sg.models.trained import Trained


def key_of(run: Context, writer: Trained) -> dict[str, Any]:
    """A language model as part of a cache key."""
    if writer.folder is not None:
        return {"stage": writer.folder.name}
    spec = writer.source.spec
    return {
        **writer.source.identity,
        "dtype": spec.dtype,
        "layers": spec.layers,
        "random_init": run.seed if spec.random_init else None,
        **rules_key(writer.source.config, spec.max_length, shared=False),
    }


def reply_rules(source: Source) -> dict[str, Any]:
    """What the key of a stage that reads replies says besides of a model with windows."""
    return rules_key(source.config, source.spec.max_length, shared=True)


def found_key(source: Source, table: Table) -> dict[str, Any]:
    """A model that labels a table as it was found."""
    return {
        **source.identity,
        "max_length": source.spec.max_length,
        "dtype": source.spec.dtype,
        **label_rules(source, table),
    }


def label_rules(source: Source, table: Table) -> dict[str, Any]:
    """Windows and the like that a model has within the texts of a table; they were once read otherwise."""
    return rules_key(source.config, source.spec.max_length, table.kind == "pairs")


def label_key(spec: ModelConfig, layer: int | None) -> dict[str, Any]:
    """The settings of a model that change what it learns (not how its batches are cut)."""
    if spec.arch == "bow":
        return {"train": spec.train, "max_length": spec.max_length}
    key = {
        "train": spec.train,
        "max_length": spec.max_length,
        "dtype": spec.dtype,
        "layers": spec.layers,
        "dropout": spec.dropout,
        "random_init": spec.random_init,
    }
    if spec.head_weights != "kept":
        key["head_weights"] = spec.head_weights
    if spec.train == "lora":
        key["lora"] = spec.lora.key()
    if spec.train == "head":
        key |= {"head": spec.head, "layer": layer}
    return key
