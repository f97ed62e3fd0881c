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

import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from w2sg import progress
from w2sg.config.programs import command
from w2sg.errors import UserError
from w2sg.store.digests import forget, of_stage
from w2sg.store.files import FAILING, FULL, TEMPORARY, UNWRITABLE, read_json, remove, sync, write_json
from w2sg.store.keys import REFERENCE, canonical, check_plain, differences, folder_name
from w2sg.store.soundness import DAMAGED, KEY, MANIFEST, PART, SCRATCH, digest, file_state, problem, verified

log = logging.getLogger(__name__)

GIVEN_UP = "its weights were not kept by the run that trained it, and are wanted now; it is trained again"
HOLDER = ".holder"  # a file beside a lock, which says who holds it
_holders: dict[Path, int] = {}  # lock file -> the thread of this process that holds it


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

    def __init__(self, store: Store, name: str, key: dict, whole: bool = False):
        self.path = store.root / folder_name(name, key)
        self.part = self.path.with_name(self.path.name + PART)
        self.scratch = self.part / SCRATCH
        self.cached = False
        self._store, self._key, self._open, self._whole = store, json.loads(canonical(key)), False, whole

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
        check_plain(info, "info")
        # The order is what makes a crash harmless: results, manifest and folders are on the disk before the one rename
        # that makes them a stage, and checkpoints go only after it.
        digests = of_stage(self.path, afresh=True)
        with self._store._writing(self.part):
            files = {}
            for file in self._results():
                name = file.relative_to(self.part).as_posix()
                files[name] = {"size": file.stat().st_size, "sha256": digests.of(file, name)}
                sync(file)
            manifest = {"sealed": time.time(), "info": info, "files": files}
            write_json(self.part / MANIFEST, {**manifest, "check": digest(manifest)})
            folders = {(self.part / name).parent for name in files} | {self.part}
            for folder in folders:
                with suppress(OSError):  # some network file systems cannot sync a folder
                    sync(folder)
            os.rename(self.part, self.path)
            with suppress(OSError):
                sync(self.path.parent)
        self._open, self.cached = False, True
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        verified[self.path] = [file_state(name, (self.path / name).lstat()) for name in [*files, MANIFEST]]
        digests.keep()
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
        if self.cached and self._whole and read_json(self.path / MANIFEST).get("given_up"):
            self.cached, wrong = False, GIVEN_UP
        return wrong

    def _repair(self, wrong: str) -> None:
        aside = self.path.with_name(self.path.name + DAMAGED)
        remove(aside)
        os.rename(self.path, aside)
        verified.pop(self.path, None)
        forget(self.path)
        if wrong == GIVEN_UP:
            remove(aside)
            log.info("%s: %s", self.path.name, wrong)
            return
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
    def claim(self, name: str, key: dict, whole: bool = False) -> Iterator[Claim]:
        """Take a stage in order to use it or, where it is not there, to make it.

        A sound stage is given at once, without a lock, so a store that may only be read serves what it has. Otherwise
        the stage's lock is taken, waiting for a process that is making the same stage, and kept until the context ends
        or the process dies. A damaged stage is moved aside with a warning that says what is wrong. Leaving without
        `seal`, by an exception or not, keeps part for the next claim. Different stages do not wait for each other.

        Args:
            name: what kind of stage, for people: letters, digits, ``_ - .``.
            key: everything that changes the result and nothing else; see `canonical`.
            whole: a stage whose weights were given up (`w2sg.store.weights`) is made again.

        Raises:
            TypeError: the key holds something that is not plain.
            UserError: a number in the key is not finite; the root cannot be written; or the disk became full, in here
                or inside the context, in which case part stays and the same command later goes on from it.
        """
        claim = Claim(self, name, key, whole)
        with self._reading():
            claim._look()  # without the lock: a store of which nothing can be written has none to take
        with self._not_full(claim.part):  # also around what the maker does: its disk is this one
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
                            yield claim  # with the lock held, which goes when this context ends or the process dies
                        finally:
                            claim._open = False
                        return
            shutil.rmtree(claim.path / SCRATCH, ignore_errors=True)  # the sealing process may have died just before
            yield claim

    def find(self, name: str, key: dict) -> Path | None:
        """The folder of a stage if it is sealed and sound, else None, with a warning where it is damaged.

        Takes no lock and changes no stage. Every file's sha256 is compared once per process, its size each time; see
        `problem` for what counts as its sha256.
        """
        claim = Claim(self, name, key)
        with self._reading():
            wrong = claim._look()
        if wrong:
            log.warning("%s is damaged: %s. It is not used, and made anew when next needed", claim.path.name, wrong)
        return claim.path if claim.cached else None

    def peek(self, name: str, key: dict, whole: bool = False) -> Claim:
        """A stage's folders and whether it is sealed, for processes that only follow one which has claimed it.

        Takes no lock, changes nothing, says nothing, and compares sizes only: hashing is for the process that claims.
        Whether to make the stage is likewise that one's to decide and tell; `cached` here may be older or newer.
        """
        claim = Claim(self, name, key, whole)
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
                self._wait(lock, file, folder)
            if wait:
                told = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
                with suppress(OSError):  # it serves only those who wait
                    file.with_suffix(HOLDER).write_text(json.dumps(told), encoding="utf-8")
        _holders[file] = threading.get_ident()
        try:
            yield
        finally:
            del _holders[file]
            if wait:
                with suppress(OSError):
                    file.with_suffix(HOLDER).unlink(missing_ok=True)
            lock.release()

    def _wait(self, lock: FileLock, file: Path, folder: str) -> None:
        """Wait for a lock, and say who holds it."""
        who, seconds = "another process", 0.0
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = read_json(file.with_suffix(HOLDER))
            where = "" if told["host"] == socket.gethostname() else f" on {told['host']}"
            who, seconds = f"process {told['process']}{where}", max(0.0, time.time() - told["since"])
        so_far = f" for {progress.clock(seconds)}" if seconds else ""
        log.info("%swaiting for %s, which has been making %s%s", progress.prefix(), who, folder, so_far)
        progress.count(f"waiting for {who}", waited=seconds)
        lock.acquire(poll_interval=0.2)
        progress.count("loading")

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
                f"{shutil.disk_usage(here).free / 1e9:.2f} GB free. Free some space (`{command('store', 'prune')}` "
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
