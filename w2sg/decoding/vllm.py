"""Plain samples of one model by vLLM (an extra): the same findings as `w2sg.decoding.contrastive`, other draws.

vLLM cannot combine the logits of two models, so contrastive decoding stays with our own engine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from w2sg.decoding.contrastive import Decoded, ReplyRows, stream
from w2sg.errors import UserError


def why_not(gguf: bool, adapted: bool) -> str | None:
    """Why vLLM cannot sample a model; None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "the package vllm is not installed; docs/install.md says how"
    if gguf or adapted:
        return "it is given whole models with a folder or hub id of their own, not adapters or GGUF files"
    return None


def sample(
    model: str,
    revision: str | None,
    dtype: str,
    max_length: int,
    rows: ReplyRows,
    stop: Sequence[int],
    ids: Sequence[int] | None = None,
) -> Decoded:
    """Write a reply to each row.

    Args:
        model: hub id or folder.
        max_length: tokens of prompt and reply.
        rows: all of one sampling setting without a contrast or a repetition penalty.
        stop: tokens that end a reply.
        ids: tokens that may be written; None for all.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        remedy = "docs/install.md says how it is installed, or use engine=transformers"
        raise UserError(f"vLLM is not wholly installed ({error}); {remedy}") from error

    engine = LLM(
        model=model,
        revision=revision,
        dtype=dtype,
        max_model_len=max_length,
        skip_tokenizer_init=True,  # ids go in and come out; text is ours to make
        logprobs_mode="raw_logprobs",
        seed=rows.seed % 2**31,
    )
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
                allowed_token_ids=None if ids is None else list(ids),
                logprobs=0,  # of the token that was drawn
                seed=int(draw * 2**31),
                detokenize=False,
            )
        )
    prompts = [{"prompt_token_ids": rows.prompts[p].tolist()} for p in rows.prompt_of]
    outputs = engine.generate(prompts, settings)
    tokens, logs, stopped = [], [], []
    for output in outputs:  # in the order of the prompts
        best: Any = output.outputs[0]
        ids = list(best.token_ids)
        tokens.append(np.array(ids, np.int64))
        values = [at[token].logprob for at, token in zip(best.logprobs, ids, strict=True)]
        logs.append(np.array(values, np.float32)[:, None])
        stopped.append(best.finish_reason == "stop")
    if len(tokens) != len(rows):
        raise UserError(f"vLLM gave {len(tokens)} replies to {len(rows)} prompts; use engine=transformers")
    return Decoded(tokens, np.array(stopped), logs, sum(map(len, tokens)))
