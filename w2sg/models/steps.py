"""Whether the steps of training survive in the weights: those of bfloat16 round small ones away, without a word.

A number in bfloat16 has 8 binary digits, so numbers next to each other differ by 2^-7 of the power of two below them,
and a weight moves only by a step of at least half of that. Adam's step is about the learning rate, whatever the
gradient, and pretrained weights are of about 0.02 (the ``initializer_range`` of GPT-2, OPT, Pythia, Llama and Qwen).
So steps below 0.02 * 2^-7 / 2 = 7.8e-5 move few weights at all: at 6e-7, 0.65 % of them were seen to change. Adapters
and heads are kept in fp32 and are not concerned.
"""

from __future__ import annotations

from collections.abc import Mapping

from w2sg.config.schema import ModelConfig

USUAL_WEIGHT = 0.02
EPSILON = 2.0**-7  # of bfloat16: from 1 to the next number
LEAST = USUAL_WEIGHT * EPSILON / 2


def lost_steps(spec: ModelConfig, role: str, rates: Mapping[str, float]) -> list[str]:
    """Problems of a configuration: learning rates that weights of a model's dtype cannot follow.

    Args:
        rates: by the key that sets them.

    >>> from types import SimpleNamespace
    >>> spec = SimpleNamespace(arch="hf", train="full", dtype="bfloat16")
    >>> [line.partition(":")[0] for line in lost_steps(spec, "strong", {"strong.lr": 1e-5, "optim.full.lr": 1e-4})]
    ['strong.dtype']
    """
    if spec.arch != "hf" or spec.train != "full" or spec.dtype != "bfloat16":
        return []
    small = {key: rate for key, rate in rates.items() if rate < LEAST}
    if not small:
        return []
    named = ", ".join(f"{key}={rate:g}" for key, rate in small.items())
    return [
        f"{role}.dtype: steps of {named} are lost in weights of bfloat16, which round by up to {LEAST:.2g} at "
        f"{USUAL_WEIGHT:g}; use {role}.dtype=float32 with trainer.precision=bf16-mixed, or {role}.tune=lora"
    ]
