"""Digests of large files that were read before: a file of the same size, times and inode is not read again.

What is known of a folder's files stands in one small file of the store, ``<store>/.digests/<folder>.json``: name ->
size, times, inode and sha256. It is written whole, so any number of processes may read and write it; a damaged one is
made anew. Small files are always read: to remember them would cost as much.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from w2sg.store.files import hash_file, read_json, remove, write_json

MEMORY = ".digests"  # folder of a store
LARGE = 1 << 20  # bytes from which a file is worth remembering
# A file may be changed twice within a tick of its file system's clock (2 s on FAT, 10 ms on most), and looks the same
# after both. So a digest is believed later only if the file was that old when it was read.
GRAIN = 2_000_000_000  # ns
BLOB = re.compile(r"[0-9a-f]{64}")  # the hub's cache names large files by their sha256

_store: Path | None = None
_made = False  # whether the store is there or may be made
_process: dict[Path, dict[str, list[Any]]] = {}  # folder of a model -> what is known, where there is no store


def remember_in(store: str | Path | None, make: bool = False) -> None:
    """The store in which digests of models are remembered; with None this process alone knows them.

    Args:
        make: it may be made for that.
    """
    global _store, _made
    _made = make
    _store = None if store is None else Path(store).expanduser().absolute()


class Digests:
    """The sha256 of a folder's files.

    Args:
        memory: the file of what is known; None has no file.
        afresh: read every file, whatever is known of it.
        known: what is known where there is no file; is added to.
    """

    def __init__(self, memory: Path | None, afresh: bool = False, known: dict[str, list[Any]] | None = None):
        self.memory, self.afresh = memory, afresh
        self.known: dict[str, list[Any]] = ({} if known is None else known) if memory is None else _read(memory)
        self._changed = False

    def of(self, path: Path, name: str | None = None) -> str:
        """The sha256 of a file's bytes, as 64 hex digits, and ``name`` what it is remembered by.

        Raises:
            OSError: the file cannot be read.
        """
        name, begun, before = name or path.name, time.time_ns(), state(os.stat(path))
        if before[0] < LARGE:
            return hash_file(path)
        if not self.afresh and (known := self.known.get(name)) is not None and known[:-1] == before:
            return known[-1]
        digest = hash_file(path)
        self.known.pop(name, None)
        if state(os.stat(path)) == before and max(before[1:3]) + GRAIN < begun:
            self.known[name] = [*before, digest]
        self._changed = True
        return digest

    def keep(self) -> None:
        """Write down what was found. Where that cannot be done, the files are read again the next time."""
        if self.memory is not None and self._changed:
            with suppress(OSError):
                self.memory.parent.mkdir(parents=_made, exist_ok=True)
                write_json(self.memory, {"files": self.known, "check": _check(self.known)})
            self._changed = False


def of_stage(folder: Path, afresh: bool = False) -> Digests:
    """What is known of a stage's files, by their places in its folder."""
    return Digests(_of_stage(folder), afresh)


def forget(folder: Path) -> None:
    """Nothing is known of a stage that is gone."""
    with suppress(OSError):
        remove(_of_stage(folder))


def of_models(files: list[Path]) -> dict[str, str]:
    """The sha256 of files of a model's folder, by their names.

    Raises:
        OSError: one cannot be read.
    """
    if not files:
        return {}
    folder = Path(os.path.realpath(files[0].parent))
    place = f"model-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"
    memory = None if _store is None else _store / MEMORY / place
    digests = Digests(memory, known=_process.setdefault(folder, {}))
    found = {}
    for file in files:
        blob = Path(os.path.realpath(file))
        named = blob.parent.name == "blobs" and BLOB.fullmatch(blob.name)
        found[file.name] = blob.name if named else digests.of(file)
    digests.keep()
    return found


def state(status: os.stat_result) -> list[int]:
    """What changes with a file's content: a time can be set back, but not that of the change itself."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _of_stage(folder: Path) -> Path:
    return folder.parent / MEMORY / f"{folder.name}.json"


def _read(memory: Path) -> dict[str, list[Any]]:
    """What is known; nothing where the file is not there, or is not as it was written."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = read_json(memory)
        if content["check"] == _check(content["files"]):
            return content["files"]
    return {}


def _check(known: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
