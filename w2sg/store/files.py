"""Files that hold what was meant or are not there: hashes, JSON in one piece, and what a disk can refuse."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

HALVES = re.compile("[\ud800-\udfff]")  # half of a pair, which UTF-8 has no bytes for: one byte of an odd path
TEMPORARY = ".w2sg-tmp"
FULL = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
SEEN = 120.0  # seconds until a machine sees what another has made: NFS keeps what it has looked up for 60
FAILING = {errno.EIO, errno.ESTALE}  # of a disk or a network file system


def hash_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, as 64 hex digits. Raises OSError where the file cannot be read."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: str | Path) -> BinaryIO:
    """A file to read; what is no file raises OSError and is not waited for, as a pipe without a writer would be."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return os.fdopen(descriptor, "rb")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that the file holds either its old content or all of the new one, whatever interrupts.

    Raises:
        TypeError, ValueError: the value is not JSON, which has no NaN and no infinity; the file is untouched.
    """
    path = Path(path)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    text = HALVES.sub(lambda half: f"\\u{ord(half[0]):04x}", text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ValueError naming the file where it is not JSON, OSError where it cannot be read."""
    with _open(path) as file:
        content = file.read()
    try:
        return json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is not JSON of ours: it is nested too deeply") from None


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seen(path: Path, seconds: float | None = None) -> bool:
    """Whether a path is there, as soon as it is, or that it is not after so many seconds (None: `SEEN`).

    A network file system may say for a minute that what another machine has just made is not there.
    """
    ends, pause = time.monotonic() + (SEEN if seconds is None else seconds), 0.01
    while not os.path.lexists(path):
        if time.monotonic() > ends:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        with contextlib.suppress(OSError):  # reading the folder makes the machine ask again
            os.listdir(path.parent)
    return True
