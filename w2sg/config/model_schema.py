"""The typed shape of a model in one role: strong.lr=5e-6, weak.tune=head, ..."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt

from w2sg.config.label_schema import LabelTokens
from w2sg.config.machine import attention_named, load_named
from w2sg.config.option import Options, option

OWN_CHAT = {"chat_template": None, "chat_template_kwargs": None, "thoughts": "strip"}  # of earlier versions


class LoraOptions(Options):
    """Low-rank adapters."""

    r: PositiveInt = option(16, "rank of the adapters")
    alpha: PositiveInt = option(32, "they are scaled by alpha / r")
    rslora: bool = option(False, "true scales them by alpha / sqrt(r) instead (rank-stabilised, arXiv 2312.03732)")
    dropout: float = option(0.0, "on what enters an adapter", ge=0.0, le=1.0)
    targets: str | list[str] = option("all-linear", "the layers that get one: all-linear, or names as [q_proj,v_proj]")

    def key(self) -> dict[str, Any]:
        """All that decides a fit, for cache keys; what came later stands there where it is set."""
        return self.model_dump(exclude=None if self.rslora else {"rslora"})


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
    head: Literal["linear", "mixture", "label_tokens"] = option(
        "linear",
        "linear | mixture (tune=head): a convex mixture of fixed linear experts | label_tokens (tune=full, lora): the "
        "language model answers with a label",
    )
    label_tokens: LabelTokens = option(LabelTokens(), "head=label_tokens")
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
    load: Literal["4bit", "8bit"] | None = option(
        None,
        "hold the pretrained weights in 4 bits (NF4) or 8, by bitsandbytes: below adapters (tune=lora: QLoRA), "
        "or where they are read alone",
    )
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None = option(
        None,
        "where it is only read or writes: over the GPUs of one process, host memory and disk, by accelerate: auto | "
        "balanced | sequential | places of blocks, as {model.layers.1: cpu, model.layers.2: disk}; null is one device",
    )
    max_memory: dict[int | str, str] | None = option(
        None, "of device_map: what each place may hold of the weights, as {0: 60GiB, cpu: 200GiB}; null is what is free"
    )
    tp_plan: Literal["auto"] | None = option(
        None,
        "where it is only read or writes: auto cuts its layers over all processes, by transformers' plan for it; they "
        "read the same rows together. null: each has all of the model",
    )
    max_length: PositiveInt = option(512, "tokens of a text; longer ones lose their start")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "float32 | bfloat16: of the weights; the head and the losses are always fp32"
    )
    attention: str = option(
        "auto",
        "auto: FlexAttention on a GPU for rows that texts share, else sdpa | sdpa | flex_attention | "
        "flash_attention_2 | flash_attention_3 | a kernel of the hub, as kernels-community/flash-attn3 | eager",
    )
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
    micro_tokens: PositiveInt | None = option(
        None,
        "padded tokens per forward and device, beside micro_batch_size; null: on a GPU as many as its memory holds of "
        "the longest batch, on a CPU the whole batch. Halved where memory runs out; it does not change the result",
    )
    save: Literal["full", "bf16", "none"] = option(
        "full",
        "weights that training leaves in the store: full | bf16 (rounded, tune=full; part of cache keys) | none (gone "
        "when the run has reported; predictions and curves stay)",
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
        if self.load is not None and self.arch == "bow":
            problems.append("load: a bag of words has no pretrained weights; set it to null")
        if self.quantise is not None and (self.arch == "bow" or self.random_init):
            problems.append("round_weights: there are no pretrained weights to round; set it to null")
        if self.head == "mixture" and self.train != "head":
            problems.append("head: the mixture head stands on frozen features; use tune=head with it")
        if self.head == "label_tokens" and (self.arch == "bow" or self.train == "head"):
            problems.append("head: label tokens are written by a language model; use tune=lora or full with them")
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
        if self.device_map is not None and self.arch == "bow":
            problems.append("device_map: a bag of words fits anywhere; set it to null")
        if self.tp_plan is not None and (self.arch == "bow" or self.device_map or self.load):
            other = "a bag of words" if self.arch == "bow" else "device_map" if self.device_map else f"load={self.load}"
            problems.append(f"tp_plan: {other} does not go with it; set one of the two to null")
        if self.max_memory is not None and not isinstance(self.device_map, str):
            problems.append("max_memory: read only where device_map is a rule; set device_map=auto, or max_memory=null")
        places = {} if isinstance(self.device_map, str) else self.device_map or {}
        if wrong := [place for place in places.values() if isinstance(place, str) and place not in ("cpu", "disk")]:
            problems.append(f"device_map: {wrong[0]!r} is no place; name the number of a GPU, cpu or disk")
        if self.load is not None and self.quantise is not None:
            problems.append("round_weights: load holds weights in few bits already; set one of the two to null")
        if self.load is not None and self.arch == "hf":
            problems += load_named(self.load, self.train)
        if self.arch == "hf":
            problems += attention_named(self.attention, self.dropout)
        return problems


def elsewhere(spec: ModelConfig, same: bool) -> dict[str, Any]:
    """Where a model stands that takes a role's other settings: by its rule, for names of blocks are the role's own.

    Args:
        same: it is the role's model.
    """
    if same:
        return {}
    rule = spec.device_map if isinstance(spec.device_map, str) else None
    return {"device_map": rule, "max_memory": spec.max_memory if rule else None, "tp_plan": None}
