"""Where each refined answer came from: the rows of refined.parquet, and the replies that they stand for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.data.messages import Dialogue
from w2sg.data.replies import Prompts, Replies
from w2sg.data.table import digest
from w2sg.errors import UserError
from w2sg.methods.refine.answers import as_replies


@dataclass(frozen=True)
class Refined:
    """Refined answers, and where each came from.

    Attributes:
        replies: what a student is trained on.
        rows: of refined.parquet: one for each reply, and for each question that has none.
        counts: what was tested, kept, replaced and dropped.
    """

    replies: Replies
    rows: list[dict[str, Any]]
    counts: dict[str, int]


def revision_of(identity: dict[str, Any]) -> str:
    """A model's commit on the hub, or a hash of what it was read from."""
    files = identity.get("files", identity)
    return str(identity.get("revision") or identity.get("gguf") or digest(json.dumps(files, sort_keys=True)))


def write_refined(out: Path, rows: list[dict[str, Any]]) -> Path:
    """Everything about each refined label, as refined.parquet beside the report.

    Raises:
        UserError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, file = dict.fromkeys(key for row in rows for key in row), out / "refined.parquet"
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".tmp"), "wb") as written:  # pyarrow takes no path that is not UTF-8
            pq.write_table(table, written)
        file.with_suffix(".tmp").replace(file)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror or error}); free space or choose another folder with out=, and "
            "run the same command: all stages are in the store"
        ) from error
    return file


def weak_row(prompt: Dialogue, answer: str, finished: bool) -> dict[str, Any]:
    """The row of a question whose own weak answer is taught."""
    row = {"prompt": prompt.text, "weak_answer": answer, "refined": answer, "source": "weak", "used": True}
    return row | {"finished": bool(finished), "exemplar_ids": [], "copy_rate": 1.0}


def replies_of_rows(queries: Prompts, rows: list[dict[str, Any]], key: dict[str, Any]) -> Replies:
    """The answers of rows of refined.parquet."""
    prompts, ids = dict(zip(queries.ids, queries.texts, strict=True)), [row["id"] for row in rows]
    replies = as_replies(ids, [prompts[i] for i in ids], [row["refined"] for row in rows], key)
    return replace(replies, sample=answer_numbers(ids))


def answer_numbers(ids: Sequence[str]) -> np.ndarray:
    """[N] which of its question's answers each is."""
    seen: Counter[str] = Counter()
    numbers = []
    for i in ids:
        numbers.append(seen[i])
        seen[i] += 1
    return np.array(numbers, np.int64)
