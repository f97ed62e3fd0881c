"""Weak-to-strong decoding (arXiv 2506.07434): the weak aligned model drafts, greedily; the strong base model goes on.

The strong model reads the draft as it grows and takes over where it would have written the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveInt

from w2sg.config.option import option
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders.base import STRONG, TUNED, Decoder, Law
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.written import Written
from w2sg.decoding.drafting import Drafting, Rule

TOP1 = "top1"  # the rule by which ``kind: wsd`` meant nudging in earlier versions


class Drafted(Decoder):
    """A decoder that has replies of which a small model writes a part, greedily if nothing else is said."""

    temperature: float = option(0.0, "sampling temperature; 0 is greedy", ge=0.0)
    max_new_tokens: PositiveInt = option(256, "a reply that reaches this is cut off")
    batch_size: PositiveInt = option(16, "prompts in flight, on each device; does not change the replies")

    needs: ClassVar[frozenset[str]] = frozenset({STRONG, TUNED})
    no_server: ClassVar[str] = (
        "the strong model's probabilities of given texts are needed, which are not asked of servers"
    )
    drafts: ClassVar[bool] = True

    def facts(self, reply: Written) -> dict[str, Any]:
        return super().facts(reply) | {"kept": reply.draft, "fate": reply.fate}

    def law(self) -> Law:
        return Law("unknown", "its replies begin, or are, another model's, and their law under both is not known")


class Wsd(Drafted):
    """The aligned weak model drafts, the strong one goes on."""

    kind: Literal["wsd"] = "wsd"
    rule: Literal["geometric_mean"] = option(
        "geometric_mean", "when the strong model takes over: by the geometric mean of its probabilities of the draft"
    )
    window: PositiveInt = option(6, "tokens whose geometric mean probability under the strong model decides (w)")
    threshold: float = option(0.8, "probability that it has to reach (gamma)", gt=0.0, le=1.0)
    check: PositiveInt = option(16, "tokens drafted between two looks at them; changes the cost and not the switch")
    draft: PositiveInt | None = option(None, "tokens that a draft may have; null as many as a reply")

    words: ClassVar[str] = "weak-to-strong decoding"

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> bool:
        return super().takes(options) and options.get("rule") != TOP1

    def rules(self) -> list[str]:
        if self.draft is not None and self.draft > self.max_new_tokens:
            return ["draft: a draft cannot be longer than a reply; lower it, or raise max_new_tokens"]
        return []

    def write(self, engines: Engines, prompts: Prompts) -> list[Written]:
        most = self.max_new_tokens
        rule = Rule(self.window, self.threshold, self.check, self.draft or most, most)
        drafting = Drafting(*engines.sides(self), rule, prompts.ids, engines.seed)
        drafts = drafting.write(prompts.texts)
        engines.forwards += drafting.forwards
        return [
            Written(
                tokens=draft.tokens,
                log_probabilities=draft.log_probabilities,
                finished=draft.finished,
                drafted=np.arange(len(draft.tokens)) < draft.kept,
                fate=draft.switch,
            )
            for draft in drafts
        ]

    def setting(self) -> str:
        return f"w {self.window}, gamma {self.threshold:g}"
