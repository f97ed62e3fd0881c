"""Accuracy over training steps: measured during a fit, of which it changes nothing; kept with the stage, and shown."""

import logging
from functools import partial

import pytest
import torch
from conftest import compose
from fits import examples, found, options, stages
from runs import CONG_SMALL, cong_arguments, run_cong, run_labels
from torch import nn

from w2sg import losses
from w2sg.config.check import check
from w2sg.metrics.labels import measure
from w2sg.models.heads import BagOfWords
from w2sg.store.files import read_json
from w2sg.training.label_modules import SoftLabelModule, oriented
from w2sg.training.stages import FitJob


class Dropping(BagOfWords):
    """A bag of words that drops scores at random, so that a forward in training mode draws random numbers."""

    def __init__(self):
        super().__init__(64, True, 2)
        self.drop = nn.Dropout(0.3)

    def forward(self, batch):
        return self.drop(super().forward(batch))


def job(watched):
    torch.manual_seed(3)
    module = partial(SoftLabelModule, loss=losses.cross_entropy)
    held_out = examples(20, seed=9)
    watched = {"test": examples(25, seed=4), "held_out": held_out} if watched else {}
    setting = options(epochs=3, lr=0.5, validation=0.1)
    return FitJob(Dropping(), module, examples(), held_out, setting, seed=5, watched=watched)


def test_measuring_changes_nothing_that_is_learned(tmp_path):
    plain = found(stages(tmp_path / "plain", eval_every=5).fit("m", {}, lambda: job(False)))
    torch.manual_seed(99)
    scorers = []

    def watching():
        made = job(True)
        scorers.append(made.scorer)
        return made

    measured = found(stages(tmp_path / "measured", eval_every=5).fit("m", {}, watching))
    assert torch.equal(plain[0], measured[0])
    points = [point for point in measured[1] if "test_accuracy" in point]
    assert [point for point in measured[1] if point not in points] == plain[1]
    assert [point["step"] for point in points] == [0, 5, 10, 12]  # before the first step, every fifth, after the last
    assert points[0].keys() == {"step", "rows", "test_accuracy", "test_nll", "held_out_accuracy", "held_out_nll"}
    assert points[0] != points[-1]


def test_the_last_point_is_what_the_trained_model_does(tmp_path):
    rows = examples(25, seed=4)

    def make():
        made = job(False)
        made.held_out, made.watched = None, {"test": examples(25, seed=4)}
        return made

    work = stages(tmp_path)
    folder = work.fit("m", {}, make)
    scorer = BagOfWords(64, True, 2)
    scorer.words.weight.data = found(folder)[0]
    logits = oriented(scorer(rows.inputs.collate(range(25))), rows.first).detach()
    wanted = measure(logits, torch.where(rows.targets.argmax(1) == 0, 0, 1))
    points = [point for point in read_json(folder / "curve.json") if "test_accuracy" in point]
    assert len(points) == 13  # a fit of 12 steps has fewer than the default number
    assert points[-1]["test_accuracy"] == wanted["accuracy"]


def test_a_run_has_the_accuracies_of_its_report_over_steps(pairs_folder, tiny_gpt2, tmp_path, caplog):
    head = ["strong.tune=head", "optim.head.epochs=2", "optim.head.validation_fraction=0.2"]
    content = run_labels(pairs_folder, tiny_gpt2, tmp_path, *head, "logger.eval_every=2")
    for name in ("weak", "student", "ceiling"):
        fit = content["accuracy_over_steps"]["fits"][name]
        assert not fit["cached"]
        kept = fit["chosen_step"] or fit["points"][-1]["step"]  # the epoch that held-out rows chose
        last = next(point for point in fit["points"] if point["step"] == kept)
        assert last["test_accuracy"] == content["metrics"][name]["accuracy"]
        assert last["test_nll"] == pytest.approx(content["metrics"][name]["nll"], rel=1e-5)
        assert [point["step"] for point in fit["points"][:3]] == [0, 2, 4]
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'aria-label="accuracy on test over optimizer steps, at the last one: weak supervisor ' in page
    student = next(stage["key"] for stage in content["stages"] if stage["name"] == "student")
    needed = read_json(tmp_path / "store" / student / "manifest.json")["info"]["rests_on"]
    assert [name for name in needed if name.startswith("features-on-transfer")]
    assert not [name for name in needed if name.startswith("features-on-test")]
    again = run_labels(pairs_folder, tiny_gpt2, tmp_path, *head, "logger.eval_every=3")
    assert {fit["cached"] for fit in again["accuracy_over_steps"]["fits"].values()} == {True}
    assert again["reading"] == content["reading"]


def test_fits_from_the_store_without_a_curve_are_said_once(pairs_folder, tiny_gpt2, tmp_path, caplog):
    first = run_labels(pairs_folder, tiny_gpt2, tmp_path, "logger.eval_every=0")
    assert first["accuracy_over_steps"] == {
        "fits": {},
        "from_the_store": [],
        "not_asked_for": ["weak", "student", "ceiling"],
    }
    with caplog.at_level(logging.INFO, logger="w2sg"):
        second = run_labels(
            pairs_folder, tiny_gpt2, tmp_path
        )  # a bag of words is measured by default, a whole model not
    assert second["accuracy_over_steps"]["from_the_store"] == ["weak"]
    said = [line for line in caplog.messages if "not measured" in line]
    assert said == [
        "accuracy over training steps: not measured for weak, which the store has from a run without it or with "
        "other test rows"
    ]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Not measured for weak: the store has it from a" in page
    assert "Not measured for student, ceiling: each measurement would read the test split with the whole model." in page
    assert second["metrics"] == first["metrics"]


def test_a_curve_over_other_test_rows_is_not_taken_for_one_over_these(pairs_folder, tiny_gpt2, tmp_path):
    """The store finds a fit whatever the test split is, and its curve was measured on that of the run that made it."""
    first = run_labels(pairs_folder, tiny_gpt2, tmp_path)
    assert first["accuracy_over_steps"]["fits"]["weak"]["points"]
    other = run_labels(pairs_folder, tiny_gpt2, tmp_path, "dataset.sizes.test=6")
    assert next(stage["cached"] for stage in other["stages"] if stage["name"] == "weak")
    assert other["accuracy_over_steps"]["fits"] == {}
    assert other["accuracy_over_steps"]["from_the_store"] == ["weak"]
    assert "or with other test rows" in (tmp_path / "run" / "report.html").read_text()
    again = run_labels(pairs_folder, tiny_gpt2, tmp_path)
    assert (
        again["accuracy_over_steps"]["fits"]["weak"]["points"] == first["accuracy_over_steps"]["fits"]["weak"]["points"]
    )


@pytest.mark.slow
def test_text_fits_are_measured_on_held_out_rows(pairs_folder, models, tmp_path):
    arguments = cong_arguments(pairs_folder, models)
    more = [*CONG_SMALL, *(f"method.{stage}.validation_fraction=0.3" for stage in ("alignment", "dpo"))]
    fits = run_cong(arguments, tmp_path, *more, "logger.eval_every=1")["text"]["training"]
    for name, fit in fits.items():
        if "held_out" in fit:
            steps = [point["step"] for point in fit["held_out"]]
            assert steps == sorted(set(steps)), name  # where an epoch ends, the rows are read once
            assert len(steps) > 2
    preferences = (
        fits["dpo"]["held_out"] if "dpo" in fits else next(f["held_out"] for f in fits.values() if "held_out" in f)
    )
    assert "held_out_rewards/accuracies" in preferences[-1]


def test_the_interval_has_a_default_and_refuses_nonsense():
    from w2sg.errors import ConfigError
    from w2sg.training.evaluating import interval

    assert [interval(None, steps) for steps in (1, 20, 21, 1000)] == [1, 1, 2, 50]
    assert interval(7, 1000) == 7
    with pytest.raises(ConfigError, match="eval_every"):
        check(compose("logger.eval_every=-1"))
