"""From a checked configuration to what runs: functions with their options bound, and how a model trains."""

from __future__ import annotations

import hashlib
import json
import pkgutil
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from w2sg.config import plugins
from w2sg.config.model_schema import ModelConfig
from w2sg.config.option import hint_of, options_class
from w2sg.config.schema import FitOptions, TrainConfig


def fit_options(config: TrainConfig, model: ModelConfig) -> FitOptions:
    """How this model trains: its mode's options, with the learning rate and epochs of its own where it has them."""
    options: FitOptions = getattr(config.training, model.train)
    of_model = {k: getattr(model, k) for k in ("lr", "epochs") if getattr(model, k) is not None}
    return options.model_copy(update=of_model)


def build(node: dict[str, Any]) -> partial:
    """The function of a ``_target_`` node with its options bound; groups of options as the types that it names."""
    function = pkgutil.resolve_name(node["_target_"])
    options = {k: v for k, v in node.items() if not (k.startswith("_") and k.endswith("_"))}
    if (kind := options_class(function)) is not None:
        return partial(function, options=kind.model_validate(options))
    for name, value in options.items():
        if isinstance(value, dict):
            options[name] = TypeAdapter(hint_of(function, name)).validate_python(value)
    return partial(function, **options)


def function_identity(node: dict[str, Any]) -> dict[str, Any]:
    """A ``_target_`` node as part of a cache key; a function from outside w2sg also counts by its source text."""
    identity = {k: v for k, v in node.items() if k not in {"_partial_", "_convert_"}}
    if not node["_target_"].startswith("w2sg."):
        source = plugins.source_of(pkgutil.resolve_name(node["_target_"]), node["_target_"])
        identity["source"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return json.loads(json.dumps(identity))
