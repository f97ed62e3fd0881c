"""Whether a sealed stage is as it was made: its key, its manifest, and every file's size and hash."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from w2sg.errors import UserError
from w2sg.store.digests import of_stage, state
from w2sg.store.files import TEMPORARY, read_json
from w2sg.store.keys import REFERENCE, canonical, differences, folder_name

KEY, MANIFEST, SCRATCH = "key.json", "manifest.json", "scratch"
PART, DAMAGED = ".part", ".damaged"

verified: dict[Path, list] = {}  # folder -> its files' sizes and times when this process last hashed all of them


def problem(folder: Path, key: dict | None = None, hashes: bool = True, afresh: bool = False) -> str | None:
    """What is wrong with a sealed folder, in words, or None where it is sound.

    Files that the manifest does not name cannot have been part of the result, but what loads a model might read them:
    they are a fault, save hidden ones (.DS_Store, .nfs...), which nothing of ours reads.

    Args:
        key: what key.json must hold; without it, key.json must hold the key that the folder is named after.
        hashes: also compare every file's sha256, unless this process did and no size or time has changed since; the
            digest of a large file is that of an earlier process where its size, times and inode are what they were
            (`w2sg.store.digests`). Without it only presence and sizes are looked at.
        afresh: read every byte, whatever is known: what a disk has changed by itself has no new time.

    Raises:
        PermissionError: something in it may not be read, which says nothing about its soundness.
    """
    try:
        if not stat.S_ISREG(os.lstat(folder / MANIFEST).st_mode):
            return f"{MANIFEST} is not a file"
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.pop("check", None) != digest(manifest):
            return f"{MANIFEST} was changed"
        stored = read_json(folder / KEY)
        if not isinstance(stored, dict):
            return f"{KEY} is not a dict"
        if key is not None and canonical(stored) != canonical(key):
            fields = ", ".join(field for field, *_ in differences(stored, key)[:5])
            return f"{KEY} is not the key asked for: it differs in {fields}"
        name = folder.name.removesuffix(DAMAGED).rpartition("-")[0]
        if key is None and folder_name(name, stored) != folder.name.removesuffix(DAMAGED):
            return f"{KEY} is not the key that the folder is named after"
        if wrong := _not_of(manifest, folder):
            return wrong
        seen = []
        for file, expected in manifest["files"].items():
            status = os.lstat(folder / file)
            if not stat.S_ISREG(status.st_mode):
                return f"{file} is not a file"
            if status.st_size != expected["size"]:
                return f"{file} has {status.st_size} bytes instead of {expected['size']}"
            seen.append(file_state(file, status))
        seen.append(file_state(MANIFEST, os.lstat(folder / MANIFEST)))
        if hashes and (afresh or verified.get(folder) != seen):
            digests = of_stage(folder, afresh)
            found = {file: digests.of(folder / file, file) for file in manifest["files"]}
            digests.keep()
            if wrong := [file for file, expected in manifest["files"].items() if found[file] != expected["sha256"]]:
                verified.pop(folder, None)
                return f"{wrong[0]} has another sha256 than when it was written"
            verified[folder] = seen
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"{_within(error.filename, folder)} is missing"
    except OSError as error:
        return f"{_within(error.filename, folder)} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, UserError, RecursionError) as error:
        return str(error).replace(f"{folder}{os.sep}", "")
    return None


def file_state(name: str, status: os.stat_result) -> list:
    """A file of a stage, by name, and what changes with its content."""
    return [name, *state(status)]


def _not_of(manifest: dict, folder: Path) -> str | None:
    """How a manifest and what is in its folder differ in their files."""
    files, gone = manifest.get("files"), manifest.get("given_up", ())
    plain = isinstance(manifest.get("info"), dict) and isinstance(files, dict)
    if not plain or not all(isinstance(f, dict) and {"size", "sha256"} <= f.keys() for f in files.values()):
        return f"{MANIFEST} is not one of ours"
    if KEY not in files:
        return f"{MANIFEST} does not name {KEY}"
    if strange := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        return f"{MANIFEST} names {strange[0]}, which is elsewhere"
    for where, folders, names in os.walk(folder):
        inside = Path(where).relative_to(folder)
        if inside == Path() and SCRATCH in folders:
            folders.remove(SCRATCH)
        for name in folders:
            if (Path(where) / name).is_symlink():
                return f"{(inside / name).as_posix()} is a symbolic link"
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = (inside / name).as_posix()
            if file not in files and file != MANIFEST and file not in gone and not name.startswith("."):
                return f"{file} was not there when it was sealed"
    return None


def is_stage(folder: Path) -> bool:
    """Whether a folder is a stage, finished or not, sound or not, by what is in it: anybody may use such a name."""
    stage = folder.name.removesuffix(PART).removesuffix(DAMAGED)
    if folder.is_symlink() or not REFERENCE.fullmatch(stage):
        return False
    with suppress(OSError, ValueError, TypeError, UserError, RecursionError):
        if folder_name(stage.rpartition("-")[0], read_json(folder / KEY)) == stage:
            return True
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        manifest = read_json(folder / MANIFEST)
        if manifest.pop("check", None) == digest(manifest) and KEY in manifest["files"]:
            return True
    with suppress(OSError):  # begun a moment before its maker died
        return folder.name.endswith(PART) and all(file.name.endswith(TEMPORARY) for file in folder.iterdir())
    return False


def _within(file: Any, folder: Path) -> str:
    try:
        return Path(file).relative_to(folder).as_posix()
    except (TypeError, ValueError):
        return "a file"


def digest(manifest: dict) -> str:
    """Over the manifest itself, so that a changed byte in it is noticed too. Floats survive JSON exactly."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
