"""Systems that answered the same prompts, two by two, as a judge sees them.

Shapes: N replies of a system.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.errors import UserError
from w2sg.judges.base import Verdicts
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap

if TYPE_CHECKING:
    from w2sg.data.replies import Replies
    from w2sg.judges.base import Judge


class Comparisons:
    """Verdicts on every two systems, each asked for once; joined by the prompt's id.

    Args:
        judge: rewards all replies at once where it can, else it compares them two by two.
        stage: name of the rewards' stage.
        replies: by system, at most one to each prompt.
        rewards: [N] of each system, where they are known already.
        stages: what a system is called in the names of stages, where that is not its name.
        tokens: whether a reply's length is that of its tokens, where both systems have one tokenizer, or of its text.

    Attributes:
        rewards: [N] of each system, where the judge gives rewards.
    """

    def __init__(
        self,
        judge: Judge,
        stage: str,
        replies: Mapping[str, Replies],
        rewards: Mapping[str, np.ndarray] | None = None,
        tokens: bool = False,
        stages: Mapping[str, str] | None = None,
    ):
        self.judge, self.replies, self.tokens, self.stages = judge, replies, tokens, stages or {}
        if rewards is None:
            rewards = judge.rewards_of(stage, replies) if judge.gives_rewards else {}
        self.rewards = dict(rewards)
        self._verdicts: dict[tuple[str, str], tuple[Verdicts, list[int], list[int]]] = {}

    def verdicts(self, name: str, other: str) -> tuple[Verdicts, list[int], list[int]]:
        """Verdicts on one system over another, and the rows of each that were compared."""
        if (other, name) in self._verdicts:
            verdicts, theirs, mine = self._verdicts[other, name]
            return verdicts.mirrored(), mine, theirs
        if (name, other) not in self._verdicts:
            place = {i: row for row, i in enumerate(self.replies[other].ids)}
            mine = [row for row, i in enumerate(self.replies[name].ids) if i in place]
            theirs = [place[self.replies[name].ids[row]] for row in mine]
            if self.rewards:
                verdicts = Verdicts.of_rewards(self.rewards[name][mine], self.rewards[other][theirs])
            else:
                pair = self.replies[name].take(mine), self.replies[other].take(theirs)
                verdicts = self.judge.checked_verdicts(f"{self.stages.get(name, name)}-over-{other}", *pair)
            self._verdicts[name, other] = verdicts, mine, theirs
        return self._verdicts[name, other]

    def preferred(self, name: str, other: str) -> np.ndarray:
        """[N] how far each reply of a system is preferred to the other's; NaN where that has none, or no verdict."""
        verdicts, mine, _ = self.verdicts(name, other)
        column = np.full(len(self.replies[name]), np.nan)
        column[mine] = verdicts.preferred
        return column

    def over(self, name: str, other: str) -> dict[str, Any]:
        """How often one system beats another, also at equal lengths, by how much, and the p of the exact sign test."""
        verdicts, mine, theirs = self.verdicts(name, other)
        known = verdicts.known
        if not known.any():
            raise UserError(
                f"method.judge: {self.judge.name} came to no verdict on {name} over {other}; choose another"
            )
        bootstrap = Bootstrap(int(known.sum()))
        lengths = [side[known] for side in self._lengths(name, other, mine, theirs)]
        measured: dict[str, Any] = {"prompts": bootstrap.n, "without_verdict": int((~known).sum())}
        if verdicts.rewards is not None:
            a, b = (side[known] for side in verdicts.rewards)
            measured |= {
                "win_rate": comparisons.win_rate(a, b, bootstrap).as_dict(),
                "length_controlled": comparisons.length_controlled_win_rate(a, b, *lengths, bootstrap).as_dict(),
                "gap": comparisons.reward_gap(a, b, bootstrap).as_dict(),
                "standardised": comparisons.standardised_gap(a, b, bootstrap).as_dict(),
            }
        else:
            preferred = verdicts.preferred[known]
            a, b = preferred, np.full(len(preferred), 0.5)
            measured |= {
                "win_rate": comparisons.preference_rate(preferred, bootstrap).as_dict(),
                "length_controlled": comparisons.length_controlled_preference(preferred, *lengths, bootstrap).as_dict(),
            }
        longer = bootstrap.mean((lengths[0] - lengths[1]).astype(np.float64)).as_dict()
        return measured | {"longer": longer, "p": comparisons.paired_test(a, b)} | verdicts.of_judge()

    def _lengths(self, name: str, other: str, mine: list[int], theirs: list[int]) -> tuple[np.ndarray, np.ndarray]:
        sides = (self.replies[name], mine), (self.replies[other], theirs)
        # tokens of two tokenizers are two units
        if self.tokens and self.replies[name].fingerprint == self.replies[other].fingerprint:
            return tuple(replies.lengths[rows] for replies, rows in sides)
        return tuple(np.array([len(replies.texts[row]) for row in rows], np.int64) for replies, rows in sides)
