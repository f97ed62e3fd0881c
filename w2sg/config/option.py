"""Options of whatever can be configured: each has its type, its default and one line of help, at one place.

A method, a decoder or a judge states its options as a class::

    class Mine(Options):
        rate: float = option(1e-5, "learning rate", gt=0)
        sft: SFT = option(SFT(epochs=3), "fine-tuning of the strong model")

    def mine(run, options: Mine): ...

A method with few options may take them as keyword parameters instead, each with a type and a default.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticUndefined

MISSING = "???"  # what stands where a value must be given


class Options(BaseModel):
    """A section of a configuration. Unknown keys are errors; no value is converted, which could hide a mistake.

    A field's name is what code and store keys call it. What is typed is its alias, where it has one: an option that is
    renamed gets an alias and a line in `w2sg.config.renamed`, and no key changes.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), populate_by_name=True
    )

    def rules(self) -> list[str]:
        """What is wrong between keys that are each in order; one ``"key: what and what to do"`` each."""
        return []

    @model_validator(mode="after")
    def _consistent(self):
        if broken := self.rules():
            raise ValueError("\n".join(broken))
        return self


def option(default: Any, help: str, **constraints: Any) -> Any:
    """A field of `Options`.

    Args:
        default: its value where none is given; ``...`` where one must be given.
        help: one line for `docs/options.md`: what it is, in which unit, and what null does.
        constraints: as of `pydantic.Field`: ``gt``, ``ge``, ``le``, ``lt``, ``min_length``, ``alias``, ...

    >>> class Lengths(Options):
    ...     most: int = option(512, "tokens of a text", gt=0)
    >>> Lengths().most, defaults_of(Lengths)
    (512, {'most': 512})
    """
    return Field(default, description=help, **constraints)


def options_class(function: Callable[..., Any]) -> type[Options] | None:
    """The class of a function's parameter ``options``; None where it takes its options as keyword parameters."""
    hint = hint_of(function, "options")
    return hint if inspect.isclass(hint) and issubclass(hint, Options) else None


def hint_of(function: Callable[..., Any], parameter: str) -> Any:
    """A parameter's type, one by one: others may name what only a type checker sees."""
    argument = inspect.signature(function).parameters.get(parameter)
    annotation = Any if argument is None or argument.annotation is argument.empty else argument.annotation
    if not isinstance(annotation, str):
        return annotation
    try:
        module = sys.modules.get(inspect.unwrap(function).__module__)  # a class has no globals of its own
        return eval(annotation, vars(module) if module else {})
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any


def defaults_of(source: type[Options] | Callable[..., Any], supplied: int = 1) -> dict[str, Any]:
    """The plain defaults of a class of options or of a function, as they stand in a composed configuration.

    A section that is one of several kinds (a judge, a decoder) is left to a file of its group, which says which one.

    Args:
        source: the class; or a function, whose ``_target_`` is given, too.
        supplied: how many first parameters of a function are no options.

    Returns:
        key -> default; `MISSING` where a value must be given.
    """
    if inspect.isclass(source) and issubclass(source, Options):
        fields = source.model_fields
        return {
            field.alias or name: _plain(field.get_default(call_default_factory=True)) for name, field in fields.items()
        }
    target = {"_target_": f"{source.__module__}.{source.__qualname__}", "_partial_": True}
    if (options := options_class(source)) is not None:
        return target | defaults_of(options)
    parameters = list(inspect.signature(source).parameters.values())[supplied:]
    return target | {p.name: _plain(p.default) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _plain(value: Any) -> Any:
    """A default as a configuration holds it: sections as dictionaries, nothing else than numbers, texts and lists."""
    if value is PydanticUndefined or value is ... or value is inspect.Parameter.empty:
        return MISSING
    if isinstance(value, Options):
        kind = type(value).model_fields.get("kind")
        if kind is not None and len(getattr(kind.annotation, "__args__", ())) == 1:
            return MISSING
        return {field.alias or name: _plain(getattr(value, name)) for name, field in type(value).model_fields.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
