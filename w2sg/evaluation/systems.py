"""What language models wrote, measured: rewards, win rates, lengths, preferences, damage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from w2sg.data.replies import Replies, gold_pairs, prompts_of
from w2sg.evaluation import alpaca_eval as alpaca
from w2sg.evaluation.alpha_sweep import measure_sweep
from w2sg.evaluation.rows import sample_rows
from w2sg.experiment.text import TextRun, Writer, reading_as
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap

if TYPE_CHECKING:
    from w2sg.config.options import Evaluation, PlainSampling
    from w2sg.data.replies import ReplyPairs
    from w2sg.evaluation.alpha_sweep import Sweep
    from w2sg.judges.base import Judge
    from w2sg.reports.report import Report


def preferences(
    text: TextRun, name: str, writer: Writer, base: Writer, beta: float
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """A model's implicit rewards of the test split's pairs: logits [N, 2], the first reply in front.

    The implicit reward is beta log(model / base), in which both read the pair as the model writes it, template and
    length, as they do in decoding. Rows that do not fit into ``max_length`` have logits of 0, which is a tie.

    Returns:
        The logits, and sums of log-probabilities and tokens of the preferred replies, [N], NaN where dropped.
    """
    table = text.run.data.test
    pairs, rows = gold_pairs(table), f"{name}-on-test-pairs"
    sums = []
    for role, model in ((name, writer), (base.name, reading_as(base, writer))):
        values, _ = text.read_replies(f"{role}-on-test-pairs", model, pairs, rows)
        sums.append(values.double())
    rows = text.encode(writer.source, pairs, rows)
    rewards = torch.zeros(len(table), 2, dtype=torch.float64)
    rewards[torch.from_numpy(rows.kept)] = beta * (sums[0] - sums[1])
    labels = torch.as_tensor(table.labels)
    logits = rewards.gather(1, torch.stack([labels, 1 - labels], 1))  # chosen is in front where the label is 0
    chosen = {key: np.full(len(table), np.nan) for key in ("log_probability", "tokens")}
    chosen["prompt"] = np.array(table.clusters)
    chosen["log_probability"][rows.kept] = sums[0][:, 0].numpy()
    chosen["tokens"][rows.kept] = rows.completions.sizes[:, 0]
    return logits, chosen


def report(
    text: TextRun,
    judge: Judge | None,
    systems: dict[str, Writer],
    untuned: Writer,
    betas: dict[str, float],
    sweep: Sweep | None,
    pairs: ReplyPairs,
    sampling: PlainSampling,
    evaluation: Evaluation,
) -> Report:
    """Measure the models of a run on the test split and write the report.

    Args:
        judge: what measures replies; None leaves that out.
        systems: by name; ``base`` is the strong model as it was found, ``weak`` the aligned weak one.
        untuned: the weak model before its alignment.
        betas: of implicit rewards, by system; those of ``cong`` hold for all others.
        sweep: over alpha.
        pairs: what the last stage was trained on.
    """
    from w2sg.evaluation.text_report import write_report

    base = systems["base"]
    prompts = prompts_of(text.run.data.test).first(evaluation.prompts)
    replies = {
        name: text.sample(f"{writer.name}-on-test", writer, prompts, sampling) for name, writer in systems.items()
    }
    measured, rows = _systems(text, judge, systems, untuned, replies, evaluation)
    logits: dict[str, Tensor] = {}
    for name, writer in systems.items():
        if name == "base":
            continue
        before = untuned if name == "weak" else base
        logits[name], chosen = preferences(text, writer.name, writer, before, betas.get(name, betas["cong"]))
        if evaluation.perplexity:
            measured[name]["perplexity"] = _perplexity(chosen)
            if "perplexity" not in measured["base"]:
                _, of_base = preferences(text, base.name, base, base, 1.0)
                measured["base"]["perplexity"] = _perplexity(of_base)
    content: dict[str, Any] = {"systems": measured, "dropped": text.dropped, "pairs": len(pairs)}
    if judge is not None:
        content["judge"] = judge.accuracy()
    if sweep is not None:
        content["alphas"], more = measure_sweep(sweep, judge)
        rows = more + rows
    found = write_report(text.run, logits, content, rows, prompts)
    if text.run.devices.main:
        alpaca.export(text.run.out, replies, text.run.config.dataset.name)
    return found


def _systems(
    text: TextRun,
    judge: Judge | None,
    systems: dict[str, Writer],
    untuned: Writer,
    replies: dict[str, Replies],
    evaluation: Evaluation,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    rewards: dict[str, np.ndarray] = {}
    if judge is not None and judge.gives_rewards:
        rewards = judge.rewards_of("replies-on-test", replies)
    found: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for name, own in replies.items():
        found[name] = {"length": comparisons.length_summary(own.lengths, ~own.finished), "replies": len(own)}
        if evaluation.kl and name != "base":
            before = untuned if name == "weak" else systems["base"]
            kl = text.divergence(f"{systems[name].name}-divergence", systems[name], before, own)
            found[name]["kl_per_token"] = Bootstrap(len(kl)).mean(kl).as_dict()
        rows += sample_rows(name, own, {"explicit": rewards[name]} if rewards else {})
    for name, own in rewards.items():
        bootstrap = Bootstrap(len(own))
        found[name]["reward"] = bootstrap.mean(own).as_dict()
        found[name]["length_correlation"] = comparisons.reward_length_correlation(
            own, replies[name].lengths, bootstrap
        ).as_dict()
    for name in rewards:
        against = {}
        for other in ("base", "weak", "weak_sft", "cong_s", "ceiling"):
            if other in rewards and other != name:
                against[other] = _against(replies, rewards, name, other)
        found[name]["against"] = against
    return found, rows


def _against(replies: dict[str, Replies], rewards: dict[str, np.ndarray], name: str, other: str) -> dict[str, Any]:
    place = {i: row for row, i in enumerate(replies[other].ids)}
    mine = [row for row, i in enumerate(replies[name].ids) if i in place]
    theirs = [place[replies[name].ids[row]] for row in mine]
    a, b = rewards[name][mine], rewards[other][theirs]
    lengths = replies[name].lengths[mine], replies[other].lengths[theirs]
    if replies[name].fingerprint != replies[other].fingerprint:  # tokens of two tokenizers are two units
        lengths = tuple(
            np.array([len(r.texts[k]) for k in rows]) for r, rows in ((replies[name], mine), (replies[other], theirs))
        )
    bootstrap = Bootstrap(len(a))
    return {
        "prompts": len(a),
        "win_rate": comparisons.win_rate(a, b, bootstrap).as_dict(),
        "length_controlled": comparisons.length_controlled_win_rate(a, b, *lengths, bootstrap).as_dict(),
        "gap": comparisons.reward_gap(a, b, bootstrap).as_dict(),
        "standardised": comparisons.standardised_gap(a, b, bootstrap).as_dict(),
        "p": comparisons.paired_test(a, b),
    }


def _perplexity(chosen: dict[str, np.ndarray]) -> dict[str, float | None]:
    """exp of the mean negative log-likelihood per token, with its interval over prompts."""
    there = ~np.isnan(chosen["tokens"])
    nll, tokens = -chosen["log_probability"][there], chosen["tokens"][there]
    ratio = Bootstrap(len(nll), clusters=chosen["prompt"][there]).ratio(nll, tokens)
    return {k: None if v is None else float(np.exp(v)) for k, v in ratio.as_dict().items()}
