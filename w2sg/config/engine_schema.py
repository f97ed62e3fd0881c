"""What runs a model that works by itself: writes, or says how likely texts are, without its logits leaving it."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from w2sg.config.option import Options, option


class EngineConfig(Options):
    """What runs models that work by themselves: plain samples, label log-probabilities; pairs are always our own."""

    name: Literal["transformers", "vllm"] = option(
        "transformers", "transformers: in this process | vllm (docs/install.md): plain samples of one model"
    )
    tensor_parallel_size: PositiveInt = option(
        1, "engine=vllm: GPUs that one model is cut over; the devices of a run hold so many engines fewer"
    )
    gpu_memory_utilization: float = option(
        0.85, "engine=vllm: part of a GPU's memory that it takes while it works", gt=0.0, le=1.0
    )
    max_model_len: PositiveInt | None = option(
        None,
        "engine=vllm: tokens of prompt and reply that it has room for; null: the model's max_length",
    )
    quantization: str | None = option(
        None,
        "engine=vllm: weights in few bits, as vLLM names it (fp8, bitsandbytes, ...); null: as they are. Part of cache "
        "keys where it is set",
    )

    def rules(self) -> list[str]:
        if self.name == "vllm":
            return []
        unread = [key for key in self.model_dump(exclude_defaults=True) if key != "name"]
        return [f"{key}: read with engine=vllm alone; add that, or leave it out" for key in unread]
