"""Options of one of several kinds: those of w2sg by ``kind``, any other by ``_target_``, the dotted path of a class."""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from w2sg.config.option import Options
from w2sg.errors import UserError


def class_named(target: Any, base: type[Options]) -> type[Options]:
    """The class of options that a dotted path names.

    Args:
        target: as ``mine.MyDecoder``; the module must be importable. base: what it must inherit from.

    Raises:
        ValueError: there is none, with the key and what to do, as `Options.rules` says it.
    """
    if not isinstance(target, str):
        raise ValueError("_target_: needs the dotted path of a class, as mine.Mine")
    try:
        kind = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_: there is no {target} ({error}); its folder must be on PYTHONPATH") from error
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise ValueError(
            f"_target_: {target} is none; name a class that inherits from {base.__module__}.{base.__name__}"
        )
    return kind


def source_of(kind: type[Options], base: type[Options]) -> dict[str, Any]:
    """A class from outside w2sg as part of a cache key: its path, and a hash of its source text and its parents'.

    Args:
        base: the class of w2sg that all of them inherit from. Nothing is said of classes of w2sg.

    Raises:
        UserError: a source cannot be read, as of a class typed into an interpreter.
    """
    own = [one for one in kind.__mro__ if issubclass(one, base) and not one.__module__.startswith("w2sg.")]
    if not own:
        return {}
    path = f"{kind.__module__}.{kind.__qualname__}"
    try:
        text = "\n".join(inspect.getsource(one) for one in own)
    except (OSError, TypeError) as error:
        raise UserError(
            f"{path}: its source cannot be read, so its results cannot be cached; put it in a file"
        ) from error
    return {"_target_": path, "source": hashlib.sha256(text.encode()).hexdigest()[:16]}


def without_target(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the path of their class."""
    return {key: value for key, value in options.items() if key != "_target_"}
