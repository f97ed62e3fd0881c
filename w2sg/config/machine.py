"""What a machine must have for what is asked of it: devices, kernels of attention, optimizers."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

# name -> the package that has it; where transformers finds that of the hub's kernels, it takes the kernel from there
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
NAMES = ("auto", "sdpa", "flex_attention", *PACKAGES, "eager")
QUANTIZED = "install the extra quantized (pip install 'w2sg[quantized]')"
OF_BITSANDBYTES = ("adamw8bit", "paged_adamw8bit")
_KERNEL = r"[^/:\s]+/[^/:@\s]+(@[^/:\s]+)?(:[^/:\s]+)?"


def attention_named(attention: str, dropout: float) -> list[str]:
    """What is wrong with a name, or with the packages that are installed for it."""
    kernel = re.fullmatch(_KERNEL, attention)
    if attention not in NAMES and not kernel:
        return [
            f"attention: '{attention}' is none of {', '.join(NAMES)}, and no kernel of the hub, as "
            "kernels-community/flash-attn3; choose one of these"
        ]
    if attention == "flex_attention" and dropout:
        return ["attention: flex_attention has no dropout; use attention=sdpa with it, or dropout=0"]
    package = "kernels" if kernel else PACKAGES.get(attention)
    if package is not None and not any(map(find_spec, {package, "kernels"})):
        return [
            f"attention: {attention} is not installed; pip install 'w2sg[kernels]' has it for common GPUs, or use "
            "attention=auto"
        ]
    return []


def load_named(load: str, tune: str) -> list[str]:
    """What is wrong with weights in few bits, or with the package that holds them."""
    if tune == "full":
        return [f"load: weights in {load} are not trained; use tune=lora (QLoRA), also where they are read alone"]
    if find_spec("bitsandbytes") is None:
        return [f"load: {load} needs bitsandbytes; {QUANTIZED}, or set it to null"]
    return []


def place_problems(role: str, model: Any, trainer: Any, trained: bool) -> list[str]:
    """Why a model cannot stand on several devices in this run.

    Args:
        model, trainer: as in `attention_problems`. trained: the run trains its weights.
    """
    if model.tp_plan is not None:
        return _cut_problems(role, model, trainer, trained)
    if model.device_map is None:
        return []
    if trained:
        return [
            f"{role}.device_map: the run trains this model, and only one that is read or writes can be spread; set it "
            f"to null, and use trainer=fsdp where one GPU does not hold it"
        ]
    if trainer.devices not in (1, "1") or trainer.num_nodes != 1:
        return [
            f"{role}.device_map: it takes the GPUs for one process, and trainer.devices={trainer.devices} starts "
            "several; use trainer.devices=1"
        ]
    return []


def _cut_problems(role: str, model: Any, trainer: Any, trained: bool) -> list[str]:
    if trained and model.train == "lora":
        return [
            f"{role}.tp_plan: what is trained here is read with adapters, which cannot be added to a model that is "
            f"cut; use {role}.tune=full, or {role}.tp_plan=null"
        ]
    if trainer.devices in (1, "1") and trainer.num_nodes == 1:
        return [
            f"{role}.tp_plan: it cuts a model over several processes, and trainer.devices=1 starts one; use "
            f"trainer=ddp, or {role}.device_map=auto"
        ]
    return []


def load_problems(role: str, model: Any, trainer: Any) -> list[str]:
    """Why weights in few bits cannot work on a run's devices; model and trainer as in `attention_problems`."""
    if model.load is None or trainer.strategy != "fsdp":
        return []
    return [f"{role}.load: weights in {model.load} cannot be cut over devices; use trainer=ddp, or {role}.load=null"]


def attention_problems(role: str, model: Any, trainer: Any) -> list[str]:
    """What a run's devices and precision lack for the attention that a role asks for.

    Args:
        model, trainer: sections of a configuration, as `w2sg.config.schema` has them.
    """
    import torch

    name = model.attention
    if model.arch != "hf" or name in ("auto", "sdpa", "eager"):
        return []
    if trainer.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return [f"{role}.attention: {name} needs a CUDA GPU, which this run does not use; use {role}.attention=auto"]
    if name != "flex_attention" and trainer.precision == "32-true" and model.dtype == "float32":
        return [
            f"{role}.attention: {name} reads bfloat16 alone; use trainer.precision=bf16-mixed or {role}.dtype="
            f"bfloat16, or {role}.attention=auto"
        ]
    return []


def device_problems(trainer: Any) -> list[str]:
    """Devices that were asked for and are not there."""
    import torch

    accelerator, visible = trainer.accelerator, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in {"gpu", "cuda"} and not visible:
        return ["trainer.accelerator: no CUDA GPU is visible on this machine; use trainer=cpu or trainer=auto"]
    if accelerator == "mps" and not torch.backends.mps.is_available():
        return ["trainer.accelerator: this machine has no Apple GPU; use trainer=cpu or trainer=auto"]
    wanted = trainer.devices if isinstance(trainer.devices, int) else 0
    if accelerator in {"auto", "gpu", "cuda"} and 0 < visible < wanted:
        return [f"trainer.devices: {wanted} GPUs were asked for, {visible} are visible; lower it, or use -1 for all"]
    return []


def on_gpu(trainer: Any) -> bool:
    """Whether a run computes on a CUDA GPU."""
    import torch

    return trainer.accelerator in {"gpu", "cuda"} or (trainer.accelerator == "auto" and torch.cuda.is_available())


def optimizer_problems(key: str, optimizer: str, trainer: Any, cut: bool = True) -> list[str]:
    """Why an optimizer cannot work.

    Args:
        key: of the section that names it, as ``optim.full``.
        cut: whether FSDP cuts what it trains.
    """
    if cut and trainer.strategy == "fsdp":
        if optimizer == "adafactor":
            return [
                f"{key}.optimizer: torch's adafactor cannot train weights that are cut over devices; use adamw, or "
                "trainer=ddp"
            ]
        if optimizer in OF_BITSANDBYTES:
            return [
                f"{key}.optimizer: bitsandbytes cannot train weights that are cut over devices; use adamw, whose "
                "states are cut as well, or trainer=ddp"
            ]
    if optimizer in OF_BITSANDBYTES and find_spec("bitsandbytes") is None:
        return [f"{key}.optimizer: {optimizer} needs bitsandbytes; {QUANTIZED}, or use adamw"]
    if optimizer == "paged_adamw8bit" and not on_gpu(trainer):
        return [f"{key}.optimizer: {optimizer} pages between a GPU and its host; use adamw8bit, or adamw"]
    return []
