"""Greedy replies in unequal batches are those of plain transformers, one prompt at a time and without a cache."""

import numpy as np
import pytest
import torch
import transformers as T
from batches import BASE, MOST, V, greedy

from w2sg.decoding.contrastive import decode
from w2sg.decoding.sight import window_of
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.models.policy import Policy

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 24,
}
MLA = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
MODELS = {  # windows and borders are 12 to 24 tokens, prompts up to 30
    "llama": lambda: T.LlamaConfig(**BASE),
    "longrope": lambda: T.Phi3Config(
        **BASE | {"num_key_value_heads": 4},
        sliding_window=None,
        original_max_position_embeddings=24,
        rope_parameters=LONGROPE,
    ),
    "mpt": lambda: T.MptConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=128, expansion_ratio=2),
    "bloom": lambda: T.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: T.FalconConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "gpt_neo": lambda: T.GPTNeoConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=12,
        max_position_embeddings=128,
    ),
    "mistral": lambda: T.MistralConfig(**BASE, sliding_window=12),
    "gemma2": lambda: T.Gemma2Config(**BASE, head_dim=8, sliding_window=12, query_pre_attn_scalar=8),
    "gpt_oss": lambda: T.GptOssConfig(
        **BASE, head_dim=8, sliding_window=12, num_local_experts=4, num_experts_per_tok=2, rope_parameters=None
    ),
    "mla": lambda: T.DeepseekV3Config(**BASE | {"num_key_value_heads": 4}, **MLA),
    "mamba": lambda: T.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=2),
    "jamba": lambda: T.JambaConfig(
        **BASE,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "opt": lambda: T.OPTConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    ),
    # has a state of its own kind, and no mask
    "rwkv": lambda: T.RwkvConfig(
        vocab_size=V, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=128
    ),
}


def tiny(name: str, seed: int = 0, scale: float = 4.0) -> Policy:
    """A model far from the flat distribution of fresh weights."""
    torch.manual_seed(seed)
    model = T.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return Policy(model).eval().requires_grad_(False)


@torch.no_grad()
def written(policy: Policy, prompt: np.ndarray, most: int = MOST) -> list[int]:
    """The likeliest tokens, by the model alone."""
    ids = prompt.tolist()
    for _ in range(most):
        ids.append(int(policy.plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def prompts(seed: int = 0) -> list[np.ndarray]:
    """With a start in common, and of 12 to 30 tokens: on both sides of all windows."""
    draw = np.random.default_rng(seed)
    start = draw.integers(5, V, 9)
    return [np.append(start, draw.integers(5, V, n)) for n in (3, 21, 14, 4)]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_greedy_replies_in_a_batch_are_those_of_the_model_alone(name):
    policy, rows = tiny(name), prompts()
    wanted = [written(policy, row) for row in rows]
    assert len({tuple(reply) for reply in wanted}) > 1  # what is read shows in what is written
    found = decode(TransformersEngine(policy), rows, greedy(4), torch.zeros(4, MOST), [-1])
    assert [tokens.tolist() for tokens in found.tokens] == wanted
    alone = decode(TransformersEngine(policy), rows[:1], greedy(1), torch.zeros(1, MOST), [-1])
    assert alone.tokens[0].tolist() == wanted[0]


@pytest.mark.parametrize("name", ["llama", "longrope", "mpt", "gpt_neo", "mla", "gpt_oss", "jamba", "opt", "rwkv"])
def test_forks_reads_and_tokens_taken_back_are_those_of_the_model_alone(name):
    policy, texts = tiny(name), [row.tolist() for row in prompts(1)]
    draw, engine = np.random.default_rng(2), TransformersEngine(policy)
    engine.worth = 1
    with torch.inference_mode():
        engine.start([np.array(text) for text in texts])
        for rows in ([1, 0, 2, 3, 0, 0], [5, 1, 0, 2]):
            engine.select(torch.tensor(rows))
            texts = [list(texts[r]) for r in rows]
            chunks = [draw.integers(5, V, draw.integers(1, 5)) for _ in texts]
            engine.read(chunks)
            texts = [[*text, *chunk.tolist()] for text, chunk in zip(texts, chunks, strict=True)]
            back = draw.integers(0, 3, len(texts))
            engine.rollback(back)
            texts = [text[: len(text) - n] for text, n in zip(texts, back, strict=True)]
            tokens = draw.integers(5, V, len(texts))
            logits = engine.extend(torch.from_numpy(tokens))
            texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
            for row, text in enumerate(texts):
                alone = policy.plain(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
                assert torch.allclose(logits[0, row], alone, atol=2e-4)


def test_what_makes_reading_slow_is_said_once_for_each_model(caplog):
    for name, words in (("gpt_neo", "its window of 12 tokens"), ("longrope", "its frequencies change")):
        policy = tiny(name)
        for _ in range(2):
            decode(TransformersEngine(policy), prompts(), greedy(4), torch.zeros(4, MOST), [-1])
        assert caplog.text.count(words) == 1
    policy = tiny("llama")
    caplog.clear()
    decode(TransformersEngine(policy), prompts(), greedy(4), torch.zeros(4, MOST), [-1])
    assert not caplog.text


def test_windows_are_found_under_all_their_names():
    assert window_of(MODELS["gpt_neo"]()) == window_of(MODELS["mistral"]()) == window_of(MODELS["gpt_oss"]()) == 12
    assert window_of(T.MistralConfig(**BASE, sliding_window=None)) is None
    assert window_of(T.Qwen2Config(**BASE, use_sliding_window=False, sliding_window=12)) is None
    assert window_of(MODELS["llama"]()) is None
    assert window_of(T.Llama4TextConfig(attention_chunk_size=64, floor_scale=32, attn_temperature_tuning=True)) == 32


def test_logits_that_are_no_numbers_are_one_error_that_names_the_model():
    policy = tiny("llama")
    engine = TransformersEngine(policy)
    with torch.no_grad():
        policy.plain.get_output_embeddings().weight[7, 0] = float("nan")
    with pytest.raises(UserError, match="LlamaForCausalLM in float32 gave logits that are no numbers"):
        decode(engine, prompts(), greedy(4), torch.zeros(4, 3), [-1])


def test_exact_ties_take_the_first_token_in_any_batch():
    """Whole rows of the output layer are equal, the best among them."""
    policy = tiny("llama")
    with torch.no_grad():
        weight = policy.plain.get_output_embeddings().weight
        weight[31:61] = weight[1:31].clone()
    rows = prompts(3)
    wanted = [written(policy, row, 6) for row in rows]
    assert all(token <= 30 for reply in wanted for token in reply)
    for batch in (rows, rows[:1], rows[1:]):
        found = decode(TransformersEngine(policy), batch, greedy(len(batch)), torch.zeros(len(batch), 6), [-1])
        here = [wanted[next(k for k, row in enumerate(rows) if row is own)] for own in batch]
        assert [tokens.tolist() for tokens in found.tokens] == here


def test_a_row_without_room_writes_nothing():
    from w2sg.decoding.contrastive import go_on

    policy, rows = tiny("llama"), prompts()
    engine = TransformersEngine(policy)
    with torch.inference_mode():
        logits = engine.start(rows)
        found, _ = go_on(engine, logits, greedy(4), torch.zeros(4, 5), [-1], [5, 0, -3, 1])
    assert [len(tokens) for tokens in found.tokens] == [5, 0, 0, 1]
    assert found.tokens[0].tolist() == written(policy, rows[0], 5)
    assert not found.stopped.any()
    with torch.inference_mode():
        nothing, _ = go_on(engine, engine.start(rows[:1]), greedy(1), torch.zeros(1, 5), [-1], [0])
    assert (nothing.tokens[0].tolist(), nothing.forwards) == ([], 0)


def test_a_reply_that_ends_at_its_last_token_is_finished_and_one_that_does_not_is_cut():
    """Several tokens may end it, an end in the prompt does not."""
    policy, rows = tiny("llama"), prompts()
    wanted = [written(policy, row, 5) for row in rows]
    most = 1 + wanted[0].index(wanted[0][4])
    ends = sorted({wanted[0][4], wanted[1][2], int(rows[0][-1])} - set(wanted[0][: most - 1]))
    found = decode(TransformersEngine(policy), rows, greedy(4), torch.zeros(4, most), ends)
    for reply, tokens, stopped in zip(wanted, found.tokens, found.stopped, strict=True):
        until = next((k + 1 for k, token in enumerate(reply[:most]) if token in ends), None)
        assert (tokens.tolist(), stopped) == (reply[: until or most], until is not None)
    assert (len(found.tokens[0]), found.stopped[0]) == (most, True)
    empty = decode(TransformersEngine(policy), rows[:1], greedy(1), torch.zeros(1, 5), [wanted[0][0]])
    assert (empty.tokens[0].tolist(), empty.stopped.tolist()) == (wanted[0][:1], [True])


def test_finished_and_cut_replies_of_one_text_are_two():
    from w2sg.decoding.search import Hypothesis

    end, tokens = 1, np.array([5, 6])
    cut = Hypothesis(0, 0, "a b", tokens, None, False, True, "0")
    ended = Hypothesis(0, 0, "a b", np.append(tokens, end), None, True, False, "1", closing=1)
    by_string = Hypothesis(0, 0, "a b", tokens, None, True, False, "2")
    served = [Hypothesis(0, 0, "a b", None, None, *fate, "3") for fate in ((True, False), (False, True))]
    assert cut.key != ended.key == by_string.key
    assert served[0].key != served[1].key
