"""In which numbers a run computes: chosen by its device where the configuration leaves it open, for keys, and in words.

Two settings decide it. ``trainer.precision`` says whether matrix products are taken in bfloat16 while weights, sums and
optimizer states stay fp32 (mixed precision). ``trainer.matmul`` says how those products are taken that stay fp32, as
the output layer's do: ``high`` lets a GPU round their factors to TF32, with 10 binary digits behind the point instead
of 23, at up to seven times the speed (NVIDIA's peaks of an H100: 67 and 495 TFLOP/s; bf16: 989).
"""

from __future__ import annotations

import torch

from w2sg.config.schema import TrainerConfig
from w2sg.errors import ConfigError
from w2sg.training import cpu_speed

MIXED = "bf16-mixed"
TF32_SINCE = (8, 0)  # compute capability of Ampere, which brought bf16 and TF32


def settled(config: TrainerConfig, device: torch.device) -> TrainerConfig:
    """The configuration with a precision and a way of fp32 products in the place of ``auto``.

    On a CUDA GPU these are bf16-mixed and TF32 where it has them; on a CPU and anything else fp32.

    Raises:
        ConfigError: bf16-mixed was asked for, and the GPU has no bf16.
    """
    gpu = device.type == "cuda"
    bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    precision, matmul = config.precision, config.matmul
    if precision == MIXED and gpu and not bf16:
        name = torch.cuda.get_device_name(device)
        raise ConfigError([f"trainer.precision: {name} has no bf16; use trainer.precision=32-true"])
    if precision == "auto":
        precision = MIXED if bf16 else "32-true"
    if matmul == "auto":
        matmul = "high" if gpu and torch.cuda.get_device_capability(device) >= TF32_SINCE else "highest"
    return config.model_copy(update={"precision": precision, "matmul": matmul})


def notes(asked: TrainerConfig, config: TrainerConfig, device: torch.device) -> list[str]:
    """What is to be said once of the precision that a run was given, a line each.

    Args:
        asked: before it was settled. config: after.
    """
    if device.type == "cuda" and asked.precision == "auto" and config.precision != MIXED:
        return [f"trainer.precision: {torch.cuda.get_device_name(device)} has no bf16, so the run computes in fp32"]
    if device.type == "cpu" and config.precision == MIXED and (line := cpu_speed.slower()) is not None:
        return [line]
    return []


def key_of(config: TrainerConfig) -> str:
    """A settled precision as part of cache keys.

    >>> key_of(TrainerConfig(precision="32-true", matmul="highest"))
    '32-true'
    """
    return config.precision if config.matmul == "highest" else f"{config.precision}, matmul {config.matmul}"


def words_of(config: TrainerConfig) -> str:
    """A settled precision in words, with the settings that give it.

    >>> words_of(TrainerConfig(precision="32-true", matmul="highest"))
    'fp32 throughout (trainer.precision=32-true, trainer.matmul=highest)'
    """
    rest = "in fp32" if config.matmul == "highest" else "in TF32"
    if config.precision == MIXED:
        words = f"mixed precision: matrix products in bf16, those that stay fp32 {rest}, weights and sums in fp32"
    else:
        words = "fp32 throughout" if config.matmul == "highest" else f"fp32, but matrix products {rest}"
    return f"{words} (trainer.precision={config.precision}, trainer.matmul={config.matmul})"
