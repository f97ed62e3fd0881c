"""GGUF files: transformers reads their configuration, tokenizer and weights; each is parsed once in a process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from w2sg.errors import UserError
from w2sg.models.unreadable import quiet_loading
from w2sg.models.weights import COMPUTED, names

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file anew for all it wants of it, and makes its table of names for every module."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    usual = {name: getattr(gguf, name) for name in names}
    try:
        for name, act in usual.items():
            setattr(gguf, name, functools.cache(act))
        yield
    finally:
        for name, act in usual.items():
            setattr(gguf, name, act)


@functools.lru_cache(maxsize=4)
def gguf_tokenizer(folder: str, file: str, _sha256: str, trust_remote_code: bool) -> Any:
    """Its tokenizer: parsing the file for it takes seconds, and a run asks for it in several roles."""
    from transformers import AutoTokenizer

    with quiet_loading(bars=True), _parsed_once():
        return AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=trust_remote_code)


@functools.lru_cache(maxsize=8)
def read_gguf(path: Path, _sha256: str) -> PretrainedConfig:
    """Configuration of a GGUF file; parsing takes seconds, and the runs of a sweep share one file."""
    from transformers import AutoConfig

    with quiet_loading(bars=True), _parsed_once():
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


@functools.lru_cache(maxsize=1)
def dequantised(folder: str, file: str, dtype: torch.dtype, trust_remote_code: bool) -> dict[str, Tensor]:
    """The weights of a GGUF file, which is of a language model whatever head it is to have; kept, since every stage of
    a run wants them, a judge's as well as a writer's.
    """
    from transformers import AutoModelForCausalLM as Auto

    with _parsed_once():
        read, loaded = Auto.from_pretrained(
            folder, gguf_file=file, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    if missing := [key for key in loaded["missing_keys"] if not COMPUTED.search(key)]:
        raise UserError(
            f"the GGUF file {folder}/{file} has no weights for {len(missing)} of {len(read.state_dict())} tensors, the "
            f"first {names(missing)}; it is of another version of its architecture, or damaged"
        )
    return dict(read.state_dict())
