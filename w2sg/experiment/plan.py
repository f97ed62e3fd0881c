"""How many stages a run has: as many as the last run of the same form, which the store remembers.

Which stages a method asks for is decided by its code as it goes. So the first run of a form has no total.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from w2sg.config.schema import TrainConfig
from w2sg.store.files import read_json, write_json

FOLDER = ".plans"  # in a store; without a stage's name, so that nothing takes it for one
APART = {
    "seed",
    "loss",
    "out",
    "store",
    "trainer",
    "logger",
    "training",
    "plan",
}  # do not change how many stages there are


def file_of(config: TrainConfig) -> Path:
    """Where the number of stages of runs of this form stands."""
    form: dict[str, Any] = config.model_dump(exclude=APART)
    form["dataset"] = {k: v for k, v in form["dataset"].items() if k not in ("sizes", "noise")}
    name = hashlib.sha256(json.dumps(form, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Path(config.store).expanduser() / FOLDER / f"{name}.json"


def planned(config: TrainConfig) -> int | None:
    """Stages of the run; None where no run of its form was finished."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(read_json(file_of(config))["stages"])
    return None


def remember(config: TrainConfig, stages: int) -> None:
    """Note the stages of a finished run. A store that cannot be written is left as it is."""
    file = file_of(config)
    if planned(config) != stages:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"stages": stages})
