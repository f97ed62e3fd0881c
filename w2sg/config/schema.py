"""The typed shape of a run's configuration: what may stand in each section.

Values and their defaults live in ``conf/``, each with a comment. `w2sg.config.check` reports what is wrong.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveInt

from w2sg.config.option import Options, option

Fraction = Field(ge=0.0, le=1.0)


Strict = Options  # its name in earlier versions


OWN_CHAT = {"chat_template": None, "chat_template_kwargs": None, "thoughts": "strip"}  # of earlier versions


class LoraOptions(Options):
    r: PositiveInt
    alpha: PositiveInt
    dropout: float = Fraction
    targets: str | list[str]


class BowOptions(Options):
    buckets: PositiveInt


class ModelConfig(Options):
    """One model in one role; see the comments in conf/model/_base.yaml."""

    name: str
    revision: str | None
    untuned: str | None
    arch: Literal["hf", "bow"]
    train: Literal["full", "lora", "head"]
    head: Literal["linear", "mixture"]
    head_weights: Literal["kept", "fresh"]
    experts: PositiveInt
    layer: PositiveInt | Literal["auto"] | None
    candidates: list[PositiveInt] | None
    layers: PositiveInt | None
    quantise: int | None = Field(ge=2, le=8)
    max_length: PositiveInt
    dtype: Literal["float32", "bfloat16"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    dropout: float = Fraction
    gradient_checkpointing: bool
    share_prompt: bool
    micro_batch: PositiveInt | None
    lr: float | None = Field(gt=0)
    epochs: PositiveInt | None
    random_init: bool
    trust_remote_code: bool
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    thoughts: Literal["strip", "keep", "refuse"]
    lora: LoraOptions
    bow: BowOptions

    def rules(self) -> list[str]:
        found = []
        if self.arch == "bow" and self.train != "full":
            found.append("train: a bag of words is trained whole; use train=full")
        if self.arch == "bow" and (self.chat_template or self.chat_template_kwargs or self.thoughts != "strip"):
            found.append(
                "chat_template: a bag of words writes no dialogues; leave chat_template and thoughts as they are"
            )
        own = {"messages", "add_generation_prompt", "tools", "documents", "date_string", "strftime_now"}
        if taken := sorted(own & set(self.chat_template_kwargs or {})):
            found.append(f"chat_template_kwargs: {', '.join(taken)} cannot be given, w2sg sets it; leave it out")
        if self.quantise is not None and (self.arch == "bow" or self.random_init):
            found.append("quantise: there are no pretrained weights to round; set it to null")
        if self.head == "mixture" and self.train != "head":
            found.append("head: the mixture head stands on frozen features; use train=head with it")
        if self.head_weights == "fresh" and (self.arch == "bow" or self.train == "head" or self.random_init):
            found.append("head_weights: this head is always drawn anew; set it to kept, or use train=full or lora")
        if self.layer is not None and self.train != "head":
            found.append(
                "layer: only a head on frozen features chooses its layer; use train=head, or set "
                "layer=null (layers= keeps the first blocks of any model)"
            )
        if isinstance(self.layer, int) and self.layers is not None and self.layer > self.layers:
            found.append(f"layer: {self.layer} lies above the {self.layers} layers that are kept; lower it")
        if self.layer == "auto" and not self.candidates:
            found.append("candidates: layer=auto chooses among these; name at least one layer, as [8,12]")
        if self.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            found.append("attention: flash_attention_2 needs the package flash-attn; install it, or use attention=sdpa")
        return found


class Optimization(Options):
    """What every kind of training has; the defaults are those of language-model stages."""

    epochs: PositiveInt = option(2, "passes over the examples")
    batch_size: PositiveInt = option(64, "examples per optimizer step, over all devices and micro-batches")
    optimizer: Literal["adamw", "adam", "adafactor"] = option(
        "adamw", "adamw | adam | adafactor; with adam, weight_decay is an L2 penalty on the loss, adamw decouples it"
    )
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "cosine | linear (both to 0) | constant")
    warmup: float = option(0.1, "part of all steps over which the learning rate rises linearly", ge=0.0, le=1.0)
    weight_decay: float = option(0.0, "decoupled from the gradient with adamw", ge=0)
    clip: float | None = option(1.0, "largest gradient norm; null does not clip", gt=0)
    validation: float = option(
        0.0, "part of the examples held out to stop early and to choose the best epoch", ge=0.0, lt=1.0
    )


class FitOptions(Optimization):
    """How one kind of training on labels runs; the defaults are the published protocol for all weights."""

    lr: float = option(1e-5, "learning rate; overruled by weak.lr and strong.lr", gt=0)
    epochs: PositiveInt = option(1, "passes over the rows; overruled by weak.epochs and strong.epochs")
    batch_size: PositiveInt = option(32, "rows per optimizer step, over all devices and micro-batches")
    warmup: float = option(0.0, "part of all steps over which the learning rate rises linearly", ge=0.0, le=1.0)
    clip: float | None = option(None, "largest gradient norm; null does not clip", gt=0)
    patience: PositiveInt | None = option(None, "epochs without improvement before stopping; null always runs them all")

    def rules(self) -> list[str]:
        if self.patience is not None and self.validation == 0.0:
            return ["patience: stopping early needs held-out rows; set validation above 0"]
        return []


class TrainingConfig(Options):
    full: FitOptions
    lora: FitOptions
    head: FitOptions
    hard_label_clamp: float | None = Field(gt=0.0, lt=0.5)
    label_smoothing: float = Field(ge=0.0, lt=1.0)
    select_on: Literal["weak", "gold"]


class NoiseConfig(Options):
    kind: Literal["none", "flip", "shrink", "hard_flip", "class_conditional"]
    rate: float = Fraction
    shrink: float = Field(ge=-1.0, le=1.0)
    rates: list[float] | None

    def rules(self) -> list[str]:
        found = []
        if self.kind == "none" and self.rate > 0:
            found.append("rate: a rate without a kind does nothing; set dataset.noise.kind=flip, or another")
        if self.kind == "class_conditional":
            if self.rates is None:
                found.append("rates: class_conditional noise needs one rate per class, as [0.1,0.3]")
            if self.rate > 0:
                found.append("rate: not read by class_conditional noise; use dataset.noise.rates alone")
        elif self.rates is not None:
            found.append("rates: read only by dataset.noise.kind=class_conditional; use dataset.noise.rate")
        if any(not 0 <= rate <= 1 for rate in self.rates or []):
            found.append(f"rates: each lies between 0 and 1 (got {self.rates})")
        return found


class Sizes(Options):
    ground_truth: PositiveInt | None
    transfer: PositiveInt | None
    test: PositiveInt | None


class ZeroShotConfig(Options):
    question: str
    answers: list[str] = Field(min_length=2)


class Difficulty(Options):
    column: str
    most: float = Field(allow_inf_nan=False)
    easy: list[Literal["ground_truth", "transfer", "test"]] = Field(min_length=1)

    def rules(self) -> list[str]:
        if len(set(self.easy)) != len(self.easy) or len(self.easy) == 3:
            return ["easy: splits with easy rows, each once, and one must be left for the hard ones; as [ground_truth]"]
        return []


# What a column of the user's own data may be, under any name (`w2sg.data.forms` reads them).
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "messages",
    "text",
    "label",
    "system",
    "history",
    "score_chosen",
    "score_rejected",
)


class DatasetConfig(Options):
    model_config = ConfigDict(
        extra="allow"
    )  # added to that of Strict: a loader may have options of its own; `check` binds them to it

    name: str
    target: str = Field(alias="_target_")
    path: str | None
    subset: str | None
    revision: str | None
    sizes: Sizes
    split_seed: int
    strict: bool
    max_chars: PositiveInt | None
    difficulty: Difficulty | None
    zero_shot: ZeroShotConfig | None
    noise: NoiseConfig

    def rules(self) -> list[str]:
        columns = (self.model_extra or {}).get("columns")
        if columns is None:
            return []
        shown = "{prompt: my_question, chosen: my_good, rejected: my_bad}"
        if not isinstance(columns, dict) or not columns or not all(isinstance(v, str) and v for v in columns.values()):
            return [f"columns: give the names of columns, as {shown}; null reads them by their own names"]
        unknown = [name for name in columns if name not in FIELDS]
        return [f"columns: there is no field {name!r}; choose among {', '.join(FIELDS)}" for name in unknown]


class TrainerConfig(Options):
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
    devices: int | str
    num_nodes: PositiveInt
    strategy: Literal["auto", "ddp", "fsdp"]
    precision: Literal["32-true", "bf16-mixed"]
    checkpoint_minutes: float = Field(ge=0)
    eval_tokens: PositiveInt | None
    progress_bar: bool
    deterministic: bool

    def rules(self) -> list[str]:
        devices = self.devices
        if isinstance(devices, int) and (devices == 0 or devices < -1):
            return [f"devices: {devices} devices cannot train; use 1 or more, or -1 for all"]
        if isinstance(devices, str) and not re.fullmatch(r"auto|-1|\d+(,\d+)*", devices):
            return [f"devices: '{devices}' is neither a number of devices nor -1 for all"]
        return []


class LoggerConfig(Options):
    kind: Literal["none", "csv", "tensorboard", "wandb"]
    project: str | None
    entity: str | None
    mode: Literal["online", "offline", "disabled"] | None
    group: str | None
    tags: list[str]
    every: PositiveInt

    def rules(self) -> list[str]:
        needs = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}.get(self.kind, ())
        if needs and not any(importlib.util.find_spec(name) for name in needs):
            extra = "'w2sg[tensorboard]'" if self.kind == "tensorboard" else "wandb"
            return [f"kind: the package {needs[0]} is not installed; pip install {extra}, or use logger=csv"]
        return []


class TrainConfig(Options):
    """A whole run, as composed from conf/train.yaml, or from conf/decode.yaml where a decoder is measured."""

    method: dict[str, Any]
    decoder: dict[str, Any] | None
    refine: dict[str, Any] | None
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


class EvaluateConfig(Options):
    """What to look at, as composed from conf/evaluate.yaml."""

    runs: str | None
    store: Literal["list", "why", "prune"] | None
    export: str | None
    harness: str | None
    annotations: str | None
    of: str | None
    known_answers: str | None
    key: str | int | float | None  # the beginning of a hash may read as a number
    apply: bool
    system: str | None
    to: str | None
    tasks: list[str]
    limit: PositiveInt | None
    fewshot: int | None = Field(ge=0)
    batch_size: PositiveInt | Literal["auto"]
    chat: bool
    include: str | None
    baseline: bool
    out: str
    root: str

    def rules(self) -> list[str]:
        doing = ("runs", "store", "export", "harness", "annotations", "known_answers")
        asked = [name for name in doing if getattr(self, name) is not None]
        if not asked:
            return [
                "runs: say what to do: runs=FOLDER gathers finished runs; store=list, =why or =prune looks at a store; "
                "export=RUN writes one of its models; harness=RUN evaluates one on downstream tasks; "
                "annotations=FILE reads what alpaca_eval judged; known_answers=all checks against theory"
            ]
        if len(asked) > 1:
            return [f"{asked[0]}: one thing at a time; leave out all but one of {', '.join(f'{a}=' for a in asked)}"]
        if self.store == "why" and self.key is None:
            return ["key: store=why explains one stage; name it with key=, or see them all with store=list"]
        if self.export is not None and self.to is None:
            return ["to: say which folder the model is to be written to"]
        if self.harness is not None and not self.tasks:
            return ["tasks: name the harness's tasks, as tasks=[arc_easy,gsm8k]"]
        if self.of is not None and self.annotations is None:
            return ["of: read only with annotations=FILE; leave it out"]
        return []
