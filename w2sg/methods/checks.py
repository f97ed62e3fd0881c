"""Checks that several methods share: what of a configuration a method does not read, and what cannot work.

Each gives problems, one line each, with the key and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from w2sg.config.build import fit_options
from w2sg.config.machine import optimizer_problems
from w2sg.config.schema import TrainConfig
from w2sg.config.unread import typed_name
from w2sg.decoding import vllm
from w2sg.models.steps import Rate, lost_steps, needless_rounding


def label_problems(config: TrainConfig) -> list[str]:
    """What is wrong for every method that trains on labels."""
    problems = []
    name = typed_name(config.method["_target_"])
    for role in ("weak", "strong"):
        model = getattr(config, role)
        if model.untuned is not None:
            problems.append(f"{role}.before_alignment: not read by method={name}; set it to null")
        options = fit_options(config, model)
        problems += _part_of_batch(config, role, options.batch_size, f"optim.{model.train}.global_batch_size")
        key = f"optim.{model.train}.lr" if model.lr is None else f"{role}.lr"
        if options.stochastic_rounding:
            alike = [m for m in (config.weak, config.strong) if m.train == model.train]
            problems += needless_rounding(f"optim.{model.train}", alike)
        problems += lost_steps(model, role, {key: Rate(options.lr, options.optimizer, options.stochastic_rounding)})
    return list(dict.fromkeys(problems))


def text_problems(
    config: TrainConfig, stages: Mapping[str, Sequence[str]], name: str, written: Sequence[str] = ("weak", "strong")
) -> list[str]:
    """What is wrong for a method whose models write and are trained on text.

    Args:
        config: of the run.
        stages: role -> the method's options of the stages that train it, as ``{"strong": ["sft", "dpo"]}``.
        name: of the method, as the user typed it.
        written: the roles that write.
    """
    problems = [line for role in written for line in writer_problems(config, role)]
    sampling = config.method.get("sampling") or {}
    own = sampling.get("engine")
    if sampling and (own or config.engine.name) == "vllm":
        key = "engine" if own is None else "method.sampling.engine"
        problems += vllm_problems(config, key)
    for role, names in stages.items():
        model = getattr(config, role)
        for stage in names:
            options = config.method[stage]
            problems += _part_of_batch(config, role, options["global_batch_size"], f"method.{stage}.global_batch_size")
            problems += optimizer_problems(f"method.{stage}", options["optimizer"], config.trainer)
            if options["stochastic_rounding"]:
                problems += needless_rounding(f"method.{stage}", [model])
        for key in ("lr", "epochs"):
            if getattr(model, key) is not None:
                problems.append(f"{role}.{key}: not read by method={name}; set method.{names[0]}.{key}")
    return list(dict.fromkeys(problems))


def writer_problems(config: TrainConfig, role: str) -> list[str]:
    """What keeps a model from writing and being trained on text."""
    model = getattr(config, role)
    if model.arch != "hf":
        return [f"{role}.arch: a bag of words cannot write; choose a language model"]
    if model.train == "head":
        also = "" if model.layer is None else f", and {role}.feature_layer=null"
        return [f"{role}.tune: a language model is trained whole or by adapters; use {role}.tune=lora, or full{also}"]
    return []


def vllm_problems(config: TrainConfig, key: str, roles: Sequence[str] = ("weak", "strong")) -> list[str]:
    """Why vLLM cannot sample models of these roles.

    Args:
        config: of the run.
        key: the option that asks for it.
        roles: of the models.
    """
    for role in roles:
        if load := getattr(config, role).load:
            return [f"{role}.load: vLLM cannot sample weights in {load}; set it to null, or {key}=transformers"]
    reason = vllm.why_not()
    return [] if reason is None else [f"{key}: vLLM cannot sample here: {reason}; use transformers"]


def lost_stage_steps(config: TrainConfig, stages: Mapping[str, Sequence[str]]) -> list[str]:
    """Learning rates of stages that the weights of their model cannot follow, by role."""
    problems = []
    for role, names in stages.items():
        rates = {f"method.{name}.lr.full": stage_rate(config.method[name]) for name in names}
        problems += lost_steps(getattr(config, role), role, rates)
    return problems


def stage_rate(options: Mapping[str, Any]) -> Rate:
    """The learning rate of all weights in a stage on text."""
    return Rate(options["lr"]["full"], options["optimizer"], options["stochastic_rounding"])


def _part_of_batch(config: TrainConfig, role: str, whole: int, key: str) -> list[str]:
    part = getattr(config, role).micro_batch
    if part is None or part <= whole:
        return []
    return [
        f"{role}.micro_batch_size: {part} is more than the batch of {whole} it is a part of; lower it, or raise {key}"
    ]
