"""Nudging (arXiv 2410.09300): a strong base model writes, and the aligned weak one the next word where it is unsure.

The strong model writes wherever it is sure of the next token; the weak one begins and ends replies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from w2sg.config.option import option
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.written import Written
from w2sg.decoding.decoders.wsd import TOP1, Drafted
from w2sg.decoding.nudging import Nudging

# As ``kind: wsd`` had it, which old reports and keys of the store still do: its rule, and what that rule did not read.
EARLIER = {"kind": "wsd", "rule": TOP1, "window": 1, "check": None, "draft": None}


class Nudge(Drafted):
    """The strong model writes where it is sure, the aligned weak model nudges it where it is not."""

    kind: Literal["nudging"] = "nudging"
    threshold: float = option(
        0.4, "probability that the strong model's likeliest token has to reach (gamma)", gt=0.0, le=1.0
    )

    words: ClassVar[str] = "nudging"

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> bool:
        return super().takes(options) or all(options.get(key) == EARLIER[key] for key in ("kind", "rule"))

    @model_validator(mode="before")
    @classmethod
    def _earlier_spelling(cls, options: Any) -> Any:
        if not isinstance(options, dict) or options.get("kind") != EARLIER["kind"]:
            return options
        wrong = [key for key, value in EARLIER.items() if options.get(key, value) != value]
        if wrong:
            raise ValueError(
                "\n".join(
                    f"{key}: read only by rule=geometric_mean; set it to "
                    f"{'null' if EARLIER[key] is None else EARLIER[key]}, as decoder=nudging has it"
                    for key in wrong
                )
            )
        return {key: value for key, value in options.items() if key not in EARLIER}

    def write(self, engines: Engines, prompts: Prompts) -> list[Written]:
        sides = engines.sides(self)
        nudging = Nudging(*sides, self.threshold, self.max_new_tokens, prompts.ids, engines.seed)
        replies = nudging.write(prompts.texts)
        engines.forwards += nudging.forwards
        return [
            Written(
                tokens=reply.tokens,
                log_probabilities=reply.log_probabilities,
                finished=reply.finished,
                drafted=reply.nudged,
                fate="reached" if not reply.nudged.all() else "complete" if reply.finished else "longest",
                rounds=reply.nudges,
            )
            for reply in replies
        ]

    def given(self, reply: Written) -> int:
        return len(reply.tokens)  # the strong model's turns were cut where each of them was written

    @property
    def stage(self) -> str:
        return EARLIER["kind"]

    def key(self) -> dict[str, Any]:
        return super().key() | EARLIER

    def facts(self, reply: Written) -> dict[str, Any]:
        return super().facts(reply) | {"nudges": reply.rounds}

    def setting(self) -> str:
        return f"gamma {self.threshold:g}"
