"""What makes a model slow to write, said once for each model."""

from __future__ import annotations

import logging
import weakref
from typing import Any

log = logging.getLogger(__name__)
_SAID: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def once(model: Any, line: str) -> None:
    """Warn of this, unless it has been said of this model."""
    lines = _SAID.setdefault(model, set())
    if line not in lines:
        log.warning("%s: %s", type(model).__name__, line)
        lines.add(line)


def slower(model: Any, why: str) -> None:
    """Say what makes its texts be read more often than once."""
    once(model, f"{why}, so that texts are read anew from their start; this is slower")
