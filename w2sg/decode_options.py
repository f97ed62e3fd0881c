"""What may stand in conf/decoder: one group of options for each way of decoding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from w2sg.config import Strict
from w2sg.text_options import Contrast, Sampling


class Guide(Strict):
    """What a hypothesis is worth to a search."""

    implicit: float = Field(ge=0.0)
    beta: float = Field(gt=0.0)
    normalise: Literal["sum", "mean", "length_alpha"]
    length_alpha: float = Field(ge=0.0)
    reward: float = Field(ge=0.0)
    model: str | None
    layer: PositiveInt | None

    def rules(self) -> list[str]:
        if not self.implicit and not self.reward:
            return ["implicit: nothing is left to choose by; give implicit or reward a weight"]
        if bool(self.reward) != (self.model is not None):
            return ["model: a reward model and its weight go together; set both, or reward=0 and model=null"]
        if not self.implicit and (self.beta != 1.0 or self.normalise != "sum"):
            return [
                "beta: it and normalise are of the implicit value alone, which has no weight; leave them as they are"
            ]
        if self.layer is not None and self.model != "weak":
            return ["layer: read only where model=weak is trained; set it to null"]
        if self.normalise != "length_alpha" and self.length_alpha != 1.0:
            return ["length_alpha: read only by normalise=length_alpha; set it to 1.0"]
        return []


class Plain(Sampling):
    """The strong model alone."""

    kind: Literal["sampling"]


class Contrastive(Contrast):
    """The weak model after and before its alignment, against each other (ConG)."""

    kind: Literal["contrastive"]


class Eft(Sampling):
    """The strong model's logits moved by what alignment did to the weak one's."""

    kind: Literal["eft"]
    beta: float
    negative: bool

    def rules(self) -> list[str]:
        if self.beta < 0 and not self.negative:
            return [
                "beta: a negative one undoes alignment (emulated disalignment); if that is what you study, say so with "
                "decoder.negative=true"
            ]
        return []


class Search(Sampling):
    """Chunk-level beam search over the strong model."""

    kind: Literal["search"]
    beams: PositiveInt
    children: PositiveInt
    chunk: PositiveInt
    tilt: float = Field(ge=0.0)
    guide: Guide

    def rules(self) -> list[str]:
        if self.temperature == 0 and self.beams * self.children > 1:
            return ["temperature: at 0 all candidates are the same; raise it"]
        return []


class BestOfN(Sampling):
    """Whole replies of the strong model, of which the best is taken."""

    kind: Literal["best_of_n"]
    samples: PositiveInt
    guide: Guide

    def rules(self) -> list[str]:
        if self.temperature == 0 and self.samples > 1:
            return ["temperature: at 0 all samples are the same; raise it"]
        return []


class Drafted(Sampling):
    """The aligned weak model drafts, the strong one goes on (weak-to-strong decoding)."""

    kind: Literal["wsd"]
    window: PositiveInt
    threshold: float = Field(gt=0.0, le=1.0)
    check: PositiveInt
    draft: PositiveInt

    def rules(self) -> list[str]:
        if self.draft > self.max_new_tokens:
            return ["draft: a draft cannot be longer than a reply; lower it, or raise max_new_tokens"]
        return []


Decoder = Annotated[Plain | Contrastive | Eft | Search | BestOfN | Drafted, Field(discriminator="kind")]
PAIR = (Contrastive, Eft, Drafted)  # always ask for the weak pair; the others by their guide


class DecodeEvaluation(Strict):
    """What is measured of the replies."""

    prompts: PositiveInt
    traces: int = Field(ge=0)
    surprise: bool


def needs_pair(decoder: Decoder) -> bool:
    """Whether the weak model takes part, and was to be aligned."""
    guide = getattr(decoder, "guide", None)
    return isinstance(decoder, PAIR) or bool(guide and guide.implicit) or bool(getattr(decoder, "tilt", 0))
