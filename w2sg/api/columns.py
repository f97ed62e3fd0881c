"""What was right, row by row: from arrays, from tables joined by id, or from predictions.parquet."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.errors import UserError
from w2sg.metrics.predictions import right

if TYPE_CHECKING:
    import pandas as pd

PREDICTIONS = "predictions.parquet"
Clusters = Sequence[Hashable] | np.ndarray | None


def hits_of(
    what: str, models: Mapping[str, Any], labels: Any, clusters: Any, data: Any
) -> tuple[list[np.ndarray], Clusters]:
    """[N] of each model whether it was right, on the same rows, and the prompt of each row.

    Args:
        what: the function that was called, for messages.
        models: by argument: a column, or the name of one of ``data``.
        labels, clusters: as in `w2sg.pgr`. data: a table of predictions, its file, a run's folder, or a report.

    Raises:
        UserError: rows do not join, or a column does not say what was right.
    """
    columns = {**models, "labels": labels, "clusters": clusters}
    if data is not None:
        columns = _of_table(what, table_of(what, data), columns)
    elif texts := [name for name, column in columns.items() if isinstance(column, str)]:
        raise UserError(f"{what}: {texts[0]} is {columns[texts[0]]!r}, a column's name; give its table as data=")
    columns = {name: _listed(what, name, column) for name, column in columns.items() if column is not None}
    if missing := [name for name in models if name not in columns]:
        raise UserError(f"{what}: {missing[0]} is missing; give whether each row was right, [N]")
    arrays = _joined(what, columns)
    count = len(next(iter(arrays.values())))
    if not count:
        raise UserError(f"{what}: there are no rows")
    gold = None if labels is None and "labels" not in arrays else _classes(what, arrays["labels"])
    own = not isinstance(data, str | Path) and (data is None or hasattr(data, "columns"))
    return [_hits(what, name, arrays[name], gold, own) for name in models], arrays.get("clusters")


def table_of(what: str, data: Any) -> pd.DataFrame:
    """A table of predictions from a DataFrame, a .parquet file, the folder of a run, or a report."""
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(predictions := getattr(data, "predictions", None), pd.DataFrame):
        return predictions
    if not isinstance(data, str | Path):
        raise UserError(f"{what}: data is {type(data).__name__}; give a pandas DataFrame, a run's folder or a report")
    file = Path(data) / PREDICTIONS if Path(data).is_dir() else Path(data)
    return read_table(file, what)


def read_table(file: Path, what: str) -> pd.DataFrame:
    """A parquet file as a DataFrame.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(file, "rb") as opened:  # pyarrow takes no path that is not UTF-8
            return pq.read_table(opened).to_pandas()
    except FileNotFoundError as error:
        raise UserError(f"{what}: there is no file {file}; a finished run leaves one in its folder") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{what}: {file} cannot be read as parquet ({error})") from error


def _of_table(what: str, table: pd.DataFrame, columns: dict[str, Any]) -> dict[str, Any]:
    """Columns of a table in place of their names; label and prompt are those of predictions.parquet if not named."""
    for name, default in (("labels", "label"), ("clusters", "prompt")):
        if columns[name] is None and default in table.columns:
            columns[name] = default
    if "id" in table.columns:
        table = table.set_index("id")
    found = {}
    for name, column in columns.items():
        if isinstance(column, str):
            if column not in table.columns:
                have = ", ".join(map(str, table.columns))
                raise UserError(f"{what}: the table has no column {column!r} for {name}; it has {have}")
            column = table[column]
        found[name] = column
    return found


def _joined(what: str, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Columns as arrays of the same rows: those of pandas joined by their index, others as they stand."""
    with_ids = {name: column for name, column in columns.items() if hasattr(column, "index") and hasattr(column, "loc")}
    if not with_ids:
        arrays = {name: _array(what, name, column) for name, column in columns.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {count:,}" for name, count in lengths.items())
            raise UserError(f"{what}: the columns have different numbers of rows ({said}); give the same rows of each")
        return arrays
    if without := [name for name in columns if name not in with_ids]:
        raise UserError(
            f"{what}: {without[0]} has no ids and {next(iter(with_ids))} does; give all as pandas Series with the ids "
            "as their index, or all as arrays of the same rows"
        )
    first, *others = with_ids
    index = with_ids[first].index
    for name, column in with_ids.items():
        if column.index.has_duplicates:
            twice = column.index[column.index.duplicated()]
            raise UserError(
                f"{what}: {name} has ids more than once ({len(twice):,}, first {twice[0]!r}); give each once"
            )
    for name in others:
        other = with_ids[name].index
        if len(apart := index.symmetric_difference(other)):
            raise UserError(
                f"{what}: the ids of {first} and {name} do not join: {len(apart):,} stand in one of them alone, first "
                f"{apart[0]!r}; compare predictions on the same test rows"
            )
    return {name: _array(what, name, column.loc[index]) for name, column in with_ids.items()}


def _listed(what: str, name: str, column: Any) -> Any:
    """A column with rows: iterators are read, and what has no order of rows is refused."""
    if isinstance(column, Mapping | set | frozenset):
        raise UserError(f"{what}: {name} is a {type(column).__name__}; give a list, an array or a pandas Series")
    return list(column) if isinstance(column, Iterator) else column


def _array(what: str, name: str, column: Any) -> np.ndarray:
    if hasattr(column, "detach"):  # a tensor
        column = column.detach().cpu()
        column = (column.float() if column.is_floating_point() else column).numpy()
    if name == "clusters":
        return _names(what, column)
    array = np.asarray(column)
    if array.dtype == object and len(array) and hasattr(array[0], "__len__"):  # lists of logits
        try:
            array = np.stack([np.asarray(row, np.float64) for row in array])
        except (TypeError, ValueError) as error:
            raise UserError(f"{what}: {name} has rows of different lengths; give [N, C] logits") from error
    if array.dtype == object:
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"{what}: {name} holds {_first(array)!r}, which is no number") from error
    if array.size and array.dtype.kind not in "biuf":
        raise UserError(f"{what}: {name} holds {_first(array)!r}, which is no number")
    if array.ndim not in (1, 2):
        raise UserError(f"{what}: {name} is {list(array.shape)}; give one row per example, [N], or logits [N, C]")
    if array.dtype.kind == "f" and np.isnan(array).any():
        rows = int(np.isnan(array.reshape(len(array), -1)).any(1).sum())
        raise UserError(f"{what}: {name} has no number (NaN) in {rows:,} of {len(array):,} rows")
    return array


def _names(what: str, column: Any) -> np.ndarray:
    """[N] what each row belongs to, by any names, whatever their type."""
    listed = column.tolist() if hasattr(column, "tolist") else list(column)
    names = np.empty(len(listed), object)
    names[:] = [tuple(name) if isinstance(name, list) else name for name in listed]
    isna = getattr(column, "isna", None)
    lost = int(isna().sum()) if isna else sum(n is None or (isinstance(n, float) and math.isnan(n)) for n in listed)
    if lost:
        raise UserError(f"{what}: clusters has no name in {lost:,} of {len(names):,} rows; name the prompt of each")
    return names


def _first(array: np.ndarray) -> Any:
    return array.ravel().tolist()[0]


def _classes(what: str, labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 1 or not np.equal(labels, np.round(labels)).all() or (labels < 0).any():
        raise UserError(f"{what}: labels are {list(labels.shape)}; give the gold class of each row, [N], from 0")
    return labels.astype(np.int64)


def _hits(what: str, name: str, column: np.ndarray, labels: np.ndarray | None, typed: bool) -> np.ndarray:
    """[N] bools of one column. ``typed``: by the caller, and not a report's, whose logits may be small."""
    if labels is not None and column.dtype == bool:
        raise UserError(
            f"{what}: {name} holds True and False, and there are labels; give classes as whole numbers, or leave the "
            "labels out where it says what was right"
        )
    if labels is None:
        if column.ndim != 1:
            shape = list(column.shape)
            raise UserError(
                f"{what}: {name} is {shape}; give whether each row was right, [N]; with logits [N, C] give labels= as "
                "well"
            )
        if not np.isin(column, (0, 1)).all():
            wrong = column[~np.isin(column, (0, 1))][0]
            raise UserError(
                f"{what}: {name} holds {wrong}; give whether each row was right (True or False), or logits with labels="
            )
        return column.astype(bool)
    if column.ndim == 1 and column.dtype.kind in "iu":
        if (column < 0).any():
            raise UserError(
                f"{what}: {name} holds the class {column.min()}; classes are numbered from 0, as labels are"
            )
        return column == labels
    classes = 2 if column.ndim == 1 else column.shape[1]
    if labels.max() >= classes:
        form = "[N] logits are of class 0 against class 1" if column.ndim == 1 else f"{name} has {classes} classes"
        raise UserError(
            f"{what}: there is a label {labels.max()}, and {form}; give [N, C] logits of all classes, or classes as "
            "whole numbers"
        )
    if column.ndim == 1 and typed and ((column >= 0) & (column <= 1)).all():
        raise UserError(
            f"{what}: {name} lies between 0 and 1 everywhere, as probabilities or classes do, and [N] floats are "
            "logits of class 0 against class 1; give classes as whole numbers, or [N, C] of all classes"
        )
    return right(column, labels)
