"""Many runs as one result: what is a setting, what a seed, and which differences are there."""

import copy
import csv
import functools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import compose, run_script
from scipy import stats

from w2sg.compare.collect import collect, heading
from w2sg.compare.label_section import findings
from w2sg.config.check import check
from w2sg.errors import UserError

LOSSES = {"ce": "cross_entropy", "kl": "forward_kl", "rkl": "reverse_kl"}


def finished(folder, config, right, ids=None, seconds=10.0, prompts=None):
    """A run's folder as `Report.write` leaves it, with chosen correctness per model."""
    n = len(next(iter(right.values())))
    ids = ids or [f"row{i:04d}" for i in range(n)]
    order = np.random.default_rng(len(str(folder))).permutation(n)  # rows are joined by id, not by position
    labels = np.arange(n) % 2
    logits = {name: np.where(hit == (labels == 0), 1.5, -1.5) for name, hit in right.items()}
    folder.mkdir(parents=True)
    columns = {"id": [ids[i] for i in order], "label": labels[order].tolist()}
    columns |= {} if prompts is None else {"prompt": [prompts[i] for i in order]}
    pq.write_table(
        pa.table(columns | {k: v[order].tolist() for k, v in logits.items()}), folder / "predictions.parquet"
    )
    measured = {"accuracy": 0.5, "auroc": 0.5, "nll": 0.6, "ece": 0.1, "overconfidence": 0.02, "intervals": {}}
    parts = {k: {"value": 0.01} for k in ("gain", "misfit", "remainder")}
    gap = float(right["ceiling"].mean() - right["weak"].mean())
    content = {
        "config": config,
        "metrics": {name: measured for name in right},
        "diagnostics": {"test": parts},
        "data": {"length_only": {"accuracy": 0.55}},
        "pgr": {"value": 0.5, "low": 0.1, "high": 0.9, "resolved": True, "gap": gap, "gap_low": 0.01, "gap_high": 0.2},
        "stages": [{"key": f"weak-{config['seed']}", "seconds": seconds}],
    }
    (folder / "report.json").write_text(json.dumps(content))


@functools.cache
def composed(loss, more):
    return check(compose(f"loss={loss}", "out=somewhere", *more)).model_dump(by_alias=True)


def config(loss="ce", seed=0, *more):
    """Composing takes half a second; seeds of runs and splits are numbers that are put in."""
    split = next((int(m.partition("=")[2]) for m in more if m.startswith("dataset.split_seed=")), None)
    found = composed(loss, tuple(m for m in more if not m.startswith("dataset.split_seed="))) | {"seed": seed}
    return found if split is None else found | {"dataset": found["dataset"] | {"split_seed": split}}


def draw(rate, seed, n=1500):
    return np.random.default_rng([seed, round(1000 * rate)]).random(n) < rate


@pytest.fixture
def sweep(tmp_path):
    """3 losses x 3 seeds x 2 noise rates; rkl is truly better by 10 points, ce and kl are the same."""
    for rate in (0.0, 0.4):
        for seed in range(3):
            for loss in LOSSES:
                options = ["dataset.noise.kind=flip", f"dataset.noise.rate={rate}", f"out=elsewhere{seed}"]
                right = {
                    "weak": draw(0.7, seed),
                    "student": draw(0.74, seed) if loss != "rkl" else draw(0.84, 50 + seed),
                    "ceiling": draw(0.85, 100 + seed),
                }
                finished(tmp_path / f"{loss}-{seed}-{rate}", config(loss, seed, *options), right)
    return tmp_path


def test_a_sweep_becomes_settings_losses_and_seeds(sweep):
    found = collect(sweep)
    assert found.content["runs"] == 18
    assert len(found.cells) == 6
    assert {len(cell.runs) for cell in found.cells} == {3}
    assert [cell.loss for cell in found.cells[:3]] == ["cross_entropy", "forward_kl", "reverse_kl"]
    assert {cell.setting for cell in found.cells} == {
        "noise.rate 0",
        "noise.rate 0.4",
    }
    assert heading(found.content) == ("18 runs: bag-of-words → SmolLM2-135M-Instruct.Q4_1.gguf, critics, finetune")
    row = found.content["cells"][0]
    assert row["accuracy"]["student"]["mean"] == pytest.approx(np.mean([draw(0.74, s).mean() for s in range(3)]))
    sd = np.std([draw(0.74, s).mean() for s in range(3)], ddof=1)
    assert row["accuracy"]["student"]["sd"] == pytest.approx(sd)
    assert row["pgr"]["over"] == "3 seeds of one split, and test prompts"
    assert row["pgr"]["resolved"]
    assert row["pgr_over_seeds_alone"]["over"] == "seeds"


def test_differences_between_losses_are_paired_and_equal_losses_are_called_identical(sweep):
    found = collect(sweep).content
    pairs = {(e["a"], e["b"]): e for e in found["between_losses"] if e["setting"].endswith("rate 0")}
    assert pairs["forward_kl", "cross_entropy"]["identical"]
    assert pairs["forward_kl", "cross_entropy"]["p"] == 1.0
    better = pairs["reverse_kl", "cross_entropy"]
    assert better["difference"] > 0.03
    assert better["p_holm"] < 0.05
    assert len(better["mcnemar_p"]) == 3
    assert better["wins"] == 3
    # two settings, and in each one test that is not of equals: reverse KL against cross entropy and its twin
    assert better["p_holm"] == pytest.approx(min(1.0, 2 * better["p"]))
    assert pairs["reverse_kl", "forward_kl"]["p_holm"] == better["p_holm"]
    ahead = {(e["a"], e["b"]): e for e in found["ahead"]}
    assert ahead["reverse_kl", "cross_entropy"]["ahead"] == 2
    assert ahead["reverse_kl", "cross_entropy"]["p"] == 0.5
    assert found["seconds"]["computed"] == 30.0  # one weak model per seed
    assert found["seconds"]["without_store"] == 180.0


@pytest.mark.drawn
def test_the_files_and_the_page_say_the_same(sweep, capsys):
    from w2sg.console import Plain

    found = collect(sweep)
    found.write(sweep)
    found.show(Plain(width=160))
    shown = capsys.readouterr().out
    assert "student against teacher: better in" in shown
    rows = list(csv.DictReader((sweep / "summary.csv").read_text().splitlines()))
    assert len(rows) == 18
    assert {r["seed"] for r in rows} == {"0", "1", "2"}
    page = (sweep / "summary.html").read_text()
    assert page.count("<svg") == 3  # bars, lines over the noise rate, differences
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "identical" in page
    assert json.loads((sweep / "summary.json").read_text())["runs"] == 18
    assert collect(sweep).content["runs"] == 18  # the summary itself is no run


def test_the_newer_of_two_runs_counts_and_damaged_ones_are_named(sweep):
    again = {m: draw(0.9, 7) for m in ("weak", "student", "ceiling")}
    options = ["dataset.noise.kind=flip", "dataset.noise.rate=0.0", "dataset.path=x", "logger=none"]
    earlier = copy.deepcopy(config("ce", 0, *options))
    del earlier["optim"]["full"]["stochastic_rounding"]  # an option that came later, and is off
    finished(sweep / "z" / "again", earlier, again)
    (sweep / "broken").mkdir()
    (sweep / "broken" / "report.json").write_text("{")
    (sweep / "old").mkdir()
    (sweep / "old" / "report.json").write_text("{}")
    found = collect(sweep)
    assert found.content["runs"] == 18
    assert any("1 older run of" in line for line in found.content["left_out"])
    assert any(line.startswith("broken: cannot be read") for line in found.content["left_out"])
    assert any(line.startswith("old: its report is of an earlier version") for line in found.content["left_out"])
    assert found.cells[0].accuracy("student")["mean"] > 0.78


def test_other_models_datasets_and_loss_options_are_told_apart_without_their_details(tmp_path):
    right = {m: draw(0.8, 1, 200) for m in ("weak", "student", "ceiling")}
    runs = [
        ("conf_ce", []),
        ("conf_ce", ["loss.alpha=0.75"]),
        ("ce", ["weak=gpt2"]),
        ("ce", ["dataset=hh_rlhf"]),
        ("ce", ["strong.lr=1e-4"]),
    ]
    for k, (loss, more) in enumerate(runs):
        finished(tmp_path / str(k), config(loss, 0, *more), right)
    found = collect(tmp_path)
    words = {cell.setting for cell in found.cells}
    assert len(found.cells) == 5
    assert sorted(c.loss for c in found.cells if c.loss.startswith("conf")) == [
        "confidence(alpha=0.5)",
        "confidence(alpha=0.75)",
    ]
    assert any(w.startswith("gpt2") for w in words)
    assert any("hh_rlhf" in w for w in words)
    assert any("strong.lr 0.0001" in w for w in words)
    assert not any("max_length" in w or "arch" in w for w in words)


def test_seeds_with_test_rows_of_their_own_are_not_paired_by_row(tmp_path):
    for seed in range(3):
        ids = [f"{seed}-{i}" for i in range(400)]
        for loss, rate in (("ce", 0.7), ("rkl", 0.75)):
            right = {"weak": draw(0.6, seed, 400), "student": draw(rate, seed, 400), "ceiling": draw(0.9, seed, 400)}
            finished(tmp_path / f"{loss}{seed}", config(loss, 0, f"dataset.split_seed={seed}"), right, ids)
    found = collect(tmp_path)
    assert len(found.cells) == 2
    assert {len(cell.runs) for cell in found.cells} == {3}
    assert found.content["cells"][0]["pgr"]["over"] == "3 splits, and test prompts"
    (pair,) = found.content["between_losses"]
    assert pair["seeds"] == 3
    found.write(tmp_path)


def test_seeds_of_a_split_are_averaged_before_splits_are_repeats(tmp_path):
    """Three seeds that say the same of a split are no three repeats: the interval is that of the splits."""
    means = []
    for split in range(3):
        ids = [f"{split}-{i}" for i in range(400)]
        for seed in range(3):
            right = {"weak": draw(0.6, split, 400), "student": draw(0.7, 10 + split, 400), "ceiling": draw(0.9, 5, 400)}
            right["student"][seed] ^= True  # else they would be one run
            finished(tmp_path / f"{split}{seed}", config("ce", seed, f"dataset.split_seed={split}"), right, ids)
        means.append(np.mean(right["student"]) - np.mean(right["weak"]))
    found = collect(tmp_path).content
    assert found["cells"][0]["repeats"] == "3 splits, 3 seeds of each averaged"
    (entry,) = found["student_against_teacher"]
    assert entry["p"] == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=0.2)
    assert "3 splits, 3 seeds of each averaged" in entry["test"]


def test_runs_that_are_one_run_count_once(tmp_path):
    """Files that come split are the same for all split seeds."""
    right = {"weak": draw(0.6, 1, 300), "student": draw(0.7, 2, 300), "ceiling": draw(0.8, 3, 300)}
    for split in range(3):
        finished(tmp_path / f"r{split}", config("ce", 0, f"dataset.split_seed={split}"), right)
    found = collect(tmp_path)
    assert found.content["runs"] == 1
    assert any(line.startswith("2 runs with the predictions, to the last digit,") for line in found.content["left_out"])


def test_a_corrected_p_is_never_below_its_own_even_where_twins_have_other_seeds(tmp_path):
    for seed in range(4):
        for loss in ("ce", "kl", "rkl"):
            if loss == "kl" and seed == 3:
                continue
            student = draw(0.74, seed, 400) if loss != "rkl" else draw(0.78, 50 + seed, 400)
            right = {"weak": draw(0.7, seed, 400), "student": student, "ceiling": draw(0.85, 100 + seed, 400)}
            finished(tmp_path / f"{loss}{seed}", config(loss, seed), right)
    found = collect(tmp_path).content
    for family in (found["student_against_teacher"], found["between_losses"]):
        assert all(entry["p_holm"] >= entry["p"] for entry in family)


def test_two_seeds_are_said_and_so_are_predictions_without_prompts(tmp_path):
    for seed in range(2):
        right = {"weak": draw(0.6, seed, 300), "student": draw(0.7, 9 + seed, 300), "ceiling": draw(0.9, 5, 300)}
        finished(tmp_path / f"r{seed}", config("ce", seed), right)
    found = collect(tmp_path)
    lines = " / ".join(findings(found.content))
    assert "two seeds in 1 of 1 cell" in lines
    assert "2 runs of an earlier version, without which test rows share a prompt" in lines
    found.write(tmp_path)
    assert "no interval here says what other training data would do" in (tmp_path / "summary.html").read_text()


def test_rows_of_one_prompt_are_one_whoever_says_so(tmp_path):
    """Twice the rows of every prompt are no more prompts: p and interval stay."""
    found = []
    for times in (1, 2):
        right = {"weak": draw(0.6, 1, 300), "student": draw(0.7, 2, 300), "ceiling": draw(0.9, 5, 300)}
        right = {name: np.repeat(hit, times) for name, hit in right.items()}
        prompts = np.repeat([f"p{i}" for i in range(300)], times).tolist()
        finished(tmp_path / str(times) / "run", config(), right, prompts=prompts)
        (entry,) = collect(tmp_path / str(times)).content["student_against_teacher"]
        found.append([entry["p"], entry["low"], entry["high"]])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_single_run_is_a_collection_too(tmp_path):
    right = {"weak": draw(0.6, 1, 300), "student": draw(0.7, 2, 300), "ceiling": draw(0.8, 3, 300)}
    finished(tmp_path / "one", config(), right)
    found = collect(tmp_path)
    assert found.content["cells"][0]["pgr"]["value"] == 0.5  # its own bootstrap
    found.write(tmp_path)
    assert "No two losses" in (tmp_path / "summary.html").read_text()


def test_no_folder_and_no_run_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        collect(tmp_path / "none")
    with pytest.raises(UserError, match="no finished run"):
        collect(tmp_path)


@pytest.mark.slow
def test_evaluate_gathers_from_the_command_line(sweep):
    done = run_script("evaluate.py", f"runs={sweep}")
    assert "summary.html" in done.stdout
    assert (sweep / "summary.html").exists()
