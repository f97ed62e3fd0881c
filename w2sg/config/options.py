"""What may stand in the options of methods that train and sample language models; defaults live in conf/method."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from w2sg.config.option import Options, option
from w2sg.config.plugins import files
from w2sg.config.schema import FitOptions, Optimization, TrainConfig
from w2sg.losses.preferences import LOSSES, options_of


class LearningRates(Options):
    """By how much of the model is trained."""

    full: float = option(1e-5, "of all weights", gt=0)
    lora: float = option(1e-4, "of adapters", gt=0)


class SFT(Optimization):
    """Supervised fine-tuning of one language model, on replies alone."""

    lr: LearningRates = option(LearningRates(), "learning rate, by weak.tune or strong.tune")

    def fit_options(self, mode: str) -> FitOptions:
        """For a model that is trained in this mode."""
        shared = self.model_dump(include=set(Optimization.model_fields))
        return FitOptions(lr=getattr(self.lr, mode), patience=None, **shared)


class DPO(SFT):
    """Direct preference optimisation of one language model, and the losses that are like it."""

    loss: str = option("sigmoid", f"{' | '.join(sorted(LOSSES))} (w2sg/losses/preferences.py)")
    beta: float = option(0.1, "strength of the pull towards the reference", gt=0)
    label_smoothing: float = option(
        0.0, "assumed share of flipped preference labels (sigmoid: cDPO; robust)", ge=0.0, lt=0.5
    )
    target_margin: float = option(0.0, "SimPO's margin in units of 1 / beta", ge=0.0)
    supervised: float = option(
        0.0, "weight of the chosen replies' negative log-likelihood beside the loss (RPO)", ge=0.0, alias="sft_weight"
    )
    supervised_mean: Literal["sequence", "token"] = option(
        "sequence",
        "sequence divides it by each reply's length (RPO), token by all chosen tokens of the batch",
        alias="sft_mean",
    )
    lr: LearningRates = option(
        LearningRates(full=8e-7, lora=5e-5),
        "learning rate, by weak.tune or strong.tune; ConG's authors train all weights, the one for adapters is ours",
    )
    epochs: PositiveInt = option(1, "passes over the pairs")
    validation: float = option(
        0.01, "part of the pairs held out to choose the best epoch", ge=0.0, lt=1.0, alias="validation_fraction"
    )

    def rules(self) -> list[str]:
        problems = super().rules()
        if self.loss not in LOSSES:
            return [*problems, f"loss: there is no {self.loss!r}; choose {', '.join(sorted(LOSSES))}"]
        for name in ("label_smoothing", "target_margin"):
            if getattr(self, name) and name not in options_of(self.loss):
                readers = ", ".join(sorted(k for k in LOSSES if name in options_of(k)))
                problems.append(f"{name}: not read by loss={self.loss}; set it to 0, or use {readers}")
        return problems

    def objective(self) -> dict[str, object]:
        """Everything that decides the loss, for the cache key and for the module."""
        options = {name: getattr(self, name) for name in sorted(options_of(self.loss))}
        extra = {"supervised": self.supervised, "supervised_mean": self.supervised_mean} if self.supervised else {}
        return {"loss": self.loss, "beta": self.beta, **options, **extra}


class Sampling(Options):
    """How one model is sampled."""

    temperature: float = option(1.0, "sampling temperature; 0 is greedy", ge=0.0)
    top_k: NonNegativeInt = option(0, "tokens to choose from; 0 is all")
    top_p: float = option(
        1.0, "nucleus sampling: probability that the tokens to choose from have together", gt=0.0, le=1.0
    )
    max_new_tokens: PositiveInt = option(256, "a reply that reaches this is cut off, and nobody is taught to end there")
    batch_size: PositiveInt = option(32, "replies written at once, on each device; does not change the replies")

    def columns(self) -> list[float]:
        """A row of `w2sg.decoding.sampling.Settings`."""
        return [1.0, 0.0, self.temperature, self.top_k, self.top_p, 1.0]


def alpha_of_gamma(gamma: float, temperature: float) -> tuple[float, float]:
    """ConG's alpha and temperature that sample from the tilt pi_r (pi_r / pi_0)^gamma at a temperature.

    ``(1 + gamma) log pi_r - gamma log pi_0`` is ``(1 + gamma)`` times ConG's score at ``alpha = 1 / (1 + gamma)``: the
    order of tokens is the same, and so is the law of sampling once the temperature is divided as well.

    >>> alpha_of_gamma(1.5, 0.8)
    (0.4, 0.32)
    """
    return 1 / (1 + gamma), temperature / (1 + gamma)


class Contrast(Sampling):
    """How the pair of models before and after alignment is sampled."""

    alpha: float | None = option(
        0.4,
        "1 is the aligned model alone, 0 the implicit reward alone: it weighs AGAINST the contrast",
        ge=0.0,
        le=1.0,
    )
    gamma: float | None = option(
        None, "the same as the tilt pi_r (pi_r / pi_0)^gamma at a temperature of its own; needs alpha: null", ge=0.0
    )
    relative_top: float = option(
        0.1,
        "plausible is what the aligned model gives at least this share of its best token's probability",
        ge=0.0,
        le=1.0,
    )
    repetition_penalty: float = option(
        1.2, "factor on the log-probability of tokens that the reply has already; 1 for none", ge=1.0
    )
    temperature: float = option(0.8, "sampling temperature; 0 is greedy", ge=0.0)
    top_p: float = option(
        0.95, "nucleus sampling: probability that the tokens to choose from have together", gt=0.0, le=1.0
    )

    def rules(self) -> list[str]:
        if (self.alpha is None) == (self.gamma is None):
            return ["alpha: give either alpha (as in ConG) or gamma (of the tilt), and null for the other"]
        return []

    def columns(self, alpha: float | None = None) -> list[float]:
        """A row of `w2sg.decoding.sampling.Settings`, with another alpha if one is given."""
        temperature = self.temperature
        if alpha is None and self.gamma is not None:
            alpha, temperature = alpha_of_gamma(self.gamma, temperature)
        alpha = self.alpha if alpha is None else alpha
        return [alpha, self.relative_top, temperature, self.top_k, self.top_p, self.repetition_penalty]


class PlainSampling(Sampling):
    """How one model is sampled, and by what."""

    engine: Literal["transformers", "vllm"] | None = option(
        None, "transformers | vllm (docs/install.md): what samples one model; null is engine.name"
    )


class Alignment(DPO):
    """How the weak model is aligned: DPO on the split that trains it. Not done where weak.before_alignment is given."""

    pairs: Literal["given", "on_policy"] = option(
        "given",
        "given: the data's own pairs | on_policy: of the weak model's own samples the best and the worst by the judge",
    )
    samples: int = option(5, "replies sampled to each prompt; on_policy only", ge=2)


class Analysis(Options):
    """The sweep over alpha on test prompts."""

    alphas: list[float] = option(
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], "beside method.decoding.alpha itself; [] leaves the sweep out"
    )
    prompts: PositiveInt = option(500, "test prompts; ConG's authors take 500")

    def rules(self) -> list[str]:
        bad = [alpha for alpha in self.alphas if not 0 <= alpha <= 1]
        if bad or len(set(self.alphas)) < len(self.alphas):
            return [f"alphas: different numbers between 0 and 1 (got {self.alphas})"]
        return []


class Evaluation(Options):
    """What is measured of the trained models."""

    prompts: PositiveInt = option(500, "test prompts that each model answers")
    perplexity: bool = option(True, "perplexity of the test split's preferred replies, a check of damage")
    kl: bool = option(True, "exact divergence from the untrained model on a model's own replies, token by token")


Baseline = Literal["weak_sft", "plain", "aux_conf", "wspo", "ceiling"]


def model_name(model: str, config: TrainConfig) -> str:
    """The model that a judge's option means: a role's, that of a file of conf/model, or what it says."""
    if model in ("strong", "weak"):
        return getattr(config, model).name
    presets = files("model")
    if model not in presets:
        return model
    from omegaconf import OmegaConf

    preset = OmegaConf.load(presets[model][0])
    return model if OmegaConf.is_missing(preset, "name") else preset.name
