"""What a hypothesis of a search is worth, as options; and what all decoders have that choose by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import PositiveInt

from w2sg.config.option import Options, option
from w2sg.config.schema import TrainConfig
from w2sg.data.messages import Dialogue
from w2sg.decoding.decoders.base import REWARD, STRONG, TUNED, UNTUNED, Decoder
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.served import Server
from w2sg.decoding.decoders.written import Written
from w2sg.decoding.search import Value
from w2sg.decoding.search_values import ImplicitValue, Mixture, RewardValue


class Guide(Options):
    """What a hypothesis is worth: a weighted sum."""

    implicit: float = option(
        1.0,
        "weight of beta log(tuned / untuned) of the reply so far, by the weak model after and before its alignment",
        ge=0.0,
    )
    beta: float = option(1.0, "factor of the implicit value; alone it changes no order", gt=0.0)
    normalise: Literal["sum", "mean", "length_alpha"] = option(
        "sum", "sum | mean over tokens | length_alpha: the sum over length ** length_alpha"
    )
    length_alpha: float = option(1.0, "exponent of length_alpha; 1.0 with the others", ge=0.0)
    reward: float = option(0.0, "weight of a reward model's score of the reply so far", ge=0.0)
    model: str | None = option(
        None,
        "that reward model: weak (a head on the weak model's frozen states, trained on the ground-truth split), or a "
        "hub id or folder; it must not be the judge",
    )
    layer: PositiveInt | None = option(
        None, "layer whose states the trained reward model reads; null is the last", alias="feature_layer"
    )

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
            return ["feature_layer: read only where model=weak is trained; set it to null"]
        if self.normalise != "length_alpha" and self.length_alpha != 1.0:
            return ["length_alpha: read only by normalise=length_alpha; set it to 1.0"]
        return []

    def value(self, engines: Engines) -> Value:
        """What it thinks of hypotheses of one batch."""
        parts: list[tuple[float, Value]] = []
        if self.implicit:
            chat, stop = engines.small_chat, engines.chat.stop
            value = ImplicitValue(
                engines.pair, chat, engines.shared, stop, self.beta, self.normalise, self.length_alpha
            )
            parts.append((self.implicit, value))
        if self.reward:
            parts.append((self.reward, RewardValue(engines.reward)))
        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else Mixture(parts)

    def room(self, engines: Engines, prompts: Sequence[Dialogue]) -> list[int] | None:
        """[P] tokens that the small models can read after each prompt; None where nothing is known.

        They may have fewer positions than the strong model. With another vocabulary it is not known how many of their
        tokens a reply will be.
        """
        if not self.implicit or not engines.shared or engines.pair.limit is None:
            return None
        return [engines.pair.limit - len(row) for row in engines.small_chat.prompts(prompts)]


class Guided(Decoder):
    """A decoder that writes several hypotheses and keeps the best; a server may write them."""

    guide: Guide = option(Guide(), "what a hypothesis is worth: a weighted sum")
    server: Server = option(Server(), "a server with OpenAI's completions API in place of the strong model")

    @property
    def needs(self) -> frozenset[str]:
        implicit = {TUNED, UNTUNED} if self.guide.implicit else set()
        return frozenset({STRONG} | implicit | ({REWARD} if self.guide.reward else set()))

    @property
    def served_by(self) -> Server | None:
        return None if self.server.url is None else self.server

    def rules(self) -> list[str]:
        if self.served_by and self.top_k:
            return ["top_k: OpenAI's completions have no such option; set it to 0, and use top_p"]
        return []

    def facts(self, reply: Written) -> dict[str, Any]:
        return super().facts(reply) | {"value": reply.value, "rounds": reply.rounds, "pooled": reply.pooled}

    def problems(self, config: TrainConfig) -> list[str]:
        broken = []
        if self.served_by and config.method["evaluation"]["surprise"]:
            broken.append(
                "method.evaluation.surprise: it is the strong model's log-probability of the replies, which a server "
                "of texts does not give; set it to false"
            )
        judge = config.method["judge"].get("model")
        if self.guide.reward and self.guide.model == judge:
            broken.append(
                f"decoder.guide.model: {judge} would be guide and judge at once, and every gain its own opinion; "
                "choose another for method.judge.model"
            )
        return broken
