"""The two axes of refinement: how right an answer is (content), and how much of the supervisor's concept it has."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from w2sg.config.model_schema import OWN_CHAT
from w2sg.data.replies import Replies
from w2sg.experiment.next_words import next_words, split_words
from w2sg.experiment.run import Run
from w2sg.judges.base import Judge
from w2sg.methods.refine.options import Axis
from w2sg.methods.refine.prompts import flat, question_of
from w2sg.metrics.answers import answer_in, scored
from w2sg.models.trained import Trained

Name = Literal["content", "concept"]
RATINGS = [" 1", " 2", " 3", " 4", " 5"]
AT_ONCE = 16  # texts that a rating model reads together


class Axes:
    """Scores replies on both axes.

    Args:
        content, concept: how. golds: right answers by prompt id, of all splits.
        judge: a judge, where an axis asks it.
    """

    def __init__(self, run: Run, content: Axis, concept: Axis, golds: dict[str, str], judge: Judge | None):
        self.axes: dict[str, Axis] = {"content": content, "concept": concept}
        self.run, self.golds, self.judge = run, golds, judge
        self.raters = {name: self._rater(name) for name, axis in self.axes.items() if axis.kind == "llm"}

    def _rater(self, name: str) -> Trained:
        """Looked for before any work is done."""
        axis = self.axes[name]
        options = {"name": axis.model, "max_length": axis.max_length, "revision": None, "layers": None, "layer": None}
        options |= OWN_CHAT
        spec = self.run.config.strong.model_copy(update={**options, "random_init": False, "train": "full"})
        source = self.run.find(spec, f"method.{name}")
        split_words(source, RATINGS, f"method.{name}.model")
        return Trained(f"{name}-rater", source)

    @property
    def measured(self) -> list[str]:
        """The axes that are."""
        return [name for name, axis in self.axes.items() if axis.kind != "none"]

    def answer_in(self, text: str) -> str:
        """What two answers must have in common to agree."""
        return answer_in(self.axes["content"].kind, text)

    def score(self, axis: Name, name: str, replies: Replies) -> np.ndarray | None:
        """[N], NaN for a reply whose right answer is asked for and not known; None where the axis is not measured.

        Args:
            name: of the stage, where a judge reads.
        """
        options = self.axes[axis]
        if options.kind == "none":
            return None
        if options.kind == "reward":
            return self.judge.rewards(name, replies)
        golds = [self.golds.get(i) for i in replies.ids]
        known = [k for k, gold in enumerate(golds) if gold is not None or not options.needs_gold]
        values = np.full(len(replies), np.nan)
        if not known:
            return values
        if options.kind == "llm":
            values[known] = self._rated(axis, name, replies.take(known))
            return values
        texts, right = [replies.texts[k] for k in known], [golds[k] or "" for k in known]
        values[known] = scored(options.kind, texts, right, options.pattern, options.unit)
        return values

    def _rated(self, axis: Name, name: str, replies: Replies) -> np.ndarray:
        """[N] the mean of the rating 1 to 5 under the model's law of the next word, scaled to 0 to 1."""
        questions = [
            self.axes[axis].ask.format(question=question_of(p), answer=flat(a), gold=flat(self.golds.get(i, "")))
            for i, p, a in zip(replies.ids, replies.prompts, replies.texts, strict=True)
        ]
        option = f"method.{axis}.model"
        law = next_words(self.run, name, self.raters[axis], questions, RATINGS, option, AT_ONCE).double().softmax(-1)
        return (law @ torch.arange(5.0, dtype=torch.float64) / 4).numpy()
