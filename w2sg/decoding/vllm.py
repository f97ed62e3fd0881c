"""One model in vLLM (an extra): the same findings as `w2sg.decoding.contrastive`, other draws.

vLLM cannot combine the logits of two models, so contrastive decoding stays with our own engine.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from w2sg.config.engine_schema import EngineConfig
from w2sg.decoding.contrastive import Decoded, ReplyRows, stream
from w2sg.errors import UserError

OURS = "use engine=transformers"


def why_not() -> str | None:
    """Why vLLM cannot be used here; None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "the package vllm is not installed; docs/install.md says how"
    return None


class VLLM:
    """One model in vLLM, which starts when it is first asked (`w2sg.decoding.text_engine.TextEngine`).

    Args:
        folder: gives the hub id or the folder of the model; called on all ranks by `ready`.
        revision: of the hub. dtype: of the weights. max_length: tokens of prompt and reply that it has room for.
        settings: how it is run; ``max_model_len`` overrules ``max_length``.
        ids: tokens that may be written; None for all.
        before: called before the model is loaded, to make room for it.
    """

    name = "vLLM"

    def __init__(
        self,
        folder: Callable[[], str],
        revision: str | None,
        dtype: str,
        max_length: int,
        settings: EngineConfig,
        ids: Sequence[int] | None = None,
        before: Callable[[], None] = lambda: None,
    ):
        self.revision, self.dtype, self.settings, self.ids = revision, dtype, settings, ids
        self.max_length = settings.max_model_len or max_length
        self._folder, self._before = folder, before
        self._model: str | None = None
        self._engine: Any = None

    def key(self) -> dict[str, Any]:
        few_bits = {} if self.settings.quantization is None else {"quantization": self.settings.quantization}
        return {"engine": "vllm", "max_length": self.max_length, **few_bits}

    def ready(self) -> None:
        if self._model is None:
            self._model = self._folder()

    def sample(self, rows: ReplyRows, stop: Sequence[int]) -> Decoded:
        from vllm import SamplingParams

        settings = []
        for p, k, row in zip(rows.prompt_of, rows.sample, rows.settings, strict=True):
            draw = stream(rows.seed, rows.prompt_ids[p], int(k), 1)[0]  # each reply has a seed of its own here, too
            settings.append(
                SamplingParams(
                    temperature=float(row[2]),
                    top_k=int(row[3]),
                    top_p=float(row[4]),
                    max_tokens=rows.max_new_tokens,
                    stop_token_ids=list(stop),
                    ignore_eos=True,  # what ends a reply is said above
                    allowed_token_ids=None if self.ids is None else list(self.ids),
                    logprobs=0,  # of the token that was drawn
                    seed=int(draw * 2**31),
                    detokenize=False,
                )
            )
        prompts = [{"prompt_token_ids": rows.prompts[p].tolist()} for p in rows.prompt_of]
        tokens, logs, stopped = [], [], []
        for output in self._started(rows.seed).generate(prompts, settings):  # in the order of the prompts
            best: Any = output.outputs[0]
            ids = list(best.token_ids)
            tokens.append(np.array(ids, np.int64))
            values = [at[token].logprob for at, token in zip(best.logprobs, ids, strict=True)]
            logs.append(np.array(values, np.float32)[:, None])
            stopped.append(best.finish_reason == "stop")
        if len(tokens) != len(rows):
            raise UserError(f"vLLM gave {len(tokens)} replies to {len(rows)} prompts; {OURS}")
        return Decoded(tokens, np.array(stopped), logs, sum(map(len, tokens)))

    def sleep(self) -> None:
        self.close()

    def close(self) -> None:
        if self._engine is not None:
            self._engine = None
            gc.collect()

    def _started(self, seed: int = 0) -> Any:
        if self._engine is None:
            try:
                from vllm import LLM
            except ImportError as error:
                remedy = f"docs/install.md says how it is installed, or {OURS}"
                raise UserError(f"vLLM is not wholly installed ({error}); {remedy}") from error
            self.ready()
            self._before()
            self._engine = LLM(
                model=self._model,
                revision=self.revision,
                dtype=self.dtype,
                max_model_len=self.max_length,
                skip_tokenizer_init=True,  # ids go in and come out; text is ours to make
                logprobs_mode="raw_logprobs",
                seed=seed % 2**31,
                tensor_parallel_size=self.settings.tensor_parallel_size,
                gpu_memory_utilization=self.settings.gpu_memory_utilization,
                quantization=self.settings.quantization,
            )
        return self._engine
