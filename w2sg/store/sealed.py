"""Files and folders that say themselves whether they are whole: their name ends in the hash of what is in them.

A file is written beside its place, on the same file system, brought to the disk and put in place by one rename, so it
is there as it was meant or not at all. What happens to it later, a hash tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from w2sg.store.files import TEMPORARY, hash_file, read_json, remove, sync

CONTENT = "content.json"  # of a sealed folder: the hash of each of its other files
HASH = re.compile(r"-([0-9a-f]{32})(\.[^-]*)?$")


class _Hashing:
    """A file that hashes what passes. The first error is kept: torch's writer tells another of its own."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.error = file, hashlib.sha256(), None

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def seal(folder: Path, stem: str, suffix: str, write: Callable[[Any], Any]) -> Path:
    """Write ``<stem>-<hash><suffix>``.

    Args:
        write: is given something with ``write(bytes)``.

    Raises:
        OSError: it could not be written; nothing new is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{stem}{suffix}.{os.getpid()}{TEMPORARY}"
    try:
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            try:
                write(hashing)
            except Exception:
                if hashing.error is not None:
                    raise hashing.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
        final = folder / f"{stem}-{hashing.hash.hexdigest()[:32]}{suffix}"
        os.replace(temporary, final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some network file systems cannot sync a folder
        sync(folder)
    return final


def seal_folder(written: Path, stem: str, suffix: str, files: dict[str, str], more: dict[str, Any]) -> Path:
    """Give a folder that was written beside its place the name ``<stem>-<hash><suffix>``.

    Args:
        files: the sha256 of each.
        more: kept with them in `CONTENT`, whose hash is in the name.

    Raises:
        OSError: nothing new is there by that name.
    """
    with open(written / CONTENT, "w", encoding="utf-8") as file:
        file.write(json.dumps({"files": files, **more}))
        file.flush()
        os.fsync(file.fileno())
    final = written.parent / f"{stem}-{hash_file(written / CONTENT)[:32]}{suffix}"
    remove(final)
    with suppress(OSError):  # some network file systems cannot sync a folder
        sync(written)
    os.replace(written, final)
    with suppress(OSError):
        sync(final.parent)
    return final


def unsound(file: Path) -> str | None:
    """What is wrong with a sealed file or folder, in words; None where it holds what was written."""
    match = HASH.search(file.name)
    if match is None:
        return "its name has no hash"
    folder = file.is_dir()
    try:
        if hash_file(file / CONTENT if folder else file)[:32] != match[1]:
            return "it has another hash than when it was written"
        if folder and (
            bad := [n for n, known in read_json(file / CONTENT)["files"].items() if hash_file(file / n) != known]
        ):
            return f"its file {bad[0]} has another hash than when it was written"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None


def sweep(folder: Path) -> None:
    """Remove what writes that were killed have left."""
    for file in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            remove(file)
