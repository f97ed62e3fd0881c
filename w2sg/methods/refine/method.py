"""Refinement: a strong model rewrites weak answers in context, and learns what it wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2sg.errors import UserError
from w2sg.judges import RewardJudge, judge_of, options_of
from w2sg.methods import checks
from w2sg.methods.refine.options import Axis, InContext, Refine, Refinement, Unrefined

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.reports.assemble import Report


def refine(run: Run, options: Refinement) -> Report:
    """Weak answers, refined by the strong model in context, train the strong model; so do the baselines' answers.

    A statistical framework for weak-to-strong generalization, arXiv 2405.16236.
    """
    from w2sg.data.replies import Prompts
    from w2sg.methods.refine.answers import answers_of_file, answers_to, gold_answers, spoken
    from w2sg.methods.refine.axes import Axes
    from w2sg.methods.refine.refiner import Refiner
    from w2sg.methods.refine.report import Findings
    from w2sg.models.trained import Trained

    if options.target == "labels":
        from w2sg.methods.refine.labels import refine_labels

        return refine_labels(
            run, options.refine, options.baselines, options.labels, options.prompts, options.sampling.batch_size
        )

    gold = {name: gold_answers(getattr(run.data, name)) for name in ("ground_truth", "transfer", "test")}
    right = {i: answer for each in gold.values() for i, answer in zip(each.ids, each.texts, strict=True)}
    # the default judge is trained only where an axis asks for it
    judged = "reward" in (options.content.kind, options.concept.kind) or not isinstance(options.judge, RewardJudge)
    judge = judge_of(run, options.judge) if judged else None
    if judge is not None and judge.trained and run.data.transfer.kind != "pairs":
        raise UserError(
            "method.judge.model: a judge is trained on preference pairs, and this dataset has none; name a reward "
            "model of the hub, or measure in another way (method.content.kind, method.concept.kind)"
        )
    if judge is not None:
        weak = {} if options.answers is not None else {"the weak model": run.weak}
        judge.independent_of({}, {"the strong model": run.strong, **weak})
    axes = Axes(run, options.content, options.concept, right, judge)
    transfer, test = run.prompts("transfer", options.prompts), run.prompts("test", options.evaluation.prompts)
    strong = Trained("strong", run.strong)
    refiner = Refiner(run, strong, options.refine, options.sampling, axes)

    if options.answers is None:
        weak = Trained("weak", run.weak)
        if options.train_weak:
            weak = run.sft("weak", weak, gold["ground_truth"], options.sft)
        taught = answers_to(run, "weak-answers", weak, transfer, options.weak_instruction, options.sampling)
        weak_on_test = answers_to(run, "weak-on-test", weak, test, options.weak_instruction, options.sampling)
    else:
        taught = answers_of_file(options.answers, transfer)
        weak_on_test = answers_of_file(options.answers, test, missing=True)
        if lost := len(transfer) - len(taught):
            run.dropped["weak-answers"] = {"prompts that the file has no answer to": lost}
    taught = spoken(run, "weak-answers", taught)
    if not len(taught):
        raise UserError("weak-answers: none of the weak answers says anything, so there is nothing to refine")
    # what the student is asked all baselines are, and nothing else
    questions = Prompts(transfer.name, taught.ids, taught.prompts)
    answered = set(taught.ids)
    right_ones = gold["transfer"].take([k for k, i in enumerate(gold["transfer"].ids) if i in answered])

    findings = Findings(run, axes, options.refine, strong)
    findings.labels["weak"] = taught
    if options.answers is not None and weak_on_test is not None and len(weak_on_test) < len(test):
        findings.left_out.append(f"weak: the file answers {len(weak_on_test)} of {len(test)} test prompts, and not all")
        weak_on_test = None
    if weak_on_test is not None:
        findings.replies["weak"] = weak_on_test
    findings.sample("base", strong, test, options.sampling)

    refined = refiner.refine("refined", taught)
    findings.refined = refined
    if not len(refined.replies):
        raise UserError(
            f"refine.accept: none of the refined answers to {len(taught)} questions was accepted; ask for less, or use "
            "refine.accept.fallback=weak or resample"
        )
    findings.train("student", run.sft("student", strong, refined.replies, options.sft), refined.replies)
    findings.sample("student", findings.trained["student"], test, options.sampling)

    for name in [name for name in options.baselines if findings.applies(name)]:
        if name == "icl":
            pool = taught if isinstance(options.refine, InContext) else weak_on_test
            findings.replies["icl"] = refiner.answer("icl-on-test", test, pool)
            continue
        if name == "naive":
            learned = taught
        elif name == "ceiling":
            learned = right_ones
        elif name == "shuffled":
            learned = refiner.refine("shuffled-refined", taught, shuffle=True).replies
        elif name == "gold_exemplars":
            learned = refiner.refine("gold-refined", taught, pool=right_ones).replies
        else:
            instruction = options.cot_instruction if name == "self_cot" else None
            learned = refiner.alone(f"{name.replace('_', '-')}-answers", questions, instruction)
        if not len(learned):
            findings.left_out.append(f"{name}: none of its answers was accepted (refine.accept)")
            continue
        findings.train(name, run.sft(name.replace("_", "-"), strong, learned, options.sft), learned)
        findings.sample(name, findings.trained[name], test, options.sampling)
    return findings.report(test, options.evaluation)


def problems(config: TrainConfig) -> list[str]:
    """What is wrong between this method's options and the rest of the configuration."""
    from pydantic import TypeAdapter

    method = config.method
    options = TypeAdapter(Refine).validate_python(method["refine"])
    if method["target"] == "labels":
        return _problems_of_labels(config, options)
    by_file = method["answers"] is not None
    stages = {"strong": ["sft"]} if by_file else {"weak": ["sft"], "strong": ["sft"]}
    lines = checks.text_problems(config, stages, "refine", written=list(stages))
    if by_file:
        if method["weak_instruction"] is not None or method["train_weak"]:
            lines.append(
                "method.answers: the file's answers are taken as they are, so the weak model is neither told nor "
                "trained; leave out weak_instruction and train_weak"
            )
        if getattr(options, "exemplars", None) == "high_confidence":
            lines.append("refine.exemplars: answers of a file come without confidence; use another choice")
    if isinstance(options, InContext) and options.count < 2 and "shuffled" in method["baselines"]:
        lines.append("method.baselines: one exemplar cannot be shuffled; leave shuffled out, or raise batch_size")
    if getattr(options, "exemplars", None) == "high_confidence" and "gold_exemplars" in method["baselines"]:
        lines.append("method.baselines: right answers have no confidence to choose gold_exemplars by; leave them out")
    if not isinstance(options, Unrefined):
        room = max(options.max_new_tokens, getattr(options, "concept_tokens", 0))
        if room >= config.strong.max_length:
            lines.append(
                f"strong.max_length: {config.strong.max_length} tokens leave no room for a context beside an answer of "
                f"{room}; raise it, or lower refine.max_new_tokens"
            )
        concept = TypeAdapter(Axis).validate_python(method["concept"])
        if options.accept.concept is not None and concept.kind == "none":
            lines.append("refine.accept.concept: no concept is measured; set method.concept.kind")
        if options.accept.concept is not None and concept.needs_gold:
            lines.append(
                "refine.accept.concept: method.concept is held against the right answers, so that they would choose "
                "what the student learns; use regex, reward or llm without {gold}"
            )
    if method["content"]["kind"] == "none" and method["concept"]["kind"] == "none":
        lines.append("method.content.kind: nothing is measured; set it, or method.concept.kind")
    for axis in ("content", "concept"):
        if method[axis]["kind"] == "reward" and not options_of(config).gives_rewards:
            lines.append(
                f"method.{axis}.kind: a reward, and this judge gives none; name another, as judge=reward, or measure "
                "in another way"
            )
    if config.loss["_target_"] != "w2sg.losses.cross_entropy":
        lines.append(
            "loss: not read where answers are refined, whose training is method.sft; it is of method.target=labels"
        )
    if config.dataset.noise.kind != "none":
        lines.append("dataset.noise.kind: answers have no labels to flip; use none, or method.target=labels")
    for role in stages:
        if getattr(config, role).untuned is not None:
            lines.append(f"{role}.before_alignment: not read by method=refine; set it to null")
    trained = {"strong": ["sft"], "weak": ["sft"] if method["train_weak"] else []}
    return lines + checks.lost_stage_steps(config, trained)


def _problems_of_labels(config: TrainConfig, options: Refine) -> list[str]:
    method, lines = config.method, []
    if options.kind not in ("icl", "none"):
        lines.append(f"refine: labels are refined in context; use refine=icl, or none, and not {options.kind}")
    elif isinstance(options, InContext):
        if options.samples > 1:
            lines.append("refine.samples: labels are not sampled but read off the next word; use 1")
        if options.combine == "vote":
            lines.append("refine.combine: soft labels are combined by their product; use product")
        if options.accept.tests:
            lines.append("refine.accept: of answers alone; set its tests to null")
        if options.count < 2 and "shuffled" in method["baselines"]:
            lines.append("method.baselines: one exemplar cannot be shuffled; leave shuffled out, or raise batch_size")
    if config.strong.arch != "hf":
        lines.append("strong.arch: a bag of words cannot read a context; choose a language model")
    for name in {"self_cot", "gold_exemplars"} & set(method["baselines"]):
        lines.append(f"method.baselines: {name} is of answers alone; leave it out")
    given = {key for key in ("weak_instruction", "answers") if method[key] is not None}
    if method["judge"].get("kind") != "reward":
        lines.append("judge: not read by method.target=labels; leave it out")
    for key in sorted(given | ({"train_weak"} if method["train_weak"] else set())):
        lines.append(f"method.{key}: of answers alone; with target=labels the weak model is trained on ground truth")
    return lines + checks.label_problems(config)
