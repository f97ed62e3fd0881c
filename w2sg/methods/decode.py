"""Decode-time alignment, measured: a frozen strong model steered by a small aligned one, beside its plain samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from w2sg.config.machine import optimizer_problems, place_problems
from w2sg.config.option import Options, option
from w2sg.config.options import Alignment
from w2sg.decoding.decoders import REWARD, STRONG, AnyDecoder, Decoder, Plain
from w2sg.decoding.decoders.batches import check_vocabulary
from w2sg.errors import calling
from w2sg.judges import AnyJudge, RewardJudge, judge_of, options_of
from w2sg.methods.checks import stage_rate
from w2sg.models.steps import lost_steps, needless_rounding

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.models.source import Source
    from w2sg.reports.assemble import Report


class DecodeEvaluation(Options):
    """What is measured, on the test split."""

    prompts: PositiveInt = option(200, "test prompts that are answered")
    traces: int = option(4, "prompts whose search is shown step by step on the page", ge=0)
    surprise: bool = option(
        True, "distance from the strong model: minus its own log-probability of the replies, per token"
    )
    tax: str | None = option(
        None,
        "alignment tax: a JSONL file of {question, choices, answer} or of {question, answer}, on which the decoder and "
        "plain samples are compared; null asks nothing",
    )
    frontier: bool = option(
        True,
        "rewards over the KL divergence of replies from the strong model, in nats, where there is one (sampling, eft, "
        "the guide; a bound for best_of_n); needs a judge that gives rewards",
    )


def decode(
    run: Run,
    decoder: AnyDecoder,
    alignment: Alignment,
    judge: AnyJudge,
    evaluation: DecodeEvaluation,
    style: Literal["chat", "roles", "urial"] = "chat",
) -> Report:
    """Answer the test prompts in one way, and plainly, and compare.

    Args:
        run: the models and the data.
        decoder: how the replies are written: a file of conf/decoder.
        judge: what measures the replies: a file of conf/judge.
        style: how the strong model reads dialogues: chat (its template; "Human: ... Assistant:" where it has none) |
            roles (plain text with [User] and [Assistant], for base models) | urial (instructions and examples before,
            for base models).
        alignment: of the weak model, where it is not given before its alignment.
        evaluation: what is measured, on the test split.
    """
    from w2sg.evaluation.alignment_tax import alignment_tax, read_questions
    from w2sg.evaluation.decoders import Comparison
    from w2sg.evaluation.divergence import frontier
    from w2sg.experiment.decode import Decoders, Pair
    from w2sg.judges.reward import RewardModel
    from w2sg.models.trained import Trained

    questions = None if evaluation.tax is None else read_questions(Path(evaluation.tax))
    measure = judge_of(run, judge)
    guides, writers = guide_and_writers(run, decoder)
    reward = None
    if REWARD in decoder.needs:
        with calling(decoder, "guide"):
            guide = decoder.guide
            named = {"model": guide.model, "layer": guide.layer}
        length = getattr(judge, "max_length", RewardJudge().max_length)  # one from outside may have none
        options = RewardJudge(**named, max_length=length)
        reward = RewardModel(run, options, "guide", "ground_truth", "decoder.guide")
        if guide.model != "weak":
            guides["the reward model that guides"] = reward.source
    if measure is not None:
        measure.independent_of(guides, writers)
    strong = Trained("strong", replace(run.strong, style=style))
    if decoder.adds_logits:
        check_vocabulary(decoder, run.weak.chat, strong.source.chat)
    prompts = run.prompts("test", evaluation.prompts)

    pair, server, plain, systems = None, decoder.served_by, Plain.like(decoder), {}
    # first of all, since a server may not answer: that is known before anything is trained
    if server is not None:
        systems["plain"] = Decoders(run, strong, server=server).write("plain", plain, prompts)
    if decoder.needs_pair:
        before, after, _ = run.align(alignment)
        pair = Pair(after, before)
    decoders = Decoders(run, strong, pair, reward, server)
    if server is None:
        systems["plain"] = decoders.write("plain", plain, prompts)
    if pair is not None:
        systems["guide"] = run.decode("guide-alone", plain, prompts, pair.tuned)
    if not decoder.is_plain:
        systems[decoder.kind] = decoders.write(decoder.stage, decoder, prompts)
    traces = []
    if decoder.traces and evaluation.traces > 0:
        answered = set(systems[decoder.kind].replies.ids)  # the others were too long for a model
        places = [k for k, i in enumerate(prompts.ids) if i in answered]
        traces = decoders.traces("traces", decoder, prompts.take(places[: evaluation.traces]))
    tax = None if questions is None else alignment_tax(decoders, decoder, plain, questions)
    comparison = Comparison(run, measure, strong, systems, decoder)
    kl = None
    if evaluation.frontier and measure is not None and measure.gives_rewards:
        kl = frontier(run, strong, pair, decoder, comparison.replies, server is not None)
    return comparison.report(traces, evaluation.surprise, tax, kl)


def guide_and_writers(run: Run, decoder: Decoder) -> tuple[dict[str, Source], dict[str, Source]]:
    """The models that guide and those that write, as they were found, each by what it is called."""
    guide, writers = {}, {"the strong model": run.strong}
    if decoder.needs_pair:
        before = run.untuned or run.weak
        writers["the small model before its alignment"] = before
        if run.untuned is not None:
            guide["the small aligned model"] = run.weak
    return guide, writers


def problems(config: TrainConfig) -> list[str]:
    """What is wrong between the decoder and the rest of the configuration."""
    from pydantic import TypeAdapter

    decoder: Decoder = TypeAdapter(AnyDecoder).validate_python(config.method["decoder"])
    broken = []
    roles = ["strong", *(["weak"] if decoder.needs_pair else [])]
    for role in roles:
        if getattr(config, role).arch != "hf":
            broken.append(f"{role}.arch: a bag of words cannot write; choose a language model")
        elif getattr(config, role).train == "head":
            broken.append(f"{role}.tune: a head cannot write; use {role}.tune=lora (or full)")
    broken += decoder.problems(config)
    if config.server.url is not None and "strong" in config.server.roles and decoder.kind != "sampling":
        how = "by decoder.server.*" if "server" in type(decoder).model_fields else "not at all"
        broken.append(
            f"server.roles: decoder={decoder.kind} asks a server for the strong model {how}; take strong out, or leave "
            "server.url out"
        )
    broken += _unread(config)
    if config.strong.load is not None and decoder.served_by is not None:
        broken.append("strong.load: a server writes in place of the strong model; set it to null")
    if config.strong.device_map is not None and decoder.served_by is not None:
        broken.append("strong.device_map: a server writes in place of the strong model; set it to null")
    if decoder.needs_pair and config.weak.untuned is None:
        alignment = config.method["alignment"]
        broken += place_problems("weak", config.weak, config.trainer, trained=True)
        broken += lost_steps(config.weak, "weak", {"method.alignment.lr.full": stage_rate(alignment)})
        if alignment["stochastic_rounding"]:
            broken += needless_rounding("method.alignment", [config.weak])
        broken += optimizer_problems("method.alignment", alignment["optimizer"], config.trainer)
    if decoder.needs_pair and config.weak.untuned is not None:
        broken += options_of(config).guides(config, config.weak.name)
    if config.method["alignment"]["pairs"] == "on_policy" and decoder.needs_pair and config.weak.untuned is None:
        broken.append(
            "method.alignment.pairs: on-policy pairs are ranked by the judge, which must not guide; use given"
        )
    if config.method["style"] != "chat" and STRONG not in decoder.needs:
        broken.append(f"method.style: the strong model writes nothing in decoder={decoder.kind}; use chat")
    return broken


def _unread(config: TrainConfig) -> list[str]:
    """Settings of the main job that nothing here reads."""
    broken = []
    for role in ("weak", "strong"):
        for key in ("lr", "epochs"):
            if getattr(getattr(config, role), key) is not None:
                where = f"set method.alignment.{key}" if role == "weak" else "the strong model stays as it is"
                broken.append(f"{role}.{key}: not read where a decoder is measured; {where}")
    if config.strong.untuned is not None:
        broken.append(
            "strong.before_alignment: only the weak model has an alignment to undo; set weak.before_alignment"
        )
    if config.dataset.noise.kind != "none":
        broken.append("dataset.noise.kind: nothing is trained on labels that a weak model gave; use none")
    return broken
