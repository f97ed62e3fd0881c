"""Models that label, exported: transformers alone gives the logits that the run had."""

import json
import sys

import architectures
import pytest
import torch
from conftest import compose, make_pairs, write_jsonl

from w2sg.cli.export import print_export
from w2sg.config.check import check
from w2sg.console import Plain
from w2sg.errors import TrainingError, UserError
from w2sg.experiment.run import Run, run_method
from w2sg.models.export import export_model
from w2sg.models.finished import FinishedModel, Scoring, find_finished
from w2sg.models.student import load_student
from w2sg.models.variants import variant

WAYS = {
    "full": {"tune": "full"},
    "cut": {"tune": "full", "keep_layers": 1},
    "lora": {"tune": "lora"},
    "head": {"tune": "head"},
    "inner": {"tune": "head", "feature_layer": 1},
    "mixture": {"tune": "head", "head": "mixture", "experts": 2},
}
OWN = {"inner", "mixture"}  # which no class of transformers can hold


def write_classes(folder, count: int = 40):
    rows = [
        {"text": row[key].partition("Assistant:")[2].strip(), "label": place}
        for row in make_pairs(count // 2, 9)
        for place, key in enumerate(("rejected", "chosen"))
    ]
    return write_jsonl(folder / "classes.jsonl", rows)


def small_run(model, data, out, *more: str) -> Run:
    sizes = "dataset.sizes={weak_train: 8, transfer: 12, test: 8}"
    typed = ["weak=bow", "strong=hf", f"strong.name={model}", "dataset=local", f"dataset.path={data}", sizes]
    typed += ["strong.max_length=60", "trainer=cpu", "logger=none", f"out={out}", "optim.full.lr=0.01", *more]
    return Run(check(compose(*typed)), out / "run")


def fitted(run: Run, name: str, changes: dict) -> tuple[FinishedModel, torch.Tensor]:
    """A model that was trained on ground truth, and its logits of the test split."""
    table = run.data.ground_truth
    source = variant(run.config.strong, changes, "strong")
    model = run.fit(name, source, table, run.gold(table))
    scoring = Scoring(run.pairs, run.classes, model.layer)
    logits = run.predict(model, run.data.test).logits
    trained = FinishedModel(name, source.spec, "strong", model.folder, None, run.out, "", run.seed, scoring)
    return trained, logits


def texts_of(table) -> list[tuple[str, ...]]:
    rows = zip(table.texts, table.first, strict=True)
    return [row if len(row) == 1 else (row[first], row[1 - first]) for row, first in rows]


def by_transformers(folder, rows, own: bool = False) -> torch.Tensor:
    """Logits as README.md says that they are got: [N, C], or a column for each text of a pair."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    trust = {"trust_remote_code": True} if own else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **trust).eval()
    parts = []
    for texts in zip(*rows, strict=True):
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            parts.append(model(**batch).logits)
    if len(parts) == 1:
        return parts[0]
    return model.compare(*parts) if parts[0].shape[1] > 1 else torch.cat(parts, 1)


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("gpt_neox", "gemma", "qwen2", "granite")]


@pytest.mark.parametrize("family", ["gpt2", "llama", *SLOW])
def test_every_way_of_training_comes_back_from_its_folder(family, pairs_folder, tmp_path):
    run = small_run(architectures.write(family, tmp_path / "model"), pairs_folder, tmp_path)
    rows = texts_of(run.data.test)
    for name, changes in WAYS.items():
        trained, logits = fitted(run, name, changes)
        about = {}
        to = tmp_path / "to" / name
        export_model(trained, to, seen=[t for r in rows for t in r], finish=lambda _, known, a=about: a.update(known))
        own = name in OWN or family == "granite"  # of which transformers has no classifier
        assert (to / "w2sg_classifier.py").is_file() == own, name
        found = by_transformers(to, rows, own)
        assert torch.allclose(found[:, 0] - found[:, 1], logits[:, 0] - logits[:, 1], atol=1e-4, rtol=0), name
        if name != "mixture":
            assert torch.allclose(found + about["constant"], logits, atol=1e-4, rtol=0), name
        config = json.loads((to / "config.json").read_text())
        assert config["id2label"] == ({"0": "expert 0", "1": "expert 1"} if name == "mixture" else {"0": "reward"})
        mine = load_student(to)
        assert torch.allclose(mine.label_logits(rows), found, atol=1e-5), name
        blocks = config.get("backbone", config)
        assert next(v for k, v in blocks.items() if k in ("n_layer", "num_hidden_layers")) == (
            1 if name in ("cut", "inner") else 2
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_class_logits_come_back_with_the_constant_of_a_head(family, tmp_path):
    run = small_run(architectures.write(family, tmp_path / "model"), write_classes(tmp_path), tmp_path)
    rows = texts_of(run.data.test)
    for name in ("full", "lora", "head", "inner", "mixture"):
        trained, logits = fitted(run, name, WAYS[name])
        export_model(trained, tmp_path / "to" / name)
        # a llama's last norm has no bias to take the constant of a head on standardised states
        own = name in OWN or (name == "head" and family == "llama")
        assert (tmp_path / "to" / name / "w2sg_classifier.py").is_file() == own
        assert torch.allclose(by_transformers(tmp_path / "to" / name, rows, own), logits, atol=1e-4, rtol=0), name


def test_a_token_that_ends_a_text_does_not_fill(tiny_gpt2, pairs_folder, tmp_path):
    """The tiny tokenizer's end of text is "!", up to which transformers would read a text."""
    run = small_run(tiny_gpt2, pairs_folder, tmp_path)
    trained, _ = fitted(run, "full", WAYS["full"])
    export_model(trained, tmp_path / "to")
    student = load_student(tmp_path / "to")
    assert student.tokenizer.pad_token == "[PAD]"
    loud, calm = student.score(["good wise!", "good wise"])
    assert loud != calm
    assert torch.allclose(student.score(["good wise!"])[0], loud, atol=1e-6)  # alone, and beside a longer one
    assert torch.allclose(student.score(["good wise!", "a far longer text " * 5])[0], loud, atol=1e-6)


@pytest.mark.slow
def test_a_run_is_exported_compared_and_described(tiny_llama, pairs_folder, tmp_path, capsys, monkeypatch):
    run = small_run(tiny_llama, pairs_folder, tmp_path, "strong.tune=lora")
    run_method(run.config, run.out, [])
    console = Plain()
    for system, to in (("student", "student"), ("weak", "bow")):
        print_export(run.out, tmp_path / to, system, tmp_path, tmp_path / "store", console)
    said = capsys.readouterr().out
    assert said.count("equal to the run's own predictions on 8 test rows") == 2
    card = (tmp_path / "student" / "README.md").read_text()
    assert "strong student (this model) | 0." in card
    assert "bag-of-words (the weak model of the run)" in card
    assert "more than 60 tokens loses its start" in card
    assert "Human: question" in card
    monkeypatch.chdir(tmp_path)
    exec(card.partition("```python\n")[2].partition("```")[0], found := {})
    assert found["logits"].shape == (2, 1)
    monkeypatch.syspath_prepend(str(tmp_path / "bow"))
    bow = (tmp_path / "bow" / "README.md").read_text()
    exec(bow.partition("```python\n")[2].partition("```")[0], found := {})
    sys.modules.pop("bag_of_words")
    assert torch.allclose(
        torch.from_numpy(found["logits"]), load_student(run.out, "weak").score(["a text", "another text"]), atol=1e-6
    )
    print_export(run.out, tmp_path / "adapter", "student", tmp_path, tmp_path / "store", console, adapter=True)
    exec((tmp_path / "adapter" / "README.md").read_text().partition("```python\n")[2].partition("```")[0], found := {})
    batch = found["tokenizer"](["good wise"], truncation=True, return_tensors="pt")
    ours = load_student(tmp_path / "student").score(["good wise"])
    assert torch.allclose(found["model"](**batch).logits, ours, atol=1e-5)
    with pytest.raises(UserError, match=r"adapter: weak was not trained with adapters"):
        print_export(run.out, tmp_path / "no", "weak", tmp_path, tmp_path / "store", console, adapter=True)
    with pytest.raises(UserError, match=r"this run has no judge: weak, student, ceiling, base"):
        find_finished(run.out, "judge", tmp_path, tmp_path / "store")
    # a folder that says something else than the run is not left behind
    weights = find_finished(run.out, "student", tmp_path, tmp_path / "store").folder / "model"
    monkeypatch.setattr("w2sg.cli.export.EQUAL", -1.0)
    with pytest.raises(TrainingError, match=r"says something else than the run's own predictions.*nothing was written"):
        print_export(run.out, tmp_path / "wrong", "student", tmp_path, tmp_path / "store", console)
    assert weights.is_dir()
    assert not [p for p in tmp_path.iterdir() if "wrong" in p.name]


@pytest.mark.slow
def test_a_chain_says_which_stage_is_its_student(tiny_gpt2, pairs_folder, tmp_path):
    more = ["method=chain", "method.links=[{keep_layers: 1}]"]
    run = small_run(tiny_gpt2, pairs_folder, tmp_path, *more)
    run_method(run.config, run.out, [])
    stages = {
        name: find_finished(run.out, name, tmp_path, tmp_path / "store").folder.name.rpartition("-")[0]
        for name in ("student", "direct", "link1", "chained", "ceiling")
    }
    assert stages == {
        "student": "chained", "direct": "student", "link1": "link1", "chained": "chained", "ceiling": "ceiling"
    }  # fmt: skip
    link = load_student(run.out, "link1", tmp_path, tmp_path / "store")
    assert link.model.config.n_layer == 1
