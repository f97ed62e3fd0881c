"""What every judge does: compare replies to the same prompts, and reward them where it can.

Shapes: N replies, or N pairs of replies to the same prompts, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict

from w2sg.config import Options, option
from w2sg.config.build import build
from w2sg.config.check import target_problems
from w2sg.config.plugins import resolve
from w2sg.data.replies import Replies, concatenate, gold_pairs
from w2sg.data.table import digest
from w2sg.errors import UserError, calling, name_hooks, path_of
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.models.source import same

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.models.source import Source


@dataclass(frozen=True)
class Verdicts:
    """Which of two replies is better, for N prompts.

    Attributes:
        preferred: [N] in [0, 1], how far a is preferred to b: 0.5 is a tie, NaN no verdict.
        rewards: [N] of a and [N] of b, where the judge gives rewards.
    """

    preferred: np.ndarray
    rewards: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self):
        # lists and float32 are taken as well; a judge from outside need not know
        object.__setattr__(self, "preferred", np.asarray(self.preferred, np.float64))

    @classmethod
    def of_rewards(cls, a: np.ndarray, b: np.ndarray) -> Verdicts:
        """The higher reward wins, [N] against [N]."""
        return cls((1 + np.sign(a - b)) / 2, (a, b))

    @property
    def known(self) -> np.ndarray:
        """[N] whether there is a verdict."""
        return ~np.isnan(self.preferred)

    def mirrored(self) -> Verdicts:
        """The same of b over a."""
        return replace(self, preferred=1 - self.preferred, rewards=None if self.rewards is None else self.rewards[::-1])

    def of_judge(self) -> dict[str, Any]:
        """What the verdicts say about the judge itself."""
        return {}


class JudgeOptions(Options):
    """What may be typed of a judge of one kind; it makes the judge."""

    @property
    def gives_rewards(self) -> bool:
        """Whether the judge rewards replies, and does not compare them alone."""
        return False

    def names(self, config: TrainConfig) -> dict[str, str]:
        """Names of the models that it consists of, by option; those that are trained here are left out."""
        return {}

    def judge(self, run: Run, stage: str, split: str) -> Judge | None:
        """The judge; None where the options name none.

        Args:
            stage: name of its training, where it is trained. split: whose pairs it is trained on.
        """
        raise NotImplementedError

    def guides(self, config: TrainConfig, model: str) -> list[str]:
        """That a model which guides is the judge by its name; by its weights it is refused once they are found."""
        return [itself(key, model) for key, name in self.names(config).items() if name == model]


class OutsideJudge(JudgeOptions):
    """A judge from outside: `_target_` is its class, a `Judge`; all other keys are its options."""

    model_config = ConfigDict(extra="allow")
    target: str = option(..., "dotted path of a class that inherits from w2sg.judges.Judge", alias="_target_")

    def rules(self) -> list[str]:
        node = {"_target_": self.target, **(self.model_extra or {})}
        problems = [line.removeprefix("judge.") for line in target_problems("judge", node)]
        judge = None if problems else resolve(self.target)
        if not problems and not (isinstance(judge, type) and issubclass(judge, Judge)):
            problems = [f"_target_: {self.target} is no judge; let it inherit from w2sg.judges.Judge"]
        elif not problems and judge.rewards is Judge.rewards and judge.compare is Judge.compare:
            problems = [f"_target_: {self.target} has neither a method rewards nor compare; give it one"]
        return problems

    @property
    def gives_rewards(self) -> bool:
        return resolve(self.target).gives_rewards

    def judge(self, run: Run, stage: str, split: str) -> Judge:
        with calling(resolve(self.target)):
            judge = build({"_target_": self.target, **(self.model_extra or {})})(run)
        if not {"run", "models", "notes"} <= vars(judge).keys():
            raise UserError(f"{self.target}: call super().__init__(run) first in its __init__")
        return judge


class Judge:
    """A judge overrides `rewards`, and then the higher reward wins, or `compare`.

    Args:
        run: the run whose replies are judged.

    Attributes:
        kind: in reports. name: what judges, for people.
        gives_rewards: whether it overrides `rewards`.
        trained: whether this run trains it, on the transfer split's pairs.
        models: the language models that it consists of, by the option that names each.
        notes: what a reader of its verdicts must know.
    """

    kind = "own"
    gives_rewards = trained = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls.gives_rewards = cls.rewards is not Judge.rewards
        name_hooks(cls, Judge)

    def __init__(self, run: Run):
        self.run = run
        self.models: dict[str, Source] = {}
        self.notes: list[str] = []

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def called(self) -> str:
        """What messages call it: the class of one from outside, else its name."""
        path = path_of(self)
        return self.name if path.startswith("w2sg.") else path

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def rewards(self, name: str, replies: Replies) -> np.ndarray:
        """[N] how good each reply is; NaN for one that cannot be read.

        Args:
            name: of the stage, where one is computed.
        """
        raise NotImplementedError(f"{self.name} gives no rewards")

    def compare(self, name: str, a: Replies, b: Replies) -> Verdicts:
        """Verdicts on pairs of replies to the same prompts.

        Args:
            name: of the stage, where one is computed.
            a, b: [N], row by row.
        """
        rows = np.tile(np.arange(len(a)), 2)  # a prompt may have several pairs
        both = replace(concatenate([a, b]), sample=rows, group=np.repeat([0, 1], len(a)))
        return Verdicts.of_rewards(*np.split(self.checked_rewards(name, both), 2))

    def checked_rewards(self, name: str, replies: Replies) -> np.ndarray:
        """`rewards`, [N] numbers.

        Raises:
            UserError: they are not, or one is infinite.
        """
        with calling(self, "rewards"):
            rewards = np.asarray(self.rewards(name, replies), np.float64)
        if rewards.shape != (len(replies),):
            raise UserError(
                f"{self.called}.rewards: gave {rewards.shape} for {len(replies)} replies; give one number each"
            )
        _check_finite(f"{self.called}.rewards", rewards)
        return rewards

    def checked_verdicts(self, name: str, a: Replies, b: Replies) -> Verdicts:
        """`compare`, [N] in [0, 1] or NaN.

        Raises:
            UserError: they are not, or come with rewards that are not [N] numbers each.
        """
        verdicts = self.compare(name, a, b)
        preferred = verdicts.preferred if isinstance(verdicts, Verdicts) else np.zeros(0)
        if preferred.shape != (len(a),) or np.any((preferred < 0) | (preferred > 1)):
            raise UserError(
                f"{self.called}.compare: give w2sg.judges.Verdicts of {len(a)} numbers between 0 and 1, or NaN where "
                "there is no verdict"
            )
        if verdicts.rewards is None:
            return verdicts
        with calling(self, "compare"):
            rewards = tuple(np.asarray(side, np.float64) for side in verdicts.rewards)
        if [side.shape for side in rewards] != [(len(a),)] * 2:
            raise UserError(f"{self.called}.compare: give its Verdicts rewards of a and of b, {len(a)} numbers each")
        for side in rewards:
            _check_finite(f"{self.called}.compare", side)
        return replace(verdicts, rewards=rewards)

    def rewards_and_key(self, name: str, replies: Replies) -> tuple[np.ndarray, dict[str, Any]]:
        """Rewards [N] to train on, and where they came from, for the cache key of what is trained."""
        rewards = self.checked_rewards(name, replies)
        return rewards, {"judge": self.name, "rewards": digest(*map(str, rewards.tolist()))}

    def rewards_of(self, name: str, systems: Mapping[str, Replies]) -> dict[str, np.ndarray]:
        """Rewards [N] of several systems' replies in one stage, by system.

        Raises:
            UserError: some replies have none.
        """
        # all at once: states of frozen judges are read batch by batch
        rewards = self.checked_rewards(name, concatenate(list(systems.values())))
        if lost := int(np.isnan(rewards).sum()):
            if hasattr(getattr(self, "options", None), "max_length"):
                raise UserError(
                    f"method.judge.max_length: the judge cannot read the prompts of {lost} replies; raise it (all "
                    "replies are in the store)"
                )
            raise UserError(
                f"{self.called}.rewards: gave NaN for {lost} of {len(rewards)} replies; give each a number, or write "
                "compare, whose NaN is no verdict (all replies are in the store)"
            )
        ends = np.cumsum([len(replies) for replies in systems.values()])
        return dict(zip(systems, np.split(rewards, ends[:-1]), strict=True))

    # -- about the judge ----------------------------------------------------------------------------------------------

    def independent_of(self, guide: Mapping[str, Source], writers: Mapping[str, Source]) -> None:
        """Refuse the guide as a judge, and note where the judge is a writer.

        Args:
            guide, writers: models by what they are called.

        Raises:
            UserError: the judge is part of the guide, whatever either is called.
        """
        for words, source in guide.items():
            for key, model in self.models.items():
                if same(source, model):
                    raise UserError(itself(key, words))
        for key, model in self.models.items():
            if names := [words for words, source in writers.items() if same(source, model)]:
                self.notes.append(self.about_writing(key, " and ".join(names)))

    def about_writing(self, key: str, writers: str) -> str:
        """What to know where the model of an option is also a writer."""
        return f"the judge's {key} model is {writers}: its own writing is part of the judge's opinion"

    def accuracy(self) -> dict[str, Any]:
        """How often the judge prefers what people preferred, on the test split, and whether it goes by length."""
        return dict(self._accuracy)

    @cached_property
    def _accuracy(self) -> dict[str, Any]:
        pairs = gold_pairs(self.run.data.test)
        verdicts = self.checked_verdicts("test-pairs", pairs.chosen, pairs.rejected)
        known = verdicts.known
        if not known.any():
            raise UserError(
                f"{self.called}: it came to no verdict on any of the {len(known)} test pairs of the dataset, by which "
                "judges are measured; let it judge them, too"
            )
        preferred = verdicts.preferred[known]
        chosen, rejected = (np.array([len(t) for t in side.texts])[known] for side in (pairs.chosen, pairs.rejected))
        opinion, length = preferred, chosen - rejected
        if verdicts.rewards is not None:
            opinion, length = verdicts.rewards[0][known], chosen
        right = (preferred > 0.5) + 0.5 * (preferred == 0.5)
        bootstrap = Bootstrap(len(right), clusters=np.array(self.run.data.test.clusters)[known])
        seen = verdicts.of_judge()
        return {
            "kind": self.kind,
            "model": self.name,
            "trained": self.trained,
            "gives_rewards": self.gives_rewards,
            "accuracy": bootstrap.share(right).as_dict(),
            "pairs": len(right),
            "without_verdict": int((~known).sum()),
            "length_correlation": comparisons.reward_length_correlation(opinion, length, bootstrap).as_dict(),
            "notes": self.notes,
            **({"on_test_pairs": seen} if seen else {}),
        }


def _check_finite(hook: str, rewards: np.ndarray) -> None:
    if infinite := int(np.isinf(rewards).sum()):
        raise UserError(f"{hook}: {infinite} of {len(rewards)} rewards are infinite; give finite numbers")


def itself(key: str, words: str) -> str:
    """That a judge is the guide.

    Args:
        key: of the judge's options. words: what the guide is called.
    """
    return (
        f"method.judge.{key}: {words} would be guide and judge at once, and every gain its own opinion; choose another"
    )
