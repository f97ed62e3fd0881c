"""Whole experiments on tiny stand-ins, through the command line as a user runs it."""

import json
import os
import sys
import time

import commands
import pyarrow.parquet as pq
import pytest
from conftest import run_script
from runs import assert_planned, planned, stages_of
from runs import label_arguments as arguments
from runs import run_labels as run


def test_the_whole_experiment_and_its_files(pairs_folder, tiny_gpt2, tmp_path):
    content = run(pairs_folder, tiny_gpt2, tmp_path, "strong.epochs=2", "loss=rkl")
    on_disk = json.loads((tmp_path / "run" / "report.json").read_text())
    assert on_disk == json.loads(json.dumps(content))
    assert {
        "method",
        "dataset",
        "weak",
        "strong",
        "loss",
        "seed",
        "metrics",
        "pgr",
        "data",
        "stages",
        "versions",
    } <= set(on_disk)
    for model in ("weak", "student", "ceiling"):
        assert {"accuracy", "auroc", "nll", "brier", "ece", "overconfidence"} <= set(on_disk["metrics"][model])
    assert {"value", "low", "high", "resolved"} <= set(on_disk["pgr"])
    table = pq.read_table(tmp_path / "run" / "predictions.parquet")
    assert table.column_names[:6] == ["id", "prompt", "label", "weak", "student", "ceiling"]
    assert table.column_names[6:] == ["weak_label", "prompt_text", "first_text", "second_text"]
    assert table.num_rows == on_disk["data"]["sizes"]["test"] == 64
    # the metrics are those of the table
    right = [(z >= 0) == (y == 0) for z, y in zip(*(table[c].to_pylist() for c in ("student", "label")), strict=True)]
    assert sum(right) / 64 == on_disk["metrics"]["student"]["accuracy"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<svg role="img" aria-label=' in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
    for stage in ("weak", "student", "ceiling"):
        assert 0.5 < stages_of(content)[stage]["useful_token_fraction"] <= 1
        assert stages_of(content)[stage]["seconds"] > 0


def test_the_same_command_finds_everything_in_the_store(pairs_folder, tiny_gpt2, tmp_path):
    first = run(pairs_folder, tiny_gpt2, tmp_path)
    second = run(pairs_folder, tiny_gpt2, tmp_path, "trainer.checkpoint_minutes=1", "logger=csv")
    assert_planned(planned(arguments(pairs_folder, tiny_gpt2, tmp_path), store=tmp_path / "empty"), first)
    assert not any(s["cached"] for s in first["stages"])
    assert all(s["cached"] for s in second["stages"])
    assert first["metrics"] == second["metrics"]


@pytest.mark.slow
def test_a_sweep_over_losses_trains_one_weak_model_and_one_ceiling(pairs_folder, tiny_gpt2, tmp_path):
    made = []
    for loss in ("ce", "kl", "rce", "rkl"):
        content = run(pairs_folder, tiny_gpt2, tmp_path, f"loss={loss}")
        made += [s["name"] for s in content["stages"] if not s["cached"]]
    assert made.count("weak") == made.count("ceiling") == 1
    assert made.count("student") == 4


@pytest.mark.slow
def test_what_changes_a_result_changes_its_key_and_nothing_else_does(pairs_folder, tiny_gpt2, tmp_path):
    def keys(*change):
        return {
            stage.name: stage.key for stage in planned(arguments(pairs_folder, tiny_gpt2, tmp_path, *change)).stages
        }

    base = keys()
    for change, makes in {
        "dataset.noise.kind=flip dataset.noise.rate=0.3": {"student"},
        "optim.hard_label_clamp=0.01": {"student"},
        "seed=1": {"weak", "student", "ceiling"},
        "strong.lr=0.001": {"student", "ceiling"},
        "weak.lr=0.02": {"weak", "student"},
        "optim.full.max_grad_norm=0.5": {"weak", "student", "ceiling"},
        "strong.micro_batch_size=4": set(),
        "trainer.tokens_per_eval_batch=512": set(),
        "strong.share_prompt=false": set(),
    }.items():
        now = keys(*change.split())
        assert {n for n in ("weak", "student", "ceiling") if now[n] != base[n]} == makes, change


@pytest.mark.slow
def test_cpu_runs_repeat_to_the_bit(pairs_folder, tiny_gpt2, tmp_path):
    one, two = (run(pairs_folder, tiny_gpt2, tmp_path / d, "loss=conf_ce") for d in "ab")
    assert one["metrics"] == two["metrics"]


@pytest.mark.parametrize(
    "loss", ["ce", "kl", "rce", "rkl", "conf_ce", "conf_rce", "product", "cace", "symmetric", "jeffreys"]
)
def test_every_loss_runs_on_frozen_features(loss, pairs_folder, tiny_gpt2, tmp_path_factory):
    out = tmp_path_factory.getbasetemp() / "losses"  # shared: features are made once
    content = run(
        pairs_folder,
        tiny_gpt2,
        out,
        f"loss={loss}",
        "strong.tune=head",
        "strong.feature_layer=auto",
        "strong.feature_layer_candidates=[1,2]",
        "optim.head.epochs=3",
    )
    names = stages_of(content)
    assert names["student"]["tokens"] == 0
    assert {"features-on-transfer", "layer"} <= names.keys()
    assert content["training"]["layer"]["layer"] in (1, 2)


@pytest.mark.parametrize(
    "change",
    [
        ("strong.tune=lora", "optim.lora.epochs=1"),
        ("strong.tune=head", "strong.head=mixture", "strong.experts=3", "optim.head.epochs=2"),
        ("strong.gradient_checkpointing=true",),
        ("optim.full.optimizer=adafactor", "optim.full.schedule=linear"),
        ("strong.random_init=true", "strong.keep_layers=1"),
        ("optim.full.validation_fraction=0.2", "optim.full.patience=1", "strong.epochs=3"),
        ("optim.select_on=gold", "optim.full.validation_fraction=0.2"),
        ("dataset.noise.kind=hard_flip", "dataset.noise.rate=0.5", "loss=rce"),
        ("method.ceiling_split=weak_train",),
        ("optim.label_smoothing=0.1",),
        ("trainer.precision=bf16-mixed",),
        ("strong.dtype=bfloat16",),
    ],
    ids=lambda c: c[0],
)
@pytest.mark.slow
def test_options_run_and_tell_the_report(change, pairs_folder, tiny_llama, tmp_path):
    content = run(pairs_folder, tiny_llama, tmp_path, *change)
    if "optim.select_on=gold" in change:
        assert any("GOLD" in line for line in content["warnings"])
    if "loss=rce" in change:
        assert content["training"]["student"]["hard_labels_clamped"] == content["data"]["label_noise"]["rows_hit"] > 20
    if "trainer.precision=bf16-mixed" in change:
        assert content["arithmetic"].startswith(
            "mixed precision: matrix products in bf16, those that stay fp32 in fp32"
        )
        assert content["arithmetic"] in (tmp_path / "run" / "report.html").read_text()
    if "method.ceiling_split=weak_train" in change:
        assert content["training"]["ceiling_split"] == "weak_train"


def test_classification(tmp_path, tiny_gpt2):
    import random

    draw = random.Random(0)
    folder = tmp_path / "classes"
    folder.mkdir()
    words = [["red", "rose"], ["blue", "sea"], ["green", "leaf"]]
    for split, count in {"ground_truth": 90, "transfer": 90, "test": 60}.items():
        rows = [
            {"text": " ".join([f"{split} {i}", *draw.choices(words[i % 3], k=4)]), "label": i % 3} for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = run(folder, tiny_gpt2, tmp_path, "weak.lr=0.05", "loss=rkl")
    assert content["metrics"]["weak"]["accuracy"] > 0.8
    table = pq.read_table(tmp_path / "run" / "predictions.parquet")
    assert len(table["student"][0].as_py()) == 3


def test_a_loss_from_outside_counts_by_its_source(pairs_folder, tiny_gpt2, tmp_path, monkeypatch):
    module = tmp_path / "mine.py"
    text = (
        "def half(logits, weak, progress):\n"
        "    from w2sg.losses import cross_entropy\n"
        "    return {} * cross_entropy(logits, weak)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = []
    for factor in (0.5, 0.25):
        module.write_text(text.format(factor))
        sys.modules.pop("mine", None)
        import linecache

        linecache.clearcache()
        content = run(pairs_folder, tiny_gpt2, tmp_path, "loss._target_=mine.half")
        keys.append(stages_of(content)["student"]["key"])
    assert keys[0] != keys[1]


# -- loggers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_csv_and_tensorboard_curves_are_by_stage(pairs_folder, tiny_gpt2, tmp_path):
    run(pairs_folder, tiny_gpt2, tmp_path, "logger=csv", "logger.every=2")
    curve = (tmp_path / "run" / "csv" / "student" / "metrics.csv").read_text()
    header, *rows = curve.splitlines()
    assert "loss" in header
    steps = [row.split(",")[header.split(",").index("step")] for row in rows]
    assert steps == ["2", "4", "6"]  # six steps, a point every two
    run(pairs_folder, tiny_gpt2, tmp_path, "logger=tensorboard", "seed=1")
    assert list((tmp_path / "run" / "tensorboard" / "student").glob("events*"))
    run(pairs_folder, tiny_gpt2, tmp_path, "logger=csv", "logger.every=2")  # from the store
    assert (tmp_path / "run" / "csv" / "student" / "metrics.csv").read_text() == curve
    assert "cached: true" in (tmp_path / "run" / "csv" / "student" / "hparams.yaml").read_text()


@pytest.mark.slow
def test_wandb_offline_is_one_run_with_stage_curves_and_a_summary(pairs_folder, tiny_gpt2, tmp_path):
    result = run_script(
        "train.py",
        *arguments(pairs_folder, tiny_gpt2, tmp_path, "logger=wandb", "logger.mode=offline", "logger.every=2"),
    )
    assert "report:" in result.stdout
    runs = list(tmp_path.glob("*/wandb/offline-run-*"))
    assert len(runs) == 1
    log = next(runs[0].glob("*.wandb")).read_bytes()
    for word in (b"student/loss", b"weak/loss", b"student/step", b"pgr/gap", b"student/accuracy"):
        assert word in log


# -- what happens to processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_runs_end_with_the_numbers_of_an_unbroken_one(pairs_folder, tiny_llama, tmp_path):
    """SIGKILL at several moments, the same command again each time."""
    more = ["strong.epochs=8", "loss=conf_ce", "trainer.checkpoint_minutes=0"]
    whole = arguments(pairs_folder, tiny_llama, tmp_path / "whole", *more)
    run_script("train.py", *whole)
    broken = arguments(pairs_folder, tiny_llama, tmp_path / "broken", *more)
    resumed = 0
    for moment in ("weak", "student", "ceiling"):
        process = commands.start("train.py", broken, {**os.environ}, os.devnull, os.devnull)
        deadline = time.time() + 120
        store = tmp_path / "broken" / "store"
        while time.time() < deadline and process.is_alive():
            if list(store.glob(f"{moment}-*.part/scratch/fit-*.ckpt")):
                break
            time.sleep(0.005)
        process.kill()
        process.join()
        resumed += bool(list(store.glob("*.part")))
    assert resumed >= 2  # really killed inside stages
    run_script("train.py", *broken)
    reports = [json.loads(next((tmp_path / d).glob("*/report.json")).read_text()) for d in ("whole", "broken")]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[0]["pgr"] == reports[1]["pgr"]


@pytest.mark.slow
def test_multirun_shares_the_store_and_gives_each_job_the_folder_of_a_single_run(pairs_folder, tiny_gpt2, tmp_path):
    run_script("train.py", "-m", *arguments(pairs_folder, tiny_gpt2, tmp_path, "loss=ce,rkl", "seed=0,1"), timeout=400)
    reports = [json.loads(p.read_text()) for p in tmp_path.glob("*/report.json")]
    assert len(reports) == 4
    made = [s["name"] for r in reports for s in r["stages"] if not s["cached"]]
    assert made.count("weak") == made.count("ceiling") == 2
    assert made.count("student") == 4
    again = run_script("train.py", *arguments(pairs_folder, tiny_gpt2, tmp_path, "loss=rkl", "seed=1"))
    assert len(list(tmp_path.glob("*/report.json"))) == 4
    assert "working on" not in again.stdout


@pytest.mark.slow
def test_the_store_can_be_listed_explained_and_pruned(pairs_folder, tiny_gpt2, tmp_path):
    for loss in ("ce", "rkl"):
        run(pairs_folder, tiny_gpt2, tmp_path, f"loss={loss}")  # both write the same report: the first is forgotten
    listed = run_script("evaluate.py", "store=list", f"out={tmp_path}").stdout
    assert listed.count("student-on-test") == 2
    key = next(p.name for p in (tmp_path / "store").iterdir() if p.name.startswith("student-") and "on" not in p.name)
    assert "objective.loss._target_" in run_script("evaluate.py", "store=why", f"key={key}", f"out={tmp_path}").stdout
    before = len(list((tmp_path / "store").iterdir()))
    run_script("evaluate.py", "store=prune", f"out={tmp_path}")
    assert len(list((tmp_path / "store").iterdir())) == before
    run_script("evaluate.py", "store=prune", "apply=true", f"out={tmp_path}")
    assert before - len([p for p in (tmp_path / "store").iterdir() if not p.name.startswith(".")]) >= 2
    assert all(s["cached"] for s in run(pairs_folder, tiny_gpt2, tmp_path, "loss=rkl")["stages"])
