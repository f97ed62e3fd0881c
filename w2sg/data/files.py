"""Rows of files of every type that is read, each with its place; what cannot be read is said in one line."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from w2sg.data.csv_rows import read_csv
from w2sg.errors import UserError, first_line

Row = dict[str, Any]
Rows = Iterable[tuple[str, Row | Exception]]  # (where it stands, the row, or why it cannot be read)

PACKED = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
SUFFIXES = (
    *(f"{kind}{packed}" for kind in (".jsonl", ".ndjson", ".json", ".csv", ".tsv") for packed in PACKED),
    ".parquet",
    ".arrow",
    ".feather",
)
SHOWN = ".jsonl .json .csv .tsv (also .gz .bz2 .xz .zst), .parquet, .arrow, .feather"
META = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of the hub and of datasets
# what files of other kinds, or no files, begin with
OTHERS = {
    b"version https://git-lfs": "the pointer that Git LFS keeps instead of the data; fetch the data by `git lfs pull`",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save its rows as CSV UTF-8",
    b"<!DOCTYPE": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
    b"SQLite format 3": "a database; export its table as CSV UTF-8",
}
TYPES = {b"PAR1": ("parquet", ".parquet"), b"ARROW1": ("Arrow", ".arrow")}
PACKERS = {
    ".gz": (b"\x1f\x8b", "gzip"),
    ".bz2": (b"BZh", "bzip2"),
    ".xz": (b"\xfd7zXZ", "xz"),
    ".zst": (b"\x28\xb5\x2f\xfd", "zstandard"),
}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what a file that breaks off raises
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


class Notes(list[str]):
    """What a reader of the report should know of how the data were read.

    Attributes:
        known: columns that something else reads. forms: file -> how its rows were understood.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()
        self.forms: dict[str, str] = {}


def suffix_of(path: Path) -> str | None:
    """The ending that says how a file is read."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def read_file(path: Path, notes: Notes | None = None) -> Rows:
    """Rows of one file, each with its line or number; a line that cannot be read is given as its error.

    Args:
        notes: what a reader of the report should know is added.

    Raises:
        UserError: the file cannot be read; names it, the place, and the remedy.
    """
    suffix, notes = suffix_of(path), Notes() if notes is None else notes
    if suffix is None:
        raise UserError(f"dataset.path: {path.name} is none of {SHOWN}; save it as one of these")
    if not path.is_file():
        raise UserError(f"dataset.path: {path} is no ordinary file; name a file of rows")
    try:
        with path.open("rb") as file:
            head = file.read(24).lstrip()
        if other := next((words for mark, words in OTHERS.items() if head.upper().startswith(mark.upper())), None):
            raise UserError(f"dataset.path: {path} is {other}")
        _refuse_misnamed(path, suffix, head)
        yield from READERS[suffix.split(".")[1]](path, notes)
    except RecursionError as error:
        raise UserError(f"dataset.path: {path} is nested too deep to be read; flatten its rows") from error
    except DAMAGED as error:
        raise UserError(
            f"dataset.path: {path} cannot be read ({getattr(error, 'strerror', None) or error}); it breaks off or is "
            "damaged; copy it anew"
        ) from error


def _refuse_misnamed(path: Path, suffix: str, head: bytes) -> None:
    """Files whose ending says another type than their first bytes do."""
    if suffix in (".parquet", ".arrow", ".feather"):
        return
    packing = next((ending for ending in PACKERS if suffix.endswith(ending)), None)
    if packing and head and not head.startswith(PACKERS[packing][0]):
        raise UserError(f"dataset.path: {path} is not packed by {PACKERS[packing][1]}; name it without {packing}")
    if packing:
        return
    for ending, (mark, name) in PACKERS.items():
        if head.startswith(mark) and not head[:12].isalnum():
            raise UserError(f"dataset.path: {path} is packed by {name}; name it {path.name}{ending}")
    for mark, (name, ending) in TYPES.items():
        if head.startswith(mark):
            raise UserError(f"dataset.path: {path} is a {name} file; its name should end in {ending}")


def _open(path: Path) -> io.BufferedIOBase:
    """A file's bytes, unpacked; refused where they are no UTF-8 text by their first bytes."""
    suffix = suffix_of(path)
    packed = next((p for p in PACKED if p and suffix.endswith(p)), "")
    if packed == ".zst":
        import pyarrow as pa

        file = io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    else:
        file = PACKED[packed](path, "rb")
    head = b""
    with contextlib.suppress(*DAMAGED):  # said where its first line is read
        head = file.peek(64)[:64]
    found = [name for mark, name in MARKS.items() if head.startswith(mark)]
    # without a mark, every other byte of Latin letters is 0
    if found or any(4 * head[k::2].count(0) > len(head) > 1 for k in (0, 1)):
        file.close()
        name = found[0] if found else "UTF-16"
        raise UserError(f"dataset.path: {path} is {name} text; save it as UTF-8 (in a spreadsheet: CSV UTF-8)")
    return file


# -- JSON --------------------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null")


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands in it twice; keep one")
    return row


def parse_json(text: str) -> Any:
    """JSON without what only Python writes (NaN) and without keys that stand there twice.

    Raises:
        ValueError: it is not; also where it is nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _read_jsonl(path: Path, notes: list[str]) -> Rows:
    with _open(path) as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except DAMAGED as error:
                raise UserError(f"dataset.path: {path} breaks off after line {number} ({error})") from error
            if not line:
                return
            number += 1
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
            except ValueError as error:  # broken JSON or not UTF-8
                if number == 1 and line.strip() in (b"[", b"{", b"\xef\xbb\xbf[", b"\xef\xbb\xbf{"):
                    yield from _read_json(path, notes)  # one list over many lines, whatever the ending says
                    return
                yield f"{path.name}:{number}", ValueError(str(error))
                continue
            if number == 1 and isinstance(row, list) and row and all(isinstance(each, dict) for each in row):
                yield from _read_json(path, notes)
                return
            yield f"{path.name}:{number}", row


def _read_json(path: Path, notes: list[str]) -> Rows:
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"dataset.path: {path} is not UTF-8 ({error}); save it as UTF-8") from error
    try:
        content = parse_json(text)
    except ValueError as error:
        first = next((line for line in text.splitlines() if line.strip()), "")
        try:
            lines = isinstance(parse_json(first), dict)
        except ValueError:
            lines = False
        if lines and "Extra data" in str(error):
            yield from _read_jsonl(path, notes)  # one object a line, whatever the ending says
            return
        raise UserError(
            f"dataset.path: {path} is not JSON ({error}); a file with one object a line should end in .jsonl"
        ) from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        keys = f" (its keys are {', '.join(map(str, content))[:200]})" if isinstance(content, dict) else ""
        raise UserError(
            f"dataset.path: {path} holds neither a list of rows nor {{'data': [...]}}{keys}; write one object a row "
            "(pandas: to_json(..., orient='records', lines=True))"
        )
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", row


# -- tables ------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, notes: list[str]) -> Rows:
    # bytes that are not UTF-8 become surrogates, which make their row malformed, and not the file
    with _open(path) as data, io.TextIOWrapper(data, "utf-8-sig", "surrogateescape", newline="") as file:
        yield from read_csv(path, file, notes)


def _read_arrow(path: Path, notes: list[str]) -> Rows:
    import pyarrow as pa

    number, lost = 0, set()
    try:
        for batch in _batches(path):
            names = batch.schema.names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise UserError(f"dataset.path: {path} has two columns named {twice[0]!r}; rename one")
            columns = {name: _values(batch.column(k), name, lost) for k, name in enumerate(names)}
            for row in range(batch.num_rows):
                number += 1
                yield f"{path.name} row {number}", {name: values[row] for name, values in columns.items()}
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        name = "parquet" if _is_parquet(path) else "Arrow"
        raise UserError(
            f"dataset.path: {path} is not a readable {name} file (after row {number}: {first_line(error)})"
        ) from error
    for name in sorted(lost):
        notes.append(f"{path.name}: the column {name} holds values that cannot be read (a date out of range, say)")


def _values(column: Any, name: str, lost: set[str]) -> list[Any]:
    """One column as Python's own values; None where a value is none that Python knows."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, KeyError, ImportError, NotImplementedError):
        lost.add(name)
        return [None] * len(column)


def _is_parquet(path: Path) -> bool:
    return suffix_of(path) == ".parquet"


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _is_parquet(path):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches()
        return
    with pa.OSFile(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(path)
            for k in range(file.num_record_batches):
                yield file.get_batch(k)
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


READERS = {
    **dict.fromkeys(("jsonl", "ndjson"), _read_jsonl),
    "json": _read_json,
    **dict.fromkeys(("csv", "tsv"), _read_csv),
    **dict.fromkeys(("parquet", "arrow", "feather"), _read_arrow),
}
