"""What language models wrote, measured: rewards, win rates, lengths, preferences, damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from w2sg.config.options import Evaluation, Sampling
from w2sg.data.replies import Prompts, Replies, gold_pairs
from w2sg.errors import UserError
from w2sg.evaluation import alpaca_eval as alpaca
from w2sg.evaluation.comparisons import Comparisons
from w2sg.evaluation.rows import sample_rows
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.models.trained import Trained, reading_as
from w2sg.reports.label_runs import check_names, columns_of
from w2sg.reports.section import Section, Story
from w2sg.reports.sections.held_out_pairs import HeldOutPairs
from w2sg.reports.sections.judge import JudgeFacts
from w2sg.reports.sections.replies import RepliesShown
from w2sg.reports.sections.systems import Systems
from w2sg.reports.sections.training import FitTraining
from w2sg.reports.sections.won_and_lost import WonAndLost

if TYPE_CHECKING:
    from w2sg.experiment.run import Run
    from w2sg.judges.base import Judge
    from w2sg.models.source import Source
    from w2sg.reports.assemble import Report

OPPONENTS = ("base", "weak", "weak_sft", "cong_s", "ceiling")  # of each system


def preferences(
    run: Run, name: str, writer: Trained, base: Trained, beta: float
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """A model's implicit rewards of the test split's pairs: logits [N, 2], the first reply in front.

    The implicit reward is beta log(model / base), in which both read the pair as the model writes it, template and
    length, as they do in decoding. Rows that do not fit into ``max_length`` have logits of 0, which is a tie.

    Returns:
        The logits, and sums of log-probabilities and tokens of the preferred replies, [N], NaN where dropped.
    """
    table = run.data.test
    pairs, rows = gold_pairs(table), f"{name}-on-test-pairs"
    sums = []
    for role, model in ((name, writer), (base.name, reading_as(base, writer))):
        values, _ = run.score(f"{role}-on-test-pairs", model, pairs, rows)
        sums.append(values.double())
    rows = run.encode(writer.source, pairs, rows)
    rewards = torch.zeros(len(table), 2, dtype=torch.float64)
    rewards[torch.from_numpy(rows.kept)] = beta * (sums[0] - sums[1])
    labels = torch.as_tensor(table.labels)
    logits = rewards.gather(1, torch.stack([labels, 1 - labels], 1))  # chosen is in front where the label is 0
    chosen = {key: np.full(len(table), np.nan) for key in ("log_probability", "tokens")}
    chosen["prompt"] = np.array(table.clusters)
    chosen["log_probability"][rows.kept] = sums[0][:, 0].numpy()
    chosen["tokens"][rows.kept] = rows.completions.sizes[:, 0]
    return logits, chosen


def measure_systems(
    run: Run,
    systems: Mapping[str, Trained | Source],
    sampling: Sampling,
    judge: Judge | None = None,
    evaluation: Evaluation | None = None,
    student: str = "student",
    before: Mapping[str, Trained] | None = None,
    betas: Mapping[str, float] | None = None,
    losses: Mapping[str, str] | None = None,
    pairs: int | None = None,
) -> Measured:
    """Let models answer the test split's prompts, and measure what they wrote.

    Args:
        run: the run.
        systems: by name, trained or as they were found; ``base``, the strong model, is added where it is missing.
        sampling: of the replies.
        judge: what measures replies; None leaves that out.
        evaluation: what is measured.
        student: the system that the run is about.
        before: the model that a system was trained from, where that is not ``base``; KL and implicit rewards are
            measured from it. A model as it was found has none, and neither is measured.
        betas: of implicit rewards, by system; 1 for others.
        losses: the preference objective of each fit that has one.
        pairs: how many pairs the last preference stage was trained on; None where there was none.
    """
    evaluation = evaluation or Evaluation()
    systems = {name: run.as_trained(model) for name, model in ({"base": run.strong} | dict(systems)).items()}
    if student not in systems:
        raise UserError(f"student: {student!r} is none of the systems {', '.join(systems)}; name one of them")
    check_names(systems, "systems")
    trained = {name: systems["base"] for name, model in systems.items() if model.folder is not None}
    before = trained | dict(before or {})
    prompts = run.prompts("test", evaluation.prompts)
    replies = {name: run.generate(f"{model.name}-on-test", model, prompts, sampling) for name, model in systems.items()}
    compared = None if judge is None else Comparisons(judge, "replies-on-test", replies, tokens=True)
    measured, rows = _replies(run, compared, systems, before, replies, evaluation)
    logits: dict[str, Tensor] = {}
    of_pairs = before if run.data.test.kind == "pairs" else {}
    for name, model in systems.items():
        if name not in of_pairs:
            continue
        called = "student" if name == student else name
        logits[called], chosen = preferences(run, model.name, model, before[name], (betas or {}).get(name, 1.0))
        if evaluation.perplexity:
            measured[name]["perplexity"] = _perplexity(chosen)
            if "perplexity" not in measured["base"]:
                _, of_base = preferences(run, "strong", systems["base"], systems["base"], 1.0)
                measured["base"]["perplexity"] = _perplexity(of_base)
    labels, clusters = torch.as_tensor(run.data.test.labels), run.data.test.clusters
    sections = [
        Systems(content={"text": {"systems": measured, "student": student}}),
        *([HeldOutPairs.measure(logits, labels, Bootstrap(len(labels), clusters=clusters))] if logits else []),
        JudgeFacts("text", None if judge is None else judge.accuracy()),
        FitTraining("text", run.stages, run.dropped, losses, pairs),
    ]
    if compared is not None and student != "base":
        preferred = compared.preferred(student, "base")
        sections.append(WonAndLost.measure((student, "base"), preferred, replies[student], replies["base"]))
    return Measured(sections, rows, columns_of(run.data.test, logits, run.config.report.texts), replies, prompts)


@dataclass(frozen=True)
class Measured:
    """What was measured of systems that answered the test split's prompts.

    Attributes:
        sections: systems, held-out pairs, judge and training.
        rows: of samples.parquet. predictions: columns of predictions.parquet.
        replies: by system, to ``prompts``.
    """

    sections: list[Section]
    rows: list[dict[str, Any]]
    predictions: dict[str, list]
    replies: dict[str, Replies]
    prompts: Prompts

    def report(
        self, run: Run, story: Story, first: Sequence[Section] = (), rows: Sequence[dict[str, Any]] = ()
    ) -> Report:
        """Write the report, with samples and what the alpaca_eval tool reads.

        Args:
            run: the run.
            story: what the method says of it.
            first: sections of the method itself, which stand above the others.
            rows: of samples.parquet, of other replies than the systems'.
        """
        every = [*rows, *self.rows]
        texts = zip(self.prompts.ids, (prompt.text for prompt in self.prompts.texts), strict=True)
        sections = [*first, *self.sections, RepliesShown("text", every, texts)]
        files = [lambda out: alpaca.export_replies(out, self.replies, run.config.dataset.name)]
        return run.report(story, sections, columns=self.predictions, samples=every, files=files)


def _replies(
    run: Run,
    compared: Comparisons | None,
    systems: Mapping[str, Trained],
    before: Mapping[str, Trained],
    replies: dict[str, Replies],
    evaluation: Evaluation,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """What was measured of each system's replies, and the replies as rows."""
    measured: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for name, written in replies.items():
        bootstrap, columns = Bootstrap(len(written)), {}
        measured[name] = {
            "length": comparisons.length_summary(written.lengths, ~written.finished),
            "replies": len(written),
        }
        if evaluation.kl and name in before and not run.all_empty(name, written, "KL divergence"):
            kl = run.divergence(f"{systems[name].name}-divergence", systems[name], before[name], written)
            measured[name]["kl_per_token"] = Bootstrap(len(kl)).mean(kl).as_dict()
        if compared is not None and compared.rewards:
            columns["explicit"] = rewards = compared.rewards[name]
            correlation = comparisons.reward_length_correlation(rewards, written.lengths, bootstrap)
            measured[name]["reward"] = bootstrap.mean(rewards).as_dict()
            measured[name]["length_correlation"] = correlation.as_dict()
        elif compared is not None and name != "base":
            columns["over_base"] = compared.preferred(name, "base")
        if compared is not None:
            others = [other for other in OPPONENTS if other in replies and other != name]
            measured[name]["against"] = {other: compared.over(name, other) for other in others}
        rows += sample_rows(name, written, columns)
    return measured, rows


def _perplexity(chosen: dict[str, np.ndarray]) -> dict[str, float | None]:
    """exp of the mean negative log-likelihood per token, with its interval over prompts."""
    measured = ~np.isnan(chosen["tokens"])
    nll, tokens = -chosen["log_probability"][measured], chosen["tokens"][measured]
    ratio = Bootstrap(len(nll), clusters=chosen["prompt"][measured]).ratio(nll, tokens)
    return {k: None if v is None else float(np.exp(v)) for k, v in ratio.as_dict().items()}
