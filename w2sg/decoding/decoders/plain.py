"""The strong model alone (``kind: sampling``): what all other decoders are compared with."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from w2sg.config.options import PlainSampling
from w2sg.config.schema import TrainConfig
from w2sg.data.replies import Prompts
from w2sg.decoding import vllm as by_vllm
from w2sg.decoding.decoders.base import STRONG, Decoder, Law
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.written import Written


class Plain(Decoder, PlainSampling):
    """The strong model alone."""

    kind: Literal["sampling"] = "sampling"
    words: ClassVar[str] = "strong model, plain"
    generated_by: ClassVar[tuple[str, ...]] = (STRONG,)
    no_server: ClassVar[str] = "plain samples are asked of a server where another decoder is compared with them"

    @classmethod
    def like(cls, decoder: Decoder) -> Plain:
        """The same sampling without a guide."""
        shared = set(cls.model_fields) & set(type(decoder).model_fields) - {"kind", "engine"}
        engine = {"engine": decoder.engine} if isinstance(decoder, Plain) else {}
        return cls(**decoder.model_dump(include=shared), **engine)

    def key(self) -> dict[str, Any]:
        # where a server writes no engine does, and keys have always said so
        return super().key() | {"engine": self.engine or "transformers"}

    def write(self, engines: Engines, prompts: Prompts) -> list[Written]:
        return [Written.of(result) for result in engines.search(self, prompts)]

    def law(self) -> Law:
        return Law("itself")

    def problems(self, config: TrainConfig) -> list[str]:
        if (self.engine or config.engine.name) != "vllm":
            return []
        key = "engine" if self.engine is None else "decoder.engine"
        reason = by_vllm.why_not()
        return [] if reason is None else [f"{key}: vLLM cannot sample here: {reason}; use transformers"]
