"""Judges other than reward models: a language model that compares replies, and the implicit reward of a pair of models.

Shapes: N replies, or N pairs of replies to the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from w2sg.config.options import ImplicitJudge, Judge, LlmJudge, model_name
from w2sg.config.schema import OWN_CHAT
from w2sg.data.messages import LAST_TURN, Dialogue, Message, instruction, transcript, unmarked
from w2sg.data.replies import Replies, ReplyPairs, gold_pairs
from w2sg.errors import UserError
from w2sg.evaluation.systems import Bench, itself, reading_as
from w2sg.experiment.text import TextRun, Writer
from w2sg.metrics import replies as comparisons
from w2sg.metrics.intervals import Bootstrap
from w2sg.models.loading import Source, find, same
from w2sg.reports.pages.labels import short


def bench_of(text: TextRun, judge: Judge | LlmJudge | ImplicitJudge) -> Bench | LlmBench:
    """What measures with a judge of any kind."""
    if isinstance(judge, LlmJudge):
        return LlmBench(text, judge)
    return ImplicitBench(text, judge) if isinstance(judge, ImplicitJudge) else Bench(text, judge)


def _find(text: TextRun, model: str, max_length: int, asked_for: str) -> Source:
    """A judge's language model, used as it is; read like the strong one in all else."""
    config = text.run.config
    own = {"name": model_name(model, config), "revision": None, "untuned": None, "layers": None, "random_init": False}
    own |= {"quantise": None}  # a weakened strong model has no weakened judge
    own |= OWN_CHAT
    own |= {"train": "full", "head": "linear", "layer": None, "lr": None, "epochs": None, "max_length": max_length}
    if model in ("strong", "weak"):
        role = getattr(config, model)
        own |= {key: getattr(role, key) for key in ("revision", "dtype", "trust_remote_code", *OWN_CHAT)}
    source = find(config.strong.model_copy(update=own), asked_for)
    text.stages.said += source.notes
    positions = getattr(source.config, "max_position_embeddings", None) or max_length
    if positions < max_length:
        source.spec = source.spec.model_copy(update={"max_length": positions})
    return source


# ---------------------------------------------------------------------------------------------------------------------
# A language model that compares
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preferences:
    """Verdicts on N pairs of replies, each read in both orders; NaN where a comparison was too long to be read.

    Attributes:
        first: [N, 2] the probability that goes to the label of the reply shown first, of that of both labels: with a
            first, then with b first.
        mass: [N] probability of the two labels together, the mean of both orders.
    """

    first: np.ndarray
    mass: np.ndarray

    @property
    def preferred(self) -> np.ndarray:
        """[N] how far a is preferred, the mean of both orders."""
        return (self.first[:, 0] + 1 - self.first[:, 1]) / 2

    @property
    def known(self) -> np.ndarray:
        """[N] whether there is a verdict."""
        return ~np.isnan(self.mass)

    def of_judge(self) -> dict[str, Any]:
        """What the verdicts say about the judge itself, where there are any.

        Returns:
            ``position_bias``: the probability of the label of what is shown first, less 1/2. ``flips``: the share of
            pairs whose verdict changes with the order. ``label_mass``: the probability of the two labels together.
        """
        first, mass = self.first[self.known], self.mass[self.known]
        bootstrap = Bootstrap(len(first))
        return {
            "position_bias": bootstrap.mean(first.mean(1) - 0.5).as_dict(),
            "flips": float(((first > 0.5).all(1) | (first < 0.5).all(1)).mean()),
            "label_mass": float(mass.mean()),
        }


class LlmBench:
    """Measures by asking a language model which of two replies is better.

    The verdict is the softmax over its next-token log-probabilities of the two labels, as AlpacaEval 2's weighted
    annotator (arXiv 2404.04475), and the mean over both orders of the replies.

    Attributes:
        judges: there is a judge. scores: it gives no rewards.
    """

    judges, scores = True, False

    def __init__(self, text: TextRun, judge: LlmJudge):
        self.text, self.run, self.judge = text, text.run, judge
        self.source = _find(text, judge.model, judge.max_length, "method.judge")
        one, two = (row.tolist() for row in self.source.chat.replies(judge.labels))
        # some tokenizers write the space before a word as a token of its own
        if one[:-1] != two[:-1] or one == two or len(one) > 2:
            raise UserError(
                f"method.judge.labels: {' and '.join(judge.labels)} do not differ in one token alone for "
                f"{self.source.spec.name}; choose others, as [A,B] or [1,2]"
            )
        self.notes: list[str] = []

    def independent_of(self, guide: Mapping[str, Source], writers: Mapping[str, Source]) -> None:
        """Refuse the guide as a judge, and note where the judge is a writer.

        Args:
            guide, writers: models by what they are called.

        Raises:
            UserError: the judge is part of the guide.
        """
        for words, source in guide.items():
            if same(source, self.source):
                raise itself("model", words)
        found = [words for words, source in writers.items() if same(source, self.source)]
        if found:
            self.notes.append(
                f"the judge is {' and '.join(found)}: models tend to prefer what they would write themselves "
                "(self-preference); another judge may say otherwise"
            )

    def preferences(self, name: str, a: Replies, b: Replies) -> Preferences:
        """Verdicts on pairs of replies to the same prompts.

        Args:
            name: of the stage. a, b: [N], row by row.
        """
        questions, ids = [], []
        for order, (one, two) in enumerate(((a, b), (b, a))):
            rows = zip(a.ids, a.prompts, one.texts, two.texts, strict=True)
            for k, (i, prompt, first, second) in enumerate(rows):
                ids.append(f"{i}:{k}:{order}")
                questions.append(self.question(prompt, first, second))
        count = len(questions)
        zeros = np.zeros(count, np.int64)
        sides = [
            Replies(ids, questions, [label] * count, zeros.astype(bool), zeros, zeros, {})
            for label in self.judge.labels
        ]
        pairs, rows = ReplyPairs(ids, *sides, {}), f"{name}-questions"
        values, _ = self.text.read_replies(f"{name}-judged", Writer("judge", self.source), pairs, rows)
        log_p = np.full((count, 2), np.nan)
        log_p[self.text.encode(self.source, pairs, rows).kept] = values.double().numpy()
        first = 1 / (1 + np.exp(log_p[:, 1] - log_p[:, 0]))
        both = np.stack(np.split(np.exp(log_p).sum(1), 2), 1).mean(1)
        shown = np.stack(np.split(first, 2), 1)
        shown[np.isnan(both)] = np.nan  # in one order it may just have fitted
        if np.isnan(both).all():
            raise UserError(
                f"method.judge.max_length: no comparison of {name} fits into {self.source.spec.max_length} tokens in "
                "both orders; raise it"
            )
        return Preferences(shown, both)

    def question(self, prompt: Dialogue, first: str, second: str) -> Dialogue:
        """What the judge reads, as a dialogue of one question."""
        parts = {"{conversation}": instruction(prompt), "{first}": first, "{second}": second}
        # one pass: a reply may hold what looks like a place; and a speaker's mark in a reply begins no turn
        filled = re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], self.judge.question)
        asked = unmarked(filled)
        return Dialogue(transcript([("user", asked)]) + LAST_TURN, (Message("user", asked.strip()),))

    def accuracy(self) -> dict[str, Any]:
        """How often the judge prefers what people preferred, on the test split, and its bias for a position there."""
        pairs = gold_pairs(self.run.data.test)
        found = self.preferences("test-pairs", pairs.chosen, pairs.rejected)
        preferred, known = found.preferred[found.known], found.known
        bootstrap = Bootstrap(len(preferred), clusters=np.array(self.run.data.test.clusters)[known])
        right = (preferred > 0.5) + 0.5 * (preferred == 0.5)
        longer = np.array([len(c) - len(r) for c, r in zip(pairs.chosen.texts, pairs.rejected.texts, strict=True)])
        return {
            "kind": "llm",
            "model": self.source.spec.name,
            "trained": False,
            "accuracy": bootstrap.share(right).as_dict(),
            "length_correlation": comparisons.reward_length_correlation(preferred, longer[known], bootstrap).as_dict(),
            "on_test_pairs": found.of_judge(),
        }


# ---------------------------------------------------------------------------------------------------------------------
# The implicit reward of a pair
# ---------------------------------------------------------------------------------------------------------------------


class ImplicitBench(Bench):
    """Rewards log tuned - log untuned of a reply, summed over its tokens: DPO's implicit reward (arXiv 2305.18290) but
    for its factor, of a pair that takes no part otherwise.
    """

    def __init__(self, text: TextRun, judge: ImplicitJudge):
        self.text, self.run, self.judge, self.name = text, text.run, judge, "judge"
        self._as_it_is, self.notes = True, []
        self.source, self.untuned = (
            _find(text, getattr(judge, key), judge.max_length, f"method.judge.{key}") for key in ("tuned", "untuned")
        )
        if self.source.chat.vocabulary != self.untuned.chat.vocabulary:
            raise UserError(
                f"method.judge.untuned: {judge.untuned} has another vocabulary than {judge.tuned}, so it is not that "
                "model before its alignment; name the one that it was tuned from"
            )

    def independent_of(self, guide: Mapping[str, Source], writers: Mapping[str, Source]) -> None:
        for words, source in guide.items():
            for key, own in (("tuned", self.source), ("untuned", self.untuned)):
                if same(source, own):
                    raise itself(key, words)
        for key, own in (("tuned", self.source), ("untuned", self.untuned)):
            self.notes += [
                f"the judge's {key} model is {words}: its own writing is part of the judge's opinion"
                for words, source in writers.items()
                if same(source, own)
            ]

    def rewards(self, name: str, replies: Replies) -> tuple[np.ndarray, dict[str, Any]]:
        """[N] rewards, and where they came from; 0 for a reply without a visible character, NaN where the prompt alone
        is longer than ``max_length``.
        """
        ids = [f"{i}:{s}:{g}" for i, s, g in zip(replies.ids, replies.sample, replies.group, strict=True)]
        # a judge reads texts: tokens as they were written, where its tokenizer wrote them, would be read otherwise
        own, rows = replace(replies, ids=ids, tokens=None, log_probabilities=None), f"{name}-for-judge"
        tuned = Writer("judge-tuned", self.source)
        sums, stages = [], []
        for writer in (tuned, reading_as(Writer("judge-untuned", self.untuned), tuned)):
            values, stage = self.text.read_replies(f"{name}-by-{writer.name}", writer, own, rows)
            sums.append(values[:, 0].double().numpy())
            stages.append(stage)
        encoded = self.text.encode(self.source, own, rows)
        found = np.full(len(replies), np.nan)
        empty = set(encoded.dropped.get("empty reply", ()))
        found[[i in empty for i in ids]] = 0.0
        found[encoded.kept] = sums[0] - sums[1]
        return found, {"stages": stages}

    def accuracy(self) -> dict[str, Any]:
        names = f"{short(self.source.spec.name)} over {short(self.untuned.spec.name)}"
        return super().accuracy() | {"kind": "implicit", "model": names}
