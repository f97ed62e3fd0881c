"""What was probably meant by a key or a choice that there is none of: the nearest one that there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from w2sg.config.programs import command

# What transformers, TRL, PEFT, Lightning and common scripts call what has another name here: whole keys or their last
# parts, or what is to be typed.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "rate": ("lr",),
    "batch_size": ("global_batch_size",),
    "micro_batch": ("micro_batch_size",),
    "train": ("tune",),
    "dataset.sizes.train": ("dataset.sizes.weak_train", "dataset.sizes.transfer"),
    "untuned": ("before_alignment",),
    "clip": ("max_grad_norm",),
    "warmup": ("warmup_fraction",),
    "validation": ("validation_fraction",),
    "layer": ("feature_layer",),
    "layers": ("keep_layers",),
    "candidates": ("feature_layer_candidates",),
    "quantise": ("round_weights",),
    "eval_tokens": ("trainer.tokens_per_eval_batch",),
    "supervised": ("sft_weight",),
    "ground_truth": ("dataset.sizes.weak_train",),
    "bs": ("global_batch_size",),
    "batch": ("global_batch_size",),
    "train_batch_size": ("global_batch_size",),
    "per_device_train_batch_size": ("global_batch_size", "micro_batch_size"),
    "per_gpu_train_batch_size": ("global_batch_size", "micro_batch_size"),
    "per_device_eval_batch_size": ("trainer.tokens_per_eval_batch",),
    "eval_batch_size": ("trainer.tokens_per_eval_batch",),
    "gradient_accumulation_steps": ("micro_batch_size",),
    "accumulate_grad_batches": ("micro_batch_size",),
    "grad_accum": ("micro_batch_size",),
    "num_train_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "n_epochs": ("epochs",),
    "max_epochs": ("epochs",),
    "epoch": ("epochs",),
    "max_steps": ("epochs",),
    "num_steps": ("epochs",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "max_len": ("max_length",),
    "max_ctx": ("max_length",),
    "model_max_length": ("max_length",),
    "max_prompt_length": ("max_length",),
    "block_size": ("max_length",),
    "seq_len": ("max_length",),
    "max_tokens": ("max_new_tokens",),
    "fp16": ("trainer.precision=bf16-mixed",),
    "bf16": ("trainer.precision=bf16-mixed",),
    "amp": ("trainer.precision=bf16-mixed",),
    "mixed_precision": ("trainer.precision=bf16-mixed",),
    "load_in_4bit": ("strong.load=4bit",),
    "load_in_8bit": ("strong.load=8bit",),
    "qlora": ("strong.load=4bit",),
    "torch_dtype": ("dtype",),
    "gpus": ("trainer.devices",),
    "gpu": ("trainer.devices",),
    "num_gpus": ("trainer.devices",),
    "n_gpu": ("trainer.devices",),
    "num_devices": ("trainer.devices",),
    "num_processes": ("trainer.devices",),
    "nproc_per_node": ("trainer.devices",),
    "world_size": ("trainer.devices",),
    "device": ("trainer.accelerator",),
    "nnodes": ("trainer.num_nodes",),
    "nodes": ("trainer.num_nodes",),
    "fsdp": ("trainer=fsdp",),
    "ddp": ("trainer=ddp",),
    "deepspeed": ("trainer=fsdp",),
    "model": ("weak=", "strong="),
    "models": ("weak=", "strong="),
    "model_name": ("weak=", "strong="),
    "model_name_or_path": ("weak=", "strong="),
    "pretrained": ("weak=", "strong="),
    "weak_model": ("weak=",),
    "weak_model_size": ("weak=",),
    "weak_model_name": ("weak=",),
    "teacher": ("weak=",),
    "strong_model": ("strong=",),
    "strong_model_size": ("strong=",),
    "strong_model_name": ("strong=",),
    "student": ("strong=",),
    "ref_model": ("before_alignment",),
    "reward_model": ("method.judge.model",),
    "model_revision": ("revision",),
    "attn_implementation": ("attention",),
    "optim": ("optimizer",),
    "opt": ("optimizer",),
    "lr_scheduler_type": ("schedule",),
    "lr_scheduler": ("schedule",),
    "scheduler": ("schedule",),
    "lr_schedule": ("schedule",),
    "warmup_ratio": ("warmup_fraction",),
    "warmup_steps": ("warmup_fraction",),
    "gradient_clip_val": ("max_grad_norm",),
    "grad_clip": ("max_grad_norm",),
    "wd": ("weight_decay",),
    "early_stopping": ("patience",),
    "early_stopping_patience": ("patience",),
    "val_frac": ("validation_fraction",),
    "val_split": ("validation_fraction",),
    "label_smoothing_factor": ("label_smoothing",),
    "output_dir": ("out",),
    "outdir": ("out",),
    "save_dir": ("out",),
    "results_folder": ("out",),
    "results_dir": ("out",),
    "default_root_dir": ("out",),
    "cache_dir": ("store",),
    "run_name": ("out",),
    "report_to": ("logger=",),
    "wandb": ("logger=wandb",),
    "use_wandb": ("logger=wandb",),
    "tensorboard": ("logger=tensorboard",),
    "project_name": ("logger.project",),
    "wandb_project": ("logger.project",),
    "wandb_entity": ("logger.entity",),
    "logging_steps": ("logger.every",),
    "log_every_n_steps": ("logger.every",),
    "save_steps": ("trainer.checkpoint_minutes",),
    "ds_name": ("dataset=",),
    "data": ("dataset=", "dataset.path"),
    "dataset_name": ("dataset=", "dataset.path"),
    "dataset_path": ("dataset.path",),
    "data_path": ("dataset.path",),
    "data_dir": ("dataset.path",),
    "train_file": ("dataset.path",),
    "n_docs": ("dataset.sizes.weak_train", "dataset.sizes.transfer"),
    "n_test_docs": ("dataset.sizes.test",),
    "max_train_samples": ("dataset.sizes.weak_train", "dataset.sizes.transfer"),
    "max_samples": ("dataset.sizes.weak_train", "dataset.sizes.transfer", "dataset.sizes.test"),
    "num_samples": ("dataset.sizes.weak_train", "dataset.sizes.transfer", "dataset.sizes.test"),
    "max_eval_samples": ("dataset.sizes.test",),
    "train_size": ("dataset.sizes.weak_train", "dataset.sizes.transfer"),
    "test_size": ("dataset.sizes.test",),
    "noise_rate": ("dataset.noise.rate",),
    "data_seed": ("dataset.split_seed",),
    "random_seed": ("seed",),
    "loss_type": ("loss=",),
    "objective": ("loss=",),
    "criterion": ("loss=",),
    "algorithm": ("method=",),
    "algo": ("method=",),
    "task": ("method=", "dataset="),
    "dpo_beta": ("beta",),
    "kl_coef": ("beta",),
    "top_n": ("top_k",),
    "temp": ("temperature",),
    "rank": ("lora.r",),
    "lora_r": ("lora.r",),
    "lora_rank": ("lora.r",),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    "target_modules": ("lora.targets",),
    "lora_target_modules": ("lora.targets",),
    "use_peft": ("tune=lora",),
    "peft": ("tune=lora",),
    "use_lora": ("tune=lora",),
    "lora": ("tune=lora",),
    "linear_probe": ("tune=head",),
    "quantize": ("round_weights",),
    "bits": ("round_weights",),
    "resume": ("out",),
    "resume_from_checkpoint": ("out",),
    "config": ("experiment=",),
    "n": ("samples", "trials"),
}
MOST = 8  # names in one line


def leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all that is set, and of the sections on the way."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        yield f"{prefix}{key}"
        yield from leaves(value, f"{prefix}{key}.")


def exists(key: str, tree: Any) -> bool:
    """Whether a dotted key stands in a configuration."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def above(key: str, tree: Any) -> tuple[str, Any]:
    """The longest beginning of a key that is a section, and what stands there."""
    parts: list[str] = []
    for part in key.split(".")[:-1]:
        if not isinstance(tree, Mapping) or not isinstance(tree.get(part), Mapping):
            break
        parts.append(part)
        tree = tree[part]
    return ".".join(parts), tree


def similar(word: str, names: Iterable[str], count: int = 3, cutoff: float = 0.65) -> list[str]:
    """The names that are spelled like a word, best first; those that differ in signs and case alone before all."""

    def bare(text: str) -> str:
        return re.sub(r"[\W_]+", "", text.casefold())

    bare_of = {name: bare(name) for name in names}
    same = [name for name, text in bare_of.items() if text == bare(word)]
    if same:
        return same
    scores = {n: difflib.SequenceMatcher(None, bare(word), text, autojunk=False).ratio() for n, text in bare_of.items()}
    near = sorted((n for n in bare_of if scores[n] >= cutoff), key=lambda n: (-scores[n], n))
    return [n for n in near if scores[n] >= scores[near[0]] - 0.15][:count]


def nearest(key: str, tree: Mapping[str, Any]) -> list[str]:
    """The keys of a configuration that one which is not in it may be meant for, the likeliest first.

    >>> nearest("weak.learning_rate", {"weak": {"lr": None}, "seed": 0})
    ['weak.lr']
    >>> nearest("dataset.nois.rate", {"dataset": {"noise": {"rate": 0.0}}})
    ['dataset.noise.rate']
    """
    keys = list(leaves(tree))
    last = key.rpartition(".")[2]
    section, node = above(key, tree)
    inside = [k for k in keys if k.startswith(section + ".")] if section else []
    if whole := [k for k in keys if k.endswith(f".{key}")]:
        return _ordered(whole)
    alias = [
        k for name in ELSEWHERE.get(key, ELSEWHERE.get(last.casefold(), ())) for k in _stands_for(name, inside, keys)
    ]
    if here := [k for k in alias if k in inside]:
        return here
    if same := [k for k in inside if k.endswith(f".{last}")]:
        return _ordered(same)
    if alias:
        return alias
    if near := _spelled(key.split("."), tree):
        return [near]
    if same := [k for k in keys if k == last or k.endswith(f".{last}")]:
        return _ordered(same)
    if isinstance(node, Mapping) and (alike := similar(last, (k.rpartition(".")[2] for k in inside))):
        return _ordered(k for k in inside if k.rpartition(".")[2] in alike)
    alike = similar(last, {k.rpartition(".")[2] for k in keys}, cutoff=0.75)
    return _ordered(k for k in keys if k.rpartition(".")[2] in alike)


def _stands_for(name: str, inside: Sequence[str], keys: Sequence[str]) -> list[str]:
    """What a word of `ELSEWHERE` stands for in this configuration; a group's choice, as ``logger=``, is itself."""
    stem, equals, _ = name.partition("=")
    if not equals or stem == "tune":
        for place in (inside, keys):  # the section's keys come before those of all others
            if same := [k for k in place if k == stem or k.endswith(f".{stem}")]:
                return [k + name[len(stem) :] for k in _ordered(same)]
        return []
    return [name] if stem in keys or "." not in stem else []


def _spelled(parts: Sequence[str], tree: Any) -> str | None:
    """The key whose every part is that of another one, or spelled like it."""
    key = []
    for part in parts:
        if not isinstance(tree, Mapping):
            return None
        alike = [part] if part in tree else similar(part, tree, 1)
        if not alike:
            return None
        key.append(alike[0])
        tree = tree[alike[0]]
    return ".".join(key)


def _ordered(keys: Iterable[str]) -> list[str]:
    """A method's own first: its stages read nothing else."""
    order = ("method", "refine", "decoder", "strong", "weak", "optim")
    first = {name: place for place, name in enumerate(order)}
    return sorted(dict.fromkeys(keys), key=lambda key: first.get(key.partition(".")[0], len(first)))


def listed(names: Sequence[str], most: int = MOST) -> str:
    """Names in a sentence; of many, the first.

    >>> listed(["a", "b", "c"])
    'a, b or c'
    """
    names = list(names)
    if len(names) > most:
        return ", ".join(names[:most]) + ", ..."
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def unknown_key(key: str, tree: Mapping[str, Any], value: Any = None) -> str:
    """What to do about a key that is not there, to follow ``key: no such key``.

    Args:
        value: what was typed for it, which a group that is meant may be given.
    """
    section, node = above(key, tree)
    typed = str(value) if isinstance(value, str) else ""
    near = [name + typed if name.endswith("=") else name for name in nearest(key, tree)]
    names = [str(k) for k in node if not str(k).startswith("_")] if section and isinstance(node, Mapping) else []
    words = f"; did you mean {listed(near)}?" if near else ""
    if (names and not near) or (names and len(names) <= MOST and not any(k.startswith(f"{section}.") for k in near)):
        words += f" ({section} has {', '.join(names)})" if near else f"; {section} has {', '.join(names)}"
    return words or f"; `{command('train', '--cfg job')}` shows all keys"
