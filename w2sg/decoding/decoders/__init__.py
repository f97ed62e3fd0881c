"""Ways of writing, one file each: the options of conf/decoder, what each needs, how it writes, its words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import WrapValidator

from w2sg.decoding.decoders.base import REWARD, STRONG, TUNED, UNTUNED, Decoder, Law, class_of
from w2sg.decoding.decoders.best_of_n import BestOfN
from w2sg.decoding.decoders.contrastive import Contrastive
from w2sg.decoding.decoders.eft import Eft
from w2sg.decoding.decoders.nudging import Nudge
from w2sg.decoding.decoders.plain import Plain
from w2sg.decoding.decoders.search import Search
from w2sg.decoding.decoders.written import Written
from w2sg.decoding.decoders.wsd import Wsd


def _choose(value: Any, of_union: Any) -> Decoder:
    if isinstance(value, Decoder) or not isinstance(value, Mapping):
        return value if isinstance(value, Decoder) else of_union(value)
    return class_of(value).model_validate(_without_target(value))


def _without_target(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "_target_"}


# The union names the options of all of them, for messages; a class from outside is chosen as well.
AnyDecoder = Annotated[Plain | Contrastive | Eft | Search | BestOfN | Wsd | Nudge, WrapValidator(_choose)]


def decoder_in(options: Mapping[str, Any]) -> Decoder | None:
    """The decoder whose options stand in a report, of any version; None where its class is not there."""
    try:
        kind = class_of(options)
    except ValueError:
        return None
    return kind.model_construct(**_without_target(options))


__all__ = [
    "REWARD",
    "STRONG",
    "TUNED",
    "UNTUNED",
    "AnyDecoder",
    "Decoder",
    "Law",
    "Plain",
    "Written",
    "class_of",
    "decoder_in",
]
