"""The sweep over ConG's alpha: replies of each to the same test prompts, plain samples beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.data.replies import Replies
from w2sg.evaluation.comparisons import Comparisons
from w2sg.evaluation.rows import sample_rows
from w2sg.reports.sections.alpha_sweep import AlphaSweep

if TYPE_CHECKING:
    from w2sg.config.options import Analysis, Contrast, PlainSampling
    from w2sg.experiment.run import Run
    from w2sg.judges.base import Judge
    from w2sg.models.trained import Trained


@dataclass(frozen=True)
class Sweep:
    """Replies of each alpha to the same prompts.

    Attributes:
        names: of the settings, "plain" first. alphas: None for plain.
        replies: of each setting.
        chosen: which setting the samples for training were written with.
    """

    names: list[str]
    alphas: list[float | None]
    replies: list[Replies]
    chosen: int


def sample_alphas(
    run: Run, weak: Trained, untuned: Trained, decoding: Contrast, sampling: PlainSampling, analysis: Analysis
) -> Sweep | None:
    """Let the pair answer the same test prompts with every alpha, and plainly, all in one batch."""
    if not analysis.alphas:
        return None
    settings: dict[str, tuple[float | None, list[float]]] = {"plain": (None, sampling.columns())}
    of_run = decoding.columns()
    for alpha in sorted(set(analysis.alphas)):
        settings[f"{alpha:g}"] = alpha, decoding.columns(alpha)
    chosen = next((name for name, (_, columns) in settings.items() if columns == of_run), None)
    if chosen is None:
        chosen = f"{of_run[0]:.3g}" + ("" if decoding.gamma is None else f" (gamma {decoding.gamma:g})")
        settings[chosen] = of_run[0], of_run
    prompts = run.prompts("test", analysis.prompts)
    columns = [columns for _, columns in settings.values()]
    replies = run.generate("alphas", weak, prompts, decoding, columns, contrast=untuned)
    return Sweep(
        list(settings),
        [alpha for alpha, _ in settings.values()],
        [replies.of_group(g) for g in range(len(settings))],
        list(settings).index(chosen),
    )


def measure_sweep(sweep: Sweep, judge: Judge | None) -> tuple[AlphaSweep, list[dict[str, Any]]]:
    """The section of every setting, and the replies themselves as rows of a table."""
    replies = dict(zip(sweep.names, sweep.replies, strict=True))
    implicit = {name: written.implicit_rewards() for name, written in replies.items()}
    lengths = {name: written.lengths for name, written in replies.items()}
    per_token = {name: implicit[name] / np.maximum(lengths[name], 1) for name in replies}
    rewards = {"implicit": implicit, "implicit_per_token": per_token}
    compared, over_plain = None, {}
    if judge is not None:
        compared = Comparisons(judge, "alphas", {f"alpha-{n}": r for n, r in replies.items()}, tokens=True)
        if compared.rewards:
            rewards["explicit"] = {n: compared.rewards[f"alpha-{n}"] for n in replies}
        else:
            plain = f"alpha-{sweep.names[0]}"
            over_plain = {n: compared.over(f"alpha-{n}", plain) for n in sweep.names[1:]}
    alphas = dict(zip(sweep.names, sweep.alphas, strict=True))
    finished = {name: written.finished for name, written in replies.items()}
    section = AlphaSweep.measure(alphas, sweep.names[sweep.chosen], lengths, finished, rewards, over_plain)
    rows = []
    for name, written in replies.items():
        columns = {kind: values[name] for kind, values in rewards.items()}
        if name in over_plain:
            columns["over_plain"] = compared.preferred(f"alpha-{name}", plain)
        rows += sample_rows(f"alpha {name}", written, columns)
    return section, rows
