"""The typed shape of a run's configuration, the two roles of a model file, and the check before any work.

Values and their defaults live in ``conf/``, each with a comment; here is what may stand there. `check` reports every
problem of a configuration at once, before anything is downloaded or trained.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pkgutil
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from w2sg.errors import ConfigError, UserError

CONF = Path(__file__).resolve().parent.parent / "conf"
Fraction = Field(ge=0.0, le=1.0)


class Strict(BaseModel):
    """Unknown keys are errors; nothing is converted that could hide a typing mistake."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class LoraOptions(Strict):
    r: PositiveInt
    alpha: PositiveInt
    dropout: float = Fraction
    targets: str | list[str]


class BowOptions(Strict):
    buckets: PositiveInt


class ModelConfig(Strict):
    """One model in one role; see the comments in conf/model/_base.yaml."""

    name: str
    revision: str | None
    arch: Literal["hf", "bow"]
    train: Literal["full", "lora", "head"]
    head: Literal["linear", "mixture"]
    experts: PositiveInt
    layer: PositiveInt | Literal["auto"] | None
    candidates: list[PositiveInt] | None
    layers: PositiveInt | None
    max_length: PositiveInt
    dtype: Literal["float32", "bfloat16"]
    attention: str
    dropout: float = Fraction
    gradient_checkpointing: bool
    share_prompt: bool
    micro_batch: PositiveInt | None
    lr: float | None = Field(gt=0)
    epochs: PositiveInt | None
    random_init: bool
    trust_remote_code: bool
    lora: LoraOptions
    bow: BowOptions

    @model_validator(mode="after")
    def _consistent(self):
        if self.arch == "bow" and self.train != "full":
            raise ValueError("train: a bag of words is trained whole; use train=full")
        if self.head == "mixture" and self.train != "head":
            raise ValueError("head: the mixture head stands on frozen features; use train=head with it")
        if self.layer is not None and self.train != "head":
            raise ValueError("layer: only a head on frozen features chooses its layer; use train=head, or layers=")
        if isinstance(self.layer, int) and self.layers is not None and self.layer > self.layers:
            raise ValueError(f"layer: {self.layer} lies above the {self.layers} layers that are kept")
        if self.layer == "auto" and not self.candidates:
            raise ValueError("candidates: layer=auto chooses among these; name at least one layer")
        return self


class FitOptions(Strict):
    """How one kind of training runs; see conf/train.yaml."""

    lr: float = Field(gt=0)
    epochs: PositiveInt
    batch_size: PositiveInt
    optimizer: Literal["adamw", "adam", "adafactor"]
    schedule: Literal["cosine", "linear", "constant"]
    warmup: float = Fraction
    weight_decay: float = Field(ge=0)
    clip: float | None = Field(gt=0)
    validation: float = Field(ge=0.0, lt=1.0)
    patience: PositiveInt | None

    @model_validator(mode="after")
    def _consistent(self):
        if self.patience is not None and self.validation == 0.0:
            raise ValueError("patience: stopping early needs held-out rows; set validation above 0")
        return self


class TrainingConfig(Strict):
    full: FitOptions
    lora: FitOptions
    head: FitOptions
    hard_label_clamp: float | None = Field(gt=0.0, lt=0.5)
    label_smoothing: float = Field(ge=0.0, lt=1.0)
    select_on: Literal["weak", "gold"]


class NoiseConfig(Strict):
    kind: Literal["none", "flip", "shrink", "hard_flip", "class_conditional"]
    rate: float = Fraction
    shrink: float = Field(ge=-1.0, le=1.0)
    rates: list[float] | None


class Sizes(Strict):
    ground_truth: PositiveInt | None
    transfer: PositiveInt | None
    test: PositiveInt | None


class DatasetConfig(Strict):
    model_config = ConfigDict(extra="allow")  # a loader may have options of its own; `check` binds them to it

    name: str
    target: str = Field(alias="_target_")
    path: str | None
    subset: str | None
    revision: str | None
    sizes: Sizes
    split_seed: int
    strict: bool
    max_chars: PositiveInt | None
    noise: NoiseConfig


class TrainerConfig(Strict):
    accelerator: str
    devices: int | str
    num_nodes: PositiveInt
    strategy: str
    precision: Literal["32-true", "bf16-mixed"]
    checkpoint_minutes: float = Field(ge=0)
    eval_tokens: PositiveInt | None
    progress_bar: bool
    deterministic: bool


class LoggerConfig(Strict):
    kind: Literal["none", "csv", "tensorboard", "wandb"]
    project: str
    entity: str | None
    mode: Literal["online", "offline", "disabled"]
    group: str | None
    tags: list[str]
    every: PositiveInt


class TrainConfig(Strict):
    """A whole training run, as composed from conf/train.yaml."""

    method: dict[str, Any]
    loss: dict[str, Any]
    weak: ModelConfig
    strong: ModelConfig
    dataset: DatasetConfig
    training: TrainingConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    seed: int = Field(ge=0)
    out: str
    store: str


# ---------------------------------------------------------------------------------------------------------------------
# Hydra: one folder of models, two roles; folders without timestamps
# ---------------------------------------------------------------------------------------------------------------------


def register(conf: Path = CONF) -> None:
    """Offer every ``conf/model/*.yaml`` as ``weak=<name>`` and ``strong=<name>``, and the name of a run's folder.

    Call once before Hydra composes anything.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for file in sorted((conf / "model").glob("*.yaml")):
        if not file.stem.startswith("_"):
            for role in ("weak", "strong"):
                store.store(group=role, name=file.stem, node={"defaults": [{"/model@_here_": file.stem}]})
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


NOT_IN_NAME = re.compile(r"^\+{0,2}(out|store|logger|trainer|hydra)([.=@/]|$)")


def run_name(overrides: list[str]) -> str:
    """A run's folder from what was typed: the same command gets the same folder, on any devices and with any logger.

    >>> run_name(["seed=1", "loss=rkl", "trainer=ddp"])
    'loss=rkl,seed=1'
    >>> run_name([])
    'default'
    """
    kept = sorted(str(o) for o in overrides if not NOT_IN_NAME.match(str(o)))
    text = ",".join(kept) or "default"
    readable = re.sub(r"[^\w.,=+-]+", "-", text)
    if readable == text and len(text) <= 120:
        return text
    return readable[:100] + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]


# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------

MISSING_HINTS = {
    "name": " (a hub id, a folder or a .gguf file)",
    "path": " (a hub id, a folder or a .jsonl, .json, .csv or .parquet file)",
}
HINTS = {
    "extra_forbidden": "no such key here",
    "missing": "needs a value",
}


def check(cfg: Any) -> TrainConfig:
    """Validate a composed configuration and report everything that is wrong with it at once.

    Args:
        cfg: what Hydra composed (a DictConfig), or the same as plain dictionaries.

    Raises:
        ConfigError: one line per problem, each with its key and what to do.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cfg = OmegaConf.create(cfg)
    missing = OmegaConf.missing_keys(cfg)
    try:
        container = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{getattr(error, 'full_key', None) or '?'}: {str(error).splitlines()[0]}"]) from error
    problems = [f"{key}: needs a value{MISSING_HINTS.get(key.rpartition('.')[2], '')}" for key in sorted(missing)]
    config = None
    try:
        config = TrainConfig.model_validate(container)
    except ValidationError as error:
        problems += [_explain(e) for e in error.errors()]
    for key in ("method", "loss", "dataset"):
        node = container.get(key)
        if isinstance(node, dict):
            problems += target_problems(key, node)
    if config is not None and not problems:
        problems += _cross_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def _explain(error: dict[str, Any]) -> str:
    key = ".".join(str(p) for p in error["loc"] if p not in ("int", "literal['auto']", "constrained-int", "str"))
    if error["type"] in HINTS:
        return f"{key}: {HINTS[error['type']]}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # our own validators name the key themselves
        return f"{key}.{message}"
    return f"{key}: {message[0].lower()}{message[1:]} (got {error['input']!r})"


DATASET_KEYS = {"name", "sizes", "split_seed", "strict", "max_chars", "noise"}  # read by the framework, not the loader


def target_problems(key: str, node: dict[str, Any]) -> list[str]:
    """What keeps a ``_target_`` node from being called: a wrong path, or options that the function does not take."""
    target = node.get("_target_")
    if not isinstance(target, str):
        return [f"{key}._target_: needs the dotted path of a function; choose {key}=<one of conf/{key}>"]
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        return [f"{key}._target_: there is no {target} ({error})"]
    if not callable(function):
        return [f"{key}._target_: {target} is not callable"]
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    given = {k for k in node if not (k.startswith("_") and k.endswith("_"))}
    if key == "dataset":
        given -= DATASET_KEYS
    return [
        f"{key}.{option}: {target} takes {', '.join(parameters)}" for option in sorted(given) if option not in parameters
    ]


def _cross_problems(config: TrainConfig) -> list[str]:
    """Rules that span several keys."""
    problems = []
    for role in ("weak", "strong"):
        model: ModelConfig = getattr(config, role)
        options = fit_options(config, model)
        if model.micro_batch is not None and model.micro_batch > options.batch_size:
            problems.append(
                f"{role}.micro_batch: {model.micro_batch} is more than the batch of {options.batch_size} it is a part "
                f"of; lower it, or raise training.{model.train}.batch_size"
            )
    reverse = any(word in config.loss.get("_target_", "") for word in ("reverse", "cace", "symmetric", "jeffreys"))
    noise = config.dataset.noise
    if reverse and noise.kind == "hard_flip" and noise.rate > 0 and config.training.hard_label_clamp is None:
        problems.append(
            "training.hard_label_clamp: hard labels have infinite reverse losses; set it (0.001 is the paper's gamma)"
        )
    if noise.kind == "class_conditional" and noise.rates is None:
        problems.append("dataset.noise.rates: class_conditional noise needs one rate per class, as [0.1,0.3]")
    if noise.rates is not None and any(not 0 <= r <= 1 for r in noise.rates):
        problems.append(f"dataset.noise.rates: rates lie between 0 and 1 (got {noise.rates})")
    if noise.kind != "class_conditional" and noise.rates is not None:
        problems.append("dataset.noise.rates: read only by noise.kind=class_conditional; use noise.rate")
    if noise.kind == "none" and noise.rate > 0:
        problems.append("dataset.noise.rate: a rate without a kind does nothing; set dataset.noise.kind=flip")
    problems += _device_problems(config.trainer)
    return problems


def _device_problems(trainer: TrainerConfig) -> list[str]:
    import torch

    if trainer.accelerator in {"gpu", "cuda"} and not torch.cuda.is_available():
        return ["trainer.accelerator: no CUDA GPU is visible on this machine; use trainer=cpu or trainer=auto"]
    if trainer.accelerator in {"gpu", "cuda"} and isinstance(trainer.devices, int):
        there = torch.cuda.device_count()
        if trainer.devices > there:
            return [f"trainer.devices: {trainer.devices} GPUs were asked for, {there} are visible"]
    if trainer.accelerator not in {"auto", "cpu", "gpu", "cuda", "mps", "tpu"}:
        return [f"trainer.accelerator: '{trainer.accelerator}' is none of auto, cpu, gpu, mps, tpu"]
    if isinstance(trainer.devices, int) and (trainer.devices == 0 or trainer.devices < -1):
        return [f"trainer.devices: {trainer.devices} devices cannot train; use 1 or more, or -1 for all"]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# What the rest of the code asks of a configuration
# ---------------------------------------------------------------------------------------------------------------------


def fit_options(config: TrainConfig, model: ModelConfig) -> FitOptions:
    """How this model trains: its mode's options, with the learning rate and epochs of its own where it has them."""
    options: FitOptions = getattr(config.training, model.train)
    own = {k: getattr(model, k) for k in ("lr", "epochs") if getattr(model, k) is not None}
    return options.model_copy(update=own)


def build(node: dict[str, Any]) -> partial:
    """The function of a ``_target_`` node with its options bound."""
    options = {k: v for k, v in node.items() if not (k.startswith("_") and k.endswith("_"))}
    return partial(pkgutil.resolve_name(node["_target_"]), **options)


def function_identity(node: dict[str, Any]) -> dict[str, Any]:
    """A ``_target_`` node as part of a cache key; a function from outside w2sg also counts by its source text."""
    identity = {k: v for k, v in node.items() if k not in {"_partial_", "_convert_"}}
    if not node["_target_"].startswith("w2sg."):
        try:
            source = inspect.getsource(pkgutil.resolve_name(node["_target_"]))
        except (OSError, TypeError) as error:
            raise UserError(f"{node['_target_']}: its source cannot be read, so its results cannot be cached") from error
        identity["source"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return json.loads(json.dumps(identity))
