"""docs/options.md: every option with its type, default and help, as they stand in Python.

``python -m w2sg.cli.options`` writes it anew; a test holds it and the code together.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from w2sg.config.option import MISSING, Options, defaults_of, hint_of, options_class
from w2sg.config.plugins import CONF, files
from w2sg.config.schema import TrainConfig

PAGE = CONF.parent / "docs" / "options.md"
# group -> its heading and the key that its options stand below
GROUPS = {
    "method": ("Methods", "method"),
    "refine": ("Refinement of weak answers, `refine=`", "refine"),
    "decoder": ("Decoders, `python evaluate.py decoder=`", "decoder"),
    "alignment": ("Alignment of the weak model", "method.alignment"),
    "judge": ("Judges", "method.judge"),
}
SECTIONS = {  # heading -> the key and the class of what stands below it
    "The run": ("", "w2sg.config.schema.TrainConfig"),
    "`weak` and `strong`": ("strong", "w2sg.config.model_schema.ModelConfig"),
    "`dataset`": ("dataset", "w2sg.config.data_schema.DatasetConfig"),
    "`optim`": ("optim", "w2sg.config.schema.TrainingConfig"),
    "`trainer`": ("trainer", "w2sg.config.schema.TrainerConfig"),
    "`engine`": ("engine", "w2sg.config.engine_schema.EngineConfig"),
    "`server`": ("server", "w2sg.config.server_schema.ServerConfig"),
    "`logger`": ("logger", "w2sg.config.schema.LoggerConfig"),
    "`plan`": ("plan", "w2sg.config.schema.PlanConfig"),
    "`python evaluate.py`": ("", "w2sg.config.evaluate_schema.EvaluateConfig"),
}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def page() -> str:
    """The whole page."""
    parts = [
        "# Options\n",
        "Every option, its type, its default and what it means. This page is generated from the classes and functions "
        "that have the options: `python -m w2sg.cli.options`. `python train.py --cfg job` shows what a command line "
        "composes to.\n",
    ]
    for title, (key, path) in SECTIONS.items():
        parts += [f"## {title}\n", _table(resolve_name(path), key)]
    for group, (title, key) in GROUPS.items():
        parts.append(f"## {title}\n")
        for choice, (file, *_) in files(group).items():
            if (source := _source(file)) is not None:
                parts += [f"### {group}={choice}\n", _table(source, key)]
    return "\n".join(parts)


def _source(file: Path) -> Any:
    """What a file of conf/ takes its defaults from; None where that is another file."""
    for entry in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", []):
        if isinstance(entry, str) and entry.startswith("/options/"):
            return resolve_name(entry.removeprefix("/options/").partition("@")[0])
    return None


def _table(source: Any, key: str) -> str:
    rows = [
        f"| `{name}` | {kind} | {'' if default == '' else f'`{default}`'} | {help} |"
        for name, kind, default, help in options_of(source, key)
    ]
    return "\n".join(["| option | type | default | |", "|---|---|---|---|", *rows, ""])


def options_of(source: Any, key: str = "") -> Iterator[tuple[str, str, str, str]]:
    """The dotted name, type, default and help of every option of a class or function, those of sections included."""
    options = source if inspect.isclass(source) else options_class(source)
    defaults = defaults_of(source)
    if options is None:
        for name, text in documented(source).items():
            kind = hint_of(source, name)
            if _is_section(kind):
                yield f"{key}.{name}", "section", "", text
                yield from _of_class(kind, defaults_of(kind), f"{key}.{name}")
            else:
                yield _row(f"{key}.{name}", kind, defaults[name], text)
        return
    yield from _of_class(options, defaults, key)


def _of_class(options: type[Options], defaults: dict[str, Any], key: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in options.model_fields.items():
        shown = field.alias or name
        if shown == "kind" and len(get_args(field.annotation)) == 1:
            continue
        full, default = f"{key}.{shown}".lstrip("."), defaults[shown]
        kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        section = _is_section(field.annotation)
        if section and options is TrainConfig:  # each has a heading
            continue
        if section and isinstance(default, dict):
            yield full, "section", "", field.description or ""
            yield from _of_class(field.annotation, default, full)
        else:
            yield _row(full, kind, default, field.description or "")


def _is_section(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Options)


def _row(key: str, kind: Any, default: Any, text: str) -> tuple[str, str, str, str]:
    shown = "" if default == MISSING else yaml.safe_dump(default, default_flow_style=True, width=10**6, sort_keys=False)
    shown = shown.removesuffix("\n").removesuffix("...").strip()
    return key, *(part.replace("|", "\\|").replace("<", "&lt;") for part in (_type(kind), shown, text))


def _type(kind: Any) -> str:
    """A type in words: ``number > 0 or null``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        marks = [mark for part in arguments[1:] for mark in getattr(part, "metadata", [part])]
        bounds = [
            f" {sign} {getattr(mark, name):g}" for mark in marks for name, sign in BOUNDS.items() if hasattr(mark, name)
        ]
        plain, null, _ = _type(arguments[0]).partition(" or null")
        return "".join([plain, *bounds, null])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if origin in (list, dict) or (inspect.isclass(origin) and origin.__name__ == "Sequence"):
        return "mapping" if origin is dict else f"list of {_type(arguments[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true, false", type(None): "null", dict: "mapping"}
    return names.get(kind, "section" if _is_section(kind) else str(kind))


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """The parameters that a docstring's ``Args:`` describes, but the first ones that are supplied."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", text, re.M)
    entries = re.findall(r"^    (\w+): ((?:.*)(?:\n {5,}.*)*)", section[1] if section else "", re.M)
    known = defaults_of(function)
    return {name: re.sub(r"\s+", " ", words).strip().removesuffix(".") for name, words in entries if name in known}


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
