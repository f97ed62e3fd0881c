"""What the benchmarks share: options, models drawn at random, interleaved timing, and the peak memory of a process."""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig

from w2sg.config.model_schema import ModelConfig
from w2sg.models.policy import Policy
from w2sg.models.source import Source, find

CONF = Path(__file__).resolve().parent.parent / "conf" / "model"
Name, Result = TypeVar("Name", bound=Hashable), TypeVar("Result")


def options_of(doc: str, **sizes: int | None) -> argparse.ArgumentParser:
    """Options that most benchmarks have, and whole numbers of these names."""
    options = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, value in sizes.items():
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """What was typed, with as many threads as it says."""
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def small_llama(args: argparse.Namespace, seed: int) -> Policy:
    """A randomly initialised Llama of ``args.layers`` and ``args.width`` without an end of text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return Policy(model.to(args.device)).requires_grad_(False)


def model_source(name: str) -> Source:
    """A file of conf/model, a folder or a hub id, to be used whole."""
    known = CONF / f"{name}.yaml"
    spec = OmegaConf.to_container(OmegaConf.load(known)) if known.is_file() else {"name": name}
    spec.pop("defaults", None)
    return find(
        ModelConfig.model_validate(spec | {"tune": "full", "feature_layer": None, "feature_layer_candidates": None}),
        "model",
    )


class Ids:
    """In place of a chat: prompts are token ids already, texts are their numbers, and nothing ends a reply."""

    vocabulary, stop, end = "ids", (), 0

    @staticmethod
    def prompts(prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(prompts)

    @staticmethod
    def text(ids: np.ndarray) -> str:
        return " ".join(map(str, ids))

    @staticmethod
    def until_stop(text: str, start: int) -> tuple[str, bool]:
        return text, False


# ---------------------------------------------------------------------------------------------------------------------
# Seconds
# ---------------------------------------------------------------------------------------------------------------------


def now(device: str) -> float:
    """Seconds, once the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    loops: dict[Name, Callable[[], Result]], repeats: int, device: str, warm_up: bool = True
) -> tuple[dict[Name, list[float]], dict[Name, list[Result]]]:
    """Seconds and results of each loop, one after the other in each round, so that a busy machine slows all alike.

    Args:
        warm_up: whether a first round is not counted.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in loops}
    results: dict[Name, list[Result]] = {name: [] for name in loops}
    for repeat in range(repeats + warm_up):
        for name, loop in loops.items():
            begun = now(device)
            result = loop()
            took = now(device) - begun
            if repeat or not warm_up:
                seconds[name].append(took)
                results[name].append(result)
    return seconds, results


def medians(seconds: dict[Name, list[float]], by: int = 1) -> dict[Name, float]:
    """The middle of each, divided by what was done in that time."""
    return {name: statistics.median(times) / by for name, times in seconds.items()}


def matrix_product_rate(device: str, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a large fp32 matrix product."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    seconds, _ = interleaved({"product": lambda: a @ b}, repeats, device, warm_up=False)
    return 2 * size**3 / min(seconds["product"])


def machine(device: str) -> str:
    """What the numbers are of."""
    return (
        f"{device}, {torch.get_num_threads()} threads; this machine's fp32 matrix product: "
        f"{matrix_product_rate(device) / 1e9:.0f} GFLOP/s"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def peak_of(name: str, script: str) -> float:
    """Peak memory of a loop in a process of its own, in GB: the script is started again with ``--memory-of``."""
    command = [sys.executable, script, *sys.argv[1:], "--memory-of", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return int(result.stdout.splitlines()[-1]) / 1e9


def print_peak(device: str, act: Callable[[], object]) -> None:
    """Print the bytes that doing something takes at most: loading a model takes more than using it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    act()
    print(torch.cuda.max_memory_allocated() if device == "cuda" else _process_peak())


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux
    except OSError:
        print("the peak includes loading", file=sys.stderr)


def _process_peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
