"""Judges of replies: one protocol, `w2sg.judges.base.Judge`, one file for each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from w2sg.config.options import AnyJudge
    from w2sg.experiment.text import TextRun
    from w2sg.judges.base import Judge


def judge_of(
    text: TextRun, options: AnyJudge, stage: str = "judge", split: Literal["transfer", "ground_truth"] = "transfer"
) -> Judge | None:
    """The judge that a run's options name; None where they name none.

    Args:
        stage: name of its training, where it is trained. split: whose pairs it is trained on.
    """
    if options.kind == "llm":
        from w2sg.judges.language_model import LanguageModel

        return LanguageModel(text, options)
    if options.kind == "implicit":
        from w2sg.judges.implicit import ImplicitReward

        return ImplicitReward(text, options)
    if options.model is None:
        return None
    from w2sg.judges.reward import RewardModel

    return RewardModel(text, options, stage, split)
