"""Tiny random models of many architectures, and what w2sg makes of each beside plain transformers.

Each is asked with texts longer than its windows, which are 8 tokens, and read by transformers one text at a time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from w2sg.config.hydra import register
from w2sg.config.model_schema import ModelConfig
from w2sg.config.plugins import CONF
from w2sg.data.completions import Completions
from w2sg.data.rows import pack
from w2sg.decoding.contrastive import decode
from w2sg.decoding.sampling import Settings
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.models.packing import keeps_replies_apart, separates_texts, why_apart
from w2sg.models.policy import load_policy
from w2sg.models.scorer import load_language_model
from w2sg.models.source import find

VOCABULARY, WINDOW, MAX_LENGTH = 96, 8, 64
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZE = {
    **IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
BOTH = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

# name -> the class of its configuration, and its settings
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_bigcode": ("GPTBigCodeConfig", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{k: v for k, v in SIZE.items() if not k.startswith("num_")},
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", SIZE),
    "gptj": ("GPTJConfig", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "opt": ("OPTConfig", {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "xglm": ("XGLMConfig", {**IDS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    "biogpt": ("BioGptConfig", SIZE),
    "ctrl": ("CTRLConfig", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 128}),
    "bloom": ("BloomConfig", {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {**IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2}),
    "falcon (alibi)": ("FalconConfig", {**SIZE, "alibi": True, "new_decoder_architecture": False}),
    "falcon (rotary)": ("FalconConfig", {**SIZE, "alibi": False, "new_decoder_architecture": False}),
    "falcon (40B)": ("FalconConfig", {**SIZE, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama": ("LlamaConfig", GROUPED),
    "llama4": (
        "Llama4TextConfig",
        {
            **HEADED,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "attention_chunk_size": WINDOW,
        },
    ),
    "mistral": ("MistralConfig", {**HEADED, "sliding_window": WINDOW}),
    "mistral (no window)": ("MistralConfig", {**HEADED, "sliding_window": None}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "sliding_window": WINDOW}),
    "ministral": ("MinistralConfig", {**HEADED, **BOTH}),
    "ministral3": ("Ministral3Config", HEADED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2 (window)": (
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2_moe": ("Qwen2MoeConfig", {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3Config", HEADED),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEADED, **EXPERTS, "num_experts": 4}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **HEADED,
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "gemma": ("GemmaConfig", HEADED),
    "gemma2": ("Gemma2Config", {**HEADED, **BOTH, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**HEADED, **BOTH, "query_pre_attn_scalar": 8}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **HEADED,
            **BOTH,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "phi": ("PhiConfig", GROUPED),
    "phi3": ("Phi3Config", {**GROUPED, "sliding_window": WINDOW}),
    "phi3 (longrope)": (
        "Phi3Config",
        {
            **GROUPED,
            "sliding_window": None,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONGROPE,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        {
            **GROUPED,
            "num_local_experts": 4,
            "sliding_window": WINDOW,
            "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
        },
    ),
    "llama (dynamic)": (
        "LlamaConfig",
        {
            **GROUPED,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "starcoder2": ("Starcoder2Config", {**GROUPED, "sliding_window": WINDOW}),
    "stablelm": ("StableLmConfig", GROUPED),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "olmo3": ("Olmo3Config", {**GROUPED, **BOTH}),
    "olmoe": ("OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": ("FlexOlmoConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", GROUPED),
    "cohere2": ("Cohere2Config", {**HEADED, **BOTH}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "granitemoe": ("GraniteMoeConfig", {**GROUPED, "num_local_experts": 4, "logits_scaling": 4.0}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **GROUPED,
            **MAMBA2,
            "num_local_experts": 4,
            "shared_intermediate_size": 48,
            "layer_types": ["mamba", "attention"],
            "logits_scaling": 4.0,
        },
    ),
    "glm": ("GlmConfig", HEADED),
    "glm4": ("Glm4Config", HEADED),
    "glm4_moe": ("Glm4MoeConfig", {**HEADED, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    "nemotron": ("NemotronConfig", {**HEADED}),
    "persimmon": ("PersimmonConfig", SIZE),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **SIZE,
            **EXPERTS,
            **MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **SIZE,
            **EXPERTS,
            **MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "minicpm3": ("MiniCPM3Config", {**SIZE, **MLA, "num_key_value_heads": 4}),
    "smollm3": (
        "SmolLM3Config",
        {
            **GROUPED,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "exaone4": ("Exaone4Config", {**GROUPED, **BOTH}),
    "ernie4_5": ("Ernie4_5Config", HEADED),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", HEADED),
    "seed_oss": ("SeedOssConfig", HEADED),
    "gpt_oss": (
        "GptOssConfig",
        {
            **HEADED,
            **BOTH,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "arcee": ("ArceeConfig", GROUPED),
    "apertus": ("ApertusConfig", GROUPED),
    "dots1": (
        "Dots1Config",
        {
            **GROUPED,
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "helium": ("HeliumConfig", HEADED),
    "bitnet": ("BitNetConfig", GROUPED),
    "diffllama": ("DiffLlamaConfig", GROUPED),
    "vaultgemma": ("VaultGemmaConfig", {**HEADED, **BOTH, "query_pre_attn_scalar": 8}),
    "afmoe": ("AfmoeConfig", {**HEADED, **BOTH, **EXPERTS, "num_experts": 4, "num_dense_layers": 1}),
    "nanochat": ("NanoChatConfig", GROUPED),
    "minimax": (
        "MiniMaxConfig",
        {**HEADED, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    ),
    "lfm2": ("Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "mamba": ("MambaConfig", {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        {
            **IDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "falcon_mamba": ("FalconMambaConfig", {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "falcon_h1": ("FalconH1Config", {**HEADED, **MAMBA2, "mamba_d_ssm": 64}),
    "jamba": (
        "JambaConfig",
        {
            **GROUPED,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaConfig", {**GROUPED, **MAMBA2, "attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2Config",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 4,
        },
    ),
    "rwkv": (
        "RwkvConfig",
        {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 128},
    ),
    "bert": ("BertConfig", SIZE),
    "bart": (
        "BartConfig",
        {
            **IDS,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 128,
        },
    ),
    "xlnet": ("XLNetConfig", {**IDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "openai-gpt": ("OpenAIGPTConfig", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "modernbert-decoder": (
        "ModernBertDecoderConfig",
        {**SIZE, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **HEADED,
            **BOTH,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
        },
    ),
    "cwm": ("CwmConfig", {**HEADED, **BOTH}),
    "doge": ("DogeConfig", {**GROUPED, "sliding_window": WINDOW}),
    "jetmoe": (
        "JetMoeConfig",
        {
            **IDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {**HEADED, "num_experts": 4, "moe_topk": 2}),
    "minimax_m2": ("MiniMaxM2Config", {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "exaone_moe": ("ExaoneMoeConfig", {**GROUPED, **BOTH, **EXPERTS, "num_experts": 4}),
    "internlm3": ("InternLM3Config", HEADED),
    "hyperclovax": ("HyperCLOVAXConfig", HEADED),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {**GROUPED, **EXPERTS, "layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {
            **HEADED,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "xlstm": ("xLSTMConfig", {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **IDS,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "lru_width": 32,
            "attention_window_size": WINDOW,
        },
    ),
}

PACKED, APART, BATCHES, REFUSED = "packed", "rows of its own", "in batches", "refused"


@dataclass(frozen=True)
class Found:
    """What became of one use of a family: `PACKED`, `APART`, `BATCHES` or `REFUSED`, and the line that refuses."""

    kind: str
    line: str = ""


@functools.cache
def _role() -> ModelConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        role = compose("train", overrides=["strong=hf", "strong.name=MODEL", "strong.tune=full"]).strong
    return ModelConfig.model_validate(OmegaConf.to_container(role, resolve=True))


def spec(folder: Path, **changes: Any) -> ModelConfig:
    """A role that reads the model in a folder, all of it trained."""
    return _role().model_copy(update={"name": str(folder), "max_length": MAX_LENGTH, **changes})


def write(family: str, folder: Path) -> Path:
    """A model of a family with random weights, large enough that its words differ."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "A_log" not in name:
                weight.mul_(3.0)
    model.save_pretrained(folder)
    # bytes: of Qwen2 transformers reads any tokenizer.json as BPE over bytes, whatever kind it says it is
    letters = sorted(ByteLevel.alphabet())[: VOCABULARY - 3]
    words = {word: k for k, word in enumerate(["w0", "w1", "w2", *letters])}
    tokenizer = Tokenizer(BPE(words, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w2"
    ).save_pretrained(folder)
    return folder


def draw(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


class Plain:
    """The model as transformers reads it: one text at a time, without a cache."""

    def __init__(self, folder: Path):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # what rotary frequencies of dynamic NTK remember would make each number hang on what was read before
        kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
        self.fresh = (lambda: copy.deepcopy(model)) if kind == "dynamic" else (lambda: model)

    def states(self, text: list[int]) -> Tensor:
        model = self.fresh()
        body = model.model if model.base_model is model else model.base_model  # Llama 4's goes by another name
        return body(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]

    def logits(self, text: list[int]) -> Tensor:
        return self.fresh()(input_ids=torch.tensor([text]), use_cache=False).logits[0].float()

    def first_block(self, text: list[int]) -> Tensor:
        """[L, D] what the first block hands on."""
        model, caught = self.fresh(), []
        blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        handle = blocks[0].register_forward_hook(lambda _m, _i, out: caught.append(out))
        model(input_ids=torch.tensor([text]), use_cache=False)
        handle.remove()
        (out,) = caught
        return (out[0] if isinstance(out, tuple | list) else out)[0]

    def reply(self, prompt: list[int], length: int) -> list[int]:
        text = list(prompt)
        for _ in range(length):
            text.append(int(self.logits(text)[-1].argmax()))
        return text[len(prompt) :]


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    worst = float((found - expected).abs().max())
    assert worst <= 1e-5 * max(1.0, float(expected.abs().max())), f"{what}: off by {worst:.1e}"


@torch.no_grad()
def rewards(folder: Path, plain: Plain, **changes: Any) -> Found:
    """Rewards of pairs, and class logits.

    Args:
        changes: of the model's settings.

    Raises:
        AssertionError: they are not those of transformers.
    """
    source = find(spec(folder, **changes), "strong")
    torch.manual_seed(0)
    scorer = load_language_model(source, True, 2)
    packed = separates_texts(scorer, VOCABULARY, MAX_LENGTH)
    start, *ends = draw(9, 14, 17, 3, 21)
    texts = [start + end for end in ends]
    head = scorer._plain.score.weight
    expected = torch.stack([plain.states(text)[-1] @ head[0] for text in texts]).view(2, 2)
    rows = pack([("a", "b")] * 2, lambda _: texts, MAX_LENGTH, packed)
    _equal(scorer(rows.collate([0, 1])), expected, "rewards")
    assert expected.std() > 1e-3
    torch.manual_seed(1)
    classes = load_language_model(source, False, 3)
    found = classes(pack([("a",)] * 4, lambda _: texts, MAX_LENGTH).collate(range(4)))
    _equal(found, torch.stack([classes._plain.score(plain.states(text)[-1]) for text in texts]), "class logits")
    return Found(PACKED if packed else APART)


@torch.no_grad()
def features(folder: Path, plain: Plain) -> Found:
    """States after the first block and after the last.

    Raises:
        AssertionError: they are not those of transformers.
    """
    source = find(spec(folder), "strong")
    scorer = load_language_model(source, True, 2)
    packed = separates_texts(scorer, VOCABULARY, MAX_LENGTH)
    start, *ends = draw(9, 14, 17, 3, 21)
    texts = [start + end for end in ends]
    rows = pack([("a", "b")] * 2, lambda _: texts, MAX_LENGTH, packed)
    found = scorer.features(rows.collate([0, 1]), [1, source.depth]).flatten(0, 1)
    _equal(found[:, 1], torch.stack([plain.states(text)[-1] for text in texts]), "the last features")
    _equal(found[:, 0], torch.stack([plain.first_block(text)[-1] for text in texts]), "the first features")
    return Found(PACKED if packed else APART)


@torch.no_grad()
def replies(folder: Path, plain: Plain) -> Found:
    """Log-probabilities of replies.

    Raises:
        AssertionError: they are not those of transformers.
    """
    policy = load_policy(find(spec(folder), "strong"), trainable=False)
    packed = keeps_replies_apart(policy, MAX_LENGTH)
    before = [np.array(ids) for ids in draw(11, 4)]
    after = [np.array(ids) for ids in draw(14, 9, 1, 20)]
    pairs = [(after[0], after[1]), (after[2], after[3])]
    found = policy(Completions(before, pairs, packed=packed).collate([0, 1]))
    expected = []
    for prompt, both in zip(before, pairs, strict=True):
        for reply in both:
            logits = plain.logits([*prompt.tolist(), *reply.tolist()]).log_softmax(-1)
            expected.append(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(reply)[:, None])[:, 0])
    _equal(found, torch.cat(expected), "log-probabilities")
    return Found(PACKED if packed else APART)


@torch.no_grad()
def greedy(folder: Path, plain: Plain) -> Found:
    """Greedy replies to prompts of unequal lengths in one batch.

    Raises:
        AssertionError: they are not those of transformers.
    """
    policy = load_policy(find(spec(folder), "strong"), trainable=False)
    start, *ends = draw(9, 1, 12, 4, 7)
    prompts, length = [np.array(start + end) for end in ends], 12
    settings = Settings.from_columns(torch.tensor([[1.0, 0, 0, 0, 1, 1]] * len(prompts)))
    engine = TransformersEngine(policy)
    found = decode(engine, prompts, settings, torch.zeros(len(prompts), length), [-1]).tokens
    expected = [plain.reply(prompt.tolist(), length) for prompt in prompts]
    same = sum(a.tolist() == b for a, b in zip(found, expected, strict=True))
    assert same == len(prompts), f"greedy replies: {same} of {len(prompts)} are the model's"
    return Found(BATCHES)


USES: dict[str, Callable[[Path, Plain], Found]] = {
    "rewards and classes": rewards,
    "features": features,
    "replies": replies,
    "decoding": greedy,
}


def tried(family: str, folder: Path) -> dict[str, Found]:
    """What became of each use.

    Raises:
        AssertionError: a number is not that of transformers.
    """
    write(family, folder)
    plain, found = Plain(folder), {}
    for use, attempt in USES.items():
        try:
            found[use] = attempt(folder, plain)
        except UserError as error:
            found[use] = Found(REFUSED, str(error).replace(str(folder), "MODEL"))
    return found


# -- the page ---------------------------------------------------------------------------------------------------------

HEAD = """# Architectures

Tiny random models of each architecture read texts of up to 38 tokens through w2sg's code. Windows and chunks have 8
tokens where an architecture has any. The numbers are compared with plain transformers, which reads one text at a
time. They are rewards of pairs, class logits, features of the first and last block, and log-probabilities of replies,
each within 1e-5. Greedy replies to prompts of unequal lengths in one batch must be equal.

`tests/models/test_architectures.py` does this and checks this page. After a change,
`W2SG_WRITE_MODELS_PAGE=1 python -m pytest -n 0 tests/models/test_architectures.py` writes it again.

Another architecture is treated in the same way. A probe tests it at the start. It reads packed rows only if they give
the numbers of plain transformers. It is refused if not even a row for each text does.
"""
ASKED = "it counts the columns of a row (slopes, windows), or carries a state along them"
LISTS = {
    PACKED: "## Texts share a row\n\nThe texts of a pair share their common prefix. So do replies to a prompt.\n",
    APART: "## A row for each text\n\nThe same numbers, with more tokens to read. The log and the report say so.\n",
    REFUSED: "## Refused\n\nEach is refused in one line, before any work.\n",
}


def lines_of(family: str, found: dict[str, Found]) -> dict[str, str]:
    """list -> the line of a family in it; what is refused of a family that works otherwise has a line there, too."""
    kind = FAMILIES[family][0]
    refused = {use: one.line for use, one in found.items() if one.kind == REFUSED}
    lines = {}
    if refused:
        what = "" if len(refused) == len(found) else f", {' and '.join(refused)}"
        lines[REFUSED] = f"- {family} ({kind}){what}: {next(iter(refused.values()))}"
    if len(refused) < len(found):
        place = APART if any(one.kind == APART for one in found.values()) else PACKED
        config = getattr(transformers, kind)(**FAMILIES[family][1])
        reason = f": {why_apart(config, MAX_LENGTH) or ASKED}" if place == APART else ""
        lines[place] = f"- {family} ({kind}){reason}"
    return lines


def page(found: dict[str, dict[str, Found]]) -> str:
    """docs/models.md."""
    lines = {family: lines_of(family, one) for family, one in found.items()}
    parts = [HEAD]
    for place, head in LISTS.items():
        parts.append(head + "\n" + "\n".join(lines[f][place] for f in sorted(lines) if place in lines[f]) + "\n")
    return "\n".join(parts)
