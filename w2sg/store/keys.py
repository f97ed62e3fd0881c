"""Keys of stages: what changes a result, as one text, its hash, and the fields in which two of them differ."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

from w2sg.errors import UserError

REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)-(?P<hash>[0-9a-f]{16})")  # how a key names another stage


def stage_seed(seed: int, name: str) -> int:
    """The seed of a stage of a run with this seed.

    >>> stage_seed(0, "plain") == stage_seed(0, "plain") != stage_seed(1, "plain")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")


def canonical(key: dict) -> str:
    """The one text of a key, which its hash is taken from: JSON, sorted fields, no spaces, ASCII.

    The order of fields is irrelevant. Types are not: ``1``, ``1.0`` and ``True`` are three different values, and so are
    ``0.0`` and ``-0.0``.

    Raises:
        TypeError: a value is not exactly a str, int, float, bool, None, list or dict; its dotted field is named.
        UserError: a number is not finite, or a text is not valid Unicode; its dotted field is named.
    """
    if type(key) is not dict:
        raise TypeError(f"a stage key is a dict, not {key!r}")
    check_plain(key, "")
    return json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)


def check_plain(value: Any, field: str) -> None:
    """Exact types only: a subclass (a numpy float, an enum) may print alike today and differently tomorrow."""
    kind = type(value)
    if kind is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise TypeError(f"stage key: {field or 'the key'} has the field name {name!r}, which is not text")
            check_plain(name, field and f"{field}.<field name>")
            check_plain(item, f"{field}.{name}" if field else name)
    elif kind is list:
        for i, item in enumerate(value):
            check_plain(item, f"{field}.{i}")
    elif kind is float:
        if not math.isfinite(value):
            raise UserError(f"{field} is {value}: give a finite number")
    elif kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{field} is not valid Unicode: {value!r}") from None
    elif value is not None and kind not in (int, bool):
        raise TypeError(
            f"stage key: {field or 'the key'} is a {kind.__module__}.{kind.__qualname__}; "
            "only str, int, float, bool, None, list and dict can be in a key"
        )


def folder_name(name: str, key: dict) -> str:
    """`<name>-<hash>`: the folder of a stage, and how the keys of later stages name it. Raises as `canonical` does."""
    folder = f"{name}-{hashlib.sha256(canonical(key).encode()).hexdigest()[:16]}"
    if not REFERENCE.fullmatch(folder):
        raise UserError(f"a stage cannot be named {name!r}: use letters, digits, '_', '-' and '.'")
    return folder


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()  # stands for the value of a field that a key does not have


def flatten(key: Any, field: str = "") -> dict[str, Any]:
    """A key as ``{dotted field: value}``; items of lists are named by their position. Empty lists and dicts stay."""
    if not (isinstance(key, dict | list) and key):
        return {field: key} if field else {}
    flat: dict[str, Any] = {}
    for name, value in key.items() if isinstance(key, dict) else enumerate(key):
        flat |= flatten(value, f"{field}.{name}" if field else str(name))
    return flat


def differences(theirs: dict, ours: dict) -> list[tuple[str, Any, Any]]:
    """The fields in which two keys differ, ``(dotted field, theirs, ours)``, `ABSENT` for a field one does not have."""
    a, b = flatten(theirs), flatten(ours)
    pairs = [(field, a.get(field, ABSENT), b.get(field, ABSENT)) for field in dict.fromkeys([*b, *a])]
    return [(field, x, y) for field, x, y in pairs if repr(x) != repr(y)]  # 1, 1.0 and True differ
