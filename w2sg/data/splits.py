"""From rows to three splits that share no prompt: ground_truth, transfer and test."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from w2sg.data import also
from w2sg.data.examples import Example
from w2sg.data.good_rows import read_rows
from w2sg.data.messages import Dialogue
from w2sg.data.table import Groups, Table, uniform
from w2sg.errors import UserError

log = logging.getLogger(__name__)
SPLITS = ("ground_truth", "transfer", "test")
UNREAD = {"name", "sizes", "split_seed", "zero_shot", "noise", "also"}  # by what reads rows
CHANCE = 20  # rows of which all may be of one class by chance


def typed_name(split: str) -> str:
    """What a split is called in options and files: ground_truth, as keys call it, is typed weak_train."""
    return "weak_train" if split == "ground_truth" else split


@dataclass(frozen=True)
class Tables:
    """The three splits, what was dropped on the way (``report``), and other test sets by name (``also``)."""

    ground_truth: Table
    transfer: Table
    test: Table
    report: dict[str, Any]
    also: dict[str, Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Levels:
    """Easy to hard: which splits have the rows of little difficulty, and which the others.

    Attributes:
        column: its name; None where rows are not told apart. most: of the easy ones. easy: the splits that have these.
    """

    column: str | None = None
    most: float = math.inf
    easy: tuple[str, ...] = SPLITS

    @staticmethod
    def of(options: dict[str, Any] | None) -> Levels:
        if options is None:
            return Levels()
        return Levels(options["column"], options["most"], tuple(options["easy"]))

    def of_split(self, name: str, rows: list[Example]) -> list[Example]:
        """Those of the split's difficulty."""
        return [row for row in rows if self.column is None or (row.difficulty <= self.most) == (name in self.easy)]

    def why(self, name: str) -> str:
        """What rows of the split are, for a message."""
        if self.column is None:
            return ""
        return f" ({self.column} {'at most' if name in self.easy else 'above'} {self.most:g}, dataset.difficulty)"

    def __str__(self) -> str:
        if self.column is None:
            return ""
        hard = [name for name in SPLITS if name not in self.easy]
        return (
            f"; {self.column} at most {self.most:g} in {' and '.join(self.easy)}, above it in {' and '.join(hard)} "
            "(easy to hard)"
        )


def load_tables(options: dict[str, Any], seed: int) -> Tables:
    """Read a dataset and make its splits.

    Files that come split stay so (their overlap is in the report); otherwise all rows of one prompt land in one split.

    Args:
        options: a ``conf/dataset`` node.
        seed: decides which reply of a pair is first.

    Raises:
        UserError: nothing to read, too few rows, or (``strict``) a bad row; names it and the remedy.
    """
    reading = {k: v for k, v in options.items() if k not in UNREAD}
    pools, kind, classes, notes = read_rows(json.dumps(reading, sort_keys=True))
    report = dict(notes)
    split_seed = options["split_seed"]
    sizes = {("ground_truth" if name == "weak_train" else name): size for name, size in options["sizes"].items()}
    levels = Levels.of(options.get("difficulty"))
    if set(pools) == set(SPLITS):
        chosen = {name: _hashed(levels.of_split(name, pools[name]), sizes[name], split_seed) for name in SPLITS}
        for name, rows in chosen.items():  # sizes are a limit here: what the files hold is what there is
            if not rows:
                raise UserError(
                    f"dataset.path: {report['source']} has no usable row for {name}{levels.why(name)}: "
                    f"{report['dropped']}"
                )
        report["split"] = f"as the files come{levels}"
    else:
        try:
            chosen = _split(pools, sizes, split_seed, levels, report)
        except UserError as error:
            if not report["dropped"]:
                raise
            dropped = "; ".join(f"{reason}: {text}" for reason, text in report["dropped"].items())
            raise UserError(f"{error}. Dropped while reading: {dropped}") from error
        report["split"] = f"by prompt, split_seed {split_seed}{levels}"
    tables = {name: _table(name, rows, kind, classes, seed) for name, rows in chosen.items()}
    if kind == "classes":
        _several_classes(tables, report)
    others = _others(options, chosen, kind, classes, seed, report) if options.get("also") else {}
    return Tables(**tables, report=report, also=others)


def _others(
    options: dict[str, Any],
    chosen: dict[str, list[Example]],
    kind: str,
    classes: int,
    seed: int,
    report: dict[str, Any],
) -> dict[str, Table]:
    """Other test sets: without rows whose prompt a model has learned from, or that are in the test split."""
    held = {key for rows in chosen.values() for example in rows for key in _keys(example)}
    tables, report["also"] = {}, {}
    for name, node in also.entries(options["also"], options).items():
        rows, notes = also.rows_of(name, node, kind, classes)
        new = [example for example in rows if held.isdisjoint(_keys(example))]
        if not new:
            raise UserError(
                f"dataset.also: all {len(rows)} rows of {name} have a prompt that is in the run's own splits; name "
                "other rows"
            )
        size = node.get("size", options["sizes"]["test"])
        tables[name] = _table(f"also-{name}", _hashed(new, size, options["split_seed"]), kind, classes, seed)
        lost = len(rows) - len(new)
        drawn = f"{len(tables[name])} of {len(new)} rows are read"
        log.info("dataset.also: %s: %s, %d left out because their prompt is in the run's own splits", name, drawn, lost)
        report["also"][name] = {
            "rows": len(tables[name]),
            "rows to choose from": len(new),
            "rows left out because their prompt is in the run's own splits": lost,
            **{key: notes[key] for key in ("source", "dropped", "notes")},
        }
    return tables


def _several_classes(tables: dict[str, Table], report: dict[str, Any]) -> None:
    """What learns or tests on one class alone is right whatever it says."""
    for name, table in tables.items():
        if len(present := set(table.labels.tolist())) > 1:
            continue
        note = f"all {len(table)} rows of {name} are of class {present.pop()}, so that accuracies on them say nothing"
        if len(table) >= CHANCE:
            raise UserError(
                f"dataset.sizes.{typed_name(name)}: {note}; give rows of at least two classes for it "
                f"({report['source']})"
            )
        report["notes"] = [*report["notes"], note]


def _rank(example: Example, split_seed: int) -> tuple[float, str]:
    return uniform("row", split_seed, example.id), example.id


def _hashed(rows: list[Example], size: int | None, split_seed: int) -> list[Example]:
    """``size`` rows by hash, in an order that does not depend on the file's."""
    return sorted(rows, key=lambda e: _rank(e, split_seed))[:size]


def _enough(name: str, count: int, wanted: int | None, why: str = "") -> None:
    if wanted is not None and count < wanted:
        raise UserError(
            f"dataset.sizes.{typed_name(name)}: {wanted} rows were asked for, {count} are there{why}; lower it, or the "
            "sizes of the other splits (null takes all there are)"
        )
    if count == 0:
        raise UserError(
            f"dataset.sizes.{typed_name(name)}: no row is left for it{why}; lower the sizes of the other splits"
        )


def _split(
    pools: dict[str, list[Example]],
    sizes: dict[str, int | None],
    split_seed: int,
    levels: Levels,
    report: dict[str, Any],
) -> dict[str, list[Example]]:
    pools = dict(pools)
    chosen: dict[str, list[Example]] = {}
    wanted = list(SPLITS)
    if "test" in pools:
        chosen["test"] = _hashed(levels.of_split("test", pools.pop("test")), sizes["test"], split_seed)
        _enough("test", len(chosen["test"]), sizes["test"], levels.why("test"))
        wanted.remove("test")
    rows = [example for pool in pools.values() for example in pool]
    rows = list({example.id: example for example in rows}.values())
    if "test" in chosen:
        held = {key for example in chosen["test"] for key in _keys(example)}
        before = len(rows)
        rows = [example for example in rows if held.isdisjoint(_keys(example))]
        report["training rows dropped because their prompt is in test"] = before - len(rows)
    groups = _groups(rows)
    if levels.column is None:
        return chosen | _filled(groups, {name: sizes[name] for name in wanted}, split_seed)
    report["rows dropped because their prompt is easy in one and hard in another"] = 0
    easy: dict[str, list[Example]] = {}
    hard: dict[str, list[Example]] = {}
    for group, members in groups.items():
        if len(kinds := {member.difficulty <= levels.most for member in members}) > 1:
            report["rows dropped because their prompt is easy in one and hard in another"] += len(members)
        else:
            (easy if kinds.pop() else hard)[group] = members
    for some, is_easy in ((easy, True), (hard, False)):
        part = {name: sizes[name] for name in wanted if (name in levels.easy) == is_easy}
        if part:
            chosen |= _filled(some, part, split_seed, levels.why(next(iter(part))))
    return chosen


def _filled(
    groups: dict[str, list[Example]], sizes: dict[str, int | None], split_seed: int, of: str = ""
) -> dict[str, list[Example]]:
    """Splits of these sizes, None sharing what is left; all rows of a group go to one of them.

    Args:
        of: what the rows are, for messages.
    """
    chosen: dict[str, list[Example]] = {}
    count = sum(map(len, groups.values()))
    names = {key: _name_of(key, members) for key, members in groups.items()}
    order = sorted(groups, key=lambda key: (uniform("prompt", split_seed, names[key]), names[key]))
    fixed = sum(size for size in sizes.values() if size is not None)
    unlimited = [name for name in sizes if sizes[name] is None]
    if fixed > count or (unlimited and fixed + len(unlimited) > count):
        raise UserError(
            f"dataset.sizes: {', '.join(f'{typed_name(k)} {v}' for k, v in sizes.items())} were asked for, but there "
            f"are {count} rows to split{of}; lower them"
        )
    why = f" ({count} rows of {len(order)} prompts{of}, and all rows of a prompt go to one split)"
    if any(not member.prompt.text and member.kind == "pairs" for members in groups.values() for member in members[:1]):
        why = (
            f" ({count} pairs without a prompt{of}; those that have a text in common go to one split, which makes "
            f"{len(order)} groups; is there a column of prompts, name it by dataset.columns.prompt)"
        )
    # test first: where its size is given, its rows stay the same when the sizes of the others change
    first = sorted(sizes, key=lambda n: (n != "test", n))
    filling = iter(order)
    for name in [n for n in first if n not in unlimited]:
        taken: list[Example] = []
        while len(taken) < sizes[name]:
            group = next(filling, None)
            if group is None:
                break
            taken += sorted(groups[group], key=lambda e: e.id)
        chosen[name] = taken[: sizes[name]]  # a prompt cut short here is not used again
        _enough(name, len(chosen[name]), sizes[name], why)
    chosen.update({name: [] for name in unlimited})
    for group in filling if unlimited else ():  # what is left is shared out, prompt by prompt, to the smallest
        name = min((n for n in first if n in unlimited), key=lambda n: len(chosen[n]))
        chosen[name] += sorted(groups[group], key=lambda e: e.id)
    for name in unlimited:
        _enough(name, len(chosen[name]), None, why)
    return chosen


def _keys(example: Example) -> tuple[str, ...]:
    """What no two splits may share: the prompt, or the texts of a pair that has none."""
    if example.prompt.text:
        return (example.prompt.text.rstrip(" "),)
    return (example.group,) if example.kind == "classes" else example.texts


def _name_of(key: str, members: list[Example]) -> str:
    """What a group's place among the others is drawn by."""
    return min(member.group for member in members) if members[0].prompt.text else key


def _groups(rows: list[Example]) -> dict[str, list[Example]]:
    """Rows that must stay together: those of one prompt, and pairs without a prompt that have a text in common."""
    shared = Groups()
    for example in rows:
        shared.join(_keys(example))
    groups: dict[str, list[Example]] = {}
    for example in rows:
        groups.setdefault(shared.root(_keys(example)[0]), []).append(example)
    return groups


def _table(name: str, rows: Iterable[Example], kind: str, classes: int, seed: int) -> Table:
    rows = list(rows)
    if kind != "pairs":
        first = np.zeros(len(rows), np.int64)
        labels = np.array([e.answer for e in rows], np.int64)
    else:
        first = np.array([int(uniform("first", seed, e.id) < 0.5) for e in rows], np.int64)
        labels = np.array([int(e.answer != f) for e, f in zip(rows, first, strict=True)], np.int64)
    prompts = [Dialogue.of_text(e.group) if kind == "classes" else e.prompt for e in rows]
    subsets = [e.subset for e in rows] if any(e.subset for e in rows) else None
    return Table(name, kind, classes, [e.id for e in rows], prompts, [e.texts for e in rows], first, labels, subsets)
