"""The sweep over ConG's alpha: replies of each to the same test prompts, plain samples beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.data.replies import Replies, prompts_of
from w2sg.evaluation.rows import sample_rows
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap

if TYPE_CHECKING:
    from w2sg.config.options import Analysis, Contrast, PlainSampling
    from w2sg.experiment.text import TextRun, Writer
    from w2sg.judges.base import Judge


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
    text: TextRun, weak: Writer, untuned: Writer, decoding: Contrast, sampling: PlainSampling, analysis: Analysis
) -> Sweep | None:
    """Let the pair answer the same test prompts with every alpha, and plainly, all in one batch."""
    if not analysis.alphas:
        return None
    settings: dict[str, tuple[float | None, list[float]]] = {"plain": (None, sampling.columns())}
    own = decoding.columns()
    for alpha in sorted(set(analysis.alphas)):
        settings[f"{alpha:g}"] = alpha, decoding.columns(alpha)
    chosen = next((name for name, (_, columns) in settings.items() if columns == own), None)
    if chosen is None:
        chosen = f"{own[0]:.3g}" + ("" if decoding.gamma is None else f" (gamma {decoding.gamma:g})")
        settings[chosen] = own[0], own
    prompts = prompts_of(text.run.data.test).first(analysis.prompts)
    columns = [columns for _, columns in settings.values()]
    replies = text.write("alphas", weak, prompts, decoding, columns, reference=untuned)
    return Sweep(
        list(settings),
        [alpha for alpha, _ in settings.values()],
        [replies.of_group(g) for g in range(len(settings))],
        list(settings).index(chosen),
    )


def measure_sweep(sweep: Sweep, judge: Judge | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rewards, lengths and wins of every setting, and the replies themselves as rows of a table."""
    count = len(sweep.replies[0])
    bootstrap = Bootstrap(count)
    implicit = {n: r.implicit_rewards() for n, r in zip(sweep.names, sweep.replies, strict=True)}
    lengths = {n: r.lengths for n, r in zip(sweep.names, sweep.replies, strict=True)}
    per_token = {n: implicit[n] / np.maximum(lengths[n], 1) for n in sweep.names}
    measures = {"implicit": implicit, "implicit_per_token": per_token}
    if judge is not None and judge.gives_rewards:
        measures["explicit"] = judge.rewards_of("alphas", dict(zip(sweep.names, sweep.replies, strict=True)))
    plain = sweep.names[0]
    found: dict[str, Any] = {
        "names": sweep.names,
        "alphas": sweep.alphas,
        "chosen": sweep.names[sweep.chosen],
        "prompts": count,
        "length": {
            n: comparisons.length_summary(lengths[n], ~r.finished)
            for n, r in zip(sweep.names, sweep.replies, strict=True)
        },
    }
    for name, values in measures.items():
        scaled = comparisons.min_max_per_prompt(values)
        found[name] = {
            "mean": {n: bootstrap.mean(values[n]).as_dict() for n in sweep.names},
            "scaled": {n: bootstrap.mean(scaled[n]).as_dict() for n in sweep.names},
            "over_plain": {
                n: {
                    "gap": comparisons.reward_gap(values[n], values[plain], bootstrap).as_dict(),
                    "standardised": comparisons.standardised_gap(values[n], values[plain], bootstrap).as_dict(),
                    "p": comparisons.paired_test(values[n], values[plain]),
                }
                for n in sweep.names[1:]
            },
            "wins": comparisons.win_matrix(values, bootstrap),
            "length_correlation": {
                n: comparisons.reward_length_correlation(values[n], lengths[n], bootstrap).as_dict()
                for n in sweep.names
            },
        }
    if "explicit" in measures:
        judged = measures["explicit"]
        found["explicit"]["length_controlled"] = {
            n: comparisons.length_controlled_win_rate(
                judged[n], judged[plain], lengths[n], lengths[plain], bootstrap
            ).as_dict()
            for n in sweep.names[1:]
        }
    rows = []
    for name, replies in zip(sweep.names, sweep.replies, strict=True):
        columns = {key: values[name] for key, values in measures.items()}
        rows += sample_rows(f"alpha {name}" if name != plain else "alpha plain", replies, columns)
    return found, rows
