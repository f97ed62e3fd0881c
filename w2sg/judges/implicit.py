"""The implicit reward of a pair of language models as a judge."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import PositiveInt

from w2sg.config import option
from w2sg.config.options import model_name
from w2sg.data.replies import Replies
from w2sg.errors import UserError
from w2sg.judges.base import Judge, JudgeOptions
from w2sg.judges.language_model import check_room, find_judge
from w2sg.models.trained import Trained, reading_as
from w2sg.reports.words import short

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run


class ImplicitJudge(JudgeOptions):
    """What alignment did to a pair of models that takes no part otherwise."""

    kind: Literal["implicit"] = "implicit"
    tuned: str = option(..., "the model after its alignment: a file of conf/model, a hub id, a folder or a .gguf file")
    untuned: str = option(..., "the same model before it; one vocabulary")
    max_length: PositiveInt = option(2048, "tokens of prompt and reply; longer replies lose their end")

    def rules(self) -> list[str]:
        if self.tuned == self.untuned:
            return ["untuned: a model against itself rewards nothing; name it before its alignment"]
        return []

    @property
    def gives_rewards(self) -> bool:
        return True

    def names(self, config: TrainConfig) -> dict[str, str]:
        return {key: model_name(getattr(self, key), config) for key in ("tuned", "untuned")}

    def judge(self, run: Run, stage: str, split: str) -> ImplicitReward:
        return ImplicitReward(run, self)


class ImplicitReward(Judge):
    """Rewards log tuned - log untuned of a reply, summed over its tokens: DPO's implicit reward (arXiv 2305.18290) but
    for its factor, of a pair that takes no part otherwise.
    """

    kind = "implicit"

    def __init__(self, run: Run, options: ImplicitJudge):
        super().__init__(run)
        self.source, self.untuned = (
            find_judge(run, getattr(options, key), options.max_length, f"method.judge.{key}")
            for key in ("tuned", "untuned")
        )
        self.models |= {"tuned": self.source, "untuned": self.untuned}
        if self.source.chat.vocabulary != self.untuned.chat.vocabulary:
            raise UserError(
                f"method.judge.untuned: {options.untuned} has another vocabulary than {options.tuned}, so it is not "
                "that model before its alignment; name the one that it was tuned from"
            )
        check_room(self, self.source, lambda prompt: prompt)

    @property
    def name(self) -> str:
        return f"{short(self.source.spec.name)} over {short(self.untuned.spec.name)}"

    def rewards(self, name: str, replies: Replies) -> np.ndarray:
        """[N]; 0 for a reply without a visible character, NaN where the prompt alone is longer than ``max_length``."""
        return self.rewards_and_key(name, replies)[0]

    def rewards_and_key(self, name: str, replies: Replies) -> tuple[np.ndarray, dict[str, Any]]:
        ids = [f"{i}:{s}:{g}" for i, s, g in zip(replies.ids, replies.sample, replies.group, strict=True)]
        # a judge reads texts: tokens as they were written, where its tokenizer wrote them, would be read otherwise
        texts, rows = replace(replies, ids=ids, tokens=None, log_probabilities=None), f"{name}-for-judge"
        tuned = Trained("judge-tuned", self.source)
        sums, stages = [], []
        for model in (tuned, reading_as(Trained("judge-untuned", self.untuned), tuned)):
            values, stage = self.run.score(f"{name}-by-{model.name}", model, texts, rows)
            sums.append(values[:, 0].double().numpy())
            stages.append(stage)
        encoded = self.run.encode(self.source, texts, rows)
        rewards = np.full(len(replies), np.nan)
        empty = set(encoded.dropped.get("empty reply", ()))
        rewards[[i in empty for i in ids]] = 0.0
        rewards[encoded.kept] = sums[0] - sums[1]
        return rewards, {"stages": stages}
