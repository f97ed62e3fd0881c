"""The files that a summary of runs goes to."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2sg.errors import UserError
from w2sg.store.files import write_json


def _inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula (OWASP's rule); numbers stay numbers.

    >>> _inert("=1+1"), _inert(-0.5), _inert("-0.5"), _inert("rkl")
    ("'=1+1", -0.5, '-0.5', 'rkl')
    """
    if not isinstance(value, str) or not value.startswith(
        ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
    ):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def write_summary(root: Path, stem: str, html: str, lines: Sequence[Sequence[Any]], content: Any) -> list[Path]:
    """Write STEM.html, STEM.csv and STEM.json, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    text = io.StringIO()
    csv.writer(text).writerows([_inert(value) for value in line] for line in lines)
    try:
        for name, written in ((f"{stem}.csv", text.getvalue()), (f"{stem}.html", html)):
            (root / f"{name}.tmp").write_text(written, encoding="utf-8")
            (root / f"{name}.tmp").replace(root / name)
        write_json(root / f"{stem}.json", content)
    except OSError as error:
        raise UserError(f"runs: the summary cannot be written to {root} ({error.strerror or error})") from error
    return [root / f"{stem}.{kind}" for kind in ("html", "csv", "json")]
