"""What may stand in the options of methods that train and sample language models; defaults live in conf/method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from w2sg.config.check import CONF
from w2sg.config.schema import FitOptions, Fraction, ModelConfig, Optimization, Strict, TrainConfig
from w2sg.losses.preferences import LOSSES, options_of


class LearningRates(Strict):
    """By how much of the model is trained."""

    full: float = Field(gt=0)
    lora: float = Field(gt=0)


class FineTuning(Optimization):
    """Optimisation of one language-model stage."""

    lr: LearningRates

    def fit_options(self, mode: str) -> FitOptions:
        """For a model that is trained in this mode."""
        shared = self.model_dump(include=set(Optimization.model_fields))
        return FitOptions(lr=getattr(self.lr, mode), patience=None, **shared)


class PreferenceTuning(FineTuning):
    """Optimisation and objective of a DPO stage."""

    loss: str
    beta: float = Field(gt=0)
    label_smoothing: float = Field(ge=0.0, lt=0.5)
    target_margin: float = Field(ge=0.0)
    supervised: float = Field(ge=0.0)
    supervised_mean: Literal["sequence", "token"]

    def rules(self) -> list[str]:
        if self.loss not in LOSSES:
            return [f"loss: there is no {self.loss!r}; choose {', '.join(sorted(LOSSES))}"]
        found = []
        for name in ("label_smoothing", "target_margin"):
            if getattr(self, name) and name not in options_of(self.loss):
                readers = ", ".join(sorted(k for k in LOSSES if name in options_of(k)))
                found.append(f"{name}: not read by loss={self.loss}; set it to 0, or use {readers}")
        return found

    def objective(self) -> dict[str, object]:
        """Everything that decides the loss, for the cache key and for the module."""
        own = {name: getattr(self, name) for name in sorted(options_of(self.loss))}
        extra = {"supervised": self.supervised, "supervised_mean": self.supervised_mean} if self.supervised else {}
        return {"loss": self.loss, "beta": self.beta, **own, **extra}


class Sampling(Strict):
    """How one model is sampled."""

    temperature: float = Field(ge=0.0)
    top_k: NonNegativeInt
    top_p: float = Field(gt=0.0, le=1.0)
    max_new_tokens: PositiveInt
    batch_size: PositiveInt

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

    alpha: float | None = Field(ge=0.0, le=1.0)
    gamma: float | None = Field(ge=0.0)
    relative_top: float = Fraction
    repetition_penalty: float = Field(ge=1.0)

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

    engine: Literal["transformers", "vllm"]


class Alignment(PreferenceTuning):
    """How the weak model is aligned."""

    pairs: Literal["given", "on_policy"]
    samples: int = Field(ge=2)


class Judge(Strict):
    """The reward model that generated replies are measured with."""

    kind: Literal["reward"]
    model: str | None
    layer: PositiveInt | Literal["auto"] | None
    candidates: list[PositiveInt] | None
    max_length: PositiveInt

    def rules(self) -> list[str]:
        if self.layer == "auto" and not self.candidates:
            return ["candidates: layer=auto chooses among these; name at least one layer, as [8,12]"]
        return []


class LlmJudge(Strict):
    """A language model that is asked which of two replies is better."""

    kind: Literal["llm"]
    model: str
    question: str
    labels: list[str] = Field(min_length=2, max_length=2)
    max_length: PositiveInt

    def rules(self) -> list[str]:
        found = []
        if lost := [part for part in PLACES if self.question.count(part) != 1]:
            found.append(f"question: {' and '.join(lost)} must stand in it, once each")
        if len({label.strip() for label in self.labels}) < 2 or not all(label.strip() for label in self.labels):
            found.append(f"labels: two different words, as [A,B] (got {self.labels})")
        return found


class ImplicitJudge(Strict):
    """What alignment did to a pair of models that takes no part otherwise."""

    kind: Literal["implicit"]
    tuned: str
    untuned: str
    max_length: PositiveInt

    def rules(self) -> list[str]:
        if self.tuned == self.untuned:
            return ["untuned: a model against itself rewards nothing; name it before its alignment"]
        return []


PLACES = ("{conversation}", "{first}", "{second}")  # of LlmJudge.question
AnyJudge = Annotated[Judge | LlmJudge | ImplicitJudge, Field(discriminator="kind")]


class Analysis(Strict):
    """The sweep over alpha on test prompts."""

    alphas: list[float]
    prompts: PositiveInt

    def rules(self) -> list[str]:
        bad = [alpha for alpha in self.alphas if not 0 <= alpha <= 1]
        if bad or len(set(self.alphas)) < len(self.alphas):
            return [f"alphas: different numbers between 0 and 1 (got {self.alphas})"]
        return []


class Evaluation(Strict):
    """What is measured of the trained models."""

    prompts: PositiveInt
    perplexity: bool
    kl: bool


Baseline = Literal["weak_sft", "plain", "aux_conf", "wspo", "ceiling"]


def model_name(model: str, config: TrainConfig) -> str:
    """The model that a judge's option means: a role's, that of a file of conf/model, or what it says."""
    if model in ("strong", "weak"):
        return getattr(config, model).name
    file = CONF / "model" / f"{model}.yaml"
    if "/" in model or not file.is_file():
        return model
    from omegaconf import OmegaConf

    preset = OmegaConf.load(file)
    return model if OmegaConf.is_missing(preset, "name") else preset.name


def problems_of_writer(spec: ModelConfig, role: str) -> list[str]:
    """What keeps a model from writing and being trained on text."""
    if spec.arch != "hf":
        return [f"{role}.arch: a bag of words cannot write; choose a language model"]
    if spec.train == "head":
        return [f"{role}.train: a language model is trained whole or by adapters; use {role}.train=lora, or full"]
    return []
