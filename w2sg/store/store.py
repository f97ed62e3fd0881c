"""Stage outputs kept by content: a folder per stage, named by a hash of everything that changes its result.

    with Store("outputs/store").claim("weak", key) as claim:
        if not claim.cached:
            ...                                # write results into claim.part, checkpoints into claim.scratch
            claim.seal({"seconds": 12.5})
    load(claim.path)

A stage is `<root>/<name>-<hash>`, made in `<root>/<name>-<hash>.part` under a lock and put in place by one rename. So a
folder without `.part` is complete, and a job that died leaves its `.part` for the next one to go on from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from w2sg.errors import UserError

log = logging.getLogger(__name__)

KEY, MANIFEST, SCRATCH = "key.json", "manifest.json", "scratch"
PART, DAMAGED = ".part", ".damaged"
REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)-(?P<hash>[0-9a-f]{16})")  # how a key names another stage
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
FAILING = {errno.EIO, errno.ESTALE}  # of a disk or a network file system

_verified: dict[Path, list] = {}  # folder -> its files' sizes and times when this process last hashed all of them
_holders: dict[Path, int] = {}  # lock file -> the thread of this process that holds it

# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


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
    text = HALVES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------


def canonical(key: dict) -> str:
    """The one text of a key, which its hash is taken from: JSON, sorted fields, no spaces, ASCII.

    The order of fields is irrelevant. Types are not: ``1``, ``1.0`` and ``True`` are three different values, and so are
    ``0.0`` and ``-0.0``.

    Raises:
        TypeError: a value is not exactly a str, int, float, bool, None, list or dict; its dotted field is named.
        UserError: a number is not finite, or a text is not valid Unicode; its dotted field is named.
    """
    if type(key) is not dict:
        raise TypeError(f"a stage key is a dict, not {key!r}")
    _check(key, "")
    return json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check(value: Any, field: str) -> None:
    """Exact types only: a subclass (a numpy float, an enum) may print alike today and differently tomorrow."""
    kind = type(value)
    if kind is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise TypeError(f"stage key: {field or 'the key'} has the field name {name!r}, which is not text")
            _check(name, field and f"{field}.<field name>")
            _check(item, f"{field}.{name}" if field else name)
    elif kind is list:
        for i, item in enumerate(value):
            _check(item, f"{field}.{i}")
    elif kind is float:
        if not math.isfinite(value):
            raise UserError(f"{field} is {value}: give a finite number")
    elif kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{field} is not valid Unicode: {value!r}") from None
    elif value is not None and kind not in (int, bool):
        raise TypeError(
            f"stage key: {field or 'the key'} is a {kind.__module__}.{kind.__qualname__}; "
            "only str, int, float, bool, None, list and dict can be in a key"
        )


def folder_name(name: str, key: dict) -> str:
    """`<name>-<hash>`: the folder of a stage, and how the keys of later stages name it. Raises as `canonical` does."""
    folder = f"{name}-{hashlib.sha256(canonical(key).encode()).hexdigest()[:16]}"
    if not REFERENCE.fullmatch(folder):
        raise ValueError(f"a stage cannot be named {name!r}: use letters, digits, '_', '-' and '.'")
    return folder


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()  # stands for the value of a field that a key does not have


def flatten(key: Any, field: str = "") -> dict[str, Any]:
    """A key as ``{dotted field: value}``; items of lists are named by their position. Empty lists and dicts stay."""
    if not (isinstance(key, dict | list) and key):
        return {field: key} if field else {}
    flat: dict[str, Any] = {}
    for name, value in key.items() if isinstance(key, dict) else enumerate(key):
        flat |= flatten(value, f"{field}.{name}" if field else str(name))
    return flat


def differences(theirs: dict, ours: dict) -> list[tuple[str, Any, Any]]:
    """The fields in which two keys differ, ``(dotted field, theirs, ours)``, `ABSENT` for a field one does not have."""
    a, b = flatten(theirs), flatten(ours)
    pairs = [(field, a.get(field, ABSENT), b.get(field, ABSENT)) for field in dict.fromkeys([*b, *a])]
    return [(field, x, y) for field, x, y in pairs if repr(x) != repr(y)]  # 1, 1.0 and True differ


# ---------------------------------------------------------------------------------------------------------------------
# Soundness
# ---------------------------------------------------------------------------------------------------------------------


def problem(folder: Path, key: dict | None = None, hashes: bool = True) -> str | None:
    """What is wrong with a sealed folder, in words, or None where it is sound.

    Files that the manifest does not name cannot have been part of the result, but what loads a model might read them:
    they are a fault, save hidden ones (.DS_Store, .nfs...), which nothing of ours reads.

    Args:
        key: what key.json must hold; without it, key.json must hold the key that the folder is named after.
        hashes: also compare every file's sha256, unless this process did and no size or time has changed since;
            without it only presence and sizes are looked at.

    Raises:
        PermissionError: something in it may not be read, which says nothing about its soundness.
    """
    try:
        if not stat.S_ISREG(os.lstat(folder / MANIFEST).st_mode):
            return f"{MANIFEST} is not a file"
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.pop("check", None) != _digest(manifest):
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
            seen.append(_mark(file, status))
        seen.append(_mark(MANIFEST, os.lstat(folder / MANIFEST)))
        if hashes and _verified.get(folder) != seen:
            for file, expected in manifest["files"].items():
                if hash_file(folder / file) != expected["sha256"]:
                    return f"{file} has another sha256 than when it was written"
            _verified[folder] = seen
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"{_within(error.filename, folder)} is missing"
    except OSError as error:
        return f"{_within(error.filename, folder)} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, UserError, RecursionError) as error:
        return str(error).replace(f"{folder}{os.sep}", "")
    return None


def _mark(name: str, status: os.stat_result) -> tuple[str, int, int, int, int]:
    """What changes with a file's content: a time can be set back, but not that of the change itself."""
    return name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _not_of(manifest: dict, folder: Path) -> str | None:
    """How a manifest and what is in its folder differ in their files."""
    files = manifest.get("files")
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
            if file not in files and file != MANIFEST and not name.startswith("."):
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
        if manifest.pop("check", None) == _digest(manifest) and KEY in manifest["files"]:
            return True
    with suppress(OSError):  # begun a moment before its maker died
        return folder.name.endswith(PART) and all(file.name.endswith(TEMPORARY) for file in folder.iterdir())
    return False


def _within(file: Any, folder: Path) -> str:
    try:
        return Path(file).relative_to(folder).as_posix()
    except (TypeError, ValueError):
        return "a file"


def _digest(manifest: dict) -> str:
    """Over the manifest itself, so that a changed byte in it is noticed too. Floats survive JSON exactly."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Store
# ---------------------------------------------------------------------------------------------------------------------


class Claim:
    """One stage as its maker sees it; `Store.claim` and `Store.peek` give it.

    Attributes:
        path: the final folder; exists once the stage is sealed.
        part: the work folder, which is sealed as it is. While a claim is open and not cached it exists, holds key.json,
            and holds whatever an earlier job that died had written.
        scratch: a folder inside part for what only serves resuming (checkpoints). It is never sealed, and is removed
            only after the stage is in place, so that dying at any moment loses nothing.
        cached: the stage is sealed and sound: read path, make nothing.
    """

    def __init__(self, store: Store, name: str, key: dict):
        self.path = store.root / folder_name(name, key)
        self.part = self.path.with_name(self.path.name + PART)
        self.scratch = self.part / SCRATCH
        self.cached = False
        self._store, self._key, self._open = store, json.loads(canonical(key)), False

    @property
    def info(self) -> dict:
        """What `seal` was given when the stage was made. Raises OSError or ValueError where it is not sealed."""
        return read_json(self.path / MANIFEST)["info"]

    def seal(self, info: dict) -> Path:
        """Declare the stage finished: write its manifest, bring every file to the disk, put it in place by one rename.

        Args:
            info: facts about the making, not about the result: seconds, tokens. Plain values, as in a key.

        Returns:
            The final folder.

        Raises:
            UserError: the disk is full or not writable; part stays, and the same command later goes on from it.
            ValueError: part holds a symbolic link, which would point elsewhere after the rename or another day.
        """
        if not self._open:
            raise RuntimeError(f"{self.path.name}: seal() comes once, inside the claim that makes the stage")
        _check(info, "info")
        with self._store._writing(self.part):
            files = {}
            for file in self._results():
                name = file.relative_to(self.part).as_posix()
                files[name] = {"size": file.stat().st_size, "sha256": hash_file(file)}
                _sync(file)
            manifest = {"sealed": time.time(), "info": info, "files": files}
            write_json(self.part / MANIFEST, {**manifest, "check": _digest(manifest)})
            folders = {(self.part / name).parent for name in files} | {self.part}
            for folder in folders:
                with suppress(OSError):  # some network file systems cannot sync a folder
                    _sync(folder)
            os.rename(self.part, self.path)
            with suppress(OSError):
                _sync(self.path.parent)
        self._open, self.cached = False, True
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        _verified[self.path] = [_mark(name, (self.path / name).lstat()) for name in [*files, MANIFEST]]
        return self.path

    def _results(self) -> list[Path]:
        """The files to seal, sorted; leftovers of interrupted writes of ours are removed on the way."""
        results = []
        for folder, folders, files in os.walk(self.part):
            if Path(folder) == self.part and SCRATCH in folders:
                folders.remove(SCRATCH)
            for path in (Path(folder, name) for name in [*folders, *files]):
                if path.is_symlink():
                    raise ValueError(f"{path} is a symbolic link; a stage must hold its own files")
            for path in (Path(folder, name) for name in files):
                if path.name.endswith(TEMPORARY):
                    path.unlink()
                elif path != self.part / MANIFEST:
                    results.append(path)
        return sorted(results)

    def _look(self, hashes: bool = True) -> str | None:
        """Set cached; return what is wrong where there is a folder and it is not sound."""
        wrong = problem(self.path, self._key, hashes) if os.path.lexists(self.path) else None
        self.cached = wrong is None and self.path.is_dir()
        return wrong

    def _repair(self, wrong: str) -> None:
        aside = self.path.with_name(self.path.name + DAMAGED)
        remove(aside)
        os.rename(self.path, aside)
        _verified.pop(self.path, None)
        log.warning("%s is damaged: %s. It is made anew; what was there is now %s", self.path.name, wrong, aside.name)

    def _prepare(self) -> None:
        try:
            fault = None if canonical(read_json(self.part / KEY)) == canonical(self._key) else "is for another key"
        except (OSError, ValueError, TypeError, UserError, RecursionError):
            fault = f"has no readable {KEY}"
        if fault:
            if os.path.lexists(self.part):
                log.warning("%s %s and is started afresh", self.part.name, fault)
                remove(self.part)
            self.part.mkdir()
            write_json(self.part / KEY, self._key)
        (self.part / MANIFEST).unlink(missing_ok=True)  # of a sealing that did not reach its rename
        self.scratch.mkdir(exist_ok=True)
        self._open = True


def _file_lock(file: Path) -> FileLock:
    try:
        return FileLock(file, thread_local=False, fallback_to_soft=False)  # such a lock would outlive a kill
    except TypeError:  # an older filelock, which has no such fallback
        return FileLock(file, thread_local=False)


class Store:
    """A folder of stages.

    Args:
        root: made when the first stage is; may be shared by any number of processes and machines whose file system has
            working locks.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().absolute()

    @contextmanager
    def claim(self, name: str, key: dict) -> Iterator[Claim]:
        """Take a stage in order to use it or, where it is not there, to make it.

        A sound stage is given at once, without a lock, so a store that may only be read serves what it has. Otherwise
        the stage's lock is taken, waiting for a process that is making the same stage, and kept until the context ends
        or the process dies. A damaged stage is moved aside with a warning that says what is wrong. Leaving without
        `seal`, by an exception or not, keeps part for the next claim. Different stages do not wait for each other.

        Args:
            name: what kind of stage, for people: letters, digits, ``_ - .``.
            key: everything that changes the result and nothing else; see `canonical`.

        Raises:
            TypeError: the key holds something that is not plain.
            UserError: a number in the key is not finite; the root cannot be written; or the disk became full, in here
                or inside the context, in which case part stays and the same command later goes on from it.
        """
        claim = Claim(self, name, key)
        with self._reading():
            claim._look()
        with self._not_full(claim.part):
            if not claim.cached:
                with self.lock(claim.path.name):
                    with self._writing(claim.part):
                        wrong = claim._look()  # again: another process may have sealed it while this one waited
                        if wrong:
                            claim._repair(wrong)
                        if not claim.cached:
                            claim._prepare()
                    if not claim.cached:
                        try:
                            yield claim
                        finally:
                            claim._open = False
                        return
            shutil.rmtree(claim.path / SCRATCH, ignore_errors=True)  # the sealing process may have died just before
            yield claim

    def find(self, name: str, key: dict) -> Path | None:
        """The folder of a stage if it is sealed and sound, else None, with a warning where it is damaged.

        Takes no lock and changes nothing. Every file's sha256 is compared once per process, its size each time.
        """
        claim = Claim(self, name, key)
        with self._reading():
            wrong = claim._look()
        if wrong:
            log.warning("%s is damaged: %s. It is not used, and made anew when next needed", claim.path.name, wrong)
        return claim.path if claim.cached else None

    def peek(self, name: str, key: dict) -> Claim:
        """A stage's folders and whether it is sealed, for processes that only follow one which has claimed it.

        Takes no lock, changes nothing, says nothing, and compares sizes only: hashing is for the process that claims.
        Whether to make the stage is likewise that one's to decide and tell; `cached` here may be older or newer.
        """
        claim = Claim(self, name, key)
        with self._reading():
            claim._look(hashes=False)
        return claim

    def nearest(self, name: str, key: dict) -> tuple[str, list[tuple[str, Any, Any]]] | None:
        """The other sealed stage of that name whose key differs in the fewest fields: why a stage was not cached.

        Returns:
            Its folder's name and the fields that differ, ``(dotted field, theirs, ours)`` (see `differences`); of
            equally near ones the newest. None where there is no other.
        """
        ours, best = folder_name(name, key), None
        for folder in self.root.glob(f"{name}-*"):
            match = REFERENCE.fullmatch(folder.name)
            if not match or match["name"] != name or folder.name == ours:
                continue
            with suppress(OSError, ValueError, TypeError, UserError, RecursionError):
                when = os.stat(folder / MANIFEST).st_mtime_ns
                theirs = read_json(folder / KEY)
                if folder_name(name, theirs) == folder.name:
                    differing = differences(theirs, key)
                    rank = (-len(differing), when, folder.name)
                    best = max(best or (rank, differing), (rank, differing), key=lambda item: item[0])
        return best and (best[0][2], best[1])

    @contextmanager
    def lock(self, folder: str, wait: bool = True) -> Iterator[None]:
        """Hold the lock of the stage `<name>-<hash>`. The kernel lets go of it when the process dies, however it dies.

        Raises:
            filelock.Timeout: another process, or another claim of this one, holds it, and wait is False.
            UserError: the root cannot be written, or its file system has no locks.
        """
        file = self.root / ".locks" / f"{folder}.lock"
        with self._writing(file), self._locking(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = _file_lock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise
                if _holders.get(file) == threading.get_ident():
                    raise RuntimeError(f"{folder} is claimed inside its own claim, which would wait for ever") from None
                log.info("waiting for another process that is making %s", self.root / folder)
                lock.acquire(poll_interval=0.2)
        _holders[file] = threading.get_ident()
        try:
            yield
        finally:
            del _holders[file]
            lock.release()

    @contextmanager
    def _locking(self, file: Path) -> Iterator[None]:
        """Explain a lock that cannot be tried."""
        try:
            yield
        except NotImplementedError as error:  # filelock's word for ENOSYS
            raise self._lockless(file, "Function not implemented") from error
        except OSError as error:
            if file.is_dir() or file.is_symlink() or (file.exists() and not file.is_file()):
                raise UserError(
                    f"{file} should be an empty file, the lock of a stage, and is something else; remove it"
                ) from error
            if isinstance(error, Timeout) or error.errno in FULL | UNWRITABLE:
                raise
            raise self._lockless(file, error.strerror or str(error)) from error

    def _lockless(self, file: Path, why: str) -> UserError:
        return UserError(
            f"The store {self.root} cannot be locked ({file.name}: {why}): its file system has no working flock, as "
            "some network file systems are mounted. Set `store=` to a folder on a local disk."
        )

    def locked(self, folder: str) -> bool | None:
        """Whether a living process holds the lock of `<name>-<hash>`; None where this user may not try the lock."""
        if not (self.root / ".locks" / f"{folder}.lock").exists():
            return False
        try:
            with self.lock(folder, wait=False):
                return False
        except Timeout:
            return True
        except UserError:
            return None

    @contextmanager
    def _not_full(self, path: Path) -> Iterator[None]:
        """Explain a full disk. Libraries in Rust or C++ report it as an error of their own, with the system's words."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in FULL
            if not full and not any(os.strerror(number) in str(error) for number in FULL):
                raise
            here = next(folder for folder in [self.root, *self.root.parents] if folder.exists())
            raise UserError(
                f"The disk became full while making {path} ({error}). The store's disk has "
                f"{shutil.disk_usage(here).free / 1e9:.2f} GB free. Free some space (`python evaluate.py store=prune` "
                "says what the store can do without) and give the same command again: it goes on from what is done. "
                "Or set `store=` to a folder on another disk."
            ) from error

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Explain what can go wrong in our own writes."""
        with self._not_full(path):
            try:
                yield
            except OSError as error:
                if error.errno in FAILING:
                    raise UserError(
                        f"The store's disk failed while making {path} ({error}). What is finished is kept; give the "
                        "same command again when it works, or set `store=` to a folder on another disk."
                    ) from error
                if error.errno not in UNWRITABLE:
                    raise
                raise UserError(
                    f"The store {self.root} cannot be written: {path} gave '{error.strerror}'. "
                    "Set `store=` to a folder that you may write to."
                ) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise UserError(
                f"The store {self.root} cannot be read: {error.filename} gave '{error.strerror}'. "
                "Ask its owner for access, or set `store=` to a folder of your own."
            ) from error
