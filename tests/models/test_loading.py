"""Models of every kind are read whole, or refused in one line that names role, model, cause and remedy."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from conftest import compose
from model_folders import BASE, V, llama, refused, save, spec
from safetensors.torch import load_file, save_file

from w2sg.config.check import check
from w2sg.data.rows import pack
from w2sg.models.policy import load_policy
from w2sg.models.scorer import load_language_model, load_scorer
from w2sg.models.source import find
from w2sg.models.zero_shot import load_zero_shot


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("loading") / "llama", llama())


def changed(folder: Path, to: Path, change) -> Path:
    """A copy of a model whose tensors were changed."""
    import shutil

    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    save_file(change(tensors), to / "model.safetensors", metadata={"format": "pt"})
    return to


# -- weights that are not there ----------------------------------------------------------------------------------------


def prefixed(prefix: str):
    return lambda tensors: {prefix + key: value for key, value in tensors.items()}


def without(part: str):
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def adapted(tensors):
    """As of a model whose adapters were not merged."""
    found = {}
    for key, value in tensors.items():
        found[key.replace("q_proj.weight", "q_proj.base_layer.weight")] = value
        if "q_proj" in key:
            found[key.replace("weight", "lora_A.default.weight")] = torch.zeros(2, 32)
    return found


def with_biases(tensors):
    """Qwen2's attention has biases, which Llama's has no place for."""
    more = {
        key.replace(".weight", ".bias"): torch.ones(len(value)) for key, value in tensors.items() if "q_proj" in key
    }
    return {**tensors, **more}


def deeper(tensors):
    more = {key.replace(".2.", ".3."): value.clone() for key, value in tensors.items() if ".layers.2." in key}
    return {**tensors, **more}


def broken(value: float):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return tensors

    return change


def narrower(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:48].clone()
    return tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (prefixed("_orig_mod."), ["no weights for", "model.embed_tokens.weight", "begin with _orig_mod.:"]),
        (prefixed("base_model.model."), ["no weights for", "merge the adapters"]),
        (prefixed("module."), ["no weights for", "begin with module.:"]),
        (prefixed("policy."), ["no weights for", "begin with policy.:"]),
        (lambda tensors: prefixed("model.")(prefixed("model.")(tensors)), ["no weights for"]),
        (without(".layers.1."), ["no weights for 9 of ", "model.layers.1.input_layernorm.weight"]),
        (without("embed_tokens"), ["no weights for 1 of ", "model.embed_tokens.weight"]),
        (without("model.norm"), ["no weights for 1 of ", "model.norm.weight"]),
        (adapted, ["no weights for 3 of ", "model with adapters"]),
        (with_biases, ["no place for", "q_proj.bias"]),
        (deeper, ["no place for", "model.layers.3.", "fewer layers"]),
        (narrower, ["other shapes", "model.layers.1.mlp.up_proj.weight: (48, 32) and not (64, 32)"]),
        (broken(float("nan")), ["NaN or infinite", "model.layers.1.mlp.up_proj.weight"]),
        (broken(float("-inf")), ["NaN or infinite", "model.layers.1.mlp.up_proj.weight"]),
    ],
)
def test_nothing_but_a_head_may_be_missing_from_a_file(change, words, saved_llama, tmp_path):
    folder = changed(saved_llama, tmp_path / "m", change)
    refused(folder, *words)


def test_a_language_model_without_its_output_layer_scores_and_does_not_write(saved_llama, tmp_path):
    folder = changed(saved_llama, tmp_path / "m", without("lm_head"))
    refused(folder, "lm_head.weight", "cannot write", kinds=["write"])
    load_language_model(find(spec(name=str(folder)), "strong"), True, 2)


def test_shared_output_weights_are_missing_by_right(tmp_path):
    folder = save(tmp_path / "m", llama(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    policy = load_policy(find(spec(name=str(folder)), "strong"))
    assert policy.plain.get_output_embeddings().weight is policy.plain.get_input_embeddings().weight


def test_layers_that_are_cut_off_are_no_foreign_tensors(saved_llama):
    source = find(spec(name=str(saved_llama), layers=2), "strong")
    assert load_language_model(source, True, 2).model.config.num_hidden_layers == 2
    refused(saved_llama, "has 3 layers, 4 were asked for", layers=4)


def test_weights_as_pickles_are_checked_alike(saved_llama, tmp_path):
    import shutil

    tensors = load_file(saved_llama / "model.safetensors")
    for name, change in {"whole": lambda t: t, "part": without(".layers.2.")}.items():
        folder = Path(shutil.copytree(saved_llama, tmp_path / name))
        (folder / "model.safetensors").unlink()
        torch.save(change(tensors), folder / "pytorch_model.bin")
    load_policy(find(spec(name=str(tmp_path / "whole")), "strong"))
    refused(tmp_path / "part", "no weights for", "model.layers.2.")


# -- kinds of models ---------------------------------------------------------------------------------------------------

FAMILIES = {
    "gpt2": lambda: T.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, vocab_size=V),
    "mpt": lambda: T.MptConfig(vocab_size=V, d_model=32, n_layers=3, n_heads=4, max_seq_len=128, expansion_ratio=2),
    "bloom": lambda: T.BloomConfig(vocab_size=V, hidden_size=32, n_layer=3, n_head=4),
    "gptj": lambda: T.GPTJConfig(vocab_size=V, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=128),
    "gpt_neo": lambda: T.GPTNeoConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=8,
        max_position_embeddings=128,
    ),
    "gemma2": lambda: T.Gemma2Config(**BASE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "granite": lambda: T.GraniteConfig(**BASE, logits_scaling=4.0, embedding_multiplier=2.0),
    "cohere": lambda: T.CohereConfig(**BASE, logit_scale=0.3),
    "olmo3": lambda: T.Olmo3Config(**BASE, sliding_window=8),
    "lfm2": lambda: T.Lfm2Config(**BASE, layer_types=["conv", "full_attention", "conv"]),
    "mamba": lambda: T.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=3, state_size=4),
    "mamba2": lambda: T.Mamba2Config(
        vocab_size=V, hidden_size=32, num_hidden_layers=3, state_size=4, num_heads=8, head_dim=8, n_groups=1
    ),
    "jamba": lambda: T.JambaConfig(
        **BASE, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4, use_mamba_kernels=False
    ),
    "codegen": lambda: T.CodeGenConfig(vocab_size=V, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=128),
}
EAGER = {"mpt", "bloom", "gptj", "gpt_neo", "gemma2", "codegen"}
OWN_HEAD = {"granite", "cohere", "lfm2", "mamba", "mamba2", "codegen"}
SCALES = {"granite": 0.25, "cohere": 0.3}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("families") / request.param, FAMILIES[request.param]())
    return request.param, folder


IDS = [[5, 9, 12, 7, 33, 8], [4, 6, 60, 21]]


def test_a_family_scores_as_transformers_does_and_is_saved_as_a_folder(family, tmp_path):
    name, folder = family
    source = find(spec(name=str(folder), share_prompt=False), "strong")
    assert (source.spec.attention == "eager") == (name in EAGER or name.startswith("mamba"))
    assert any("attention=eager" in note for note in source.notes) == (name in EAGER)
    torch.manual_seed(0)
    scorer = load_language_model(source, True, 2)
    body = T.AutoModel.from_pretrained(folder, attn_implementation=source.spec.attention).eval()
    batch = pack([("a", "b")], lambda _: IDS, 16, packed=False).collate([0])
    with torch.no_grad():
        found = scorer(batch)[0]
        states = [body(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in IDS]
        expected = torch.stack([scorer.model.score(state)[0] for state in states])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    scorer.save(tmp_path / "saved")
    again = load_scorer(source, True, 2, tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(batch)[0], found, atol=1e-6, rtol=1e-5)
    plain = T.AutoModel.from_pretrained(tmp_path / "saved").eval()  # transformers reads the body, whoever made the head
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.tensor([IDS[0]]), use_cache=False).last_hidden_state[0, -1], states[0])
    kind = type(scorer.model)
    assert hasattr(sys.modules[kind.__module__], kind.__name__) == (name not in OWN_HEAD)  # transformers' own, or not


def test_a_family_has_the_log_probabilities_of_transformers(family):
    name, folder = family
    source = find(spec(name=str(folder)), "strong")
    policy = load_policy(source)
    assert policy.scale == SCALES.get(name, 1.0)
    plain = T.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=source.spec.attention).eval()
    ids = torch.tensor([IDS[0]])
    batch = {"input_ids": ids[:, :-1], "position_ids": torch.arange(5)[None], "source": torch.arange(5)}
    with torch.no_grad():
        logs = plain(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
        expected = logs.gather(1, ids[0, 1:, None])[:, 0]
        found = policy({**batch, "targets": ids[0, 1:]}, top=True)
        torch.testing.assert_close(policy.logits(policy.states(batch)).log_softmax(-1), logs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 1], logs.amax(-1), atol=1e-4, rtol=1e-4)


def test_a_family_is_cut_to_its_first_blocks(family):
    _, folder = family
    source = find(spec(name=str(folder), layers=2), "strong")
    whole = load_language_model(find(spec(name=str(folder)), "strong"), True, 2)
    cut = load_language_model(source, True, 2)
    assert len(cut._blocks()) == 2
    assert len(whole._blocks()) == 3
    for key, value in cut.model.base_model.state_dict().items():
        torch.testing.assert_close(value, whole.model.base_model.state_dict()[key])


def test_gradients_pass_through_the_scale_of_logits(tmp_path):
    folder = save(tmp_path / "m", FAMILIES["granite"]())
    policy = load_policy(find(spec(name=str(folder)), "strong"))
    ids = torch.tensor([IDS[0]])
    batch = {"input_ids": ids[:, :-1], "position_ids": torch.arange(5)[None], "source": torch.arange(5)}
    policy({**batch, "targets": ids[0, 1:]}).sum().backward()
    found = policy.plain.model.layers[0].mlp.up_proj
    ours = found.weight.grad.clone()
    policy.zero_grad()
    logs = policy.plain(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    logs.gather(1, ids[0, 1:, None]).sum().backward()
    torch.testing.assert_close(ours, found.weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
@pytest.mark.parametrize("pairs", [True, False])
def test_answers_of_an_untrained_model_are_its_logits_scaled_and_capped(name, pairs, tmp_path):
    changes = {"final_logit_softcapping": 0.5} if name == "gemma2" else {}
    config = FAMILIES[name]()
    config.update(changes)
    folder = save(tmp_path / "m", config)
    source = find(spec(name=str(folder), share_prompt=False), "strong")
    scorer = load_zero_shot(source, pairs, ["w7", "w9"])
    plain = T.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=source.spec.attention).eval()
    texts = [("a", "b")] if pairs else [("a",), ("b",)]
    rows = pack(texts, lambda _: IDS, 16, packed=False)
    with torch.no_grad():
        found = scorer(rows.collate(range(len(texts)))).flatten()
        logits = [plain(torch.tensor([ids]), use_cache=False).logits[0, -1, [7, 9]] for ids in IDS]
    expected = torch.stack([x[1] - x[0] for x in logits]) if pairs else torch.cat(logits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_ends_of_a_configuration_count_where_no_settings_of_generation_are_there(tiny_llama, tmp_path):
    folder = tmp_path / "several-ends"
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 7]}), encoding="utf-8")
    found = find(check(compose("strong=hf", f"strong.name={folder}", "strong.max_length=128")).strong, "strong")
    assert {1, 7} <= set(found.chat.stop)
