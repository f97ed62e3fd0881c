"""Contrastive decoding between the weak model after and before its alignment (ConG, arXiv 2510.07884).

The strong model writes nothing here; only its judge's frozen states are read.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from w2sg.config.option import option
from w2sg.config.options import Contrast
from w2sg.decoding.decoders.base import TUNED, UNTUNED, Decoder, Law


class Contrastive(Contrast, Decoder):
    """The weak model after and before its alignment, against each other."""

    kind: Literal["contrastive"] = "contrastive"
    max_new_tokens: PositiveInt = option(128, "a reply that reaches this is cut off")

    words: ClassVar[str] = "contrastive decoding"
    needs: ClassVar[frozenset[str]] = frozenset({TUNED, UNTUNED})
    generated_by: ClassVar[tuple[str, ...]] = (TUNED, UNTUNED)
    no_server: ClassVar[str] = "the strong model writes nothing here"

    def setting(self) -> str:
        return f"gamma {self.gamma:g}" if self.alpha is None else f"alpha {self.alpha:g}"

    def law(self) -> Law:
        return Law("unknown", "its replies begin, or are, another model's, and their law under both is not known")
