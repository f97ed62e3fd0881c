"""What of a trained model stays in the store: ``strong.save`` and ``weak.save``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2sg.config.model_schema import ModelConfig
from w2sg.models.half import to_bf16
from w2sg.store.store import Store
from w2sg.store.weights import MODEL, SAVE, give_up, keep, passing


@dataclass(frozen=True)
class Keep:
    """What one fit leaves.

    Attributes:
        save: ``full``, ``bf16`` or ``none``. role: whose option it is.
        rounds: whether its weights are rounded, as bf16 says of whole language models.
    """

    save: str = "full"
    role: str = "strong"
    rounds: bool = False

    @classmethod
    def of(cls, spec: ModelConfig, role: str) -> Keep:
        """As a model's configuration says."""
        return cls(spec.save, role, spec.save == "bf16" and spec.arch == "hf" and spec.train == "full")

    @property
    def whole(self) -> bool:
        """Whether a fit whose weights are gone is to be trained again."""
        return self.save != "none"

    @property
    def key(self) -> dict[str, Any]:
        """As part of the fit's cache key: what reads rounded weights finds others."""
        return {"save": "bf16"} if self.rounds else {}

    def seal(self, part: Path) -> dict[str, Any]:
        """Round weights that were just saved, where that is wanted; what the stage's info says of them."""
        if self.rounds:
            to_bf16(part / MODEL)
        return {} if self.whole else {SAVE: {"save": self.save, "role": self.role}}


FULL = Keep()


class Kept:
    """The weights of a run's fits: what a report says of them, and those that go with it.

    Args:
        store: None in a process that only follows.
        notes: where lines for the report go.
    """

    def __init__(self, store: Store | None, notes: list[str]):
        self.store, self.notes = store, notes
        self._passing: dict[Path, None] = {}

    def add(self, name: str, folder: Path, how: Keep) -> None:
        """A fit that was trained or found."""
        if self.store is None or how is FULL:
            return
        if how.whole:  # it does not go with the report of another run
            keep(self.store, folder)
        else:
            self._passing[folder] = None
        option = f"({how.role}.save={how.save})"
        line = None
        if how.rounds:
            line = f"{name}: its weights are kept in bf16, and its predictions are of these {option}"
        elif not how.whole and passing(folder):
            line = f"{name}: its weights are not kept, its predictions and curves are {option}"
        elif not how.whole:
            line = f"{name}: its weights stay, since an earlier run kept them {option}"
        if line is not None and line not in self.notes:
            self.notes.append(line)

    def end(self) -> None:
        """The run has reported: what is not kept goes."""
        for folder in self._passing:
            give_up(self.store, folder)
        self._passing.clear()
