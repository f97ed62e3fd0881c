"""The files that a summary of runs goes to."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2sg.errors import UserError
from w2sg.printable import inert
from w2sg.store.files import write_json


def write_summary(root: Path, stem: str, html: str, lines: Sequence[Sequence[Any]], content: Any) -> list[Path]:
    """Write STEM.html, STEM.csv and STEM.json, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    text = io.StringIO()
    csv.writer(text).writerows([inert(value) for value in line] for line in lines)
    try:
        for name, written in ((f"{stem}.csv", text.getvalue()), (f"{stem}.html", html)):
            (root / f"{name}.tmp").write_text(written, encoding="utf-8")
            (root / f"{name}.tmp").replace(root / name)
        write_json(root / f"{stem}.json", content)
    except OSError as error:
        raise UserError(f"runs: the summary cannot be written to {root} ({error.strerror or error})") from error
    return [root / f"{stem}.{kind}" for kind in ("html", "csv", "json")]
