"""FinishedModel models of a run as transformers folders, and the lm-evaluation-harness on them."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import BETTER, WORDS, compose, run_script, save_tiny_model, write_jsonl

from w2sg.cli.export import print_export
from w2sg.cli.harness import run_harness, show_rows
from w2sg.config.check import check, check_evaluate
from w2sg.console import Plain
from w2sg.errors import ConfigError, UserError
from w2sg.evaluation import lm_harness
from w2sg.evaluation.lm_harness import Options, harness_imported, result_rows, with_baseline, writable
from w2sg.experiment.run import run_method
from w2sg.models.export import export_model, load_merged
from w2sg.models.finished import FinishedModel, find_finished
from w2sg.models.policy import load_policy
from w2sg.models.source import find

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install lm-eval")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}!\n{% endfor %}"
    "{% if add_generation_prompt %}> {% endif %}"
)
TOKENS = torch.arange(1, 41)[None]


@pytest.fixture(scope="module")
def finished(pairs_folder, tmp_path_factory) -> Path:
    """A folder with a finished run: the weak model trained whole, the strong one by adapters."""
    out = tmp_path_factory.mktemp("harness")
    weak = save_tiny_model(out / "models" / "weak", width=16)
    strong = save_tiny_model(out / "models" / "strong", "llama", seed=1)
    settings = json.loads((strong / "tokenizer_config.json").read_text())
    (strong / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    overrides = [
        "method=cong",
        "dataset=local",
        f"dataset.path={pairs_folder}",
        "dataset.sizes={weak_train: 16, transfer: 16, test: 8}",
        "weak=hf",
        f"weak.name={weak}",
        "strong=hf",
        f"strong.name={strong}",
        "strong.tune=lora",
        "weak.max_length=96",
        "strong.max_length=96",
        *(f"method.{stage}.lr={{full: 0.01, lora: 0.1}}" for stage in ("alignment", "sft", "dpo")),
        *(f"method.{stage}.global_batch_size=8" for stage in ("alignment", "sft", "dpo")),
        "method.decoding.max_new_tokens=8",
        "method.baselines=[]",
        "method.analysis.alphas=[0.0]",
        "method.judge.model=null",
        "trainer=cpu",
        "logger=none",
        f"out={out}",
    ]
    run_method(check(compose(*overrides)), out / "a=1,b=2", overrides)
    return out


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder of two task files of our own, one that chooses and one that writes, with their data."""
    folder = tmp_path / "tasks"
    good, bad = sorted(BETTER), sorted(set(WORDS) - BETTER)
    choices = [{"question": f"question {i}?", "choices": [good[i % 10], bad[i % 7]], "answer": 0} for i in range(12)]
    write_jsonl(folder / "choice.jsonl", choices)
    write_jsonl(folder / "words.jsonl", [{"question": f"question {i}?", "answer": good[i]} for i in range(6)])
    common = 'doc_to_text: "Human: {{question}}\\n\\nAssistant:"\ndataset_path: json\ntest_split: test\n'
    (folder / "tiny_choice.yaml").write_text(
        f"task: tiny_choice\ndataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}\n{common}"
        'output_type: multiple_choice\nfewshot_split: test\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    (folder / "tiny_words.yaml").write_text(
        f"task: tiny_words\ndataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}}}\n{common}"
        "output_type: generate_until\ndoc_to_target: answer\nmetric_list: [{metric: exact_match}]\n"
        'generation_kwargs: {until: ["Human:"], max_gen_toks: 4, do_sample: false}\n'
    )
    (folder / "lost.yaml").write_text(
        f"task: lost\ndataset_kwargs: {{data_files: {{test: {folder}/nowhere.jsonl}}}}\n{common}"
        "output_type: generate_until\ndoc_to_target: answer\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


def named(out: Path, system: str | None, place: Path | None = None) -> FinishedModel:
    return find_finished(place or out / "a=1,b=2", system, out, out / "store")


def stage(out: Path, name: str) -> Path:
    stages = json.loads((out / "a=1,b=2" / "report.json").read_text())["stages"]
    return out / "store" / next(s["key"] for s in stages if s["name"] == name)


@torch.no_grad()
def says(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits[0]


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["weak", "cong-s", "cong_s", "cong", "base", "untuned"])
def test_an_exported_model_says_what_the_trained_one_says(system, finished, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = named(finished, system)
    files = {file.name for file in export_model(trained, tmp_path / "x" / "model")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "w2sg.json"} <= files
    assert not any("adapter" in name for name in files)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "model")
    source = find(trained.spec, trained.role)
    saved = None if trained.folder is None else trained.folder / "model"
    own = load_policy(source, saved, trainable=False).model
    assert torch.allclose(says(model), says(own), atol=1e-5, rtol=0)
    if saved is not None:  # and that is not what it said before
        assert not torch.allclose(says(model), says(load_policy(source, trainable=False).model), atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x" / "model")
    assert tokenizer.chat_template == (None if system in ("weak", "untuned") else TEMPLATE)
    assert tokenizer("good question?").input_ids == source.tokenizer("good question?").input_ids
    stop = model.generation_config.eos_token_id
    assert set(source.chat.stop) <= set(stop if isinstance(stop, list) else [stop])


def test_a_stage_is_exported_without_naming_its_run(finished, tmp_path):
    folder = stage(finished, "cong")
    trained = named(finished, None, folder)
    assert (trained.name, trained.role, trained.folder.name) == ("cong", "strong", folder.name)
    with pytest.raises(UserError, match="stage of cong, not of weak"):
        named(finished, "weak", folder)
    with pytest.raises(UserError, match="this run has no cong-reference"):
        named(finished, None, stage(finished, "cong-reference"))
    shutil.copytree(folder, tmp_path / "store" / folder.name)
    with pytest.raises(UserError, match=r"no finished run below .* names the stage cong-"):
        named(tmp_path, None, tmp_path / "store" / folder.name)


def test_a_pruned_or_damaged_stage_says_how_it_is_made_anew(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "a=1,b=2", out / "a=1,b=2")
    report = json.loads((out / "a=1,b=2" / "report.json").read_text())
    report["config"]["store"] = str(out / "elsewhere")
    (out / "a=1,b=2" / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"stage of cong, cong-\w+, is not in .*pruned.*root=.*w2sg train"):
        named(out, "cong")
    folder = out / "moved" / stage(finished, "cong").name
    shutil.copytree(stage(finished, "cong"), folder)
    assert find_finished(out / "a=1,b=2", "cong", out, out / "moved").folder == folder
    (folder / "model" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"damaged \(model/adapter_config.json is missing\); start the run again"):
        find_finished(out / "a=1,b=2", "cong", out, out / "moved")


def test_adapters_are_not_merged_into_another_base(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "a=1,b=2", out / "a=1,b=2")
    report = json.loads((out / "a=1,b=2" / "report.json").read_text())
    other = save_tiny_model(tmp_path / "other", "llama", seed=7)
    report["config"]["strong"]["name"] = str(other)
    (out / "a=1,b=2" / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="is not the model any more that cong-"):
        named(out, "cong")


@pytest.mark.slow
def test_what_cannot_be_exported_is_said(finished, pairs_folder, tmp_path):
    console = Plain(quiet=True)
    with pytest.raises(UserError, match=r"this run has no nobody: untuned, base, weak, cong-s, cong$"):
        named(finished, "nobody")
    assert named(finished, "student").name == "cong"
    with pytest.raises(UserError, match="say which model of the run you mean: untuned, base, weak"):
        named(finished, None)
    with pytest.raises(UserError, match="there is no folder"):
        named(finished, "cong", tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no finished run"):
        named(finished, "cong", finished)
    (tmp_path / "begun" / ".hydra").mkdir(parents=True)
    with pytest.raises(UserError, match="is not finished"):
        named(finished, "cong", tmp_path / "begun")
    with pytest.raises(UserError, match="is a saved model already"):
        print_export(finished / "models" / "weak", tmp_path / "x", None, finished, finished / "store", console)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UserError, match="there is something at"):
        export_model(named(finished, "cong"), tmp_path / "full")
    overrides = [
        "weak=bow",
        "strong=bow",
        "dataset=local",
        f"dataset.path={pairs_folder}",
        "trainer=cpu",
        "logger=none",
    ]
    run_method(check(compose(*overrides, f"out={tmp_path}")), tmp_path / "scorers", [])
    with pytest.raises(UserError, match=r"score texts and do not write \(method=finetune\)"):
        find_finished(tmp_path / "scorers", "student", tmp_path, tmp_path / "store", "harness")


def test_a_full_disk_leaves_nothing_of_an_export(monkeypatch, tmp_path):
    import errno

    class Model:
        def save_pretrained(self, folder):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("w2sg.models.export.load_merged", lambda trained: (Model(), None))
    trained = FinishedModel("weak", None, "weak", None, None, tmp_path, "", 0)
    with pytest.raises(UserError, match=r"to: .*cannot be written .No space left on device.*; free space"):
        export_model(trained, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"to: .*cannot be written"):
        export_model(trained, tmp_path / "file" / "model")


def test_a_harness_that_is_half_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    before = list(sys.path)
    with (
        pytest.raises(UserError, match=r"lm-eval is not wholly installed.*pip install lm-eval"),
        harness_imported(),
    ):
        pass
    assert sys.path == before


def test_a_folder_for_results_is_tried_before_the_work(tmp_path):
    writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"to: .*cannot be written"):
        writable(tmp_path / "file" / "folder")


# -- the harness ------------------------------------------------------------------------------------------------------


def harness(place, system, options, console=None, baseline=False, to=None, out=Path("nowhere")):
    return run_harness(place, system, options, baseline, to, out, out / "store", console or Plain(quiet=True))


@pytest.mark.slow
@needs_harness
def test_the_harness_evaluates_a_system_and_its_base(finished, tasks, tmp_path, capsys):
    options = Options(["tiny_choice", "tiny_words"], include=tasks)
    place = finished / "a=1,b=2"
    found = harness(place, "cong", options, Plain(width=120), baseline=True, to=tmp_path)
    choice, words = found
    assert [(r["task"], r["metric"], r["examples"]) for r in found] == [
        ("tiny_choice", "acc", 12),
        ("tiny_words", "exact_match", 6),
    ]
    # by hand: the likelier continuation
    for system, value in (("cong", choice["value"]), ("base", choice["before_value"])):
        assert value == pytest.approx(accuracy(*load_merged(named(finished, system)), tasks))
    assert choice["difference"] == pytest.approx(choice["value"] - choice["before_value"])
    assert choice["difference_stderr"] >= 0
    assert 0 <= words["value"] <= 1
    table = capsys.readouterr().out
    assert all(word in table for word in ("tiny_choice", "acc ↑", "cong", "base", "difference", "harness.json"))
    saved = json.loads((tmp_path / "harness.json").read_text())["rows"]
    assert saved == found
    assert saved[0]["stage"] == stage(finished, "cong").name
    assert "each" not in saved[0]
    # another model beside it; the same one in its own place
    harness(place, "weak", Options(["tiny_choice"], include=tasks), to=tmp_path)
    harness(place, "cong", Options(["tiny_choice"], include=tasks), to=tmp_path)
    saved = json.loads((tmp_path / "harness.json").read_text())["rows"]
    assert sorted((r["system"], r["task"]) for r in saved) == [
        ("cong", "tiny_choice"),
        ("cong", "tiny_words"),
        ("weak", "tiny_choice"),
    ]


@torch.no_grad()
def accuracy(model, tokenizer, tasks: Path) -> float:
    right = []
    for line in (tasks / "choice.jsonl").read_text().splitlines():
        row, scores = json.loads(line), []
        prompt = tokenizer(f"Human: {row['question']}\n\nAssistant:").input_ids
        for choice in row["choices"]:
            reply = tokenizer(f" {choice}").input_ids
            logs = model(input_ids=torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
            scores.append(sum(logs[len(prompt) - 1 + k, token].item() for k, token in enumerate(reply)))
        right.append(scores[row["answer"]] == max(scores))
    return sum(right) / len(right)


@pytest.mark.slow
@needs_harness
def test_an_exported_folder_gets_what_its_run_gets(finished, tasks, tmp_path):
    options = Options(["tiny_choice"], include=tasks, limit=5, fewshot=1, batch_size=2)
    export_model(named(finished, "cong"), tmp_path / "exported")
    (mine,) = harness(tmp_path / "exported", None, options, baseline=True)
    (its,) = harness(stage(finished, "cong"), None, options, baseline=True, to=tmp_path, out=finished)
    same = ("value", "stderr", "before_value", "difference", "difference_stderr", "examples", "fewshot", "limit")
    assert [mine[k] for k in same] == [its[k] for k in same]
    assert (mine["examples"], mine["fewshot"], mine["limit"]) == (5, 1, 5)
    assert (tmp_path / "exported" / "harness.json").is_file()
    (chat,) = harness(tmp_path / "exported", None, Options(["tiny_choice"], include=tasks, chat=True))
    assert chat["chat"]
    assert len(json.loads((tmp_path / "exported" / "harness.json").read_text())["rows"]) == 2


@needs_harness
def test_what_the_harness_cannot_do_is_said(finished, tasks, tmp_path):
    place = finished / "a=1,b=2"
    with pytest.raises(UserError, match=r"lost cannot be loaded.*nowhere.jsonl.*HF_HOME=FOLDER.*include=FOLDER"):
        harness(place, "cong", Options(["lost"], include=tasks))
    with pytest.raises(UserError, match="include: there is no folder"):
        harness(place, "cong", Options(["arc_easy"], include=tmp_path / "nowhere"))
    with pytest.raises(UserError, match="this model's tokenizer has no chat template"):
        harness(place, "weak", Options(["tiny_choice"], include=tasks, chat=True))
    with pytest.raises(UserError, match="baseline: nothing says what base was trained from"):
        harness(place, "base", Options(["tiny_choice"], include=tasks), baseline=True)
    with pytest.raises(UserError, match=r"system: .* is one saved model"):
        harness(finished / "models" / "weak", "cong", Options(["tiny_choice"], include=tasks))
    (tmp_path / "harness.json").write_text("[]")
    with pytest.raises(UserError, match="holds something else than results"):
        harness(place, "cong", Options(["tiny_choice"], include=tasks, limit=2), to=tmp_path)


def test_without_the_package_the_extra_is_named(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("w2sg.cli.harness.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install lm-eval"):
        harness(finished / "a=1,b=2", "cong", Options(["arc_easy"]))


def results(values: list[float], value: float) -> dict:
    return {
        "results": {"t": {"alias": "t", "sample_len": 4, "m,none": value, "m_stderr,none": "N/A"}},
        "samples": {"t": [{"doc_id": k, "filter": "none", "m": v} for k, v in enumerate(values)]},
        "higher_is_better": {"t": {"m": False}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
        "n-shot": {"t": 0},
    }


def test_differences_have_the_standard_error_of_pairs(capsys):
    (own,) = result_rows("cong", results([1.0, 1.0, 0.0, 1.0], 0.75), Options(["t"]))
    (base,) = result_rows("base", results([1.0, 0.0, 0.0, 1.0], 0.5), Options(["t"]))
    found = with_baseline(own, base)
    assert (found["difference"], own["stderr"], own["higher_is_better"]) == (0.25, None, False)
    assert found["difference_stderr"] == pytest.approx(0.5 / math.sqrt(4))  # differences 0, 1, 0, 0
    (perplexity,) = result_rows("cong", results([1.0, 2.0, 3.0, 4.0], 12.0), Options(["t"]))  # no mean of its examples
    assert with_baseline(perplexity, perplexity)["difference_stderr"] is None
    (lost,) = result_rows("cong", results([1.0], math.inf), Options(["t"]))
    assert lost["value"] is None
    assert with_baseline(lost, base)["difference"] is None
    show_rows([found, with_baseline(lost, base)], Plain(width=80))
    table = capsys.readouterr().out
    assert "m ↓" in table
    assert "+0.250 ± 0.250" in table


# -- as typed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["export=run"], "to: say which folder"),
        (["harness=run"], "tasks: name the harness's tasks"),
        (["export=run", "harness=run", "to=x"], "export: one thing at a time"),
        (["harness=run", "tasks=[a]", "limit=0"], "limit: "),
        (["harness=run", "tasks=[a]", "batch_size=all"], "batch_size: "),
    ],
)
def test_options_are_checked(overrides, words):
    with pytest.raises(ConfigError, match=words):
        check_evaluate(compose(*overrides, name="evaluate"))


@pytest.mark.slow
@needs_harness
def test_both_commands_run_as_typed(finished, tasks, tmp_path):
    run = f"{finished}/a=1,b=2"  # signs that Hydra has another use for
    found = run_script("evaluate.py", f"export={run}", "system=cong", f"to={tmp_path}/x=1", f"out={finished}")
    assert "written to" in found.stdout
    # a task that imports the package `evaluate`, which has our script's name
    words = (tasks / "tiny_words.yaml").read_text()
    words = words.replace('"Human: {{question}}\\n\\nAssistant:"', "!function metric.named")
    assert "!function" in words
    (tasks / "metric.py").write_text(
        "import evaluate\n\ndef named(doc):\n    assert evaluate.load\n    return doc['question']\n"
    )
    (tasks / "tiny_words.yaml").write_text(words)
    found = run_script(
        "evaluate.py", f"harness={run}", "system=cong", "tasks=[tiny_words]", f"include={tasks}", f"to={tmp_path}"
    )
    assert "exact_match" in found.stdout
    assert (tmp_path / "harness.json").is_file()
    found = run_script(
        "evaluate.py", f"harness={tmp_path}/x=1", "tasks=[tiny_choise,gsm8k]", f"include={tasks}", check=False
    )
    assert found.returncode == 1
    assert "the harness has no task 'tiny_choise'; near it: tiny_choice" in found.stderr
    assert "Traceback" not in found.stderr


def test_packages_beside_an_installed_w2sg_are_found(tmp_path):
    """A wheel lies in the folder of all packages; a clone's folder has the script evaluate.py."""
    path = ["/elsewhere", str(tmp_path)]
    assert lm_harness._without_script(path, tmp_path) == path
    (tmp_path / "evaluate.py").touch()
    assert lm_harness._without_script(path, tmp_path) == ["/elsewhere"]
