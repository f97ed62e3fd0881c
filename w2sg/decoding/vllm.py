"""One model in vLLM (an extra): the same findings as `w2sg.decoding.contrastive`, other draws.

vLLM cannot combine the logits of two models, so contrastive decoding stays with our own engine.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from w2sg.config.engine_schema import EngineConfig
from w2sg.decoding.contrastive import Decoded, ReplyRows, stream
from w2sg.errors import UserError

OURS = "use engine=transformers"
VISIBLE = "CUDA_VISIBLE_DEVICES"


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
        gpu: gives that of this process, with ``tensor_parallel_size`` the first one; None on a CPU.
        ranks: of the run.
        remote_code: whether code beside the model may run.
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
        gpu: Callable[[], int | None] = lambda: None,
        ranks: int = 1,
        remote_code: bool = False,
    ):
        self.revision, self.dtype, self.settings, self.ids = revision, dtype, settings, ids
        self.max_length = settings.max_model_len or max_length
        self.share = settings.tensor_parallel_size if ranks > 1 else 1
        self._folder, self._before, self._gpu, self._remote_code = folder, before, gpu, remote_code
        self._model: str | None = None
        self._engine: Any = None
        if ranks % self.share:
            raise UserError(
                f"engine.tensor_parallel_size: {self.share} does not divide the {ranks} devices of the run; set it to "
                "a divisor, or change trainer.devices"
            )

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
                    stop_token_ids=[int(token) for token in stop],
                    ignore_eos=True,  # what ends a reply is said above
                    allowed_token_ids=None if self.ids is None else [int(token) for token in self.ids],
                    logprobs=0,  # of the token that was drawn
                    seed=int(draw * 2**31),
                    detokenize=False,
                )
            )
        tokens, logs, stopped = [], [], []
        for best in self._answers([rows.prompts[p] for p in rows.prompt_of], settings):
            written: Any = best.outputs[0]
            ids = list(written.token_ids)
            tokens.append(np.array(ids, np.int64))
            values = [at[token].logprob for at, token in zip(written.logprobs, ids, strict=True)]
            logs.append(np.array(values, np.float32)[:, None])
            stopped.append(written.finish_reason == "stop")
        return Decoded(tokens, np.array(stopped), logs, sum(map(len, tokens)))

    def label_log_probabilities(self, prompts: Sequence[np.ndarray], labels: Sequence[Sequence[int]]) -> np.ndarray:
        begin, last = list(labels[0][:-1]), [label[-1] for label in labels]
        if any(list(label[:-1]) != begin for label in labels):
            raise ValueError("labels differ in their last token alone")
        common = len(begin)
        found = self._read([[*prompt, *begin] for prompt in prompts], [common] * len(prompts), [last] * len(prompts))
        return np.array([known.sum() + after for known, after in found])

    def token_log_probabilities(self, prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]) -> list[np.ndarray]:
        texts = [[*prompt, *reply[:-1]] for prompt, reply in zip(prompts, replies, strict=True)]
        found = self._read(texts, [len(reply) - 1 for reply in replies], [[int(reply[-1])] for reply in replies])
        return [np.concatenate(row) for row in found]

    def _read(
        self, texts: Sequence[Sequence[int]], known: Sequence[int], after: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Log-probabilities of each text's last ``known`` tokens, and of the tokens ``after`` as what follows it."""
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                temperature=0.0,
                max_tokens=1,
                prompt_logprobs=0 if n else None,
                logprob_token_ids=[int(token) for token in ids],
                detokenize=False,
            )
            for n, ids in zip(known, after, strict=True)
        ]
        found = []
        for n, ids, text, output in zip(known, after, texts, self._answers(texts, settings), strict=True):
            read = output.prompt_logprobs[-n:] if n else []
            inside = [at[int(token)].logprob for at, token in zip(read, text[len(text) - n :], strict=True)]
            follows = output.outputs[0].logprobs[0]
            found.append((np.array(inside, np.float64), np.array([follows[int(token)].logprob for token in ids])))
        return found

    def _answers(self, prompts: Sequence[Sequence[int]], settings: list[Any]) -> list[Any]:
        """In the order of the prompts."""
        asked = [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts]
        outputs = list(self._started().generate(asked, settings, use_tqdm=False))
        if len(outputs) != len(asked):
            raise UserError(f"vLLM gave {len(outputs)} answers to {len(asked)} prompts; {OURS}")
        return outputs

    def sleep(self) -> None:
        self.close()  # what it wakes up with would stay in host memory

    def close(self) -> None:
        if self._engine is None:
            return
        core = getattr(getattr(self._engine, "llm_engine", None), "engine_core", None)
        if core is not None:
            core.shutdown()  # its own processes, with the memory that they hold
        self._engine = core = None
        gc.collect()

    def _started(self) -> Any:
        if self._engine is None:
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns that it has no tokenizer, which is meant
            try:
                from vllm import LLM
            except ImportError as error:
                remedy = f"docs/install.md says how it is installed, or {OURS}"
                raise UserError(f"vLLM is not wholly installed ({error}); {remedy}") from error
            self.ready()
            self._before()
            with _visible(self._gpu(), self.settings.tensor_parallel_size):
                self._engine = LLM(
                    model=self._model,
                    revision=self.revision,
                    dtype=self.dtype,
                    max_model_len=self.max_length,
                    trust_remote_code=self._remote_code,
                    skip_tokenizer_init=True,  # ids go in and come out; text is ours to make
                    logprobs_mode="raw_logprobs",
                    seed=0,  # each reply has a seed of its own
                    tensor_parallel_size=self.settings.tensor_parallel_size,
                    gpu_memory_utilization=self.settings.gpu_memory_utilization,
                    quantization=self.settings.quantization,
                    enforce_eager=not torch.cuda.is_available(),  # compiling takes a CPU minutes, at each start
                )
        return self._engine


@contextlib.contextmanager
def _visible(first: int | None, count: int) -> Iterator[None]:
    """Processes that are started in here see the GPUs of this rank alone.

    Raises:
        UserError: there are not so many.
    """
    if first is None:
        yield
        return
    usual = os.environ.get(VISIBLE)
    gpus = usual.split(",") if usual else [str(gpu) for gpu in range(torch.cuda.device_count())]
    mine = gpus[first : first + count]
    if len(mine) < count:
        raise UserError(
            f"engine.tensor_parallel_size: {count} GPUs are wanted from GPU {first} on, and this machine shows "
            f"{len(gpus)}; lower it, or change trainer.devices"
        )
    os.environ[VISIBLE] = ",".join(mine)
    try:
        yield
    finally:
        if usual is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = usual
