"""Options that had another name: what is typed or stands in a file under the old one is read under the new one.

Each old name that is met is said once. Store keys keep the old names, so nothing is computed again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from w2sg.console import Plain

_TRAINING = {"batch_size": "global_batch_size", "warmup": "warmup_fraction", "clip": "max_grad_norm"}
_TRAINING |= {"validation": "validation_fraction"}
_MODEL = {"train": "tune", "untuned": "before_alignment", "layer": "feature_layer", "layers": "keep_layers"}
_MODEL |= {"candidates": "feature_layer_candidates", "quantise": "round_weights", "micro_batch": "micro_batch_size"}
_LAYERS = {"layer": "feature_layer", "candidates": "feature_layer_candidates"}
_PREFERENCES = {"supervised": "sft_weight", "supervised_mean": "sft_mean"}
_BARS = {"none": ("false", False), "auto": ("true", True)}  # as typed, and in a file
# section, as a pattern -> old name of a key in it -> new name
SECTIONS = {
    r"weak|strong|method\.(links|variants)\.\d+": _MODEL,
    r"(optim|training)\.(full|lora|head)|method\.(alignment|sft|dpo)": _TRAINING,
    r"method\.(alignment|dpo)": _PREFERENCES,
    r"(method\.)?judge|(method\.)?decoder\.guide": _LAYERS,
    r"trainer": {"eval_tokens": "tokens_per_eval_batch", "progress_bar": "progress"},
    r"(method\.)?refine": {"batch_size": "context_size"},
    r"dataset\.sizes": {"ground_truth": "weak_train"},
}
GROUPS = {"training": "optim", "measure@method": "method"}  # also first parts of keys
VALUES: dict[tuple[str, Any], str] = {("method.ceiling_split", "ground_truth"): "weak_train"}
VALUES |= {("trainer.progress", old): new for new, both in _BARS.items() for old in both}
# group -> the section that its files fill; those of other groups fill the whole configuration
PACKAGES = {"model": "weak", "training": "optim", "alignment": "method.alignment", "judge": "method.judge"}
WHOLE = ("experiment", "pair", "")


@cache
def say(old: str, new: str) -> None:
    """One line for each old name, whatever often it is met."""
    Plain(stderr=True).say(f"{old} is now {new}", "note: ", "yellow")


@cache
def new_key(key: str) -> str:
    """The key of today for a dotted key, which may be one already.

    >>> new_key("weak.train"), new_key("training.full.clip"), new_key("seed")
    ('weak.tune', 'optim.full.max_grad_norm', 'seed')
    """
    section, _, name = key.rpartition(".")
    for pattern, names in SECTIONS.items():
        if name in names and re.fullmatch(pattern, section):
            name = names[name]
    start, dot, rest = f"{section}.{name}".lstrip(".").partition(".")
    return GROUPS.get(start, start) + dot + rest if dot else start


def override(typed: str) -> str:
    """What is typed, ``key=value``, under the names of today.

    >>> override("weak.lr=1"), override("~seed"), override("plan=true")
    ('weak.lr=1', '~seed', 'plan.only=true')
    """
    typed = re.sub(r"^([+]*)plan=", r"\1plan.only=", typed)  # the short form of the option that says so
    sign, key, equals, value = re.fullmatch(r"([+~]*)([^=]*)(=?)(.*)", typed, re.S).groups()
    new = new_key(key) if "." in key else GROUPS.get(key, key)
    if key.startswith("training.") and not _is_of_training(new):
        new = key
    if new != key:
        say(key, new)
    parts = [_value(new, part) for part in value.split(",")]  # of a sweep there are several
    return sign + new + equals + _in_braces(new, ",".join(parts))


def _is_of_training(key: str) -> bool:
    from w2sg.config.option import defaults_of
    from w2sg.config.schema import TrainConfig
    from w2sg.config.suggest import exists

    return exists(key, defaults_of(TrainConfig))


def _value(key: str, value: Any) -> Any:
    new = VALUES.get((key, value), value)
    if new != value:
        say(f"{key}={value}", f"{key}={new}")
    if not isinstance(new, str):
        return new
    return re.sub(r"\$\{([\w.]+)\}", lambda match: "${" + new_key(match[1]) + "}", new)


def _in_braces(key: str, value: str) -> str:
    """A section in one word, ``{train: lora}``, or a list of sections, with their keys renamed."""
    if not re.match(r"\s*[\[{].*:", value, re.S):
        return value
    section = key if value.lstrip().startswith("{") else f"{key}.0"

    def word(match: re.Match[str]) -> str:
        new = new_key(f"{section}.{match[2]}").rpartition(".")[2]
        if new != match[2]:
            say(f"{section}.{match[2]}", f"{section}.{new}")
        return match[1] + new + match[3]

    return re.sub(r"([{,]\s*)(\w+)(\s*:)", word, value)


def tree(content: Any, section: str = "", quiet: bool = False) -> Any:
    """A configuration, or a section of one, under the names of today.

    Args:
        content: plain values.
        section: the dotted key of ``content``; "" for a whole configuration.
        quiet: say nothing, as of a report, whose names nobody can change any more.
    """
    if isinstance(content, list):
        return [tree(inner, f"{section}.{place}", quiet) for place, inner in enumerate(content)]
    if not isinstance(content, dict):
        return _value(section, content) if isinstance(content, str | bool) else content
    renamed = {}
    for name, inner in content.items():
        key = f"{section}.{name}".lstrip(".")
        new = new_key(key) if section else GROUPS.get(key, key)
        if new != key and not quiet:
            say(key, new)
        renamed[new.rpartition(".")[2]] = tree(inner, new, quiet)
    return renamed


def file(content: dict[str, Any], path: str) -> dict[str, Any]:
    """The content of a file of Hydra's under the names of today.

    Args:
        content: plain values, with its defaults list.
        path: of the file in its folder of files, as ``experiment/mine``.
    """
    group = path.rpartition("/")[0]
    section = "" if group in WHOLE else PACKAGES.get(group, group)
    defaults, hydra = content.get("defaults"), content.get("hydra")
    renamed = tree({k: v for k, v in content.items() if k not in ("defaults", "hydra")}, section)
    if isinstance(defaults, list):
        renamed = {
            "defaults": [dict(_entries(entry)) if isinstance(entry, dict) else entry for entry in defaults]
        } | renamed
    if isinstance(hydra, dict):
        params = (hydra.get("sweeper") or {}).get("params")
        if isinstance(params, dict):
            swept = dict(override(f"{k}={v}").split("=", 1) for k, v in params.items())
            hydra = {**hydra, "sweeper": {**hydra["sweeper"], "params": swept}}
        renamed["hydra"] = hydra
    return renamed


def _entries(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """An entry of a defaults list, as ``override /training: default``."""
    for words, choice in entry.items():
        *before, group = words.split()
        new = GROUPS.get(group.lstrip("/"), group.lstrip("/"))
        if new != group.lstrip("/"):
            say(group.lstrip("/"), new)
            group = ("/" if group.startswith("/") else "") + new
        yield " ".join([*before, group]), choice
