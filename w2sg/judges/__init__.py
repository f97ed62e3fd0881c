"""Judges of replies: one protocol, `Judge`, and one file for each kind, which holds its options beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, TypeAdapter

from w2sg.config.schema import TrainConfig
from w2sg.judges.base import Judge, JudgeOptions, OutsideJudge, Verdicts
from w2sg.judges.implicit import ImplicitJudge
from w2sg.judges.language_model import LanguageModelJudge
from w2sg.judges.reward import RewardJudge


def _kind(options: Any) -> str | None:
    """Which kind of judge options are of, as they were typed or as an object."""
    if isinstance(options, Mapping):
        return "own" if "_target_" in options else options.get("kind")
    return getattr(options, "kind", "own")


AnyJudge = Annotated[
    Annotated[RewardJudge, Tag("reward")]
    | Annotated[LanguageModelJudge, Tag("llm")]
    | Annotated[ImplicitJudge, Tag("implicit")]
    | Annotated[OutsideJudge, Tag("own")],
    Discriminator(
        _kind,
        custom_error_type="no_judge",
        custom_error_message="There is no such kind; choose judge=reward, implicit, llm, or a class by its path",
    ),
]


def judge_of(
    run: Any, options: JudgeOptions, stage: str = "judge", split: Literal["transfer", "ground_truth"] = "transfer"
) -> Judge | None:
    """The judge that a run's options name; None where they name none.

    Args:
        stage: name of its training, where it is trained. split: whose pairs it is trained on.
    """
    return options.judge(run, stage, split)


def options_of(config: TrainConfig) -> JudgeOptions:
    """The options of a checked configuration's judge."""
    return TypeAdapter(AnyJudge).validate_python(config.method["judge"])


__all__ = [
    "AnyJudge",
    "ImplicitJudge",
    "Judge",
    "JudgeOptions",
    "LanguageModelJudge",
    "OutsideJudge",
    "RewardJudge",
    "Verdicts",
    "judge_of",
    "options_of",
]
