"""Emulated fine-tuning (arXiv 2310.12962), also called proxy-tuning (arXiv 2401.08565).

The strong model's logits plus beta times what alignment did to the weak model's; the two need one vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from w2sg.config.option import option
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders.base import STRONG, TUNED, UNTUNED, Decoder, Law
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.written import Written


class Eft(Decoder):
    """The strong model's logits moved by what alignment did to the weak one's."""

    kind: Literal["eft"] = "eft"
    beta: float = option(1.0, "strength; the papers: 1.0")
    negative: bool = option(False, "allow a negative beta, which undoes alignment")

    words: ClassVar[str] = "emulated fine-tuning"
    needs: ClassVar[frozenset[str]] = frozenset({STRONG, TUNED, UNTUNED})
    no_server: ClassVar[str] = "the logits of all tokens are needed at every step, which no server of texts gives"

    def rules(self) -> list[str]:
        if self.beta < 0 and not self.negative:
            return [
                "beta: a negative one undoes alignment (emulated disalignment); if that is what you study, say so with "
                "decoder.negative=true"
            ]
        return []

    def write(self, engines: Engines, prompts: Prompts) -> list[Written]:
        return [Written.of(result) for result in engines.search(self, prompts, tilt=self.beta)]

    @property
    def adds_logits(self) -> bool:
        return True

    def setting(self) -> str:
        return f"beta {self.beta:g}"

    def law(self) -> Law:
        return Law("exact", tilt=self.beta)
