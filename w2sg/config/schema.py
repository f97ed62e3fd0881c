"""The typed shape of a run's configuration: models, training, devices, loggers, and the whole.

Defaults and help stand at the fields; files of ``conf/`` say what differs. `w2sg.config.check` reports what is wrong.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from w2sg.config.data_schema import DatasetConfig
from w2sg.config.engine_schema import EngineConfig
from w2sg.config.gpus import GPUS
from w2sg.config.model_schema import ModelConfig
from w2sg.config.option import Options, option
from w2sg.config.server_schema import ServerConfig


class Optimization(Options):
    """What every kind of training has; the defaults are those of language-model stages."""

    epochs: PositiveInt = option(2, "passes over the examples")
    batch_size: PositiveInt = option(
        64, "examples per optimizer step, over all devices and micro-batches", alias="global_batch_size"
    )
    optimizer: Literal["adamw", "adam", "adafactor", "adamw8bit", "paged_adamw8bit"] = option(
        "adamw",
        "adamw | adam | adafactor | adamw8bit: adamw with states of 8 bits, by bitsandbytes | paged_adamw8bit: so, "
        "and they move to the host when a GPU is full; in adam, weight_decay is an L2 penalty, adamw decouples it",
    )
    stochastic_rounding: bool = option(
        False, "weights of bfloat16 are rounded by chance, so that small steps count; read by adamw and its 8-bit kin"
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

    def rules(self) -> list[str]:
        if self.stochastic_rounding and not self.optimizer.endswith(("adamw", "adamw8bit")):
            return [f"stochastic_rounding: not read by optimizer={self.optimizer}; use adamw or adamw8bit"]
        return []

    def key(self) -> dict[str, Any]:
        """All that decides a fit, for cache keys; what came later stands there where it is set."""
        return self.model_dump(exclude=None if self.stochastic_rounding else {"stochastic_rounding"})


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
        problems = super().rules()
        if self.patience is not None and self.validation == 0.0:
            problems.append("patience: stopping early needs held-out rows; set validation_fraction above 0")
        return problems


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


class TrainerConfig(Options):
    """Devices, precision and progress."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = option(
        "auto", "auto: a GPU where there is one, else the CPU | cpu | gpu (the same as cuda) | mps | tpu"
    )
    devices: int | str = option(1, "devices per node; -1 takes all")
    num_nodes: PositiveInt = option(1, "machines; start the same command on each, with torchrun or SLURM")
    strategy: Literal["auto", "ddp", "fsdp"] = option("auto", "auto | ddp | fsdp")
    shard_over: Literal["all", "node"] = option(
        "all",
        "what strategy=fsdp cuts a model over: all devices | node: those of a machine, each machine with a copy, so "
        "that weights never travel between machines; more memory, less waiting",
    )
    offload: bool = option(
        False,
        "true: strategy=fsdp leaves weights, gradients and optimizer states in host memory, and sends a GPU one block "
        "at a time; far slower",
    )
    precision: Literal["auto", "32-true", "bf16-mixed"] = option(
        "auto",
        "auto: bf16-mixed on a CUDA GPU, else 32-true | 32-true | bf16-mixed (matrix products in bf16, weights fp32); "
        "what was used is part of cache keys",
    )
    matmul: Literal["auto", "highest", "high"] = option(
        "auto",
        "matrix products that stay fp32: highest in fp32 | high in TF32, faster with 10 binary digits in place of 23 | "
        "auto: high on a GPU that has it, else highest; part of cache keys where it is high",
    )
    checkpoint_minutes: float = option(
        10, "between checkpoints inside a stage; a killed run continues from the last one", ge=0
    )
    timeout_minutes: float = option(
        30,
        "of one exchange between devices, after which a run ends as one of them hangs; waiting for another run, or for "
        "what one process does alone, has no limit",
        gt=0,
    )
    eval_tokens: PositiveInt | None = option(
        None,
        "padded tokens per forward when nothing is trained; null: 2048 on a CPU, on a GPU what its memory holds, at "
        "most 65536. Halved where memory runs out",
        alias="tokens_per_eval_batch",
    )
    progress: Literal["auto", "plain", "none"] = option(
        "auto",
        "auto: one live line on a terminal, else lines | plain: lines | none: stages stand in the log file alone",
    )
    deterministic: bool = option(False, "true asks torch for deterministic kernels (slower on a GPU)")

    def rules(self) -> list[str]:
        devices = self.devices
        if isinstance(devices, int) and (devices == 0 or devices < -1):
            return [f"devices: {devices} devices cannot train; use 1 or more, or -1 for all"]
        if isinstance(devices, str) and not re.fullmatch(r"auto|-1|\d+(,\d+)*", devices):
            return [f"devices: '{devices}' is neither a number of devices nor -1 for all"]
        if self.strategy != "fsdp":
            changed = {"shard_over": self.shard_over != "all", "offload": self.offload}
            return [
                f"{key}: read with trainer=fsdp alone; add that, or leave it out" for key in changed if changed[key]
            ]
        return []


class LoggerConfig(Options):
    """Where the curves of training go."""

    kind: Literal["none", "csv", "tensorboard", "wandb"] = option("csv", "none | csv | tensorboard | wandb")
    project: str | None = option(None, "W&B project; null: WANDB_PROJECT, or w2sg")
    entity: str | None = option(None, "W&B team or user; null: WANDB_ENTITY, or your default")
    mode: Literal["online", "offline", "disabled"] | None = option(
        None, "W&B: online | offline (no network) | disabled; null: WANDB_MODE, or online"
    )
    group: str | None = option(None, "W&B group; null: WANDB_RUN_GROUP, or the setting without its seed")
    tags: list[str] = option([], "W&B tags, besides method, dataset and loss")
    every: PositiveInt = option(10, "optimizer steps between points of a curve")
    eval_every: NonNegativeInt | None = option(
        None,
        "optimizer steps between measurements during a fit: accuracy and NLL on test and held-out rows; shown, never "
        "used to choose; null: 20 in each fit of a bag of words or a head, none where the whole model would have to "
        "read the rows again; 0: none",
    )

    def rules(self) -> list[str]:
        needs = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}.get(self.kind, ())
        if needs and not any(importlib.util.find_spec(name) for name in needs):
            return [f"kind: the package {needs[0]} is not installed; pip install {needs[0]}, or use logger=csv"]
        return []


class PlanConfig(Options):
    """What a run would do, said before it does anything; ``plan=true`` for short."""

    only: bool = option(
        False,
        "true, or plan=true: say which stages are cached, and rows, tokens, FLOPs, memory, hours and disk of the "
        "others; nothing is trained, downloaded or written",
    )
    gpu: Literal[*GPUS] | None = option(
        None, f"the GPU that it is for: {' | '.join(GPUS)}; null: what this machine has"
    )
    utilisation: float = option(
        0.4, "part of the GPU's peak rate that products reach, by which hours are told", gt=0.0, le=1.0
    )
    file: str | None = option(None, "a JSON file that the plan is written to as well")

    def rules(self) -> list[str]:
        unread = [key for key in self.model_dump(exclude_defaults=True) if not self.only]
        return [f"{key}: read by a plan alone; add plan=true" for key in unread]


class ReportConfig(Options):
    """What a run writes beside its numbers."""

    texts: bool = option(
        True,
        "false leaves prompts, texts and replies out of the page, of files beside it and of W&B, for private data; "
        "the store keeps what stages need",
    )


class TrainConfig(Options):
    """A whole run, as composed from conf/train.yaml, or from conf/decode.yaml where a decoder is measured."""

    method: dict[str, Any] = option(..., "what is done: a function of the run and of options of its own")
    decoder: dict[str, Any] | None = option(None, "how replies are written, where a decoder is measured")
    refine: dict[str, Any] | None = option(None, "how weak answers are refined, with method=refine")
    loss: dict[str, Any] = option(..., "what the student minimises: a function of logits, weak logits and progress")
    weak: ModelConfig = option(..., "the model that labels, or is aligned")
    strong: ModelConfig = option(..., "the model that learns")
    dataset: DatasetConfig = option(..., "the rows, and how they are split")
    training: TrainingConfig = option(TrainingConfig(), "how models are trained on labels", alias="optim")
    trainer: TrainerConfig = option(..., "devices, precision and progress")
    engine: EngineConfig = option(EngineConfig(), "what runs a model that works by itself")
    server: ServerConfig = option(ServerConfig(), "a completions server in place of models as they were found")
    logger: LoggerConfig = option(..., "where the curves of training go")
    report: ReportConfig = option(ReportConfig(), "what is written beside the numbers")
    plan: PlanConfig = option(PlanConfig(), "what a run would do, said in its place")
    seed: int = option(
        0, "decides ties, label noise, head initialisation, batches and sampling; splits have dataset.split_seed", ge=0
    )
    out: str = option("outputs", "runs and their shared stages are written below this folder")
    store: str = option(..., "stage outputs, shared between runs: the same stage is never computed twice")
