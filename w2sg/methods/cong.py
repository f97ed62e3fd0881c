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
    PlainSampling,
    PreferenceTuning,
)
from w2sg.data.replies import gold_pairs, join_pairs
from w2sg.judges import AnyJudge, judge_of, options_of
from w2sg.methods import checks
from w2sg.reports.section import Story
from w2sg.reports.words import short

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.reports.assemble import Report

NAMES = {
    "weak": "weak supervisor",
    "student": "strong student",
    "ceiling": "strong ceiling",
    "base": "strong, untrained",
    "cong_s": "ConG-S",
    "cong": "strong student",
    "weak_sft": "weak SFT",
    "plain": "ConG on plain samples",
    "aux_conf": "AuxConf",
    "wspo": "WSPO",
}


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
    judge: AnyJudge,
    analysis: Analysis,
    evaluation: Evaluation,
) -> Report:
    """Align the weak model, decode contrastively, fine-tune the strong model on the samples, prefer them to its own.

    Contrastive Weak-to-Strong Generalization, arXiv 2510.07884. Every option is explained in conf/method/cong.yaml.

    Args:
        self_alignment: the model trained is the weak one before its alignment. prompts: of the transfer split.
        alignment, sft, dpo: the three kinds of training. decoding: of the weak pair. sampling: of one model.
        baselines: what else is trained, for comparison. aux_conf_weight, wspo_gamma: of two of them.
        judge: what measures replies. analysis: the sweep over alpha. evaluation: what is measured.
    """
    from w2sg.evaluation.alpha_sweep import measure_sweep, sample_alphas
    from w2sg.evaluation.systems import measure_systems
    from w2sg.experiment.alignment import align
    from w2sg.experiment.fit_text import one_tokenizer
    from w2sg.models.trained import Trained

    judged, ranker = judge_of(run, judge), None
    if judged is not None:
        aligned = {} if run.untuned is None else {"the aligned weak model": run.weak}
        before = run.untuned or run.weak
        judged.independent_of(aligned, {"the strong model": run.strong, "the weak model before its alignment": before})
    if alignment.pairs == "on_policy" and run.untuned is None:
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

    aligned = {"weak": alignment, "ceiling": alignment}
    measured = measure_systems(
        run,
        systems,
        sampling,
        judged,
        evaluation,
        student="cong",
        before={"weak": untuned},
        betas={name: aligned.get(name, dpo).beta for name in systems},
        losses={name: aligned.get(name, dpo).loss for name in systems},
        pairs=len(pairs),
    )
    sweep = sample_alphas(run, weak, untuned, decoding, sampling, analysis)
    section, rows = (None, []) if sweep is None else measure_sweep(sweep, judged)
    return measured.report(run, story(run.config), [] if section is None else [section], rows)


def story(config: TrainConfig) -> Story:
    """Title, names of systems, and what each split is for."""
    method = config.method
    decoding, itself = method["decoding"], method["self_alignment"]
    how = f"alpha {decoding['alpha']:g}" if decoding["gamma"] is None else f"gamma {decoding['gamma']:g}"
    what = f"ConG{' in self-alignment' if itself else ''}, {how}, seed {config.seed}"
    whom = "itself" if itself else short(config.strong.name)
    aligned_on = "pairs of its own samples" if method["alignment"]["pairs"] == "on_policy" else "its pairs"
    return Story(
        f"{short(config.weak.name)} aligns {whom} on {config.dataset.name}: {what}",
        loss=method["dpo"]["loss"],
        names=NAMES,
        uses_of_splits={
            "ground_truth": "not trained on" if config.weak.untuned else f"the weak model is aligned on {aligned_on}",
            "transfer": "prompts: contrastive and plain samples, ConG-S, ConG; pairs: ceiling and a trained judge",
            "test": "prompts: the sweep over alpha and the trained models' replies; pairs: held-out preferences",
        },
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
    judge = options_of(config)
    if method["alignment"]["pairs"] == "on_policy" and weak.untuned is None and not judge.gives_rewards:
        lines.append(
            "method.judge: on-policy samples are ranked by rewards; name a judge that gives them, as judge=reward"
        )
    if weak.untuned is not None:
        lines += judge.guides(config, weak.name)
    if strong.untuned is not None:
        lines.append("strong.untuned: only the weak model has an alignment to undo; set weak.untuned")
    if config.loss["_target_"] != "w2sg.losses.cross_entropy":
        lines.append("loss: not read by method=cong; its losses are method.alignment.loss and method.dpo.loss")
    if config.dataset.noise.kind != "none":
        lines.append("dataset.noise.kind: method=cong trains on no labels of the transfer split; use none")
    ceiling = ["alignment"] if "ceiling" in method["baselines"] else []
    stages = {"weak": ["alignment"] if weak.untuned is None else [], "strong": ["sft", "dpo", *ceiling]}
    return lines + checks.lost_stage_steps(config, stages)
