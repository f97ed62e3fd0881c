"""From rows to three splits that share no prompt: ground_truth, transfer and test."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from w2sg.config.check import build
from w2sg.data.asked import Tie
from w2sg.data.examples import Example
from w2sg.data.forms import Formed
from w2sg.data.messages import Dialogue
from w2sg.data.sources import Source
from w2sg.data.table import Groups, Table, uniform
from w2sg.errors import UserError

log = logging.getLogger(__name__)
SPLITS = ("ground_truth", "transfer", "test")
KINDS = {"pairs": "preference pairs", "classes": "labelled texts", "answers": "answered questions"}
CONTRADICTED = "duplicate with the opposite label"
UNEQUAL = "duplicate with another difficulty"


@dataclass(frozen=True)
class Tables:
    """The three splits, and what was dropped on the way (``report``)."""

    ground_truth: Table
    transfer: Table
    test: Table
    report: dict[str, Any]


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


@dataclass
class Drops:
    """Rows left out, by reason, with the first of each."""

    strict: bool
    counts: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str, detail: str = "") -> None:
        if self.strict:
            raise UserError(
                f"{where}: {reason}{f' ({detail})' if detail else ''}. dataset.strict=true refuses such rows; mend the "
                "row, or set dataset.strict=false to drop and count them"
            )
        self.counts[reason] += 1
        self.first.setdefault(reason, f"{where}{f': {detail}' if detail else ''}")

    def report(self) -> dict[str, str]:
        return {reason: f"{n}, first at {self.first[reason]}" for reason, n in self.counts.most_common() if n}


def load_tables(options: dict[str, Any], seed: int) -> Tables:
    """Read a dataset and make its splits.

    Files that come split stay so (their overlap is in the report); otherwise all rows of one prompt land in one split.

    Args:
        options: a ``conf/dataset`` node.
        seed: decides which reply of a pair is first.

    Raises:
        UserError: nothing to read, too few rows, or (``strict``) a bad row; names it and the remedy.
    """
    reading = {k: v for k, v in options.items() if k not in {"name", "sizes", "split_seed", "zero_shot", "noise"}}
    pools, kind, classes, notes = _read(json.dumps(reading, sort_keys=True))
    report = dict(notes)
    split_seed, sizes = options["split_seed"], options["sizes"]
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
    return Tables(**tables, report=report)


CHANCE = 20  # rows of which all may be of one class by chance


def _several_classes(tables: dict[str, Table], report: dict[str, Any]) -> None:
    """What learns or tests on one class alone is right whatever it says."""
    for name, table in tables.items():
        if len(present := set(table.labels.tolist())) > 1:
            continue
        said = f"all {len(table)} rows of {name} are of class {present.pop()}, so that accuracies on them say nothing"
        if len(table) >= CHANCE:
            raise UserError(
                f"dataset.sizes.{name}: {said}; give rows of at least two classes for it ({report['source']})"
            )
        report["notes"] = [*report["notes"], said]


@functools.lru_cache(maxsize=4)
def _read(options_json: str) -> tuple[dict[str, list[Example]], str, int, dict[str, Any]]:
    """All good rows of a dataset by pool; kept in memory, since the runs of a sweep read the same ones."""
    options = json.loads(options_json)
    column = (options.get("difficulty") or {}).get("column")
    try:
        source: Source = build({k: v for k, v in options.items() if k not in {"strict", "max_chars", "difficulty"}})()
        source.notes.known.update({column} - {None})
        return _of_source(source, options, column)
    except (OSError, RuntimeError) as error:  # a folder that may not be read, a loop of links, a name that is too long
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"dataset.path: {options.get('path')} cannot be read ({reason}); name a file or folder that can"
        ) from error


def _of_source(
    source: Source, options: dict[str, Any], column: str | None
) -> tuple[dict[str, list[Example]], str, int, dict[str, Any]]:
    drops = Drops(options["strict"])
    pools: dict[str, list[Example]] = {}
    seen_rows = 0
    for pool, rows in source.pools.items():
        kept: dict[str, Example] = {}
        contradicted: set[str] = set()
        unequal: set[str] = set()
        for where, row in rows:
            seen_rows += 1
            example = _parse(source, where, row, options["max_chars"], column, drops)
            if example is None:
                continue
            earlier = kept.get(example.id)
            if earlier is None:
                kept[example.id] = example
            elif column is not None and earlier.difficulty != example.difficulty:
                drops.add(UNEQUAL, where)
                unequal.add(example.id)
            elif earlier.answer == example.answer and example.id not in contradicted:
                drops.add("duplicate", where)
            else:
                drops.add(CONTRADICTED, where)
                contradicted.add(example.id)
        # neither of two opposite rows is the right one: keeping the first would let the order of the file decide
        drops.counts[CONTRADICTED] += len(contradicted)
        drops.counts[UNEQUAL] += len(unequal - contradicted)
        pools[pool] = [example for example in kept.values() if example.id not in contradicted | unequal]
    malformed = drops.counts["malformed"]
    if seen_rows == 0:
        raise UserError(f"dataset.path: {source.origin} holds no rows")
    if malformed > seen_rows / 2:
        raise UserError(
            f"dataset.path: {malformed} of {seen_rows} rows of {source.origin} are malformed, the first at "
            f"{drops.first['malformed']}. Expected {source.expects}"
        )
    for where, words in source.notes.forms.items():
        log.info("dataset: %s: read as %s", where, words)
    for note in source.notes:
        log.warning("dataset: %s", note)
    for reason, text in drops.report().items():
        log.info("dataset: dropped as %s: %s", reason, text)
    kinds = {example.kind for rows in pools.values() for example in rows}
    if not kinds:
        raise UserError(f"dataset.path: no usable row is left of {source.origin}: {drops.report()}")
    if len(kinds) > 1:
        mixed = " and ".join(words for kind, words in KINDS.items() if kind in kinds)
        raise UserError(f"dataset.path: {source.origin} mixes {mixed}")
    kind = kinds.pop()
    classes = 2
    if kind == "classes":
        present = sorted({example.answer for rows in pools.values() for example in rows})
        classes = max(2, 1 + present[-1])
        if len(present) == 1:
            raise UserError(
                f"dataset.path: all rows left of {source.origin} are class {present[0]}, one class only; what was "
                f"dropped: {drops.report() or 'nothing'}; labels are numbers from 0 (for two classes 0 and 1)"
            )
        if classes > max(2, len(present)):
            raise UserError(
                f"dataset.path: the labels are {', '.join(map(str, present[:10]))}{', ...' * (len(present) > 10)} in "
                f"{source.origin}, which leaves classes without a row; number the classes from 0 without gaps"
            )
    notes = list(source.notes)
    return (
        pools,
        kind,
        classes,
        {
            "source": source.origin,
            "rows_read": seen_rows,
            "dropped": drops.report(),
            "read_as": dict(source.notes.forms),
            "notes": notes,
        },
    )


def _parse(
    source: Source, where: str, row: Any, max_chars: int | None, column: str | None, drops: Drops
) -> Example | None:
    try:
        if isinstance(row, Exception):
            raise row
        example = source.parse(row)
        if drops.strict and (reason := _unsure(row, example)):
            raise ValueError(reason)
        if column is not None:
            example = replace(example, difficulty=_difficulty(row[column], column))
        if not _is_unicode(example.group, *example.texts):
            raise ValueError("the text is not valid UTF-8 (a lone surrogate); save the file as UTF-8")
    except Tie as error:
        drops.add("no preference", where, str(error))
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"no column {error}" if isinstance(error, KeyError) else str(error)
        drops.add("malformed", where, detail)
        return None
    if any(blank(text[len(example.prompt.text) :]) for text in example.texts):
        drops.add("empty", where)
        return None
    said = [turn.content for turn in example.prompt.messages if turn.role != "system"]
    if example.prompt.text and said and all(map(blank, said)):
        drops.add("empty", where, "the prompt holds no text")
        return None
    if len(set(example.texts)) < len(example.texts):
        drops.add("identical replies", where)
        return None
    longest = max(len(text) for text in example.texts)
    if max_chars is not None and longest > max_chars:
        drops.add("over-long", where, f"{longest} characters, dataset.max_chars is {max_chars}")
        return None
    return example


def _difficulty(value: Any, column: str) -> float:
    """A number, or the only one in a text ("Level 3")."""
    found = re.findall(r"(?:(?<!\w)-)?\d+(?:\.\d+)?", value) if isinstance(value, str) else [value]
    if len(found) != 1 or isinstance(value, bool) or not isinstance(found[0], str | int | float):
        raise ValueError(f"{column} is {value!r}, and not one number (dataset.difficulty)")
    if not math.isfinite(float(found[0])):
        raise ValueError(f"{column} is {value!r} (dataset.difficulty)")
    return float(found[0])


def _unsure(row: Any, example: Example) -> str | None:
    """Why a row's preference is not to be trusted."""
    return row.form.strict.get(example.id) if isinstance(row, Formed) else None


INVISIBLE = {"\u115f", "\u1160", "\u2800", "\u3164", "\uffa0"}  # letters and signs by name that show nothing


def blank(text: str) -> bool:
    """Whether a text has no visible character: spaces, controls and marks of no width alone."""
    return all(c.isspace() or c in INVISIBLE or unicodedata.category(c)[0] in "CZ" for c in text)


def _is_unicode(*texts: str) -> bool:
    """Whether texts can be written down; a JSON escape may name half a character, which no tokenizer takes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _rank(example: Example, split_seed: int) -> tuple[float, str]:
    return uniform("row", split_seed, example.id), example.id


def _hashed(rows: list[Example], size: int | None, split_seed: int) -> list[Example]:
    """``size`` rows by hash, in an order that does not depend on the file's."""
    return sorted(rows, key=lambda e: _rank(e, split_seed))[:size]


def _enough(name: str, there: int, asked: int | None, why: str = "") -> None:
    if asked is not None and there < asked:
        raise UserError(
            f"dataset.sizes.{name}: {asked} rows were asked for, {there} are there{why}; lower it, or the sizes of the "
            "other splits (null takes all there are)"
        )
    if there == 0:
        raise UserError(f"dataset.sizes.{name}: no row is left for it{why}; lower the sizes of the other splits")


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
        asked = {name: sizes[name] for name in wanted if (name in levels.easy) == is_easy}
        if asked:
            chosen |= _filled(some, asked, split_seed, levels.why(next(iter(asked))))
    return chosen


def _filled(
    groups: dict[str, list[Example]], asked: dict[str, int | None], split_seed: int, of: str = ""
) -> dict[str, list[Example]]:
    """Splits of these sizes, None sharing what is left; all rows of a group go to one of them.

    Args:
        of: what the rows are, for messages.
    """
    chosen: dict[str, list[Example]] = {}
    count = sum(map(len, groups.values()))
    names = {key: _name_of(key, members) for key, members in groups.items()}
    order = sorted(groups, key=lambda key: (uniform("prompt", split_seed, names[key]), names[key]))
    fixed = sum(size for size in asked.values() if size is not None)
    unlimited = [name for name in asked if asked[name] is None]
    if fixed > count or (unlimited and fixed + len(unlimited) > count):
        raise UserError(
            f"dataset.sizes: {', '.join(f'{k} {v}' for k, v in asked.items())} were asked for, but there are "
            f"{count} rows to split{of}; lower them"
        )
    why = f" ({count} rows of {len(order)} prompts{of}, and all rows of a prompt go to one split)"
    # test first: where its size is given, its rows stay the same when the sizes of the others change
    first = sorted(asked, key=lambda n: (n != "test", n))
    filling = iter(order)
    for name in [n for n in first if n not in unlimited]:
        taken: list[Example] = []
        while len(taken) < asked[name]:
            group = next(filling, None)
            if group is None:
                break
            taken += sorted(groups[group], key=lambda e: e.id)
        chosen[name] = taken[: asked[name]]  # a prompt cut short here is not used again
        _enough(name, len(chosen[name]), asked[name], why)
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
    return Table(name, kind, classes, [e.id for e in rows], prompts, [e.texts for e in rows], first, labels)
