"""Which points of a run's curves a dashboard has, so that a run that is started again does not log them twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from w2sg.store.files import read_json


class Ledger:
    """The last step of every curve that was logged.

    Args:
        earlier: files of ledgers whose points count as logged; unreadable ones do not.
        file: where this one is kept, together with what stood in the earlier ones; None keeps it in memory alone.
    """

    def __init__(self, earlier: Iterable[Path] = (), file: Path | None = None):
        self.file = file
        self.last: dict[str, dict[str, float]] = {}
        for path in earlier:
            with suppress(OSError, ValueError, AttributeError):
                for stage, steps in read_json(path).items():
                    kept = self.last.setdefault(stage, {})
                    kept |= {key: max(step, kept.get(key, step)) for key, step in steps.items()}

    def new(self, stage: str, values: Mapping[str, float], step: float) -> dict[str, float]:
        """The values that are past the last step of their curve, which are noted as logged."""
        last = self.last.setdefault(stage, {})
        new = {key: value for key, value in values.items() if step > last.get(key, -1)}
        if new:
            last.update(dict.fromkeys(new, step))
            if self.file is not None and self.file.parent.is_dir():
                self._write(self.file)
        return new

    def _write(self, file: Path) -> None:
        """Whole or not at all; not synced to the disk, since it is written at every point."""
        part = file.with_name(f"{file.name}.part")
        with suppress(OSError):
            part.write_text(json.dumps(self.last), encoding="utf-8")
            part.replace(file)
