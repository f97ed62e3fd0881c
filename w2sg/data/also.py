"""Second test sets: rows of other data that a run's models are measured on, too, and that none of them learns from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2sg.config import plugins
from w2sg.config.data_schema import DATASET_KEYS
from w2sg.data.examples import Example
from w2sg.data.good_rows import KINDS, read_rows
from w2sg.errors import UserError

LOCAL = {"_target_": "w2sg.data.sources.local", "path": None, "subset": None, "revision": None}


def entries(also: Sequence[Any], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sets by their names, each with all that reads its rows.

    Args:
        also: of ``dataset.also``: names of conf/dataset, files, or mappings. options: of the run's own dataset.

    Raises:
        UserError: a name is none of conf/dataset's, or stands for two sets.
    """
    found: dict[str, dict[str, Any]] = {}
    for place, entry in enumerate(also):
        given = dict(entry) if isinstance(entry, Mapping) else _named(entry)
        given = {key: value for key, value in given.items() if value is not None}
        node = dict(LOCAL)
        if (choice := given.pop("dataset", None)) is not None:
            node = _choice(choice, place)
        node |= given
        name = slug(given.get("name") or choice or Path(str(node["path"])).stem)
        if name in found or name in ("test", options["name"]):
            raise UserError(f"dataset.also: two test sets are called {name!r}; give one of them another name, as name=")
        found[name] = {**node, "strict": options["strict"], "max_chars": options["max_chars"]}
    return found


def slug(name: str) -> str:
    """A name as it can stand in names of stages."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("_.") or "set"


def _named(entry: str) -> dict[str, Any]:
    return {"dataset": entry} if entry in plugins.files("dataset") else {"path": entry}


def _choice(choice: str, place: int) -> dict[str, Any]:
    """What a file of conf/dataset says of how its rows are read: the loader, with all options that go to it."""
    from omegaconf import OmegaConf

    if choice.startswith("_") or choice not in (known := plugins.files("dataset")):
        shown = ", ".join(sorted(name for name in plugins.files("dataset") if not name.startswith("_")))
        raise UserError(f"dataset.also[{place}].dataset: there is no {choice}; the choices: {shown}")
    content = OmegaConf.to_container(OmegaConf.load(known[choice][0]))
    return {**LOCAL, **{key: content[key] for key in content if key not in DATASET_KEYS | {"defaults"}}}


def rows_of(name: str, node: Mapping[str, Any], kind: str, classes: int) -> tuple[list[Example], dict[str, Any]]:
    """The rows of one set that are for testing: of its test file where it has one, else all.

    Raises:
        UserError: they are of another kind than the run's.
    """
    reading = {key: value for key, value in node.items() if key not in ("name", "size")}
    try:
        pools, its_kind, its_classes, notes = read_rows(json.dumps(reading, sort_keys=True))
    except UserError as error:
        raise UserError(f"dataset.also, {name}: {error}") from error
    if (its_kind, its_classes) != (kind, classes):
        of = f" of {its_classes} classes" if its_kind == kind == "classes" else ""
        raise UserError(
            f"dataset.also: {name} has {KINDS[its_kind]}{of}, and the run {KINDS[kind]}"
            f"{f' of {classes}' if of else ''}; name a test set of the same kind"
        )
    rows = pools.get("test") or [example for rows in pools.values() for example in rows]
    return list({example.id: example for example in rows}.values()), dict(notes)
