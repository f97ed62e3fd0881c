"""Greedy decoding of batches by plain transformers."""

import torch

from w2sg.decoding.sampling import Settings

V, MOST = 61, 14


BASE = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def greedy(rows: int) -> Settings:
    return Settings.from_columns(torch.tensor([[1.0, 0, 0, 0, 1, 1]] * rows))
