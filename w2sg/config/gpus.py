"""GPUs by name: memory, bandwidth, and the peak rates of matrix products without sparsity.

Sources are NVIDIA's data sheets (H100 and H200 2023, A100 2022, L40S, L4, A10, RTX A6000, HGX B200) and architecture
papers (Ada and Ampere GA102 for the RTX cards, whose bf16 rates are with fp32 accumulation).
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        memory: GiB that programs can have. bandwidth: of the memory, TB/s.
        fp32, tf32, bf16: TFLOP/s of matrix products whose operands are of that kind.
    """

    memory: float
    bandwidth: float
    fp32: float
    tf32: float
    bf16: float


GPUS = {
    "a10": Gpu(22.0, 0.6, 31.2, 62.5, 125.0),
    "a100-40": Gpu(39.4, 1.555, 19.5, 156.0, 312.0),
    "a100-80": Gpu(79.2, 2.039, 19.5, 156.0, 312.0),
    "a6000": Gpu(47.5, 0.768, 38.7, 77.4, 154.8),
    "b200": Gpu(178.0, 7.7, 75.0, 1125.0, 2250.0),
    "h100-80": Gpu(79.1, 3.35, 67.0, 494.7, 989.4),
    "h100-pcie": Gpu(79.1, 2.0, 51.0, 378.0, 756.0),
    "h200": Gpu(139.8, 4.8, 67.0, 494.7, 989.4),
    "l4": Gpu(22.0, 0.3, 30.3, 60.0, 121.0),
    "l40s": Gpu(44.4, 0.864, 91.6, 183.0, 362.0),
    "rtx3090": Gpu(23.6, 0.936, 35.6, 35.6, 71.0),
    "rtx4090": Gpu(23.5, 1.008, 82.6, 82.6, 165.2),
    "rtx5090": Gpu(31.4, 1.792, 104.8, 104.8, 209.5),
}
