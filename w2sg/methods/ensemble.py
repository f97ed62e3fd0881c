"""The strong model learns the combined labels of several weak teachers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from w2sg.data.labels import Labels
from w2sg.methods import checks
from w2sg.methods.votes import boosted, combine, member_rows, weighted_rows
from w2sg.models import variants

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.models.source import Source
    from w2sg.models.trained import Trained
    from w2sg.reports.assemble import Report


def problems(config: TrainConfig) -> list[str]:
    """Conflicts between this method's options and the rest of the configuration."""
    method = config.method
    problems = checks.label_problems(config) + variants.problems(config.weak, method["variants"], "method.variants")
    if method["combine"] == "boost" and method["resample"] != "none":
        problems.append("method.resample: boosting draws its rows itself; set it to none")
    elif method["combine"] != "boost" and method["resample"] == "none" and len(method["variants"]) < method["members"]:
        random = config.weak.random_init or config.weak.dropout or config.weak.arch == "bow"
        if not random and config.weak.train == "head":
            problems.append(
                "method.resample: heads on the same features and rows hardly differ; use bootstrap, or give a variant "
                "for each member"
            )
    if method["resample"] != "subset" and method["part"] != 1.0:
        problems.append("method.part: read only by resample=subset; set it to 1.0")
    return problems


def ensemble(
    run: Run,
    members: Annotated[int, Field(ge=2)] = 5,
    combine: Literal["mean", "logits", "vote", "boost"] = "mean",
    resample: Literal["none", "bootstrap", "subset"] = "bootstrap",
    part: Annotated[float, Field(gt=0, le=1)] = 1.0,
    variants: Sequence[dict[str, Any]] = (),
    ceiling_split: Literal["transfer", "weak_train"] = "transfer",
) -> Report:
    """Train weak models on ground truth, combine their labels, train the strong model on those.

    Bagging and boosting of weak supervisors (arXiv 2402.00667, EnsemW2S 2410.04571). The baselines are the single weak
    model, from which PGR counts, and its student `direct`.

    Args:
        members: number of weak models in the committee.
        combine: how their labels become one: mean of probabilities | logits (their mean) | vote | boost: SAMME, each
            member learns what those before it got wrong.
        resample: how each member's rows are drawn. none: all | bootstrap: as many, with repetition | subset: a part,
            without.
        part: share of the rows that resample=subset draws.
        variants: what members change of the weak model, in turn: [{name: gpt2}, {name: facebook/opt-125m}]; [] changes
            nothing.
        ceiling_split: split whose ground truth trains the ceiling: transfer or weak_train, as in method=finetune.
    """
    data = run.data
    weak = run.fit("weak", run.weak, data.ground_truth, run.gold(data.ground_truth))
    committee = Committee(run, members, combine, resample, part, variants)
    labels = run.noisy(committee.labels(data.transfer))
    student = run.fit("taught-by-all", run.strong, data.transfer, labels, loss=run.loss, like="student")
    first = run.noisy(run.predict(weak, data.transfer))
    direct = run.fit("student", run.strong, data.transfer, first, loss=run.loss)
    ceiling = run.ceiling(ceiling_split)
    return run.report(
        weak=run.predict(weak, data.test),
        ensemble=committee.labels(data.test),
        student=run.predict(student, data.test),
        direct=run.predict(direct, data.test),
        ceiling=run.predict(ceiling, data.test),
        taught=(labels, run.predict(student, data.transfer)),
        notes={"ceiling_split": ceiling_split, "weights_of_members": committee.weights},
    )


class Committee:
    """Weak models that were trained separately.

    Attributes:
        models: the M members.
        weights: vote of each member, for boosting; ones otherwise.
    """

    def __init__(self, run: Run, members: int, how: str, resample: str, part: float, changes: list[dict[str, Any]]):
        self.run, self.how = run, how
        sources = [
            variants.variant(run.config.weak, changes[k % len(changes)], f"method.variants[{k % len(changes)}]")
            if changes
            else run.weak
            for k in range(members)
        ]
        if how == "boost":
            self.models, self.weights = self._boost(sources)
        else:
            table, seed = run.data.ground_truth, run.config.seed
            rows = [member_rows(table.ids, k, resample, part, seed) for k in range(members)]
            gold = run.gold(table)
            self.models = [run.fit(f"member{k}", source, table, gold, rows=rows[k]) for k, source in enumerate(sources)]
            self.weights = [1.0] * members

    def labels(self, table) -> Labels:
        """The committee's labels for the rows of a table."""
        members = [self.run.predict(model, table) for model in self.models]
        key = {"members": [labels.key for labels in members], "combine": self.how}
        if self.how == "boost":
            key["weights"] = self.weights
        return Labels(table, combine([labels.logits for labels in members], self.how, self.weights), key)

    def _boost(self, sources: list[Source]) -> tuple[list[Trained], list[float]]:
        """Each member learns what those before it got wrong. A member no better than chance gets no vote."""
        run, table = self.run, self.run.data.ground_truth
        row_weights = np.full(len(table), 1 / len(table))
        models, weights = [], []
        for member, source in enumerate(sources):
            rows = weighted_rows(table.ids, row_weights, member, run.config.seed)
            models.append(run.fit(f"member{member}", source, table, run.gold(table), rows=rows))
            right = run.predict(models[-1], table).logits.argmax(-1).numpy() == table.labels
            weight, row_weights = boosted(row_weights, right, table.classes)
            weights.append(weight)
        return models, weights
