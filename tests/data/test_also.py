"""Second test sets: whose rows they are, what they leave out, and what a run measures on them."""

import json

import numpy as np
import pytest
from conftest import make_pairs, write_jsonl
from runs import CONG_SMALL, cong_arguments, label_arguments, planned, run_cong, run_labels, stages_of

from w2sg.data.also import entries
from w2sg.errors import UserError
from w2sg.metrics.over_sets import over_sets


def also(*sets) -> str:
    return f"dataset.also={json.dumps(list(sets)).replace(chr(34), '')}"


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Rows of other prompts, the first ten of them from the run's own test split; two subsets, and one too small."""
    own = make_pairs(64, 2)[:10]
    rows = [row | {"subset": "odd" if k % 2 else "even"} for k, row in enumerate(make_pairs(60, 9))]
    return write_jsonl(tmp_path_factory.mktemp("also") / "others.jsonl", [*own, *rows, rows[0] | {"subset": "one"}])


def test_every_model_is_measured_on_each_set(pairs_folder, tiny_gpt2, others, tmp_path):
    more = [also(f"{others}", f"{{name: few, path: {others}, size: 20}}"), f"store={tmp_path / 'store'}"]
    more += ["strong.tune=head", "optim.head.epochs=2"]
    report = run_labels(pairs_folder, tiny_gpt2, tmp_path, *more)
    sets = report["test_sets"]
    assert list(sets) == ["test", "others", "few"]
    assert [sets[name]["rows"] for name in sets] == [64, 60, 20]
    assert report["data"]["also"]["others"]["rows left out because their prompt is in the run's own splits"] == 10
    for name in ("weak", "student", "ceiling"):
        assert set(sets["others"]["accuracy"]) >= {name}
        assert sets["test"]["accuracy"][name]["value"] == report["metrics"][name]["accuracy"]
    assert {part: found["rows"] for part, found in sets["others"]["subsets"].items()} == {"even": 30, "odd": 30}
    halves = [found["accuracy"]["weak"]["value"] for found in sets["others"]["subsets"].values()]
    assert np.mean(halves) == pytest.approx(sets["others"]["accuracy"]["weak"]["value"])
    assert len(report["over_test_sets"]["holm"]) == 3
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "its own test split (in distribution)" in page
    assert "Subsets of others" in page
    plain = run_labels(pairs_folder, tiny_gpt2, tmp_path / "plain", *more[1:])
    assert "test_sets" not in plain
    assert "other_tests" not in plain["sections"]
    assert all(stage["cached"] for stage in plain["stages"]), "another test set changes no key"
    plan = planned(label_arguments(pairs_folder, tiny_gpt2, tmp_path, *more), store=tmp_path / "new")
    assert {"weak-on-also-few", "ceiling-on-also-others"} <= {stage.name for stage in plan.stages}
    assert stages_of(report).keys() == {stage.name for stage in plan.stages}


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["reviewz/x.jsonl"], "dataset.also, x: dataset.path: there is no file or folder reviewz/x.jsonl"),
        (["reviews_class"], "dataset.also: reviews_class has labelled texts, and the run preference pairs"),
        (["{dataset: reviewz}"], r"dataset.also\[0\].dataset: there is no reviewz"),
        (["reviews", "{name: reviews, path: x}"], "two test sets are called 'reviews'"),
    ],
)
def test_what_cannot_be_one_is_named(sets, words, pairs_folder, tiny_gpt2, tmp_path):
    with pytest.raises(UserError, match=words):
        run_labels(pairs_folder, tiny_gpt2, tmp_path, also(*sets))


def test_rows_that_are_all_in_the_runs_own_splits_are_refused(pairs_folder, tiny_gpt2, tmp_path):
    with pytest.raises(UserError, match="all 64 rows of test_set have a prompt that is in the run's own splits"):
        run_labels(pairs_folder, tiny_gpt2, tmp_path, also(f"{{name: test_set, path: {pairs_folder / 'test.jsonl'}}}"))


def test_the_mean_over_sets_counts_each_set_once_and_corrects_for_their_number():
    draw = np.random.default_rng(0)

    def one(n, weak, student, p):
        right = {name: draw.random(n) < a for name, a in (("weak", weak), ("student", student), ("ceiling", 0.95))}
        return {"right": right, "clusters": [str(k) for k in range(n)], "p": p}

    sets = {"a": one(4000, 0.6, 0.8, 0.001), "b": one(200, 0.6, 0.6, 0.04), "c": one(500, 0.6, 0.7, 0.02)}
    found = over_sets(sets)
    gains = [float(s["right"]["student"].mean() - s["right"]["weak"].mean()) for s in sets.values()]
    assert found["difference"]["value"] == pytest.approx(np.mean(gains))
    assert found["holm"] == pytest.approx({"a": 0.003, "b": 0.04, "c": 0.04})
    half = 4.302653 * np.std(gains, ddof=1) / np.sqrt(3)  # Student's t with 2 degrees of freedom
    assert found["over_sets"]["high"] - found["over_sets"]["value"] == pytest.approx(half, rel=1e-6)
    errors = [np.var(s["right"]["student"] * 1.0 - s["right"]["weak"]) / len(s["clusters"]) for s in sets.values()]
    width = 2 * 1.96 * np.sqrt(sum(errors)) / 3
    assert found["difference"]["high"] - found["difference"]["low"] == pytest.approx(width, rel=0.1)
    gaps = [float(s["right"]["ceiling"].mean() - s["right"]["weak"].mean()) for s in sets.values()]
    assert found["pgr"]["value"] == pytest.approx(np.mean(gains) / np.mean(gaps))
    assert over_sets({name: sets[name] for name in "ab"})["over_sets"]["low"] is None


def test_two_bags_of_words_read_by_their_own_buckets(pairs_folder, tiny_gpt2, tmp_path):
    small = ["strong=bow", "strong.bow.buckets=64"]
    alone = [*small, "weak=bow", "weak.bow.buckets=64"]
    one = run_labels(pairs_folder, tiny_gpt2, tmp_path / "one", *small, f"store={tmp_path / 'one-store'}")
    two = run_labels(pairs_folder, tiny_gpt2, tmp_path / "two", *alone, f"store={tmp_path / 'two-store'}")
    ceilings = [report["metrics"]["ceiling"] for report in (one, two)]
    assert ceilings[0] == ceilings[1]


def test_all_options_of_a_datasets_loader_go_to_it():
    (node,) = entries(
        [{"dataset": "questions", "path": "q.jsonl"}], {"name": "x", "strict": True, "max_chars": 9}
    ).values()
    assert (node["question"], node["split"], node["path"], node["strict"]) == ("question", "train", "q.jsonl", True)
    assert not {"defaults", "sizes", "zero_shot"} & node.keys()


@pytest.mark.slow
def test_a_run_whose_models_label_nothing_says_so(pairs_folder, models, others, tmp_path):
    content = run_cong(cong_arguments(pairs_folder, models), tmp_path, *CONG_SMALL, also(f"{others}"))
    assert any("nothing was measured on other test sets" in line for line in content["warnings"])
