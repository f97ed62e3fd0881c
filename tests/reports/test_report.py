"""What a run says of itself: diagnostics, warnings, the page, and the dashboard's copy."""

import json
import re
import types

import pytest
from runs import run_labels as run

from w2sg.errors import TrainingError
from w2sg.reports.label_runs import verdict
from w2sg.reports.sections.accuracy import Accuracy
from w2sg.reports.sections.confidence import Confidence
from w2sg.reports.sections.splits import Splits
from w2sg.reports.sections.theory import Teacher
from w2sg.reports.words import pgr_sentence

pytestmark = pytest.mark.drawn


@pytest.fixture(scope="module")
def content(pairs_folder, tiny_gpt2, tmp_path_factory):
    """A noisy run with everything in its report, and its page."""
    out = tmp_path_factory.mktemp("report")
    noise = ["dataset.noise.kind=flip", "dataset.noise.rate=0.3"]
    found = run(pairs_folder, tiny_gpt2, out, "loss=rkl", "strong.epochs=2", *noise)
    return found, (out / "run" / "report.html").read_text()


def test_every_measure_has_its_interval(content):
    for values in content[0]["metrics"].values():
        names = {"accuracy", "auroc", "nll", "brier", "ece", "overconfidence"}
        assert set(values["intervals"]) == names
        for name in names - {"ece"}:
            low, high = values["intervals"][name]
            assert low <= values[name] <= high


def test_the_identity_holds_on_both_splits(content):
    for split, rows in (("test", 64), ("transfer", 96)):
        found = content[0]["diagnostics"][split]
        assert found["rows"] == rows
        parts = [found[k]["value"] for k in ("gain", "misfit", "remainder")]
        assert parts[0] == pytest.approx(parts[1] + parts[2], abs=1e-9)
        assert all(found[k]["low"] <= found[k]["value"] <= found[k]["high"] for k in ("gain", "misfit", "remainder"))
    assert content[0]["diagnostics"]["theorem_conditions"] == {
        "reverse_kl": True,
        "last_layer": False,
        "convex_class": False,
    }


def test_gain_is_the_difference_of_the_reported_nlls(content):
    metrics = content[0]["metrics"]
    assert content[0]["diagnostics"]["test"]["gain"]["value"] == pytest.approx(
        metrics["weak"]["nll"] - metrics["student"]["nll"], abs=1e-9
    )


def test_the_teacher_on_transfer_is_what_the_student_saw(content):
    """30 % of labels are flipped there, so the student's teacher is right less often than the weak model."""
    found = content[0]
    errors = found["diagnostics"]["transfer"]["overturned"]["errors"]["rows"]
    assert errors / 96 == pytest.approx(1 - found["data"]["label_noise"]["label_accuracy_after"], abs=1e-4)
    assert found["diagnostics"]["teacher_transfer_minus_test"] is None  # noise would hide a leak


def test_tests_are_paired_and_baselines_are_there(content):
    found = content[0]
    weak = found["tests"]["student - weak"]
    difference = found["metrics"]["student"]["accuracy"] - found["metrics"]["weak"]["accuracy"]
    assert weak["difference"] == pytest.approx(difference)
    assert (weak["only_student"] - weak["only_other"]) / 64 == pytest.approx(difference)
    assert 0 < found["data"]["length_only"]["low"] < found["data"]["length_only"]["high"] < 1


def test_the_page_shows_all_of_it_and_needs_nothing_else(content):
    found, html = content
    for words in (
        "Accuracy",
        "Confidence",
        "The student and its teacher",
        "Theory",
        "Data",
        "Accuracy over training steps",
        "Training",
        "Stages",
    ):
        assert f"<h2>{words}</h2>" in html
    assert html.count("<svg") == 8  # accuracy, reliability, confidence, agreement, splits, two over steps, curves
    assert "src=" not in html
    assert re.search(r"flip noise on \d+% of labels", html)
    assert "exact McNemar" in html
    assert "performance gap recovered" in html
    assert found["versions"]["torch"] in html
    assert "{" not in re.sub(
        r"<(style|script|pre|svg|p class=command)\b.*?</\1>|<p class=command>.*?</p>", "", html, flags=re.S
    )


def test_the_size_of_the_strong_model_is_its_weights(content, tiny_gpt2):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    assert content[0]["parameters"] == {"weak": None, "strong": whole.num_parameters()}


def test_warnings_name_what_a_reader_must_know(content):
    warnings = content[0]["warnings"]
    assert any(line.startswith("64 test rows know an accuracy to about") for line in warnings)
    student = content[0]["metrics"]["student"]
    said = any("the student is overconfident" in line for line in warnings)
    assert said == (student["intervals"]["overconfidence"][0] > 0)


def test_an_overconfident_student_a_leaking_teacher_and_a_better_untrained_model_are_called_out(content):
    found = json.loads(json.dumps(content[0]))
    found["metrics"]["student"]["intervals"]["overconfidence"] = [0.02, 0.1]
    found["diagnostics"]["teacher_transfer_minus_test"] = {"value": 0.1, "low": 0.05, "high": 0.15}
    found["tests"]["student - zero_shot"] = {
        "difference": -0.1,
        "low": -0.2,
        "high": -0.01,
        "p": 0.01,
        "test": "exact McNemar",
    }
    found["data"]["overlaps"] = {"transfer and test": 3}
    sections = (Accuracy(), Confidence(), Teacher(), Splits())
    lines = " / ".join(line for section in sections for line in section.warnings(found))
    for words in ("overconfident", "carry ground truth", "is more accurate than the student", "transfer and test 3"):
        assert words in lines


def test_the_verdict_says_what_the_numbers_say(content):
    found = json.loads(json.dumps(content[0]))
    for difference, p, words in ((0.05, 0.04, "better"), (-0.05, 0.04, "worse"), (0.05, 0.06, "not distinguishable")):
        # the word is of the test whose p stands beside it, whatever an interval of another kind says
        found["tests"]["student - weak"] |= {"difference": difference, "p": p, "low": 0.001, "high": 0.1}
        assert f"the student is {words}" in verdict(found)
        assert "exact McNemar" in verdict(found)
    found["tests"]["student - weak"]["test"] = "exact sign flips over prompts"
    assert "intervals are over test prompts alone" in verdict(found)
    found["pgr"]["resolved"] = False
    assert "no PGR is claimed" in verdict(found)
    assert "gap not resolved" in pgr_sentence({**found["pgr"], "gap_high": 0.1})
    assert "no gap" in pgr_sentence({**found["pgr"], "gap_high": -0.1})


class FakeRun:
    """Remembers what W&B was told."""

    id = "0"

    def __init__(self):
        self.summary, self.logged, self.saved, self.ended = {}, {}, [], None

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        self.logged.update(values)

    def log_artifact(self, artifact):
        self.saved += artifact.manifest.entries

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def dashboard(monkeypatch):
    import wandb

    fake, asked = FakeRun(), {}
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or fake)
    return types.SimpleNamespace(run=fake, asked=asked)


def test_the_dashboard_gets_curves_summary_page_and_table(dashboard, pairs_folder, tiny_gpt2, tmp_path):
    options = ["logger=wandb", "logger.mode=offline", "logger.group=sweep", "logger.tags=[a,b]", "logger.every=2"]
    found = run(pairs_folder, tiny_gpt2, tmp_path, *options)
    assert (dashboard.asked["group"], dashboard.asked["mode"]) == ("sweep", "offline")
    assert dashboard.asked["tags"] == ["finetune", "local", "cross_entropy", "a", "b"]
    told = dashboard.run
    assert {"weak/loss", "student/loss", "ceiling/loss", "report", "predictions"} <= set(told.logged)
    table = told.logged["predictions"]
    assert table.columns[:6] == ["id", "prompt", "label", "weak", "student", "ceiling"]
    assert table.columns[6:] == ["weak_label", "prompt_text", "first_text", "second_text"]
    assert len(table.data) == 64
    assert told.summary["student/accuracy"] == found["metrics"]["student"]["accuracy"]
    assert told.summary["test/gain"] == found["diagnostics"]["test"]["gain"]["value"]
    assert told.ended == 0
    assert sorted(told.saved) == ["predictions.parquet", "report.html", "report.json"]


def test_the_dashboard_of_a_failed_run_is_marked_as_failed(dashboard, pairs_folder, tiny_gpt2, tmp_path):
    with pytest.raises(TrainingError):
        run(pairs_folder, tiny_gpt2, tmp_path, "logger=wandb", "logger.mode=offline", "strong.lr=1e30")
    assert dashboard.run.ended == 1
    assert dashboard.asked["group"].startswith(f"finetune cross_entropy bag-of-words→{tiny_gpt2.name} local ")
