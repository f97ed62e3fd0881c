"""Whether the steps of training survive in the weights: those of bfloat16 round small ones away, without a word.

A number in bfloat16 has 8 binary digits, so numbers next to each other differ by 2^-7 of the power of two below them,
and a weight moves only by a step of at least half of that. Adam's step is about the learning rate, whatever the
gradient, and pretrained weights are of about 0.02 (the ``initializer_range`` of GPT-2, OPT, Pythia, Llama and Qwen).
So steps below 0.02 * 2^-7 / 2 = 7.8e-5 move few weights at all: at 6e-7, 0.65 % of them were seen to change. Adafactor
multiplies the rate by the size of the weights, so its steps are smaller still. Adapters and heads are kept in fp32 and
are not concerned; nor are steps that are rounded by chance (`w2sg.training.optimizers.rounded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from w2sg.config.model_schema import ModelConfig

USUAL_WEIGHT = 0.02
EPSILON = 2.0**-7  # of bfloat16: from 1 to the next number
LEAST = USUAL_WEIGHT * EPSILON / 2


@dataclass(frozen=True)
class Rate:
    """A learning rate with what decides how far it moves a weight.

    >>> Rate(1e-4).lost, Rate(1e-4, "adafactor").lost, Rate(1e-6, stochastic_rounding=True).lost
    (False, True, False)
    """

    value: float
    optimizer: str = "adamw"
    stochastic_rounding: bool = False

    @property
    def lost(self) -> bool:
        """Whether weights of bfloat16 round most of its steps away."""
        step = self.value * USUAL_WEIGHT if self.optimizer == "adafactor" else self.value
        return step < LEAST and not self.stochastic_rounding


def needless_rounding(key: str, specs: Iterable[ModelConfig]) -> list[str]:
    """Problems of ``stochastic_rounding`` in a section, where none of the models that it trains has such weights."""
    if any(spec.arch == "hf" and spec.train == "full" and spec.dtype == "bfloat16" for spec in specs):
        return []
    return [
        f"{key}.stochastic_rounding: it trains no weights of bfloat16, and others lose no step; leave it out, or set "
        "dtype=bfloat16 and tune=full of the model"
    ]


def lost_steps(spec: ModelConfig, role: str, rates: Mapping[str, Rate]) -> list[str]:
    """Problems of a configuration: learning rates that weights of a model's dtype cannot follow.

    Args:
        rates: by the key that sets them.

    >>> from types import SimpleNamespace
    >>> spec = SimpleNamespace(arch="hf", train="full", dtype="bfloat16")
    >>> rates = {"strong.lr": Rate(1e-5), "optim.full.lr": Rate(1e-4)}
    >>> [line.partition(":")[0] for line in lost_steps(spec, "strong", rates)]
    ['strong.dtype']
    """
    if spec.arch != "hf" or spec.train != "full" or spec.dtype != "bfloat16":
        return []
    small = {key: rate for key, rate in rates.items() if rate.lost}
    if not small:
        return []
    named = ", ".join(
        f"{key}={rate.value:g}{' of adafactor' if rate.optimizer == 'adafactor' else ''}" for key, rate in small.items()
    )
    sections = [f"optim.{spec.train}" if key == f"{role}.lr" else key.partition(".lr")[0] for key in small]
    rounding = " ".join(f"{section}.stochastic_rounding=true" for section in dict.fromkeys(sections))
    return [
        f"{role}.dtype: steps of {named} are lost in weights of bfloat16, which round by up to {LEAST:.2g} at "
        f"{USUAL_WEIGHT:g}; use {role}.dtype=float32 with trainer.precision=bf16-mixed, {role}.tune=lora, or "
        f"{rounding}"
    ]
