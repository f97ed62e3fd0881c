"""ConG: contrastive decoding between a weak model before and after its alignment teaches a strong one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveInt

from w2sg.config.options import (
    Alignment,
    Analysis,
    Baseline,
    Contrast,
    Evaluation,
    FineTuning,
    Judge,
    PlainSampling,
    PreferenceTuning,
)
from w2sg.data.replies import gold_pairs, join_pairs
from w2sg.methods import checks

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.reports.report import Report


def cong(
    run: Run,
    self_alignment: bool,
    prompts: PositiveInt | None,
    alignment: Alignment,
    decoding: Contrast,
    sampling: PlainSampling,
    sft: FineTuning,
    dpo: PreferenceTuning,
    baselines: list[Baseline],
    aux_conf_weight: float,
    wspo_gamma: float,
    judge: Judge,
    analysis: Analysis,
    evaluation: Evaluation,
) -> Report:
    """Align the weak model, decode contrastively, fine-tune the strong model on the samples, prefer them to its own.

    Contrastive Weak-to-Strong Generalization, arXiv 2510.07884. Every option is explained in conf/method/cong.yaml.

    Args:
        self_alignment: the model trained is the weak one before its alignment. prompts: of the transfer split.
        alignment, sft, dpo: the three kinds of training. decoding: of the weak pair. sampling: of one model.
        baselines: what else is trained, for comparison. aux_conf_weight, wspo_gamma: of two of them.
        judge: the reward model. analysis: the sweep over alpha. evaluation: what is measured.
    """
    from w2sg.evaluation.alpha_sweep import sample_alphas
    from w2sg.evaluation.systems import report
    from w2sg.experiment.alignment import align
    from w2sg.experiment.fit_text import one_tokenizer
    from w2sg.judges import judge_of
    from w2sg.models.trained import Trained

    measure, ranker = judge_of(run, judge), None
    if alignment.pairs == "on_policy":
        ranker = judge_of(run, judge, "ranker", "ground_truth").rewards_and_key
    transfer, strong = run.prompts("transfer", prompts), Trained("strong", run.strong)
    if "wspo" in baselines:
        one_tokenizer([source for source in (run.strong, run.weak, run.untuned) if source is not None])

    untuned, weak, aligned_on = align(run, alignment, sampling, ranker)
    chosen = run.generate("contrastive", weak, transfer, decoding, contrast=untuned)
    cong_s = run.sft("cong-s", strong, chosen, sft)
    rejected = run.generate("cong-s-samples", cong_s, transfer, sampling)
    pairs = join_pairs(chosen, rejected)
    student = run.dpo("cong", cong_s, pairs, dpo)

    systems: dict[str, Trained] = {"base": strong, "weak": weak, "cong_s": cong_s, "cong": student}
    if {"weak_sft", "plain", "aux_conf"} & set(baselines):
        plain = run.generate("weak-samples", weak, transfer, sampling)
    if {"weak_sft", "plain"} & set(baselines):
        systems["weak_sft"] = run.sft("weak-sft", strong, plain, sft)
    if "plain" in baselines:
        worse = run.generate("weak-sft-samples", systems["weak_sft"], transfer, sampling)
        systems["plain"] = run.dpo("plain", systems["weak_sft"], join_pairs(plain, worse), dpo)
    if "aux_conf" in baselines:
        systems["aux_conf"] = run.sft("aux-conf", strong, plain, sft, confidence=aux_conf_weight)
    if "wspo" in baselines:
        imitated = chosen if aligned_on is None else aligned_on.chosen
        systems["wspo"] = run.wspo("wspo", strong, (weak, untuned), imitated, sft, wspo_gamma)
    if "ceiling" in baselines:
        systems["ceiling"] = run.dpo("ceiling", strong, gold_pairs(run.data.transfer), alignment)

    sweep = sample_alphas(run, weak, untuned, decoding, sampling, analysis)
    return report(
        run,
        measure,
        systems,
        untuned,
        {"weak": alignment.beta, "ceiling": alignment.beta, "cong": dpo.beta},
        sweep,
        pairs,
        sampling,
        evaluation,
    )


def problems(config: TrainConfig) -> list[str]:
    """What is wrong between this method's options and the rest of the configuration."""
    weak, strong, method = config.weak, config.strong, config.method
    lines = checks.text_problems(config, {"weak": ["alignment"], "strong": ["sft", "dpo"]}, "cong")
    if method["self_alignment"] and strong.name not in (weak.untuned or weak.name,):
        lines.append(
            f"strong.name: self-alignment trains the weak model before its alignment, {weak.untuned or weak.name}; "
            "give the same model as strong="
        )
    if method["alignment"]["pairs"] == "on_policy" and weak.untuned is None and method["judge"].get("model") is None:
        lines.append("method.judge.model: on-policy samples are ranked by the judge; name one")
    if strong.untuned is not None:
        lines.append("strong.untuned: only the weak model has an alignment to undo; set weak.untuned")
    if config.loss["_target_"] != "w2sg.losses.cross_entropy":
        lines.append("loss: not read by method=cong; its losses are method.alignment.loss and method.dpo.loss")
    if config.dataset.noise.kind != "none":
        lines.append("dataset.noise.kind: method=cong trains on no labels of the transfer split; use none")
    ceiling = ["alignment"] if "ceiling" in method["baselines"] else []
    stages = {"weak": ["alignment"] if weak.untuned is None else [], "strong": ["sft", "dpo", *ceiling]}
    return lines + checks.lost_stage_steps(config, stages)
