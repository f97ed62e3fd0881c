"""Rows of CSV files, read strictly: what is shifted, swallowed or cut off is said, with its line."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from w2sg.errors import UserError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SEP = re.compile(r"sep=(.|\t)", re.I)


def read_csv(path: Path, file: TextIO, notes: list[str]) -> Iterator[tuple[str, dict[str, str] | Exception]]:
    """Rows with the line where each begins; one with too many or too few fields is given as its error.

    Args:
        path: for messages. file: opened with ``newline=""``. notes: what a reader of the report should know is added.

    Raises:
        UserError: no header, two columns of one name, or a quote that is not closed or stands inside of a field.
    """
    csv.field_size_limit(2**31 - 1)  # whether a text is too long is for max_chars to say
    first, before = next(file, ""), 0
    given = SEP.fullmatch(first.strip('\r\n"'))
    if given:  # a spreadsheet's own line, which says what tells columns apart
        first, before = next(file, ""), 1
    delimiter = given[1] if given else _delimiter(first, path)
    if delimiter in list(DELIMITERS)[1:] and not _tabbed(path):
        notes.append(f"{path.name}: its columns are told apart by {DELIMITERS[delimiter]}")
    kept: list[str] = []  # lines since the last row

    def lines() -> Iterator[str]:
        for line in chain([first] if first else [], file):
            kept.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header, ends = None, before
    while True:
        begins = ends + 1
        kept.clear()
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(_broken(path, begins, kept, error)) from error
        ends, where = before + reader.line_num, f"{path.name}:{begins}"
        if row is None:
            return
        if header is None:
            header = row
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise UserError(
                    f"dataset.path: {path} has {len(header)} columns, of which two are named {twice[0]!r}; rename one"
                )
        elif len(row) == len(header) > 0:
            yield where, dict(zip(header, row, strict=True))
        elif row:  # no empty line
            how, cause = "fewer", ""
            if len(row) > len(header):
                how, cause = "more", " (a field with a comma, or a quote, must be quoted, and quotes in it doubled)"
            yield where, ValueError(f"{len(row)} fields, {how} than the {len(header)} columns{cause}")


def _delimiter(header: str, path: Path) -> str:
    """Of the header line: what cuts it into most columns, a comma where that is not one thing alone."""
    if _tabbed(path):
        return "\t"
    bare = "".join(header.split('"')[::2])  # outside of quotes
    return max(DELIMITERS, key=bare.count)


def _tabbed(path: Path) -> bool:
    return ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]]


def _broken(path: Path, begins: int, lines: list[str], error: Any) -> str:
    """What is wrong with quotes, and the line."""
    if "end of data" in str(error):
        odd = [number for number, line in enumerate(lines, begins) if line.count('"') % 2]  # opens, closes, opens ...
        return (
            f"dataset.path: {path}:{[begins, *odd[::2]][-1]}: a quote that opens here is not closed, so that all rows "
            "below would be read as one field; close it, or double it if it is part of the text"
        )
    return (
        f"dataset.path: {path}:{begins} is not CSV ({error}): it would have more fields than columns; quotes inside "
        'of a field must be doubled ("") and not escaped by a backslash, and every quote be closed'
    )
