"""Whether matrix products in bfloat16 are faster than in fp32 on this machine's processor: measured once, remembered.

Processors with AVX512-BF16 or AMX have instructions for them (2.3 times as fast was seen); others compute them by
conversions, up to a hundred times slower. The name of the processor does not tell: a virtual machine may hide them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROWS, WIDTH = 256, 768  # of the products that are timed: a batch of tokens through a layer as wide as GPT-2's
REPEATS = 5


@cache
def bf16_speedup() -> float:
    """How many times as fast bf16 products are as fp32 ones on this CPU, with torch's present number of threads.

    Measured in some hundredths of a second when first asked for, and then kept in a file for this processor, torch
    version and number of threads. Below 1 fp32 is the faster one.
    """
    file, name = _remembered(), f"{_processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(known.get(name), float):
        known[name] = measured()
        with contextlib.suppress(OSError):  # a home that cannot be written: measured again by the next process
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{file.name}.{os.getpid()}")
            part.write_text(json.dumps(known, indent=1), encoding="utf-8")
            part.replace(file)
    return known[name]


@torch.no_grad()
def measured() -> float:
    """Seconds of an fp32 product by those of a bf16 one: the fastest of a few each, taken by turns."""
    draws = torch.Generator().manual_seed(0)
    pair = [torch.randn(size, WIDTH, generator=draws) for size in (ROWS, 4 * WIDTH)]
    operands: dict[torch.dtype, list[Tensor]] = {
        kind: [x.to(kind) for x in pair] for kind in (torch.float32, torch.bfloat16)
    }
    least = dict.fromkeys(operands, float("inf"))
    for turn in range(1 + REPEATS):
        for kind, (a, b) in operands.items():
            begun = time.perf_counter()
            torch.nn.functional.linear(a, b)
            taken = time.perf_counter() - begun
            least[kind] = min(least[kind], taken) if turn else least[kind]  # the first makes kernels ready
        if turn and least[torch.bfloat16] > 10 * least[torch.float32]:
            break  # no doubt is left, and each turn is slow
    return round(least[torch.float32] / least[torch.bfloat16], 3)


def slower() -> str | None:
    """A line on bf16-mixed where fp32 is faster on this CPU; None where it is not."""
    speed = bf16_speedup()
    if speed >= 1:
        return None
    return (
        f"trainer.precision=bf16-mixed: products in bf16 take {1 / speed:.1f} times as long as in fp32 on this CPU; "
        "trainer.precision=32-true is faster"
    )


def _remembered() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "w2sg" / "bf16_speedup.json"


def _processor() -> str:
    """The processor's name and its instructions for bf16, as far as the system tells them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}
        has = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in facts.get("flags", "").split()]
        if "model name" in facts:
            return f"{facts['model name']} {' '.join(has)}".strip()
    return f"{platform.machine()} {platform.processor()}".strip()
