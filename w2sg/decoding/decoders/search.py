"""Weak-to-strong search (arXiv 2405.19262): chunk-level beam search over the strong model, guided by the weak one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from w2sg.config.option import option
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders.base import TUNED, UNTUNED, Law
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.guided import Guided
from w2sg.decoding.decoders.written import Written


class Search(Guided):
    """Chunk-level beam search over the strong model."""

    kind: Literal["search"] = "search"
    beams: PositiveInt = option(
        4,
        "hypotheses that go on after each chunk (W); the authors' W, K, L are 4, 4, 5 for sentiment and 2, 2, 30 for "
        "instructions",
    )
    children: PositiveInt = option(4, "successors of each (K); the first chunk has beams * children")
    chunk: PositiveInt = option(5, "tokens of a chunk (L)")
    tilt: float = option(
        0.0, "beta of emulated fine-tuning below the search; 0 samples the strong model as it is", ge=0.0
    )
    batch_size: PositiveInt = option(
        8, "prompts in flight, on each device; each has beams * children rows; does not change the replies"
    )

    words: ClassVar[str] = "weak-to-strong search"
    traces: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({TUNED, UNTUNED} if self.tilt else set())

    def rules(self) -> list[str]:
        if self.temperature == 0 and self.beams * self.children > 1:
            return ["temperature: at 0 all candidates are the same; raise it"]
        if self.served_by and self.tilt:
            return ["tilt: it moves the strong model's logits, which a server of texts does not give; set it to 0"]
        return super().rules()

    def write(self, engines: Engines, prompts: Prompts) -> list[Written]:
        results = engines.search(
            self,
            prompts,
            self.guide.value(engines),
            self.beams,
            self.children,
            self.chunk,
            self.tilt,
            self.guide.room(engines, prompts.texts),
        )
        return [Written.of(result) for result in results]

    @property
    def in_the_making(self) -> int:
        return self.beams * self.children

    @property
    def adds_logits(self) -> bool:
        return bool(self.tilt)

    def setting(self) -> str:
        return f"W {self.beams}, K {self.children}, L {self.chunk}"

    def law(self) -> Law:
        return Law(
            "unknown",
            "its law is that of no distribution that can be written down; the number of candidates is no divergence",
        )
