"""ConG: contrastive decoding between a weak model before and after its alignment teaches a strong one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveInt

from w2sg.config.option import Options, option
from w2sg.config.options import (
    DPO,
    SFT,
    Alignment,
    Analysis,
    Baseline,
    Contrast,
    Evaluation,
    LearningRates,
    PlainSampling,
)
from w2sg.data.replies import gold_pairs, join_pairs
from w2sg.judges import AnyJudge, RewardJudge, judge_of, options_of
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


class ConG(Options):
    """Options of method=cong. Defaults are those of the authors' scripts where nothing else is said."""

    self_alignment: bool = option(
        False, "train the weak model before its alignment in place of a stronger one; give the same model as strong="
    )
    prompts: PositiveInt | None = option(
        None, "prompts of the transfer split that are answered and trained on; null takes them all"
    )
    alignment: Alignment = option(Alignment(), "(a) the weak model's alignment by preferences")
    decoding: Contrast = option(
        Contrast(max_new_tokens=2048),
        "(b) contrastive decoding: log pi_r - (1 - alpha) log pi_0 over what pi_r finds plausible",
    )
    sampling: PlainSampling = option(
        PlainSampling(temperature=0.8, top_p=0.95, max_new_tokens=2048),
        "of one model: the strong model's own replies, the baselines', and those that are measured",
    )
    sft: SFT = option(
        SFT(),
        "(c) ConG-S: supervised fine-tuning of the strong model on the contrastive samples (3B models: batches of 128)",
    )
    # With one's own samples as rejected, beta is how far to go: 1 imitates the contrastive samples, less goes further.
    dpo: DPO = option(
        DPO(beta=0.5, lr=LearningRates(full=6e-7, lora=2e-5)),
        "(d) ConG: DPO from ConG-S, the reference; chosen the contrastive sample, rejected ConG-S's own (lr.full for "
        "Qwen2.5-3B: 8e-7)",
    )
    baselines: list[Baseline] = option(
        ["weak_sft", "ceiling"],
        "what ConG is compared with. weak_sft: fine-tuning on plain samples of the aligned weak model | plain: the "
        "whole of ConG on those | aux_conf: fine-tuning on them with Burns et al.'s confidence loss | wspo: WSPO "
        "(arXiv 2410.18640), which needs one tokenizer | ceiling: the strong model's DPO on the transfer split's own "
        "pairs, by method.alignment; the others train as method.sft says (the authors: one epoch)",
    )
    aux_conf_weight: float = option(0.5, "weight of the model's own token in aux_conf")
    wspo_gamma: float = option(0.1, "WSPO's factor on the strong model's change")
    judge: AnyJudge = option(RewardJudge(), "what replies are measured with: a file of conf/judge")
    analysis: Analysis = option(
        Analysis(), "the sweep over alpha: replies of each to the same test prompts, with plain sampling beside them"
    )
    evaluation: Evaluation = option(Evaluation(), "what is measured of the trained models, on the test split")


def cong(run: Run, options: ConG) -> Report:
    """Align the weak model, decode contrastively, fine-tune the strong model on the samples, prefer them to its own.

    Contrastive Weak-to-Strong Generalization, arXiv 2510.07884.
    """
    from w2sg.evaluation.alpha_sweep import measure_sweep, sample_alphas
    from w2sg.evaluation.systems import measure_systems
    from w2sg.experiment.fit_text import one_tokenizer
    from w2sg.models.trained import Trained

    judged, ranker = judge_of(run, options.judge), None
    if judged is not None:
        aligned = {} if run.untuned is None else {"the aligned weak model": run.weak}
        before = run.untuned or run.weak
        judged.independent_of(aligned, {"the strong model": run.strong, "the weak model before its alignment": before})
    if options.alignment.pairs == "on_policy" and run.untuned is None:
        ranker = judge_of(run, options.judge, "ranker", "ground_truth").rewards_and_key
    transfer, strong = run.prompts("transfer", options.prompts), Trained("strong", run.strong)
    if "wspo" in options.baselines:
        one_tokenizer([source for source in (run.strong, run.weak, run.untuned) if source is not None])

    untuned, weak, aligned_on = run.align(options.alignment, options.sampling, ranker)
    chosen = run.generate("contrastive", weak, transfer, options.decoding, contrast=untuned)
    cong_s = run.sft("cong-s", strong, chosen, options.sft)
    rejected = run.generate("cong-s-samples", cong_s, transfer, options.sampling)
    pairs = join_pairs(chosen, rejected)
    student = run.dpo("cong", cong_s, pairs, options.dpo)

    systems: dict[str, Trained] = {"base": strong, "weak": weak, "cong_s": cong_s, "cong": student}
    if {"weak_sft", "plain", "aux_conf"} & set(options.baselines):
        plain = run.generate("weak-samples", weak, transfer, options.sampling)
    if {"weak_sft", "plain"} & set(options.baselines):
        systems["weak_sft"] = run.sft("weak-sft", strong, plain, options.sft)
    if "plain" in options.baselines:
        worse = run.generate("weak-sft-samples", systems["weak_sft"], transfer, options.sampling)
        systems["plain"] = run.dpo("plain", systems["weak_sft"], join_pairs(plain, worse), options.dpo)
    if "aux_conf" in options.baselines:
        systems["aux_conf"] = run.sft("aux-conf", strong, plain, options.sft, confidence=options.aux_conf_weight)
    if "wspo" in options.baselines:
        imitated = chosen if aligned_on is None else aligned_on.chosen
        systems["wspo"] = run.wspo("wspo", strong, (weak, untuned), imitated, options.sft, options.wspo_gamma)
    if "ceiling" in options.baselines:
        systems["ceiling"] = run.dpo("ceiling", strong, gold_pairs(run.data.transfer), options.alignment)

    aligned = {"weak": options.alignment, "ceiling": options.alignment}
    measured = measure_systems(
        run,
        systems,
        options.sampling,
        judged,
        options.evaluation,
        student="cong",
        before={"weak": untuned},
        betas={name: aligned.get(name, options.dpo).beta for name in systems},
        losses={name: aligned.get(name, options.dpo).loss for name in systems},
        pairs=len(pairs),
    )
    sweep = sample_alphas(run, weak, untuned, options.decoding, options.sampling, options.analysis)
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
    sweep = "the sweep over alpha and " if method["analysis"]["alphas"] else ""
    baselines, judge = method["baselines"], method["judge"]
    plain = " and plain" if {"weak_sft", "plain", "aux_conf"} & set(baselines) else ""
    judged = judge.get("kind") == "reward" and judge.get("model") in ("strong", "weak")
    of_pairs = " and ".join(["ceiling"] * ("ceiling" in baselines) + ["a trained judge"] * judged)
    of_pairs = f"; pairs: {of_pairs}" if of_pairs else ""
    return Story(
        f"{short(config.weak.name)} aligns {whom} on {config.dataset.name}: {what}",
        loss=method["dpo"]["loss"],
        names=NAMES,
        uses_of_splits={
            "ground_truth": "not trained on" if config.weak.untuned else f"the weak model is aligned on {aligned_on}",
            "transfer": f"prompts: contrastive{plain} samples, ConG-S, ConG{of_pairs}",
            "test": f"prompts: {sweep}the trained models' replies; pairs: held-out preferences",
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
        lines.append("strong.before_alignment: only the weak model has an alignment to undo; set weak.before_alignment")
    if config.loss["_target_"] != "w2sg.losses.cross_entropy":
        lines.append("loss: not read by method=cong; its losses are method.alignment.loss and method.dpo.loss")
    if config.dataset.noise.kind != "none":
        lines.append("dataset.noise.kind: method=cong trains on no labels of the transfer split; use none")
    ceiling = ["alignment"] if "ceiling" in method["baselines"] else []
    stages = {"weak": ["alignment"] if weak.untuned is None else [], "strong": ["sft", "dpo", *ceiling]}
    return lines + checks.lost_stage_steps(config, stages)
