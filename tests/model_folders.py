"""Folders of models, whole and damaged, and how they are asked for."""

from pathlib import Path

import pytest
import torch
import transformers as T

from w2sg.config.model_schema import OWN_CHAT, ModelConfig
from w2sg.errors import UserError
from w2sg.models.policy import load_policy
from w2sg.models.scorer import load_language_model
from w2sg.models.source import find


def spec(**changes) -> ModelConfig:
    base = {
        "name": "x",
        "revision": None,
        "untuned": None,
        "arch": "hf",
        "train": "full",
        "head": "linear",
        "head_weights": "kept",
        "experts": 4,
        "layer": None,
        "candidates": None,
        "layers": None,
        "quantise": None,
        "max_length": 64,
        "dtype": "float32",
        "attention": "sdpa",
        "dropout": 0.0,
        "gradient_checkpointing": False,
        "share_prompt": True,
        "micro_batch": None,
        "lr": None,
        "epochs": None,
        "random_init": False,
        "trust_remote_code": False,
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"},
        "bow": {"buckets": 512},
    }
    return ModelConfig.model_validate(OWN_CHAT | base | changes)


V = 64


BASE = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def save(folder: Path, config, auto=T.AutoModelForCausalLM, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # random weights say nearly the same of all tokens; larger ones do not
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def words() -> T.PreTrainedTokenizerFast:
    """A tokenizer of V words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w3")


def llama(**changes):
    return T.LlamaConfig(**{**BASE, **changes})


def load(kind: str, folder: Path, **options):
    source = find(spec(name=str(folder), **options), "strong")
    return load_language_model(source, True, 2) if kind == "score" else load_policy(source)


def refused(folder: Path, *words: str, kinds=("score", "write"), **options) -> None:
    for kind in kinds:
        with pytest.raises(UserError) as caught:
            load(kind, folder, **options)
        message = str(caught.value)
        assert "\n" not in message
        for word in ("strong.", *words):
            assert word in message
