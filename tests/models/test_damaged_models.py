"""A model's folder that is damaged, foreign or half there ends in one line, whatever is wrong with it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers as T
from model_folders import BASE, V, llama, load, refused, save, spec
from safetensors.torch import load_file, save_file

from w2sg.errors import UserError
from w2sg.models.loading import load_transformer
from w2sg.models.policy import load_policy
from w2sg.models.scorer import load_language_model
from w2sg.models.source import find


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    from conftest import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("sound") / "m", "llama")


def config_of(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def cut(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def in_place_of(file: Path, make) -> None:
    file.unlink()
    make(file)


def as_pickle(folder: Path, content: bytes) -> None:
    weights(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)


def ends(folder: Path, value) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))


def rounded(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(weights(folder))
    tensors = {k: (v * 100).to(dtype) if "mlp" in k else v for k, v in tensors.items()}
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def lost_shards(folder: Path) -> None:
    names = list(load_file(weights(folder)))
    weights(folder).rename(folder / "model-00001-of-00002.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    index(folder, json.dumps({"metadata": {}, "weight_map": places}))


def quantised(how: str):
    return lambda f: config_of(f, quantization_config={"quant_method": how, "bits": 4})


DAMAGE = {
    "empty config": (lambda f: (f / "config.json").write_text("{}"), ["config.json is no configuration"]),
    "config of no bytes": (lambda f: (f / "config.json").write_text(""), ["config.json is empty"]),
    "config a list": (lambda f: (f / "config.json").write_text("[1, 2]"), ["config.json is no configuration"]),
    "config no JSON": (lambda f: (f / "config.json").write_text("{'a': "), ["config.json is no JSON"]),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00\x80"), ["config.json is no JSON"]),
    "config nested without end": (lambda f: (f / "config.json").write_text("[" * 100_000), ["config.json is no JSON"]),
    "config without a type": (lambda f: config_of(f, model_type=None), ["model_type"]),
    "config with words for numbers": (lambda f: config_of(f, hidden_size="wide"), ["config.json that cannot be read"]),
    "config of no layers": (lambda f: config_of(f, num_hidden_layers=0), ["does not say how many layers"]),
    "config of another width": (lambda f: config_of(f, hidden_size=16), ["other shapes"]),
    "config of more layers": (lambda f: config_of(f, num_hidden_layers=4), ["no weights for", "layers.2."]),
    "config of fewer layers": (lambda f: config_of(f, num_hidden_layers=1), ["no place for", "layers.1."]),
    "config of another vocabulary": (lambda f: config_of(f, vocab_size=999), ["other shapes", "embed_tokens"]),
    "config of another family": (lambda f: config_of(f, model_type="gpt2"), ["no weights for"]),
    "a type of the future": (lambda f: config_of(f, model_type="llama9"), ["llama9", "newer transformers"]),
    "an encoder": (lambda f: config_of(f, model_type="bert"), ["is an encoder"]),
    "an encoder and decoder": (lambda f: config_of(f, model_type="t5"), ["is an encoder with a decoder"]),
    "its own code": (
        lambda f: config_of(f, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"}),
        ["strong.trust_remote_code=true"],
    ),
    "quantised by GPTQ": (quantised("gptq"), ["quantised (gptq)"]),
    "quantised by AWQ": (quantised("awq"), ["quantised (awq)"]),
    "quantised by bitsandbytes": (quantised("bitsandbytes"), ["quantised (bitsandbytes)"]),
    "no weights": (lambda f: weights(f).unlink(), ["holds no weights"]),
    "weights of no bytes": (lambda f: weights(f).write_bytes(b""), ["model.safetensors is empty"]),
    "weights cut off": (lambda f: cut(weights(f), 0.5), ["cut off or damaged"]),
    "weights cut in their header": (lambda f: cut(weights(f), 0.001), ["cut off or damaged"]),
    "weights a page of the web": (lambda f: weights(f).write_text("<html>404</html>"), ["cut off or damaged"]),
    "weights a folder": (lambda f: in_place_of(weights(f), Path.mkdir), ["is a folder"]),
    "weights a pipe": (lambda f: in_place_of(weights(f), os.mkfifo), ["no ordinary file"]),
    "weights a link to nothing": (
        lambda f: in_place_of(weights(f), lambda p: p.symlink_to("gone.safetensors")),
        ["a link to nothing"],
    ),
    "weights a link to itself": (
        lambda f: in_place_of(weights(f), lambda p: p.symlink_to(p.name)),
        ["a link to nothing"],
    ),
    "weights a pointer of git-lfs": (
        lambda f: weights(f).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        ["git lfs pull"],
    ),
    "tokenizer a pointer of git-lfs": (
        lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n"),
        ["git lfs pull"],
    ),
    "a pickle of no bytes": (lambda f: as_pickle(f, b""), ["pytorch_model.bin is empty"]),
    "a pickle that is none": (lambda f: as_pickle(f, b"nonsense" * 9), ["cannot be loaded", "damaged"]),
    "a pickle that runs code": (
        lambda f: as_pickle(f, b"cos\nsystem\n(S'exit 1'\ntR."),
        ["cannot be loaded", "damaged"],
    ),
    "an index no JSON": (lambda f: index(f, "{"), ["index.json is no JSON"]),
    "an index of nothing": (lambda f: index(f, "{}"), ["no weight_map"]),
    "an index of shards that are gone": (lost_shards, ["names 1 files of weights that are not there", "-00002-of"]),
    "settings of generation no JSON": (
        lambda f: (f / "generation_config.json").write_text("{"),
        ["generation_config.json is no JSON"],
    ),
    "settings of generation a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        ["generation_config.json holds no settings"],
    ),
    "an end of replies that is text": (lambda f: ends(f, "</s>"), ["eos_token_id", "'</s>' and no token's number"]),
    "an end of replies in a list of its own": (lambda f: ends(f, [1, [2]]), ["[2] and no token's number"]),
    "an end of replies that is no whole number": (lambda f: ends(f, 2.0), ["2.0 and no token's number"]),
    "an end of replies that is true": (lambda f: ends(f, True), ["True and no token's number"]),
    "weights of int8 without scales": (lambda f: rounded(f, torch.int8), ["mlp.down_proj.weight", "numbers of I8"]),
    "weights of fp8 without scales": (lambda f: rounded(f, torch.float8_e4m3fn), ["numbers of F8_E4M3"]),
    "adapters": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}'),
        ["holds adapters of org/base", "merge"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(damage, sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "m"))
    harm, words = DAMAGE[damage]
    harm(folder)
    refused(folder, *words)


def test_files_that_may_not_be_read(sound, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(sound, tmp_path / "m"))
    usual = Path.open

    def closed(self, *arguments, **options):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    refused(folder, "Permission denied", "chmod")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~nobody-of-this-name/model", ["cannot be looked for"]),
        ("~/no-such-folder-of-models", ["there is no model folder"]),
        ("org/model/", ["hf download org/model "]),
        ("org/mo del", ["'org/mo del'", "Check the name"]),
        ("a/b/c", ["'a/b/c'", "Check the name"]),
        ("gpt3-xl", ["'gpt3-xl'", "Check the name"]),
        ("x" * 5000, ["cannot be looked for", "File name too long"]),
    ],
)
def test_a_name_of_nothing_is_one_line(name, words):
    with pytest.raises(UserError) as caught:
        find(spec(name=name), "weak")
    assert "\n" not in str(caught.value)
    for word in ("weak.name", *words):
        assert word in str(caught.value)


def test_a_name_ends_in_a_slash_or_begins_at_home(sound, tmp_path, monkeypatch):
    shutil.copytree(sound, tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = (str(sound), f"{sound}/", "~/m", "~/m/")
    assert len({str(find(spec(name=name), "weak").identity) for name in names}) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"GGUF", ["no GGUF file that can be read"]),
        (b"nonsense" * 20, ["no GGUF file that can be read"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    ],
)
def test_a_broken_gguf_file_is_one_line(content, words, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", *words)


def write_gguf(file: Path, architecture: str = "llama", leave_out: str = "nothing") -> Path:
    """A Llama of two blocks, whose tensors may be left out by a part of their names."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"t{i}" for i in range(3, V))])
    writer.add_token_types([1] * V)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(1)
    draw = np.random.default_rng(0)
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {"token_embd": (V, 32), "output_norm": (32,), "output": (V, 32)}
    shapes |= {f"blk.{k}.{name}": shape for k in range(2) for name, shape in block.items()}
    for name, shape in shapes.items():
        if leave_out not in name:
            writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_has_all_its_weights(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf")
    load_policy(find(spec(name=str(whole)), "strong"))
    scorer = load_language_model(find(spec(name=str(whole)), "strong"), True, 2)
    assert scorer.head == "drawn at random"
    refused(write_gguf(tmp_path / "part.gguf", leave_out="ffn_up"), "no weights for 2 of", "model.layers.0.mlp.up_proj")
    refused(write_gguf(tmp_path / "norm.gguf", leave_out="blk.1.attn_norm"), "no weights for 1 of")
    refused(write_gguf(tmp_path / "other.gguf", "mystery"), "no GGUF file that can be read", "mystery")


# -- texts and adapters ------------------------------------------------------------------------------------------------


def test_texts_longer_than_a_table_of_positions_are_refused(tmp_path, caplog):
    config = T.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=V)
    source = find(spec(name=str(save(tmp_path / "gpt2", config)), max_length=65), "strong")
    with pytest.raises(UserError, match=r"strong\.max_length: 65 is more than the 64 positions"):
        source.check_texts()
    rotary = find(spec(name=str(save(tmp_path / "llama", llama())), max_length=129), "weak")
    rotary.__dict__["tokenizer"] = []
    rotary.check_texts()
    assert rotary.notes == [
        f"weak: max_length=129 is more than the 128 positions that {tmp_path}/llama was made for; longer texts are "
        "read all the same"
    ]


def test_tokens_without_embeddings_are_refused(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "m"))
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    find(spec(name=str(folder)), "strong").check_texts()  # filling alone is never read
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        find(spec(name=str(folder)), "strong").check_texts()
    assert f"has {rows + 3} tokens and the model rows for {rows}" in str(caught.value)
    assert "<|im_start|>, <|im_end|>" in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "c_attn"], ["strong.lora.targets", "no c_attn", "q_proj"]),
        (["query_key_value"], ["strong.lora.targets", "no query_key_value"]),
        ("wq", ["strong.lora.targets"]),
    ],
)
def test_adapters_on_layers_that_are_not_there(targets, words, sound):
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "targets": targets}
    refused(sound, *words, train="lora", lora=lora)


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return save(tmp_path_factory.mktemp("reward") / "m", llama(num_labels=1), T.AutoModelForSequenceClassification)


def test_a_trained_head_is_kept_or_drawn_anew_and_that_is_said(reward_model, tmp_path):
    theirs = load_file(weights(reward_model))["score.weight"]
    for train in ("full", "lora"):
        kept = load("score", reward_model, train=train)
        assert "is a trained scorer and starts with its own head" in kept.head
        torch.testing.assert_close(kept._plain.score.weight.detach(), theirs)
        fresh = load("score", reward_model, train=train, head_weights="fresh")
        assert "drawn at random: the trained head" in fresh.head
        assert not torch.allclose(fresh._plain.score.weight, theirs)
        assert fresh._plain.score.weight.std().item() == pytest.approx(0.02, rel=0.5)
        body = fresh._plain.model.embed_tokens.weight
        torch.testing.assert_close(body, kept._plain.model.embed_tokens.weight)
    assert load("score", save(tmp_path / "plain", llama())).head == "drawn at random"


def test_a_head_of_another_shape_is_refused_unless_it_is_drawn_anew(tmp_path):
    folder = save(tmp_path / "five", llama(num_labels=5), T.AutoModelForSequenceClassification)
    refused(folder, "strong.head_weights", "another shape than the 1 outputs", kinds=["score"])
    assert load("score", folder, head_weights="fresh").model.score.weight.shape == (1, 32)
    assert load("score", folder, train="head").head is None  # its features alone are read
    with pytest.raises(UserError, match="it has 5 outputs and not one"):
        load_language_model(find(spec(name=str(folder)), "method.judge"), True, 2, as_it_is=True)


def test_a_head_of_another_name_is_not_read_and_that_is_said(tmp_path, caplog):
    folder = save(tmp_path / "m", llama())
    tensors = load_file(weights(folder))
    tensors["v_head.summary.weight"] = torch.ones(1, 32)
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    assert load("score", folder).head == "drawn at random"
    assert "v_head.summary.weight" in caplog.text


# -- models that also see ----------------------------------------------------------------------------------------------


def test_of_a_model_that_also_sees_the_text_model_is_read_with_its_weights(tmp_path):
    text = T.Gemma3TextConfig(**BASE, head_dim=8, sliding_window=16, query_pre_attn_scalar=8)
    sight = T.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    folder = save(
        tmp_path / "m",
        T.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4),
        T.AutoModelForImageTextToText,
    )
    source = find(spec(name=str(folder)), "strong")
    assert source.notes == [
        f"strong: of {folder} (gemma3) the text model is used alone; what it sees or hears is not read"
    ]
    ids = torch.tensor([[5, 9, 12, 7, 33, 8]])
    whole = T.AutoModelForImageTextToText.from_pretrained(folder).eval()
    policy = load_policy(source)
    with torch.no_grad():
        torch.testing.assert_close(policy.plain(ids).logits, whole(ids).logits)
        policy.save(tmp_path / "saved")
        again = load_policy(source, tmp_path / "saved")
        torch.testing.assert_close(again.plain(ids).logits, whole(ids).logits)


SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "image_size": 28,
    "patch_size": 14,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
WITH_SIGHT = {
    "llava": lambda: T.LlavaConfig(
        text_config=llama(),
        vision_config=T.CLIPVisionConfig(**SIGHT, num_attention_heads=2, projection_dim=32),
        image_token_index=5,
    ),
    "mistral3": lambda: T.Mistral3Config(
        text_config=T.MistralConfig(**BASE, head_dim=8),
        vision_config=T.PixtralVisionConfig(**SIGHT, num_attention_heads=2, head_dim=16),
    ),
    "qwen3_5": lambda: T.Qwen3_5Config(
        text_config=T.Qwen3_5TextConfig(**BASE, head_dim=8, layer_types=["full_attention"] * 3),
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
    ),
    "llama4": lambda: T.Llama4Config(
        text_config={**BASE, "intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 8},
        vision_config={
            **SIGHT,
            "num_attention_heads": 2,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    ),
    "mllama": lambda: T.MllamaConfig(
        text_config={**BASE, "cross_attention_layers": [1], "rope_parameters": ROTARY},
        vision_config={
            **SIGHT,
            "attention_heads": 2,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
    ),
}


@pytest.mark.parametrize("name", WITH_SIGHT)
def test_text_models_of_families_that_also_see(name, tmp_path):
    torch.manual_seed(0)
    whole = T.AutoModelForImageTextToText.from_config(WITH_SIGHT[name](), dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path / "m")
    source = find(spec(name=str(tmp_path / "m")), "strong")
    assert "the text model is used alone" in source.notes[0]
    model, drawn = load_transformer(T.AutoModelForCausalLM, source)
    assert drawn == []
    ids = torch.tensor([[8, 9, 12, 7, 33]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, whole(ids).logits)
    scorer = load_language_model(source, True, 2)
    assert scorer.head == "drawn at random"
    scorer.save(tmp_path / "saved")
    again = load_language_model(source, True, 2, tmp_path / "saved")
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, scorer.state_dict()[key])


def test_a_text_part_without_a_language_model_is_refused(sound, tmp_path):
    rotary = {**ROTARY, "mrope_section": [1, 1, 2]}
    config = T.Qwen2VLConfig(text_config={**BASE, "rope_parameters": rotary})
    folder = Path(shutil.copytree(sound, tmp_path / "m"))
    config.save_pretrained(folder)
    refused(folder, "no language model of its own")
