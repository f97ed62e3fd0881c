"""How Hydra is started: one folder of models for two roles, folders of runs without timestamps, and runs of sweeps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from w2sg.config import plugins
from w2sg.config.plugins import CONF
from w2sg.errors import UserError
from w2sg.progress import Sweep

SWEEP = "W2SG_SWEEP"  # the environment variable that the runs of a sweep share


def register(conf: Path = CONF, users: Path | None = None) -> None:
    """Offer every ``model/*.yaml`` as ``weak=<name>`` and ``strong=<name>``, and the name of a run's folder.

    Call once before Hydra composes anything.

    Args:
        conf: the folder of conf files to start from.
        users: the user's folder, where another than ``./conf`` is given (``--config-dir``).

    Raises:
        UserError: there is no such folder.
    """
    if not (conf / "model").is_dir():
        raise UserError(
            f"there is no {conf}/model: this installation of w2sg lacks its configuration files; install it once more, "
            "or give your own folder, register(conf)"
        )
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from w2sg.config.defaults_source import register_defaults

    plugins.use(users)
    register_defaults()
    store = ConfigStore.instance()
    for model in sorted({*plugins.files("model"), *(file.stem for file in (conf / "model").glob("[!_]*.yaml"))}):
        for role in ("weak", "strong"):
            if f"{model}.yaml" not in store.repo.get(role, {}):
                store.store(group=role, name=model, node={"defaults": [{"/model@_here_": model}]})
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


# The precision is what of a trainer's settings changes what comes out.
NOT_IN_NAME = re.compile(
    r"^[+~]{0,2}(out|store|plan|logger|trainer(?!\.(?:precision|matmul))|hydra"
    r"|engine\.(?:tensor_parallel_size|gpu_memory_utilization))([.=@/]|$)"
)


def run_name(overrides: list[str]) -> str:
    """A run's folder from what was typed: the same command gets the same folder, on any devices and with any logger.

    >>> run_name(["seed=1", "loss=rkl", "trainer=ddp"])
    'loss=rkl,seed=1'
    >>> run_name([])
    'default'
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, kept = OverridesParser.create(), {}
    for typed in map(str, overrides):
        text = typed
        with contextlib.suppress(HydraException):  # one that cannot be parsed, or is a sweep, stays as it was typed
            override = parser.parse_override(typed)
            if not override.is_delete():  # as a sweep writes it for its jobs: 5e-6 is 5e-06 there
                text = f"{override.get_key_element()}={override.get_value_element_as_str()}"
        if not NOT_IN_NAME.match(text):
            kept[text.partition("=")[0].lstrip("+")] = text  # typed twice, the last one counts
    text = ",".join(sorted(kept.values())) or "default"
    readable = re.sub(r"[^\w.,=+-]+", "-", text)
    if readable == text and len(text) <= 120:
        return text
    return readable[:100] + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]


@contextlib.contextmanager
def known_mode(mode: Any) -> Iterator[None]:
    """Let Hydra begin with a mode that is known, and not compose the whole configuration once more to look it up."""
    from hydra._internal.hydra import Hydra

    usual = Hydra.get_mode
    Hydra.get_mode = lambda *_, **__: mode
    try:
        yield
    finally:
        Hydra.get_mode = usual


def tell_sweep(jobs: Sequence[Sequence[str]] | None) -> None:
    """Let the runs of a sweep, which may be processes, know how many they are and what they share.

    Args:
        jobs: the overrides of each run; None where there is no sweep, or nobody knows.
    """
    os.environ.pop(SWEEP, None)
    if jobs is not None:
        os.environ[SWEEP] = json.dumps({"runs": len(jobs), "common": sorted(set.intersection(*map(set, jobs)))})


def sweep_of(job: Any) -> Sweep | None:
    """The place of a run in its sweep; None for one that stands alone.

    Args:
        job: Hydra's configuration of the run.
    """
    from hydra.types import RunMode

    if job.mode != RunMode.MULTIRUN:
        return None
    known = json.loads(os.environ.get(SWEEP) or "{}")
    words = [word for word in job.overrides.task if word not in known.get("common", ())]
    apart = not str(job.launcher._target_).endswith(".BasicLauncher")
    return Sweep(int(job.job.num) + 1, known.get("runs"), " ".join(words), apart)
