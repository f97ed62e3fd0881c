"""What a store holds, why a stage is what it is, what can go, what is whole: `w2sg store list|why|prune|verify`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import Timeout
from rich.filesize import decimal

from w2sg.console import Plain
from w2sg.errors import UserError
from w2sg.store.digests import forget
from w2sg.store.files import read_json, remove
from w2sg.store.keys import REFERENCE, flatten
from w2sg.store.soundness import DAMAGED, KEY, MANIFEST, PART, is_stage, problem
from w2sg.store.store import Store

State = Literal["damaged", "unfinished", "finished"]  # the later ones first where a stage has several folders
STATES = get_args(State)
NAMED = ("model.name", "data.name")  # fields that say most about a stage, where its key has them


@dataclass
class Row:
    """One folder of a store.

    Attributes:
        folder: where it is.
        stage: `<name>-<hash>`, without the ending of an unfinished or damaged folder.
        state: "finished", "unfinished" (being made, or its maker died) or "damaged".
        size: bytes of its files.
        age: seconds since its newest file was written.
        locked: a living process is making it; None where this user may not find out.
        seconds: how long the making took, where it is finished and says so.
        key: what it was made for; None where that cannot be read.
        problem: what is wrong with it, where it is damaged.
        summary: its key in a few words.
    """

    folder: Path
    stage: str
    state: State
    size: int
    age: float
    locked: bool | None
    seconds: float | None
    key: dict | None
    problem: str | None
    summary: str = ""

    @property
    def name(self) -> str:
        return self.stage.rpartition("-")[0]

    @property
    def hash(self) -> str:
        return self.stage.rpartition("-")[2]


def rows(root: str | Path) -> list[Row]:
    """Every stage of a store, finished or not, sorted by name and then oldest first.

    Presence and sizes of files are looked at, not their sha256, which would read everything there is: that is for
    `verify`. What is not a stage is left out, and a root that is not there has none.
    """
    store = Store(root)
    stages = [row for folder in _folders(store.root) if (row := _row(store, folder))]
    for row in stages:
        row.summary = _summary(row, [r for r in stages if r.name == row.name])
    return sorted(stages, key=lambda row: (row.name, -row.age))


def print_list(root: str | Path, console: Plain) -> None:
    """A table of every stage, with what is wrong with the damaged ones below it, and the totals."""
    stages = rows(root)
    if not stages:
        console.say(f"There are no stages in {root}.")
        return
    lines = [("stage", "hash", "state", "size", "age", "took")]
    for row in stages:
        took = "" if row.seconds is None else _duration(row.seconds)
        state = "being made" if row.locked and row.state == "unfinished" else row.state
        lines.append((row.name, row.hash, state, decimal(row.size), _duration(row.age), took))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    apart = sum(widths) + 2 * len(widths) + 40 > console.width  # each key has a line of its own
    for cells, key in zip(lines, ["" if apart else "key", *(row.summary for row in stages)], strict=True):
        line = "  ".join(
            cell.rjust(w) if n > 2 else cell.ljust(w) for n, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        console.say(line if apart else f"{line}  {key}")
        if apart and key:
            console.say(f"    {key}")
    for row in stages:
        if row.problem:
            console.say(f"{row.folder.name} is damaged: {row.problem}")
    counts = Counter(row.state for row in stages)
    words = ", ".join(f"{counts[state]} {state}" for state in reversed(STATES) if counts[state])
    console.say(f"{words}; {decimal(sum(row.size for row in stages))}")


def print_why(root: str | Path, key_prefix: str, console: Plain) -> None:
    """What a stage was made for, what it was made from, and how it differs from the nearest other one of its name.

    Args:
        key_prefix: the stage's folder, or its name, which is the newest of that name, or the beginning of its hash or
            name, if that is enough to tell it.

    Raises:
        UserError: no stage begins like that, or more than one; the candidates are listed.
    """
    stages = rows(root)
    row, others = _choose(stages, Path(key_prefix).name, root)
    if others:
        console.say(f"{len(others) + 1} stages are called {row.name}; this is the newest. The others:")
        for line in _briefly(others):
            console.say(line)
    state = row.state + (f": {row.problem}" if row.problem else ", being made now" if row.locked else "")
    console.say(f"{row.stage} ({state})")
    if row.key is None:
        console.say(f"Its {KEY} cannot be read.")
        return
    _say_fields(list(flatten(row.key).items()), console)
    console.say("Made from:" if _upstream(row.key) else "Made from no other stage.")
    states = _best(stages)
    for depth, stage in _ancestors(row.stage, states, {row.stage}):
        console.say(f"{'  ' * depth}{stage} ({states[stage].state if stage in states else 'not in the store'})")
    nearest = Store(root).nearest(row.name, row.key)
    if nearest is None:
        console.say(f"There is no other finished stage named {row.name}.")
        return
    console.say(f"The nearest other one is {nearest[0]}; it has, and this one has:")
    _say_fields(nearest[1], console)


def verify(root: str | Path, console: Plain) -> bool:
    """Read every byte of every finished stage and compare it with what was written; whether all are as they were.

    Runs believe a large file whose size, times and inode have not changed. What a disk changes by itself has no new
    time, and is found here; the next run that needs such a stage makes it anew.
    """
    stages = [row for row in rows(root) if not row.folder.name.endswith((PART, DAMAGED))]
    damaged = 0
    for row in stages:
        try:
            wrong = row.problem or problem(row.folder, afresh=True)
        except PermissionError as error:
            wrong = f"{error.filename} cannot be read ({error.strerror})"
        if wrong:
            damaged += 1
            console.say(f"{row.folder.name} is damaged: {wrong}. It is made anew when next needed")
    size = decimal(sum(row.size for row in stages))
    console.say(f"{len(stages) - damaged} of {len(stages)} finished stages are as they were written; {size} read")
    return not damaged


def _say_fields(lines: Sequence[tuple[str, *tuple[Any, ...]]], console: Plain) -> None:
    width = max((len(field) for field, *_ in lines), default=0)
    for field, *values in lines:
        console.say("  ".join(["", f"{field:<{width}}", *map(repr, values)]))


def used_stages(out: Path) -> set[str]:
    """Stages that a report below ``out`` names."""
    if not out.is_dir():
        raise UserError(
            f"out: there is no folder {out}, so nothing says which stages are in use; name the folder of the runs"
        )
    used: set[str] = set()
    for file in out.rglob("report.json"):
        try:
            used |= {stage["key"] for stage in read_json(file)["stages"]}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{file} is no report of a run ({error!r}), so nothing says which stages it uses; correct or remove it"
            ) from error
    return used


def prune(root: str | Path, used: set[str], apply: bool, console: Plain) -> int:
    """Remove what no run needs: unfinished stages that nobody is making, damaged ones, and finished ones out of use.

    In use are the stages in used, those being made, and all that these were made from. What a living process is
    making is never removed; but what it finished before, and neither names in the key of its present stage nor has
    reported yet, is not known to be in use: prune when no job is at work, which the output reminds of.

    A folder is removed only if what is in it says that it is a stage: its key, or its manifest.

    Args:
        used: the `<name>-<hash>` of every stage that a run to be kept names.
        apply: remove; otherwise only say what would be.

    Returns:
        Bytes that were, or would be, freed.

    Raises:
        UserError: the store cannot be written.
    """
    store, stages, freed = Store(root), rows(root), 0
    best = _best(stages)
    locked = {row.stage: row.locked for row in stages if row.locked is not False}
    keep = used | set(locked)
    for stage in sorted(keep):
        _ancestors(stage, best, keep)
    for row in stages:
        if not is_stage(row.folder):
            console.say(f"kept {row.folder.name}: it has a stage's name and is none; remove it yourself if it may go")
            continue
        if row.stage in locked or (row.state == "finished" and row.stage in keep):
            continue
        reason = {"finished": "no run uses it", "unfinished": "nobody is making it", "damaged": row.problem}[row.state]
        if apply:
            try:
                with store.lock(row.stage, wait=False):
                    remove(row.folder)
                    forget(row.folder)
            except Timeout:
                console.say(f"kept {row.folder.name}: a process has just begun to make it")
                continue
            except OSError as error:
                console.say(f"could not remove {row.folder.name}: {error}")
                continue
        freed += row.size
        console.say(f"{'removed' if apply else 'would remove'} {row.folder.name} ({decimal(row.size)}): {reason}")
    for stage, sure in sorted(locked.items()):
        console.say(
            f"kept {stage}, which {'is' if sure else 'may be'} being made, and what it is made from. Other stages that "
            "its job has finished and not yet reported count as unused: better prune when it is done.",
        )
    console.say(f"{'freed' if apply else 'would free'} {decimal(freed)}")
    return freed


# ---------------------------------------------------------------------------------------------------------------------


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise UserError(f"The store {root} cannot be read: '{error.strerror}'. Ask its owner for access.") from error


def _row(store: Store, folder: Path) -> Row | None:
    stage = folder.name.removesuffix(PART).removesuffix(DAMAGED)
    if not REFERENCE.fullmatch(stage):
        return None
    wrong, seconds, key = None, None, None
    if not folder.name.endswith(PART):
        try:
            wrong = problem(folder, hashes=False)
        except PermissionError as error:
            wrong = f"{error.filename} cannot be read ({error.strerror})"
        if wrong is None and folder.name.endswith(DAMAGED):
            wrong = "it was found damaged and moved aside"
    state: State = "unfinished" if folder.name.endswith(PART) else "damaged" if wrong else "finished"
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        key = read_json(folder / KEY)
        if state == "finished":
            took = read_json(folder / MANIFEST)["info"].get("seconds")
            seconds = took if isinstance(took, int | float) else None
    size, newest = _measure(folder)
    locked = store.locked(stage)
    key = key if isinstance(key, dict) else None
    return Row(folder, stage, state, size, max(0.0, time.time() - newest), locked, seconds, key, wrong)


def _measure(folder: Path) -> tuple[int, float]:
    """Bytes and the newest time of the files below, which a living process may be changing."""
    states = []
    for path in [os.path.join(where, file) for where, _, files in os.walk(folder) for file in files] or [str(folder)]:
        with suppress(FileNotFoundError):
            states.append(os.lstat(path))
    return sum(state.st_size for state in states), max((state.st_mtime for state in states), default=0.0)


def _summary(row: Row, namesakes: list[Row]) -> str:
    """Model and data where the key names them, else its first values; then what sets it apart from its namesakes."""
    if row.key is None:
        return ""
    flat = {field: value for field, value in flatten(row.key).items() if not isinstance(value, dict | list)}
    words = [_short(flat[field]) for field in NAMED if field in flat]
    others = [flatten(other.key) for other in namesakes if other.key is not None and other.stage != row.stage]
    apart = [
        field
        for field, value in flat.items()
        if field not in NAMED
        and not (isinstance(value, str) and REFERENCE.fullmatch(value))
        and any(repr(other.get(field)) != repr(value) for other in others)
    ]
    fields = apart if words or apart else list(flat)
    return ", ".join([*words, *(f"{field}={_short(flat[field])}" for field in fields[:3])])


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 32 else f"{text[:31]}…"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _best(rows: list[Row]) -> dict[str, Row]:
    """One row per stage: the finished one, else the unfinished, else the damaged."""
    return {row.stage: row for row in sorted(rows, key=lambda row: STATES.index(row.state))}


def _choose(rows: list[Row], prefix: str, root: str | Path) -> tuple[Row, list[Row]]:
    """The stage that is meant, and the older ones where it was called by a name that several have."""
    stages = _best(rows)
    exact = [row for row in rows if row.folder.name == prefix != row.stage]
    begin = [row for row in stages.values() if row.stage.startswith(prefix) or row.hash.startswith(prefix)]
    named = [row for row in begin if row.name == prefix]
    candidates = exact[:1] or [row for row in begin if row.stage == prefix] or named or begin
    if candidates and (len(candidates) == 1 or candidates == named):
        *others, newest = sorted(candidates, key=lambda row: -row.age)
        return newest, others
    what = f"{prefix!r} could be any of these stages" if candidates else f"No stage of {root} begins with {prefix!r}"
    lines = _briefly(candidates or list(stages.values()))
    raise UserError("\n".join([what + (":" if lines else "; it has none"), *lines]))


def _briefly(rows: list[Row]) -> list[str]:
    """Stages by name, a line each, thirty of them."""
    listed = sorted(rows, key=lambda row: row.stage)
    more = [f"  … and {len(listed) - 30} more"] if len(listed) > 30 else []
    return [*(f"  {row.stage}  {row.summary}".rstrip() for row in listed[:30]), *more]


def _upstream(key: dict) -> list[str]:
    """The stages that a key names, in order, each once."""
    values = [value for value in flatten(key).values() if isinstance(value, str)]
    return list(dict.fromkeys(value for value in values if REFERENCE.fullmatch(value)))


def _ancestors(stage: str, best: dict[str, Row], seen: set[str], depth: int = 1) -> list[tuple[int, str]]:
    """All that a stage was made from and seen lacks, ``(depth, stage)``; each once, under the first that names it."""
    row, ancestors = best.get(stage), []
    for above in _upstream(row.key) if row and row.key else []:
        if above not in seen:
            seen.add(above)
            ancestors += [(depth, above), *_ancestors(above, best, seen, depth + 1)]
    return ancestors
