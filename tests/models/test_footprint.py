"""What a model is said to take in memory, beside what it takes."""

import copy

import pytest
import torch
import transformers

from w2sg.models import footprint
from w2sg.models.activations import in_one_kernel
from w2sg.models.footprint import Use, cache_bytes, counting, kept, state_bytes, weights

SIZE = {"vocab_size": 300, "hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 128}
DEEP = {**SIZE, "num_hidden_layers": 3, "intermediate_size": 112}
GROUPED = {**DEEP, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=48, n_layer=3, n_head=4, n_positions=128),
    "llama": transformers.LlamaConfig(**GROUPED),
    "neox": transformers.GPTNeoXConfig(**DEEP),
    "opt": transformers.OPTConfig(**{**DEEP, "ffn_dim": 112, "word_embed_proj_dim": 48, "dropout": 0.0}),
    "qwen": transformers.Qwen2Config(**GROUPED),
}
USES = {
    "fp32": Use(),
    "bf16-mixed": Use(precision="bf16-mixed"),
    "bf16": Use(dtype="bfloat16"),
    "adapters": Use("lora", "bf16-mixed", rank=4),
    "packed": Use(packed=True),
    "recomputed": Use(checkpointing=True, precision="bf16-mixed"),
}
ROWS, LENGTH = 3, 40


def model(config, use):
    torch.manual_seed(0)
    dtype = getattr(torch, use.dtype)
    made = transformers.AutoModel.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa").train()
    in_one_kernel(made)  # as loading does
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if use.train == "lora":
        made = footprint._adapted(made.requires_grad_(False), use)
    return made


def held(config, use):
    """Bytes that a real forward keeps beside the model itself."""
    made = model(config, use)
    if use.checkpointing:
        made.activation_checkpointing_enable()
    ids = torch.randint(300, (ROWS, LENGTH))
    mask = torch.zeros(ROWS, 1, LENGTH, LENGTH) if use.packed else torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    inputs["position_ids"] = torch.arange(LENGTH).expand(ROWS, LENGTH)
    mine = {t.untyped_storage()._cdata for t in (*made.parameters(), *made.buffers())}
    with torch.autocast("cpu", torch.bfloat16, enabled=use.precision == "bf16-mixed"), counting(mine) as found:
        made(**inputs)
    return sum(found.values())


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_said_is_what_autograd_keeps(family):
    for name in USES if family == "llama" else ("bf16-mixed", "adapters"):
        use = USES[name]
        said = kept(CONFIGS[family], use, LENGTH)
        assert said.measured, name
        total = said.token * ROWS * LENGTH + (0 if use.checkpointing else said.fixed)
        assert total == pytest.approx(held(CONFIGS[family], use), rel=0.1), name


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_and_caches(family):
    config = CONFIGS[family]
    made = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in made.parameters())
    assert weights(config, Use()).all == weights(config, Use()).trained == count
    adapters = weights(config, USES["adapters"])
    assert 0 < adapters.trained == adapters.all - count < count / 4
    assert state_bytes(config, Use(), devices=2) == {
        "weights": 2 * count,
        "gradients": 2 * count,
        "optimizer": 4 * count,
    }
    with torch.no_grad():
        cache = made(input_ids=torch.zeros(1, 23, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(config, 23) == held
    assert cache_bytes(config, 46, "bfloat16") == held


def test_a_model_whose_experts_are_chosen_by_numbers_is_counted_by_rule():
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4)
    assert kept(config, Use(), 16).token > 0
