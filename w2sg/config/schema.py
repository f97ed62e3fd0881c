"""The typed shape of a run's configuration: what may stand in each section.

Values and their defaults live in ``conf/``, each with a comment. `w2sg.config.check` reports what is wrong.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, PositiveInt

from w2sg.config.option import Options, option

Strict = Options  # its name in earlier versions


OWN_CHAT = {"chat_template": None, "chat_template_kwargs": None, "thoughts": "strip"}  # of earlier versions


class LoraOptions(Options):
    """Low-rank adapters."""

    r: PositiveInt = option(16, "rank of the adapters")
    alpha: PositiveInt = option(32, "they are scaled by alpha / r")
    dropout: float = option(0.0, "on what enters an adapter", ge=0.0, le=1.0)
    targets: str | list[str] = option("all-linear", "the layers that get one: all-linear, or names as [q_proj,v_proj]")


class BowOptions(Options):
    """A bag of hashed words."""

    buckets: PositiveInt = option(32768, "hashed words: the width of its one layer")


class ModelConfig(Options):
    """One model in one role: strong.lr=5e-6, weak.tune=head, ..."""

    name: str = option(..., "hub id, folder, .gguf file, or package:<module>/<file>")
    untuned: str | None = option(
        None, "weak, method=cong: this model before its alignment; null aligns it in the run", alias="before_alignment"
    )
    revision: str | None = option(
        None, "hub branch, tag or commit; null is main (the commit that it was counts in cache keys)"
    )
    arch: Literal["hf", "bow"] = option("hf", "hf: a transformers decoder | bow: a bag of hashed words, no download")
    train: Literal["full", "lora", "head"] = option(
        "full", "full: every weight | lora: adapters | head: last layer only, on cached features", alias="tune"
    )
    head: Literal["linear", "mixture"] = option(
        "linear", "linear | mixture (tune=head): a convex mixture of fixed linear experts"
    )
    head_weights: Literal["kept", "fresh"] = option(
        "kept", "a reward model's own head, where its weights have one: kept | fresh draws another"
    )
    experts: PositiveInt = option(8, "experts of the mixture head")
    layer: PositiveInt | Literal["auto"] | None = option(
        None,
        "tune=head: the layer whose states are read; null the last, auto by cross-validation",
        alias="feature_layer",
    )
    candidates: list[PositiveInt] | None = option(
        None,
        "layers among which feature_layer=auto chooses, on the split that trains the weak model",
        alias="feature_layer_candidates",
    )
    layers: PositiveInt | None = option(
        None, "keep only this many blocks of the backbone; null keeps all", alias="keep_layers"
    )
    quantise: int | None = option(
        None,
        "round the pretrained weights to so many bits, 2 to 8: the same model, but weaker",
        ge=2,
        le=8,
        alias="round_weights",
    )
    max_length: PositiveInt = option(512, "tokens of a text; longer ones lose their start")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "float32 | bfloat16: of the weights; the head and the losses are always fp32"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = option("sdpa", "sdpa | eager | flash_attention_2")
    dropout: float = option(0.0, "every dropout rate of the backbone; the published runs have none", ge=0.0, le=1.0)
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    share_prompt: bool = option(
        True, "one row per pair where the backbone allows it; false gives each text a row of its own"
    )
    micro_batch: PositiveInt | None = option(
        None,
        "examples per forward and device (= per_device_train_batch_size); null the whole batch. Accumulation is "
        "derived, so it does not change the result",
        alias="micro_batch_size",
    )
    lr: float | None = option(None, "learning rate; null: optim.<tune>.lr", gt=0)
    epochs: PositiveInt | None = option(None, "passes over the rows; null: optim.<tune>.epochs")
    random_init: bool = option(False, "architecture and tokenizer only, with new random weights")
    trust_remote_code: bool = option(False, "run code from the model's repository")
    chat_template: str | None = option(None, "file with a jinja chat template, in place of the model's own")
    chat_template_kwargs: dict[str, Any] | None = option(
        None, "variables of the chat template, as {enable_thinking: false}"
    )
    thoughts: Literal["strip", "keep", "refuse"] = option(
        "strip", "of reasoning models: strip (replies are what follows a thought) | keep | refuse"
    )
    lora: LoraOptions = option(LoraOptions(), "tune=lora")
    bow: BowOptions = option(BowOptions(), "arch=bow")

    def rules(self) -> list[str]:
        problems = []
        if self.arch == "bow" and self.train != "full":
            problems.append("tune: a bag of words is trained whole; use tune=full")
        if self.arch == "bow" and (self.chat_template or self.chat_template_kwargs or self.thoughts != "strip"):
            problems.append(
                "chat_template: a bag of words writes no dialogues; leave chat_template and thoughts as they are"
            )
        set_here = {"messages", "add_generation_prompt", "tools", "documents", "date_string", "strftime_now"}
        if taken := sorted(set_here & set(self.chat_template_kwargs or {})):
            problems.append(f"chat_template_kwargs: {', '.join(taken)} cannot be given, w2sg sets it; leave it out")
        if self.quantise is not None and (self.arch == "bow" or self.random_init):
            problems.append("round_weights: there are no pretrained weights to round; set it to null")
        if self.head == "mixture" and self.train != "head":
            problems.append("head: the mixture head stands on frozen features; use tune=head with it")
        if self.head_weights == "fresh" and (self.arch == "bow" or self.train == "head" or self.random_init):
            problems.append("head_weights: this head is always drawn anew; set it to kept, or use tune=full or lora")
        if self.layer is not None and self.train != "head":
            problems.append(
                "feature_layer: only a head on frozen features chooses its layer; use tune=head, or set "
                "feature_layer=null (keep_layers= keeps the first blocks of any model)"
            )
        if isinstance(self.layer, int) and self.layers is not None and self.layer > self.layers:
            problems.append(f"feature_layer: {self.layer} lies above the {self.layers} layers that are kept; lower it")
        if self.layer == "auto" and not self.candidates:
            problems.append(
                "feature_layer_candidates: feature_layer=auto chooses among these; name at least one layer, as [8,12]"
            )
        if self.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            problems.append("attention: flash_attention_2 needs the package flash-attn; install it, or use sdpa")
        return problems


class Optimization(Options):
    """What every kind of training has; the defaults are those of language-model stages."""

    epochs: PositiveInt = option(2, "passes over the examples")
    batch_size: PositiveInt = option(
        64, "examples per optimizer step, over all devices and micro-batches", alias="global_batch_size"
    )
    optimizer: Literal["adamw", "adam", "adafactor"] = option(
        "adamw", "adamw | adam | adafactor; with adam, weight_decay is an L2 penalty on the loss, adamw decouples it"
    )
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "cosine | linear (both to 0) | constant")
    warmup: float = option(
        0.1, "part of all steps over which the learning rate rises linearly", ge=0.0, le=1.0, alias="warmup_fraction"
    )
    weight_decay: float = option(0.0, "decoupled from the gradient with adamw", ge=0)
    clip: float | None = option(1.0, "largest gradient norm; null does not clip", gt=0, alias="max_grad_norm")
    validation: float = option(
        0.0,
        "part of the examples held out to stop early and to choose the best epoch",
        ge=0.0,
        lt=1.0,
        alias="validation_fraction",
    )


class FitOptions(Optimization):
    """How one kind of training on labels runs; the defaults are the published protocol for all weights."""

    lr: float = option(1e-5, "learning rate; overruled by weak.lr and strong.lr", gt=0)
    epochs: PositiveInt = option(1, "passes over the rows; overruled by weak.epochs and strong.epochs")
    batch_size: PositiveInt = option(
        32, "rows per optimizer step, over all devices and micro-batches", alias="global_batch_size"
    )
    warmup: float = option(
        0.0, "part of all steps over which the learning rate rises linearly", ge=0.0, le=1.0, alias="warmup_fraction"
    )
    clip: float | None = option(None, "largest gradient norm; null does not clip", gt=0, alias="max_grad_norm")
    patience: PositiveInt | None = option(None, "epochs without improvement before stopping; null always runs them all")

    def rules(self) -> list[str]:
        if self.patience is not None and self.validation == 0.0:
            return ["patience: stopping early needs held-out rows; set validation_fraction above 0"]
        return []


class TrainingConfig(Options):
    """How models are trained: what holds for all, then by mode (weak.tune, strong.tune)."""

    full: FitOptions = option(FitOptions(), "every weight")
    lora: FitOptions = option(FitOptions(lr=2e-4, epochs=2, warmup=0.03, clip=1.0), "low-rank adapters")
    # The penalty is for a few hundred weak labels and hundreds of features. It was chosen once by cross-validation on
    # 800 review pairs, judged by gold labels: student .64 without it, .75 with it; ceiling .86 and .87.
    head: FitOptions = option(
        FitOptions(lr=1e-3, epochs=20, optimizer="adam", weight_decay=0.5),
        "the last layer alone, on cached features",
    )
    hard_label_clamp: float | None = option(
        0.001,
        "hard labels (0 or 1) have infinite reverse losses: they are pulled to [c, 1-c] (arXiv 2502.11107: 0.001), "
        "counted and reported; null refuses them",
        gt=0.0,
        lt=0.5,
    )
    label_smoothing: float = option(0.0, "smooths the labels that a student trains on: w(1-e) + e/C", ge=0.0, lt=1.0)
    select_on: Literal["weak", "gold"] = option(
        "weak",
        "labels that early stopping and model selection look at; gold leaks ground truth, which the report says",
    )


class NoiseConfig(Options):
    """Noise on the labels that the student trains on.

    Which rows are hit depends on (seed, row id), so the rows at rate 0.1 are a subset of those at 0.2.
    """

    kind: Literal["none", "flip", "shrink", "hard_flip", "class_conditional"] = option(
        "none", "none | flip | shrink | hard_flip | class_conditional"
    )
    rate: float = option(0.0, "share of rows that are hit", ge=0.0, le=1.0)
    shrink: float = option(-1.0, "kind=shrink: w becomes 1/C + shrink (w - 1/C)", ge=-1.0, le=1.0)
    rates: list[float] | None = option(None, "kind=class_conditional: one rate for each class of label")

    def rules(self) -> list[str]:
        problems = []
        if self.kind == "none" and self.rate > 0:
            problems.append("rate: a rate without a kind does nothing; set dataset.noise.kind=flip, or another")
        if self.kind == "class_conditional":
            if self.rates is None:
                problems.append("rates: class_conditional noise needs one rate per class, as [0.1,0.3]")
            if self.rate > 0:
                problems.append("rate: not read by class_conditional noise; use dataset.noise.rates alone")
        elif self.rates is not None:
            problems.append("rates: read only by dataset.noise.kind=class_conditional; use dataset.noise.rate")
        if any(not 0 <= rate <= 1 for rate in self.rates or []):
            problems.append(f"rates: each lies between 0 and 1 (got {self.rates})")
        return problems


class Sizes(Options):
    """Examples per split; null takes all there are."""

    ground_truth: PositiveInt | None = option(None, "trains the weak model", alias="weak_train")
    transfer: PositiveInt | None = option(None, "is labelled by the weak model, and trains the student")
    test: PositiveInt | None = option(None, "measures")


class ZeroShotConfig(Options):
    """What the untrained strong model is asked after each text, for its zero-shot score."""

    question: str = option(..., "comes after the text")
    answers: list[str] = option(..., "pairs: the worse, the better; classes: one for each", min_length=2)


# what it is called in code and in keys; typed weak_train
Split = Annotated[
    Literal["ground_truth", "transfer", "test"],
    BeforeValidator(lambda name: "ground_truth" if name == "weak_train" else name),
]


class Difficulty(Options):
    """Easy to hard: some splits get the easy rows, the others the hard ones."""

    column: str = option(..., "the column with each row's difficulty, a number")
    most: float = option(..., "rows of at most this are easy", allow_inf_nan=False)
    easy: list[Split] = option(..., "splits that get the easy rows, as [weak_train, transfer]", min_length=1)

    def rules(self) -> list[str]:
        if len(set(self.easy)) != len(self.easy) or len(self.easy) == 3:
            return ["easy: splits with easy rows, each once, and one must be left for the hard ones; as [weak_train]"]
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
        extra="allow", populate_by_name=False
    )  # added to that of Strict: a loader may have options of its own; `check` binds them to it

    name: str = option(..., "names the rows in reports")
    target: str = option(
        ...,
        "the loader: a function (path, subset, revision) -> w2sg.data.sources.Source; other keys go to it as options",
        alias="_target_",
    )
    path: str | None = option(
        ...,
        "a hub id, a folder or a file (.jsonl .jsonl.gz .json .csv .parquet); a folder with weak_train, transfer and "
        "test files gives the three splits as they are; null reads an installed package",
    )
    subset: str | None = option(None, "one of the hub's configurations of the dataset, where it has several")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    sizes: Sizes = option(Sizes(), "examples per split; null takes all there are")
    split_seed: int = option(
        0, "decides which prompts go to which split; which of two replies is first is decided by seed"
    )
    strict: bool = option(False, "true refuses a bad row instead of dropping and counting it")
    max_chars: PositiveInt | None = option(
        40000, "longer texts are dropped and counted, whatever the tokenizer; null keeps them all"
    )
    difficulty: Difficulty | None = option(
        None, "{column: level, most: 3, easy: [weak_train, transfer]} gives these splits the easy rows; null does not"
    )
    zero_shot: ZeroShotConfig | None = option(
        None, "what the untrained strong model is asked after each text, for its zero-shot score; null asks nothing"
    )
    noise: NoiseConfig = option(NoiseConfig(), "noise on the labels that the student trains on")

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
    """Devices, precision and progress."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = option(
        "auto", "auto: a GPU where there is one, else the CPU | cpu | gpu (the same as cuda) | mps | tpu"
    )
    devices: int | str = option(1, "devices per node; -1 takes all")
    num_nodes: PositiveInt = option(1, "machines; start the same command on each, with torchrun or SLURM")
    strategy: Literal["auto", "ddp", "fsdp"] = option("auto", "auto | ddp | fsdp")
    precision: Literal["32-true", "bf16-mixed"] = option(
        "32-true", "32-true | bf16-mixed (matrix products in bf16, weights in fp32); part of cache keys"
    )
    checkpoint_minutes: float = option(
        10, "between checkpoints inside a stage; a killed run continues from the last one", ge=0
    )
    eval_tokens: PositiveInt | None = option(
        None,
        "padded tokens per forward when nothing is trained; null: 2048 on a CPU, 65536 on a GPU",
        alias="tokens_per_eval_batch",
    )
    progress_bar: bool = option(True, "shown on a terminal only")
    deterministic: bool = option(False, "true asks torch for deterministic kernels (slower on a GPU)")

    def rules(self) -> list[str]:
        devices = self.devices
        if isinstance(devices, int) and (devices == 0 or devices < -1):
            return [f"devices: {devices} devices cannot train; use 1 or more, or -1 for all"]
        if isinstance(devices, str) and not re.fullmatch(r"auto|-1|\d+(,\d+)*", devices):
            return [f"devices: '{devices}' is neither a number of devices nor -1 for all"]
        return []


class LoggerConfig(Options):
    """Where the curves of training go."""

    kind: Literal["none", "csv", "tensorboard", "wandb"] = option("csv", "none | csv | tensorboard | wandb")
    project: str | None = option(None, "W&B project; null: WANDB_PROJECT, or w2sg")
    entity: str | None = option(None, "W&B team or user; null: WANDB_ENTITY, or your default")
    mode: Literal["online", "offline", "disabled"] | None = option(
        None, "W&B: online | offline (no network) | disabled; null: WANDB_MODE, or online"
    )
    group: str | None = option(
        None, "W&B group; null: WANDB_RUN_GROUP, or dataset and models: losses and seeds together"
    )
    tags: list[str] = option([], "W&B tags, besides method, dataset and loss")
    every: PositiveInt = option(10, "optimizer steps between points of a curve")

    def rules(self) -> list[str]:
        needs = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}.get(self.kind, ())
        if needs and not any(importlib.util.find_spec(name) for name in needs):
            extra = "'w2sg[tensorboard]'" if self.kind == "tensorboard" else "wandb"
            return [f"kind: the package {needs[0]} is not installed; pip install {extra}, or use logger=csv"]
        return []


class TrainConfig(Options):
    """A whole run, as composed from conf/train.yaml, or from conf/decode.yaml where a decoder is measured."""

    method: dict[str, Any] = option(..., "what is done: a function of the run and of options of its own")
    decoder: dict[str, Any] | None = option(None, "how replies are written, where `evaluate.py decoder=` measures it")
    refine: dict[str, Any] | None = option(None, "how weak answers are refined, with method=refine")
    loss: dict[str, Any] = option(..., "what the student minimises: a function of logits, weak logits and progress")
    weak: ModelConfig = option(..., "the model that labels, or is aligned")
    strong: ModelConfig = option(..., "the model that learns")
    dataset: DatasetConfig = option(..., "the rows, and how they are split")
    training: TrainingConfig = option(TrainingConfig(), "how models are trained on labels", alias="optim")
    trainer: TrainerConfig = option(..., "devices, precision and progress")
    logger: LoggerConfig = option(..., "where the curves of training go")
    seed: int = option(
        0, "decides ties, label noise, head initialisation, batches and sampling; splits have dataset.split_seed", ge=0
    )
    out: str = option("outputs", "runs and their shared stages are written below this folder")
    store: str = option(..., "stage outputs, shared between runs: the same stage is never computed twice")


class EvaluateConfig(Options):
    """What to look at, as composed from conf/evaluate.yaml."""

    runs: str | None = option(
        None, "a folder of finished runs: one table, one page, paired tests (summary.html, .csv, .json)"
    )
    store: Literal["list", "why", "prune"] | None = option(
        None, "list: what is in the store | why: what made a stage | prune: remove what no run uses"
    )
    export: str | None = option(
        None, "a finished run, or a stage of the store: write a trained language model for transformers"
    )
    harness: str | None = option(
        None, "the same, or a saved model: lm-evaluation-harness on it (pip install 'w2sg[harness]')"
    )
    annotations: str | None = option(
        None, "annotations.json of the alpaca_eval tool: its preferences as win rates (docs/decoding.md)"
    )
    of: str | None = option(
        None, "annotations: the run whose replies were judged; recognised by instruction and output"
    )
    known_answers: str | None = option(
        None, "all, or one by name: experiments whose answer theory knows (docs/known_answers.md)"
    )
    # the beginning of a hash may read as a number
    key: str | int | float | None = option(None, "store=why: a stage, or the beginning of its name or hash")
    apply: bool = option(False, "store=prune: true removes; false is a dry run")
    system: str | None = option(None, "export, harness: which model of the run: base, weak, cong-s, cong, ...")
    to: str | None = option(
        None, "export: the new folder; harness, annotations: where their file goes if not beside what is read"
    )
    tasks: list[str] = option([], "harness: its names of tasks or groups, as [arc_easy,gsm8k]")
    limit: PositiveInt | None = option(None, "harness: examples per task; null is all of them")
    fewshot: int | None = option(None, "harness: examples before each question; null is the task's own number", ge=0)
    batch_size: PositiveInt | Literal["auto"] = option(8, "harness: requests at a time; auto finds what fits on a GPU")
    chat: bool = option(False, "harness: ask through the model's chat template")
    include: str | None = option(
        None, "harness: a folder of task files (YAML) of your own; needs no network if its data is local"
    )
    baseline: bool = option(False, "harness: also evaluate the model before its training, and print the difference")
    out: str = option("outputs", "the folder that runs were written to")
    root: str = option(..., "the store itself, where it was given another place")

    def rules(self) -> list[str]:
        doing = ("runs", "store", "export", "harness", "annotations", "known_answers")
        tasks = [name for name in doing if getattr(self, name) is not None]
        if not tasks:
            return [
                "runs: say what to do: runs=FOLDER gathers finished runs; store=list, =why or =prune looks at a store; "
                "export=RUN writes one of its models; harness=RUN evaluates one on downstream tasks; "
                "annotations=FILE reads what alpaca_eval judged; known_answers=all checks against theory"
            ]
        if len(tasks) > 1:
            return [f"{tasks[0]}: one thing at a time; leave out all but one of {', '.join(f'{a}=' for a in tasks)}"]
        if self.store == "why" and self.key is None:
            return ["key: store=why explains one stage; name it with key=, or see them all with store=list"]
        if self.export is not None and self.to is None:
            return ["to: say which folder the model is to be written to"]
        if self.harness is not None and not self.tasks:
            return ["tasks: name the harness's tasks, as tasks=[arc_easy,gsm8k]"]
        if self.of is not None and self.annotations is None:
            return ["of: read only with annotations=FILE; leave it out"]
        return []
