"""Weights of finished fits: where they are, and how those that are not to be kept go while all else of a stage stays.

A fit whose weights are not kept is sealed with them, since what its run predicts reads them. When that run has
reported, they are given up: the manifest says so first, then the files go. The stage stays as sound as before.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from w2sg.errors import UserError
from w2sg.store.digests import forget
from w2sg.store.files import read_json, remove, write_json
from w2sg.store.soundness import MANIFEST, digest
from w2sg.store.store import Store

MODEL, SAVE = "model", "save"  # folder of a fit's stage; what its info says of how long that stays


def weights(folder: Path) -> Path:
    """The folder of a finished fit's weights.

    Raises:
        UserError: they were not kept; says how to have them.
    """
    manifest = _manifest(folder)
    if manifest.get("given_up"):
        role = manifest["info"][SAVE]["role"]
        raise UserError(
            f"{folder.name}: its weights were not kept (save=none in the run that trained it); start that run with "
            f"{role}.save=full, which trains it again and keeps them"
        )
    return folder / MODEL


def passing(folder: Path) -> bool:
    """Whether the weights of a finished fit go, or are gone, when its run has reported."""
    return _manifest(folder).get("info", {}).get(SAVE, {}).get("save") == "none"


def keep(store: Store, folder: Path) -> None:
    """Let weights stay that would go with another run's report."""
    if passing(folder):
        with store.lock(folder.name):
            manifest = read_json(folder / MANIFEST)
            if not manifest.get("given_up"):
                manifest["info"].pop(SAVE, None)
                _rewrite(folder, manifest)


def give_up(store: Store, folder: Path) -> None:
    """Remove weights that are not kept; those that a run keeps stay."""
    with store.lock(folder.name):
        if not passing(folder):
            return
        manifest = read_json(folder / MANIFEST)
        lost = [name for name in manifest["files"] if name.startswith(f"{MODEL}/")]
        if lost:
            manifest["files"] = {name: file for name, file in manifest["files"].items() if name not in lost}
            _rewrite(folder, {**manifest, "given_up": lost})
            forget(folder)
        remove(folder / MODEL)


def _manifest(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_json(folder / MANIFEST)
    return {}


def _rewrite(folder: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("check", None)
    write_json(folder / MANIFEST, {**manifest, "check": digest(manifest)})
