"""The rows of a dataset that can be used, by pool, and what was left out of them, by reason."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from w2sg.config.build import build
from w2sg.data.examples import Example
from w2sg.data.forms import Formed
from w2sg.data.prompt_columns import Tie
from w2sg.data.sources import Source
from w2sg.errors import UserError, calling

log = logging.getLogger(__name__)
KINDS = {"pairs": "preference pairs", "classes": "labelled texts", "answers": "answered questions"}
CONTRADICTED = "duplicate with the opposite label"
UNEQUAL = "duplicate with another difficulty"
INVISIBLE = {"\u115f", "\u1160", "\u2800", "\u3164", "\uffa0"}  # letters and signs by name that show nothing


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


@functools.lru_cache(maxsize=4)
def read_rows(options_json: str) -> tuple[dict[str, list[Example]], str, int, dict[str, Any]]:
    """All good rows of a dataset by pool; kept in memory, since the runs of a sweep read the same ones."""
    options = json.loads(options_json)
    column = (options.get("difficulty") or {}).get("column")
    try:
        loader = build({k: v for k, v in options.items() if k not in {"strict", "max_chars", "difficulty"}})
        with calling(loader):
            source: Source = loader()
            if not isinstance(source, Source):
                raise UserError(
                    f"{options['_target_']}: returned {type(source).__name__}; return a w2sg.data.sources.Source"
                )
            source.notes.known.update({column} - {None})
            return _good_rows(source, options, column)
    except (OSError, RuntimeError) as error:  # a folder that may not be read, a loop of links, a name that is too long
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"dataset.path: {options.get('path')} cannot be read ({reason}); name a file or folder that can"
        ) from error


def _good_rows(
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
        if isinstance(row, dict) and isinstance(subset := row.get("subset"), str | int):
            example = replace(example, subset=str(subset))
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
    contents = [turn.content for turn in example.prompt.messages if turn.role != "system"]
    if example.prompt.text and contents and all(map(blank, contents)):
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
    numbers = re.findall(r"(?:(?<!\w)-)?\d+(?:\.\d+)?", value) if isinstance(value, str) else [value]
    if len(numbers) != 1 or isinstance(value, bool) or not isinstance(numbers[0], str | int | float):
        raise ValueError(f"{column} is {value!r}, and not one number (dataset.difficulty)")
    if not math.isfinite(float(numbers[0])):
        raise ValueError(f"{column} is {value!r} (dataset.difficulty)")
    return float(numbers[0])


def _unsure(row: Any, example: Example) -> str | None:
    """Why a row's preference is not to be trusted."""
    return row.form.strict.get(example.id) if isinstance(row, Formed) else None


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
