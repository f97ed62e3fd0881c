"""Pools of rows: those of a file, of a folder, of what `datasets` saved, or of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from w2sg.data.examples import Example
from w2sg.data.files import META, SHOWN, Notes, Row, Rows, read_file, suffix_of
from w2sg.data.forms import SAMPLE, Formed, formed
from w2sg.errors import UserError, first_line

SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?$")  # how the hub names the parts of one split
SPLITS = dict.fromkeys(("ground_truth", "transfer", "test"))  # in this order
TESTS = {"test", "validation", "eval"}
ALIKE = {*TESTS, "tests", "valid", "val", "dev", "heldout"}
POOLED = "{}: read with the others and split by prompt; only what is named test, validation or eval is kept for testing"
TABLES = {".xlsx", ".xls", ".ods", ".zip", ".tar", ".7z", ".txt", ".pkl", ".pickle", ".db", ".sqlite", ".xml", ".html"}


@dataclass
class Reader:
    """Reads files in a dataset's own form where their columns are its, else in the form that their columns say.

    Attributes:
        parse: of the dataset's own form, which raises KeyError for other columns; None where it has none.
        expects: what a row should look like, for messages. columns: as in `formed`.
    """

    parse: Callable[[Row], Example] | None
    expects: str
    columns: dict[str, str] | None = None
    notes: Notes = field(default_factory=Notes)
    files: set[Path] = field(default_factory=set)

    def file(self, path: Path) -> Rows:
        """Rows of one file."""
        yield from self.rows(read_file(path, self.notes), path.name)

    def rows(self, rows: Rows, where: str) -> Rows:
        """Rows of one file, in one form."""
        rows = iter(rows)
        head = list(islice(rows, SAMPLE))
        everything = chain(head, rows)
        if self.parse is not None and self._parses([row for _, row in head if isinstance(row, dict)]):
            yield from everything
        else:
            yield from formed(everything, where, self.columns, self.notes, self.expects)

    def numbered(self, rows: Iterable[Row], where: str) -> Rows:
        """Rows of what `datasets` holds, in one form."""
        return self.rows(((f"{where} row {number}", row) for number, row in enumerate(rows, 1)), where)

    def _parses(self, sample: list[Row]) -> bool:
        """Whether at least half of some rows have the columns of the dataset's own form."""
        missing = 0
        for row in sample:
            try:
                self.parse(row)
            except KeyError:
                missing += 1
            except (ValueError, TypeError):
                continue
        return 2 * missing <= len(sample)

    def example(self, row: Row) -> Example:
        """One row as an example."""
        if not isinstance(row, dict):
            raise ValueError("the row is not an object")
        if not isinstance(row, Formed):
            return self.parse(row)
        if not row.form.needs <= row.keys():
            raise ValueError(f"columns {', '.join(map(str, row)) or 'none'}")
        return row.form.example(row)


def _files(folder: Path, deep: bool = False) -> dict[str, list[Path]]:
    """Data files of a folder (``deep``: and below) by their name without the ending and the number of the shard."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        suffix = suffix_of(path)
        if suffix and not hidden and path.name not in META and path.is_file():
            files.setdefault(SHARD.sub("", path.name[: -len(suffix)]), []).append(path)
    return files


def _rows(read: Reader, *splits: list[Path]) -> Rows:
    """Rows of splits, each one file or the shards of one."""
    for paths in splits:
        shards = [SHARD.search(p.name[: -len(suffix_of(p))]) for p in paths]
        if len(paths) > 1 and not (all(shards) and len({(p.parent, suffix_of(p)) for p in paths}) == 1):
            names = [f"{p.parent.name}/{p.name}" if paths[0].parent != paths[1].parent else p.name for p in paths]
            raise UserError(
                f"dataset.path: there are both {names[0]} and {names[1]}, and which to read is not said; keep one"
            )
        read.files |= set(paths)
        if all(shards) and len(shards) < (parts := int(shards[0][2])):
            read.notes.append(f"of {paths[0].name} there are {len(shards)} of {parts} parts; copy the others")
    return chain(*(read.file(path) for paths in splits for path in paths))


def local_pools(
    path: Path, read: Reader, subsets: tuple[str, ...] = (), splits: dict[str, str] | None = None
) -> dict[str, Rows]:
    """Pools of a local file or folder.

    A folder with weak_train, transfer and test files gives the splits as they are; one with sub-folders named as the
    subsets, with the files of ``splits`` (pool -> split on the hub; also below it, as in a downloaded repository), or
    with train and test files, gives a train and a test pool; other files are pooled.
    """
    if path.is_file():
        return {"all": read.file(path)}
    if not path.is_dir():
        special = f"{path} is neither a file nor a folder; name a file of rows"
        raise UserError(f"dataset.path: {special if path.exists() else f'there is no file or folder {path}'}")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, read, splits or {})
    files = _split_names(_files(path))
    if files.keys() >= SPLITS.keys():
        pools = {name: _rows(read, files[name]) for name in SPLITS}
        _left(path, read)
        return pools
    inside = [_files(path / s) for s in subsets if (path / s).is_dir()]
    if inside:
        pools = {name: [f[name] for f in inside if name in f] for name in ("train", "test")}
        return {name: _rows(read, *parts) for name, parts in pools.items() if parts}
    if not subsets:
        with_test = "test" in (splits or {})  # the hub's own splits say what is for testing
        below = _files(path, deep=True) if with_test or not files else {}
        for level in (files, below):
            if with_test and set(splits.values()) <= level.keys():
                return {pool: _rows(read, level[split]) for pool, split in splits.items()}
        files = files or below
    if not files:
        raise UserError(
            f"dataset.path: the folder {path} holds no {SHOWN} file"
            + (f", nor any of the subsets {', '.join(subsets)}" if subsets else "")
        )
    tests = [name for name in files if name.lower() in TESTS]
    pools = {"train": _rows(read, *(f for name, f in files.items() if name not in tests))}
    if tests:
        pools["test"] = _rows(read, *(files[name] for name in tests))
    _left(path, read)
    others = [file for name in files if name not in tests for file in files[name]]
    alike = [f for f in others if ALIKE & set(re.split(r"[^a-z]+", str(f.relative_to(path)).lower()))]
    if alike:
        read.notes.append(POOLED.format(_listed(alike, path)))
    return pools if len(files) > len(tests) else {"all": pools["test"]}


def _split_names(parts: dict[str, Any]) -> dict[str, Any]:
    """What is named weak_train, or ground_truth as in earlier versions, under the split's name in code."""
    if "ground_truth" in parts:
        return dict(parts)
    return {("ground_truth" if name == "weak_train" else name): part for name, part in parts.items()}


def _listed(files: list[Path], folder: Path) -> str:
    """The first four of some files."""
    return ", ".join(str(file.relative_to(folder)) for file in files[:4]) + ", ..." * (len(files) > 4)


def _left(path: Path, read: Reader) -> None:
    """Names files of a folder that hold rows, as it seems, and are not read."""
    below = [file for paths in _files(path, deep=True).values() for file in paths if file not in read.files]
    below += [file for file in sorted(path.iterdir()) if file.suffix.lower() in TABLES and file.is_file()]
    if below:
        read.notes.append(f"files that are not read: {_listed(below, path)}")


def _saved(path: Path, read: Reader, splits: dict[str, str]) -> dict[str, Rows]:
    """What `datasets` wrote with save_to_disk: one set of rows, or several by their names.

    Args:
        splits: pool -> the hub's name of it, where the hub has one for testing.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
        parts = _split_names(loaded) if isinstance(loaded, dict) else {"all": loaded}
    except Exception as error:  # datasets raises its own, Arrow's and plain errors for damaged folders
        raise UserError(
            f"dataset.path: the folder {path} was written by save_to_disk and cannot be read ({first_line(error)}); "
            "write the rows with to_parquet() and give that file"
        ) from error

    def rows(name: str) -> Rows:
        where = path.name if name == "all" else f"{path.name}/{name}"
        return read.numbered(parts[name], where)

    if parts.keys() >= SPLITS.keys():
        return {name: rows(name) for name in SPLITS}
    if "test" in splits and set(splits.values()) <= parts.keys():
        if others := sorted(parts.keys() - set(splits.values())):
            read.notes.append(f"splits that are not read: {', '.join(others)}")
        return {pool: rows(split) for pool, split in splits.items()}
    tests = [name for name in parts if name in TESTS]
    train = [name for name in parts if name not in tests]
    if alike := [name for name in train if ALIKE & set(re.split(r"[^a-z]+", name.lower()))]:
        read.notes.append(POOLED.format(", ".join(alike)))
    if not tests or not train:
        return {"all": chain(*map(rows, parts))}
    return {"train": chain(*map(rows, train)), "test": chain(*map(rows, tests))}


def hub_pools(path: str, read: Reader, splits: dict[str, str], revision: str | None, **options: Any) -> dict[str, Rows]:
    """Pools of a dataset on the Hugging Face hub: pool -> split name there.

    Raises:
        UserError: not there, or no network; says how to use a local copy.
    """
    import datasets

    pools = {}
    for pool, split in splits.items():
        try:
            loaded = datasets.load_dataset(path, split=split, revision=revision, **options)
        except Exception as error:  # datasets raises its own, the hub's and plain errors for the same few causes
            reason = first_line(error)
            if "scripts are no longer supported" in reason:
                reason += "; the hub's converted copy may do: dataset.revision=refs/convert/parquet"
            raise UserError(
                f"dataset.path: '{path}' is neither a local file or folder nor to be had from the Hugging Face hub "
                f"({reason}). Without a network, download it where there is one (`hf download {path} --repo-type "
                "dataset --local-dir FOLDER`) and set dataset.path=FOLDER"
            ) from error
        pools[pool] = read.numbered(loaded, f"{path}[{split}]")
    return pools


def is_local(path: str) -> bool:
    """Whether a path is of this machine, and no id on the hub."""
    return Path(path).expanduser().exists() or path.startswith(("/", ".", "~")) or suffix_of(Path(path)) is not None
