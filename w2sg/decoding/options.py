"""What may stand in conf/decoder: one group of options for each way of decoding."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, model_validator

from w2sg.config.options import Contrast, PlainSampling, Sampling
from w2sg.config.schema import Strict


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


class Server(Strict):
    """A server with OpenAI's completions API that writes in place of the strong model; none without a ``url``."""

    url: str | None
    model: str | None
    key_variable: str
    workers: PositiveInt
    attempts: PositiveInt
    timeout: float = Field(gt=0.0)

    def rules(self) -> list[str]:
        if self.url is None:
            left = {"model": None, "key_variable": "OPENAI_API_KEY", "workers": 8, "attempts": 6, "timeout": 600.0}
            typed = [name for name, value in left.items() if getattr(self, name) != value]
            return [
                f"{name}: read only where server.url names a server; set that, or leave it as it is" for name in typed
            ]
        found = []
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.netloc:
            found.append(f"url: {self.url!r} is not the address of a server, as http://localhost:8000/v1")
        if "@" in address.netloc:
            found.append(
                "url: reports name it, so no key belongs into it; name the variable that has it in key_variable"
            )
        if self.model is None:
            found.append("model: say what the server calls its model; the address with /models names them")
        return found


class Local(Strict):
    """A decoder that no server of texts can write for."""

    needs: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _no_server(cls, options: Any) -> Any:
        if isinstance(options, dict) and options.get("server") is not None:
            raise ValueError(f"server: {cls.needs}; leave it out, or use decoder=search or best_of_n")
        return options


class Plain(PlainSampling, Local):
    """The strong model alone."""

    kind: Literal["sampling"]
    needs: ClassVar[str] = "plain samples are asked of a server where another decoder is compared with them"


class Contrastive(Contrast, Local):
    """The weak model after and before its alignment, against each other (ConG)."""

    kind: Literal["contrastive"]
    needs: ClassVar[str] = "the strong model writes nothing here"


class Eft(Sampling, Local):
    """The strong model's logits moved by what alignment did to the weak one's."""

    kind: Literal["eft"]
    needs: ClassVar[str] = "the logits of all tokens are needed at every step, which no server of texts gives"
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
    server: Server

    def rules(self) -> list[str]:
        if self.temperature == 0 and self.beams * self.children > 1:
            return ["temperature: at 0 all candidates are the same; raise it"]
        if self.server.url is not None and self.tilt:
            return ["tilt: it moves the strong model's logits, which a server of texts does not give; set it to 0"]
        return _by_texts(self)


class BestOfN(Sampling):
    """Whole replies of the strong model, of which the best is taken."""

    kind: Literal["best_of_n"]
    samples: PositiveInt
    guide: Guide
    server: Server

    def rules(self) -> list[str]:
        if self.temperature == 0 and self.samples > 1:
            return ["temperature: at 0 all samples are the same; raise it"]
        return _by_texts(self)


def _by_texts(decoder: Search | BestOfN) -> list[str]:
    """What a server's API has no word for."""
    if decoder.server.url is not None and decoder.top_k:
        return ["top_k: OpenAI's completions have no such option; set it to 0, and use top_p"]
    return []


class Drafted(Sampling, Local):
    """The aligned weak model drafts, the strong one goes on (weak-to-strong decoding), or they take turns (nudging)."""

    kind: Literal["wsd"]
    needs: ClassVar[str] = "the strong model's probabilities of given texts are needed, which are not asked of servers"
    rule: Literal["geometric_mean", "top1"]
    window: PositiveInt
    threshold: float = Field(gt=0.0, le=1.0)
    check: PositiveInt | None
    draft: PositiveInt | None

    def rules(self) -> list[str]:
        if self.rule == "top1":
            left = {"window": (self.window, 1), "check": (self.check, None), "draft": (self.draft, None)}
            return [
                f"{name}: read only by rule=geometric_mean; set it to {'null' if unread is None else unread}, as "
                "decoder=nudging has it"
                for name, (value, unread) in left.items()
                if value != unread
            ]
        if self.check is None:
            return ["check: rule=geometric_mean needs a number, as decoder=wsd has it"]
        if self.draft is not None and self.draft > self.max_new_tokens:
            return ["draft: a draft cannot be longer than a reply; lower it, or raise max_new_tokens"]
        return []

    @property
    def nudges(self) -> bool:
        """Whether the models take turns."""
        return self.rule == "top1"


Decoder = Annotated[Plain | Contrastive | Eft | Search | BestOfN | Drafted, Field(discriminator="kind")]
PAIR = (Contrastive, Eft, Drafted)  # always ask for the weak pair; the others by their guide


class DecodeEvaluation(Strict):
    """What is measured of the replies."""

    prompts: PositiveInt
    traces: int = Field(ge=0)
    surprise: bool
    tax: str | None
    frontier: bool


def server_of(decoder: Decoder) -> Server | None:
    """Who writes in place of the strong model, if a server does."""
    server = getattr(decoder, "server", None)
    return server if server is not None and server.url is not None else None


def needs_pair(decoder: Decoder) -> bool:
    """Whether the weak model takes part, and was to be aligned."""
    guide = getattr(decoder, "guide", None)
    return isinstance(decoder, PAIR) or bool(guide and guide.implicit) or bool(getattr(decoder, "tilt", 0))
