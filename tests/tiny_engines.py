"""Tiny models to decode with, and their log-probabilities worked out plainly."""

import numpy as np
import torch

from w2sg.models.policy import Policy

V = 64


def tiny(kind: str, seed: int = 0, places: int = 128, size: int = V, window: int = 8) -> Policy:
    """A model far from the flat distribution of fresh weights."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen3NextConfig

    plain = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": size, "bos_token_id": 1, "eos_token_id": 1}
    attention = plain | {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": places,
    }
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = {
        "gpt2": lambda: GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_positions=places, vocab_size=size, bos_token_id=1, eos_token_id=1
        ),
        "llama": lambda: LlamaConfig(**attention),
        "window": lambda: MistralConfig(sliding_window=window, **attention),
        "mamba": lambda: MambaConfig(state_size=4, time_step_rank=2, **plain),
        "hybrid": lambda: Qwen3NextConfig(
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_value_head_dim=8,
            shared_expert_intermediate_size=16,
            **linear,
            **experts,
            **attention,
        ),
    }[kind]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.25 * torch.randn(parameter.shape)
    return Policy(model).eval()


@torch.no_grad()
def next_logs(policy: Policy, ids) -> np.ndarray:
    """[n, V] what a model without a cache says after each token."""
    return policy.plain(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0].log_softmax(-1).numpy()


def token_logs(policies, prompt, reply) -> np.ndarray:
    """[n, m] of a reply's tokens, by models without a cache."""
    logs = [next_logs(policy, np.append(prompt, reply))[len(prompt) - 1 : -1] for policy in policies]
    return np.stack([part[np.arange(len(reply)), reply] for part in logs], 1)


def draw(generator, n: int) -> np.ndarray:
    return generator.integers(2, V, n)


STOPS = [5, 17, 40]


class Ids:
    """A tokenizer whose texts are ids."""

    end, stop, vocabulary = STOPS[0], STOPS, "ids"

    def prompts(self, prompts):
        return [np.array(prompt.split(), np.int64) for prompt in prompts]

    replies = prompts

    def text(self, tokens):
        return " ".join(str(int(token)) for token in tokens)

    def until_stop(self, text, start=0):
        return text, False


def prompts_of(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    generator = np.random.default_rng(seed)
    return [Ids().text(draw(generator, generator.integers(2, longest))) for _ in range(count)]
