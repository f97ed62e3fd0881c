"""Bootstrapping: a weak model teaches a slightly stronger one, which teaches the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from w2sg.methods import checks
from w2sg.models import variants

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.reports.assemble import Report


def problems(config: TrainConfig) -> list[str]:
    """Conflicts between this method's options and the rest of the configuration."""
    links = config.method["links"]
    problems = checks.label_problems(config) + variants.problems(config.strong, links, "method.links")
    if not links:
        problems.append(
            "method.links: a chain needs a model between weak and strong, as [{name: gpt2}] or [{keep_layers: 6}]"
        )
    return problems


def chain(
    run: Run, links: Sequence[dict[str, Any]] = (), ceiling_split: Literal["transfer", "weak_train"] = "transfer"
) -> Report:
    """Train each model of a chain on the labels of the one before it, the strong model last.

    Burns et al. 2023 (arXiv 2312.09390, section 4.3.1). The baseline `direct` is the ordinary finetune student.

    Args:
        links: the models between weak and strong, each by what it changes of the strong model: [{name: gpt2}, {name:
            gpt2-medium}], [{revision: step1000}], [{keep_layers: 6}, {keep_layers: 12}] of a model that is trained
            whole, [{feature_layer: 8}] of a head on states.
        ceiling_split: split whose ground truth trains the ceiling: transfer or weak_train, as in method=finetune.
    """
    data = run.data
    sources = [variants.variant(run.config.strong, link, f"method.links[{k}]") for k, link in enumerate(links)]
    weak = run.fit("weak", run.weak, data.ground_truth, run.gold(data.ground_truth))
    first = labels = run.noisy(run.predict(weak, data.transfer))
    between = {}
    for place, source in enumerate(sources, 1):
        link = run.fit(f"link{place}", source, data.transfer, labels, loss=run.loss)
        between[f"link{place}"] = run.predict(link, data.test)
        labels = run.predict(link, data.transfer)
    student = run.fit("chained", run.strong, data.transfer, labels, loss=run.loss, like="student")
    direct = run.fit("student", run.strong, data.transfer, first, loss=run.loss)
    ceiling = run.ceiling(ceiling_split)
    return run.report(
        weak=run.predict(weak, data.test),
        **between,
        student=run.predict(student, data.test),
        direct=run.predict(direct, data.test),
        ceiling=run.predict(ceiling, data.test),
        taught=(labels, run.predict(student, data.transfer)),
        notes={"ceiling_split": ceiling_split, "links": list(links)},
    )
