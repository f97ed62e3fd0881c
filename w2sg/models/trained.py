"""A model at one point of its training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from w2sg.models.source import Source
from w2sg.store.weights import weights


@dataclass(frozen=True)
class Trained:
    """A finished fit, or a model as it was found: of labels or of text.

    Attributes:
        name: for stage names.
        source: where the model came from, and its settings.
        folder: of the stage that trained it; None as it was found.
        layer: of the frozen features that it reads; None where it reads tokens.
    """

    name: str
    source: Source
    folder: Path | None = None
    layer: int | None = None

    @property
    def saved(self) -> Path | None:
        """Where its weights are, if not where they were found.

        Raises:
            UserError: they were not kept.
        """
        return None if self.folder is None else weights(self.folder)


def reading_as(model: Trained, other: Trained) -> Trained:
    """A model that reads with another's template and length; both have one vocabulary."""
    source, like = model.source, other.source
    if source.chat.fingerprint == like.chat.fingerprint and source.spec.max_length == like.spec.max_length:
        return model
    source = replace(source, spec=source.spec.model_copy(update={"max_length": like.spec.max_length}))
    source.chat = like.chat
    return replace(model, source=source)
