"""A language model as a judge: it is asked which of two replies is better, in both orders.

Shapes: N pairs of replies to the same prompts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import PositiveInt

from w2sg.config import option
from w2sg.config.model_schema import OWN_CHAT, elsewhere
from w2sg.config.options import model_name
from w2sg.data.messages import LAST_TURN, Dialogue, Message, instruction, transcript, unmarked
from w2sg.data.replies import Replies, ReplyPairs, prompts_of
from w2sg.errors import UserError
from w2sg.judges.base import Judge, JudgeOptions, Verdicts
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.models.source import Source
from w2sg.models.trained import Trained

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run

log = logging.getLogger(__name__)

QUESTION = """\
Below are a conversation between a user and an assistant, and two replies to its last message. Decide which of the \
replies
is more helpful, correct and honest. Do not go by their order or by their length.

[Conversation]
{conversation}

[Reply A]
{first}

[Reply B]
{second}

Which reply is better? Answer with A or B alone."""


PLACES = ("{conversation}", "{first}", "{second}")  # of its question


class LanguageModelJudge(JudgeOptions):
    """A language model that is asked which of two replies is better."""

    kind: Literal["llm"] = "llm"
    model: str = option(
        "qwen2.5-7b-instruct",
        "a file of conf/model, a hub id, a folder or a .gguf file; strong or weak is that role's model before training",
    )
    question: str = option(
        QUESTION, "what it is asked; {conversation}, {first} and {second} stand for the dialogue and the two replies"
    )
    labels: list[str] = option(
        ["A", "B"],
        "its answers for the first and the second reply, which differ in one token",
        min_length=2,
        max_length=2,
    )
    max_length: PositiveInt = option(4096, "tokens of the question; a longer comparison is left out, which is said")

    def rules(self) -> list[str]:
        problems = []
        if lost := [part for part in PLACES if self.question.count(part) != 1]:
            problems.append(f"question: {' and '.join(lost)} must stand in it, once each")
        if len({label.strip() for label in self.labels}) < 2 or not all(label.strip() for label in self.labels):
            problems.append(f"labels: two different words, as [A,B] (got {self.labels})")
        return problems

    def names(self, config: TrainConfig) -> dict[str, str]:
        return {"model": model_name(self.model, config)}

    def judge(self, run: Run, stage: str, split: str) -> LanguageModel:
        return LanguageModel(run, self)


@dataclass(frozen=True)
class LabelVerdicts(Verdicts):
    """Verdicts by the probability of two labels, each pair read in both orders.

    Attributes:
        first: [N, 2] the probability that goes to the label of the reply shown first, of that of both labels: with a
            first, then with b first; NaN where a comparison was too long to be read.
        mass: [N] probability of the two labels together, the mean of both orders.
    """

    first: np.ndarray | None = None
    mass: np.ndarray | None = None

    @classmethod
    def of_labels(cls, first: np.ndarray, mass: np.ndarray) -> LabelVerdicts:
        """The mean of both orders."""
        return cls((first[:, 0] + 1 - first[:, 1]) / 2, None, first, mass)

    def mirrored(self) -> LabelVerdicts:
        return replace(super().mirrored(), first=self.first[:, ::-1])

    def of_judge(self) -> dict[str, Any]:
        """The judge's bias for a position, and whether it answers the question, where there are any verdicts.

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


def find_judge(run: Run, model: str, max_length: int, asked_for: str) -> Source:
    """A judge's language model, used as it is; read like the strong one in all else."""
    config = run.config
    options = {"name": model_name(model, config), "revision": None, "untuned": None, "layers": None, "layer": None}
    options |= {"random_init": False, "train": "full", "head": "linear", "lr": None, "epochs": None}
    options |= {"max_length": max_length, "quantise": None, "load": None}
    options |= OWN_CHAT  # a weakened strong model has no weakened judge
    if model in ("strong", "weak"):
        role = getattr(config, model)
        options |= {key: getattr(role, key) for key in ("revision", "dtype", "trust_remote_code", *OWN_CHAT)}
    spec = config.strong.model_copy(update=options | elsewhere(config.strong, model == "strong"))
    # a judge on a server lends its tokenizer alone
    source = run.find(spec, asked_for, weights=config.server.url is None or "judge" not in config.server.roles)
    run.stages.notes += source.notes
    positions = getattr(source.config, "max_position_embeddings", None) or max_length
    if positions < max_length:
        source.spec = source.spec.model_copy(update={"max_length": positions})
    return source


def check_room(judge: Judge, source: Source, of_prompt: Callable[[Dialogue], Dialogue], reply: int = 1) -> None:
    """Whether a judge's model has room for the test split's prompts: said before anything is trained.

    Args:
        of_prompt: what the model reads of a prompt, with replies of no text. reply: tokens that must fit after it.

    Raises:
        UserError: it has room for none.
    """
    most = source.spec.max_length
    prompts = prompts_of(judge.run.data.test).texts
    longest = max(prompts, key=lambda prompt: len(prompt.text))
    if len(source.chat.prompts([of_prompt(longest)])[0]) + reply <= most:
        return
    lengths = np.array([len(ids) for ids in source.chat.prompts([of_prompt(prompt) for prompt in prompts])])
    lost = int((lengths + reply > most).sum())
    if lost == len(prompts):
        raise UserError(
            f"method.judge.max_length: {source.spec.name} reads {most} tokens as a judge, and the shortest test prompt "
            f"takes {lengths.min()} without any reply; raise max_length, or choose a judge that reads more"
        )
    log.warning(
        "method.judge.max_length: %d of %d test prompts take more than the %d tokens that the judge %s reads; it "
        "cannot judge replies to them; raise max_length, or choose a judge that reads more",
        *(lost, len(prompts), most, source.spec.name),
    )


class LanguageModel(Judge):
    """Compares replies by asking a language model which of two is better.

    The verdict is the softmax over its next-token log-probabilities of the two labels, as AlpacaEval 2's weighted
    annotator (arXiv 2404.04475), and the mean over both orders of the replies.
    """

    kind = "llm"

    def __init__(self, run: Run, options: LanguageModelJudge):
        super().__init__(run)
        self.options = options
        self.source = find_judge(run, options.model, options.max_length, "method.judge")
        self.models["model"] = self.source
        one, two = (row.tolist() for row in self.source.chat.replies(options.labels))
        # some tokenizers write the space before a word as a token of its own
        if one[:-1] != two[:-1] or one == two or len(one) > 2:
            raise UserError(
                f"method.judge.labels: {' and '.join(options.labels)} do not differ in one token alone for "
                f"{self.source.spec.name}; choose others, as [A,B] or [1,2]"
            )
        check_room(self, self.source, lambda prompt: self.question(prompt, "", ""), len(one))
        self.label_tokens = len(one)

    @property
    def name(self) -> str:
        return self.source.spec.name

    def about_writing(self, key: str, writers: str) -> str:
        return (
            f"the judge is {writers}: models tend to prefer what they would write themselves (self-preference); "
            "another judge may say otherwise"
        )

    def compare(self, name: str, a: Replies, b: Replies) -> LabelVerdicts:
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
            for label in self.options.labels
        ]
        pairs, rows = ReplyPairs(ids, *sides, {}), f"{name}-questions"
        shortest = min(map(len, self.source.chat.prompts(questions)))
        if shortest + self.label_tokens > self.source.spec.max_length:
            raise self._no_room(name)
        judge = Trained("judge", self.source)
        log_p = self.run.ask_labels(f"{name}-judged", judge, questions, ids, self.options.labels)
        if log_p is None:
            values, _ = self.run.score(f"{name}-judged", judge, pairs, rows)
            log_p = np.full((count, 2), np.nan)
            log_p[self.run.encode(self.source, pairs, rows).kept] = values.double().numpy()
        first = 1 / (1 + np.exp(log_p[:, 1] - log_p[:, 0]))
        both = np.stack(np.split(np.exp(log_p).sum(1), 2), 1).mean(1)
        shown = np.stack(np.split(first, 2), 1)
        shown[np.isnan(both)] = np.nan  # in one order it may just have fitted
        if np.isnan(both).all():
            raise self._no_room(name)
        return LabelVerdicts.of_labels(shown, both)

    def _no_room(self, name: str) -> UserError:
        return UserError(
            f"method.judge.max_length: no comparison of {name} fits into {self.source.spec.max_length} tokens in both "
            "orders; raise max_length"
        )

    def question(self, prompt: Dialogue, first: str, second: str) -> Dialogue:
        """What the judge reads, as a dialogue of one question."""
        parts = {"{conversation}": instruction(prompt), "{first}": first, "{second}": second}
        # one pass: a reply may hold what looks like a place; and a speaker's mark in a reply begins no turn
        filled = re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], self.options.question)
        text = unmarked(filled)
        return Dialogue(transcript([("user", text)]) + LAST_TURN, (Message("user", text.strip()),))
