"""What values are called where many runs stand side by side: in the shortest words that no other value has."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

# What is shown by its last parts, and what stands between these.
SEPARATORS = {"weak.name": "/", "strong.name": "/", "method._target_": ".", "loss._target_": "."}
PAIR = ("weak.name", "strong.name")
Values = Mapping[str, Any]


def key_of(values: Any) -> str:
    """A text that is the same for the same values alone."""
    return json.dumps(values, sort_keys=True, default=str)


def shortest(names: Sequence[str], separator: str = "/") -> dict[str, str]:
    """The fewest last parts of each name that no other has; where there are none, the name.

    >>> shortest(["/a/weak", "/b/weak", "/b/strong"])
    {'/a/weak': 'a/weak', '/b/weak': 'b/weak', '/b/strong': 'strong'}
    """
    parts = {name: name.rstrip(separator).split(separator) for name in names}
    shown = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        counts = range(1, len(own) + 1)
        least = next((n for n in counts if all(other[-n:] != own[-n:] for other in others)), None)
        shown[name] = name if least is None else separator.join(own[-least:])
    return shown


def distinct(words: Sequence[str], values: Sequence[Values]) -> list[str]:
    """The words of each of several values; where others have the same, with what they differ in, written in full.

    >>> distinct(["a", "a", "b"], [{"lr": 1}, {"lr": 2}, {"lr": 2}])
    ['a, lr=1', 'a, lr=2', 'b']
    """
    alike: dict[str, dict[str, Values]] = defaultdict(dict)
    for text, value in zip(words, values, strict=True):
        alike[text][key_of(value)] = value

    def differing(text: str) -> list[str]:
        keys = sorted({key for value in alike[text].values() for key in value})
        return [key for key in keys if len({key_of(value.get(key)) for value in alike[text].values()}) > 1]

    apart = {text: differing(text) for text in alike}
    return [
        ", ".join([text, *(f"{key}={key_of(value.get(key))}" for key in apart[text])])
        for text, value in zip(words, values, strict=True)
    ]


def settings_in_words(settings: Sequence[Values]) -> list[str]:
    """What sets each setting apart: the pair where one of its models varies, then every other setting that does.

    Words are the same only where values are.
    """
    names = {key: _names(key, settings) for key in SEPARATORS}

    def in_words(values: Values) -> str:
        parts = []
        if pair := [names[key][str(values[key])] for key in PAIR if key in values]:
            parts.append(" → ".join(pair))
        for key, value in values.items():
            if key == "dataset.name":
                parts.append(str(value))
            elif key == "method._target_":
                parts.append(names[key][str(value)])
            elif key not in PAIR and value is not None:
                name = key.removeprefix("dataset.").removeprefix("optim.").removeprefix("refine.")
                parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(parts) or "all runs"

    return distinct([in_words(values) for values in settings], settings)


def losses_in_words(losses: Sequence[Values]) -> list[str]:
    """Each loss with its options; words are the same only where values are.

    Args:
        losses: ``loss._target_`` of each, and those of its options in which runs differ.
    """
    names = _names("loss._target_", losses)
    words = []
    for values in losses:
        name = names[values["loss._target_"]]
        options = [f"{k.removeprefix('loss.')}={v}" for k, v in values.items() if k != "loss._target_"]
        words.append(f"{name}({', '.join(options)})" if options else name)
    return distinct(words, losses)


def methods_in_words(methods: Sequence[tuple[str, str | None]]) -> dict[tuple[str, str | None], str]:
    """Each method in a word, and its decoder where it measured one."""
    names = shortest([target for target, _ in methods], ".")
    return {(target, kind): f"{names[target]}: {kind}" if kind else names[target] for target, kind in methods}


def _names(key: str, settings: Sequence[Values]) -> dict[str, str]:
    return shortest([str(values[key]) for values in settings if key in values], SEPARATORS[key])
