"""Replies of models whose layers see windows or chunks are transformers' own, on both sides of their edges."""

import numpy as np
import pytest
import torch
from tiny_engines import V, draw, next_logs

from w2sg.decoding import transformers_engine
from w2sg.decoding.contrastive import decode
from w2sg.decoding.sampling import Settings
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.models.policy import Policy

WINDOW, MOST = 8, 12
LENGTHS = [3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3]
GREEDY = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "vocab_size": V,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def config_of(kind: str):
    import transformers

    return {
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **PLAIN, head_dim=16, sliding_window=WINDOW, sliding_window_pattern=2
        ),
        "mistral": lambda: transformers.MistralConfig(**PLAIN, sliding_window=WINDOW),
        "qwen2": lambda: transformers.Qwen2Config(
            **PLAIN, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=2
        ),
        "llama4": lambda: transformers.Llama4TextConfig(
            **PLAIN,
            head_dim=16,
            intermediate_size_mlp=64,
            num_local_experts=2,
            attention_chunk_size=WINDOW,
            floor_scale=4,
        ),
    }[kind]()


@pytest.fixture(scope="module", params=["gemma3", "mistral", "qwen2", "llama4"])
def policy(request) -> Policy:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(request.param), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.25 * torch.randn(parameter.shape)
    return Policy(model).eval()


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [draw(generator, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(policy, prompts) -> list[list[int]]:
    """What transformers writes to each prompt by itself."""
    replies = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        written = policy.plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MOST, min_new_tokens=MOST
        )
        replies.append(written[0, len(prompt) :].tolist())
    return replies


def written(policy, prompts, prompt_of=None):
    rows = len(prompts if prompt_of is None else prompt_of)
    settings = Settings.alike(GREEDY, rows, torch.device("cpu"))
    return decode(TransformersEngine(policy), prompts, settings, torch.zeros(rows, MOST), [], prompt_of)


def test_greedy_replies_are_those_of_transformers(policy, prompts, alone):
    assert [row.tolist() for row in written(policy, prompts).tokens] == alone


def test_they_are_with_a_start_in_common_and_a_fork(policy, prompts):
    """Chunks and windows count a row's tokens, whatever stands before them in the batch."""
    start = prompts[2]
    longer = [np.append(start, prompt) for prompt in prompts]
    found = written(policy, longer, [0, 0, 1, 2, 3, 4, 4])
    apart = [written(policy, [prompt]) for prompt in longer]
    for row, place in enumerate([0, 0, 1, 2, 3, 4, 4]):
        assert found.tokens[row].tolist() == apart[place].tokens[0].tolist()
        assert np.allclose(found.log_probabilities[row], apart[place].log_probabilities[0], atol=1e-4)


def test_log_probabilities_are_those_of_reading_the_reply_at_once(policy, prompts, alone):
    found = written(policy, prompts)
    for prompt, reply, values in zip(prompts, alone, found.log_probabilities, strict=True):
        logs = next_logs(policy, np.append(prompt, reply))[len(prompt) - 1 : -1]
        assert np.allclose(values[:, 0], logs[np.arange(MOST), reply], atol=1e-4)


def test_long_prompts_are_read_in_parts(policy, prompts, alone, monkeypatch):
    monkeypatch.setattr(transformers_engine, "AT_ONCE", 25)  # five columns of five prompts
    engine = TransformersEngine(policy)
    sizes = []
    hook = policy.body.register_forward_pre_hook(
        lambda module, args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        settings = Settings.alike(GREEDY, len(prompts), torch.device("cpu"))
        found = decode(engine, prompts, settings, torch.zeros(len(prompts), MOST), [])
    finally:
        hook.remove()
    assert [row.tolist() for row in found.tokens] == alone
    if not engine._fills:  # rows of equal length, whole
        assert max(sizes) == max(LENGTHS) + MOST - 1
        return
    assert max(sizes) == 25
    assert sum(sizes) == len(prompts) * (max(LENGTHS) + MOST - 1)
