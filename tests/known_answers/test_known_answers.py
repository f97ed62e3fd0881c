"""The experiments with known answers hold, and each fails when the part of the product that it watches is broken."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, the_script

from w2sg import losses
from w2sg.console import Plain
from w2sg.data import noise, splits
from w2sg.errors import UserError
from w2sg.experiment import run
from w2sg.known_answers import concepts, labels, suite, sweeps, whole_path
from w2sg.known_answers.result import Check, Findings, Quantity
from w2sg.methods import votes as ensembles
from w2sg.metrics import intervals as statistics
from w2sg.metrics import labels as metrics
from w2sg.metrics import spread
from w2sg.metrics import theory as diagnostics
from w2sg.reports.sections.accuracy import Accuracy
from w2sg.training import label_modules as modules
from w2sg.training import stage_values

SLOW = {"halfspaces", "leakage", "ridge", "personas", "intrinsic_dimension", "whole_path"}
NAMES = [pytest.param(c.name, marks=pytest.mark.slow if c.name in SLOW else ()) for c in suite.CHECKS]


def failures(name: str) -> list[str]:
    return [q.name for q in suite.run_check(*suite.chosen(name)).findings.quantities if not q.passed]


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_known_one(name):
    assert failures(name) == []


def test_what_is_no_number_does_not_hold():
    found = Findings()
    assert not found.passed  # nothing was looked at
    found.add("a", 1.0, None, 9.0, "")
    assert not found.passed
    same = Quantity("b", 1.0, 1.2, 0.1, "")
    assert not same.passed
    assert replace(same, relation=">=").passed
    assert not replace(same, relation="<=").passed
    assert not replace(same, relation="<=", got=float("nan")).passed


# ---------------------------------------------------------------------------------------------------------------------
# Broken on purpose
# ---------------------------------------------------------------------------------------------------------------------


def swapped(logits, weak_logits, progress=1.0):
    """The reverse KL with its arguments the wrong way round; the gradient still flows to the student."""
    return losses.forward_kl(logits, weak_logits)


def test_a_reverse_kl_with_swapped_arguments_is_noticed(monkeypatch):
    monkeypatch.setattr(losses, "reverse_kl", swapped)
    assert failures("loss_values") == ["reverse kl"]
    assert any("KL(truth‖student) + KL(student‖weak)" in name for name in failures("misfit_kl"))


def test_a_cross_entropy_against_hardened_labels_is_noticed(monkeypatch):
    plain = losses.cross_entropy

    def hardened(logits, weak_logits, progress=1.0):
        return plain(logits, losses.hard_logits(weak_logits.argmax(1), 2).to(weak_logits.dtype))

    monkeypatch.setattr(losses, "cross_entropy", hardened)
    assert "cross entropy" in failures("loss_values")
    assert any("soft labels" in name for name in failures("misfit_kl"))


def test_a_warm_up_as_in_the_published_code_is_noticed(monkeypatch):
    """It climbs with progress itself, and jumps to its full weight at the end of the warm-up."""
    published = lambda alpha, warmup, progress: alpha * (1.0 if progress > warmup else progress)  # noqa: E731
    monkeypatch.setattr(losses.adaptive, "_coefficient", published)
    failed = failures("loss_values")
    assert len(failed) == 2
    assert all(name.startswith("confidence at") for name in failed)


def test_progress_that_stands_still_is_noticed(monkeypatch):
    monkeypatch.setattr(
        modules.SoftLabelModule,
        "backward_pass",
        lambda self, batch, parts, progress: (self._one_pass(batch, parts, 1.0), {}),
    )
    assert all(name.startswith("confidence at") for name in failures("loss_values"))
    assert failures("loss_values")


def test_diagnostics_with_the_student_and_its_teacher_swapped_are_noticed(monkeypatch):
    right = diagnostics.three_point
    monkeypatch.setattr(
        "w2sg.known_answers.objectives.three_point", lambda student, teacher, truth: right(teacher, student, truth)
    )
    assert "gain, as diagnostics measure it" in failures("misfit_kl")


@pytest.mark.slow
def test_a_split_that_overlaps_is_noticed(monkeypatch):
    """Half of transfer is taken from the rows that train the teacher."""
    plain = splits._split

    def overlapping(*arguments):
        chosen = plain(*arguments)
        half = len(chosen["transfer"]) // 2
        return chosen | {"transfer": chosen["ground_truth"][:half] + chosen["transfer"][half:]}

    monkeypatch.setattr(splits, "_split", overlapping)
    small(monkeypatch)
    failed = failures("leakage")
    assert "prompts that the splits share, split by prompt" in failed
    assert "alarm raised, split by prompt" in failed


@pytest.mark.slow
def test_an_alarm_that_looks_at_the_test_split_twice_is_noticed(monkeypatch):
    plain = diagnostics.leak
    monkeypatch.setattr(diagnostics, "leak", lambda transfer, test: plain(test, test))
    small(monkeypatch)
    assert "alarm raised, overlap 1.0" in failures("leakage")


def small(monkeypatch) -> None:
    """Leakage without its students, which the alarm does not need."""
    monkeypatch.setattr(labels, "STUDENTS", (1.0,))


def test_a_pgr_of_the_wrong_quotient_is_noticed(monkeypatch):
    plain = statistics.performance_gap_recovered
    monkeypatch.setattr(statistics, "performance_gap_recovered", lambda w, s, c, b: plain(s, w, c, b))
    assert any(name.startswith("PGR, flips") for name in failures("clusters"))


def test_an_accuracy_that_counts_the_wrong_class_is_noticed(monkeypatch):
    monkeypatch.setattr(metrics, "correct", lambda logits, gold: logits.argmin(-1) == gold)
    assert any(name.startswith("student error") for name in failures("clusters"))


def test_label_noise_at_another_rate_is_noticed(monkeypatch):
    plain = noise.apply_noise
    monkeypatch.setattr(
        noise,
        "apply_noise",
        lambda y, ids, gold, options, seed: plain(y, ids, gold, options | {"rate": options["rate"] / 2}, seed),
    )
    assert any(name.startswith("student error") for name in failures("clusters"))


def test_intervals_that_are_too_narrow_are_noticed(monkeypatch):
    plain = statistics.quantile

    def normal(spreads, contrast, level=0.95):
        t, error = plain(spreads, contrast, level)
        return min(t, 1.96), error  # five seeds taken for many

    for module in (statistics, spread):
        monkeypatch.setattr(module, "quantile", normal)
    failed = failures("pgr_intervals")
    assert "coverage, gap 0.10, 5 seeds" in failed
    assert "not resolved, gap 0.01, 5 seeds" in failed


def test_a_report_that_claims_every_gap_is_noticed(monkeypatch):
    monkeypatch.setattr("w2sg.known_answers.intervals.pgr_sentence", lambda pgr: f"PGR {pgr['estimate']}")
    assert "report says so, gap 0.01, 5 seeds" in failures("pgr_intervals")


def test_values_that_are_stored_in_another_order_are_noticed(monkeypatch):
    plain = stage_values.load_values

    def reversed_(folder):
        ids, values = plain(folder)
        return ids, values.flip(0)

    monkeypatch.setattr(stage_values, "load_values", reversed_)
    assert failures("misfit_gain")


def test_a_fit_that_averages_over_too_many_rows_is_noticed(monkeypatch):
    """Half the gradient: the least-squares solution is not reached in the steps that reach it."""
    plain = modules.SoftLabelModule._objective
    monkeypatch.setattr(modules.SoftLabelModule, "_objective", lambda *arguments: plain(*arguments) / 2)
    assert failures("misfit_gain")


def test_a_product_that_forgets_the_prior_is_noticed(monkeypatch):
    monkeypatch.setattr(concepts, "pooled", lambda found: found[:-1].mean(0))
    assert any("product" in name for name in failures("product_of_contexts"))


def test_a_committee_that_multiplies_where_it_should_average_is_noticed(monkeypatch):
    plain = ensembles.combine
    monkeypatch.setattr(concepts, "combine", lambda members, how: 8 * plain(members, "logits").double())
    assert "off-target mass, average of 8" in failures("product_of_contexts")


@pytest.fixture
def one_run(monkeypatch):
    monkeypatch.setattr(whole_path, "EPOCHS", (16,))


@pytest.mark.slow
def test_a_pgr_that_is_swapped_in_the_report_is_noticed(monkeypatch, one_run):
    plain = Accuracy.measure

    def swapped_pgr(predictions, labels, bootstrap):
        section = plain(predictions, labels, bootstrap)
        other = plain(predictions | {"weak": predictions["student"], "student": predictions["weak"]}, labels, bootstrap)
        section.content["pgr"] = other.content["pgr"]
        return section

    monkeypatch.setattr(Accuracy, "measure", swapped_pgr)
    failed = failures("whole_path")
    assert "PGR in report.json, 16 epochs" in failed
    assert not any(name.startswith("accuracy") for name in failed)


@pytest.mark.slow
def test_a_student_that_is_trained_on_gold_is_noticed(monkeypatch, one_run):
    monkeypatch.setattr(run.Run, "noisy", lambda self, labels: self.gold(labels.table))
    failed = failures("whole_path")
    assert "accuracy of student, 16 epochs" in failed
    assert "PGR in report.json, 16 epochs" in failed


@pytest.mark.slow
def test_a_join_that_is_reversed_is_noticed(monkeypatch, one_run):
    plain = run.columns_of

    def reversed_ids(*arguments):
        found = plain(*arguments)
        return found | {"id": found["id"][::-1]}

    monkeypatch.setattr(run, "columns_of", reversed_ids)
    failed = failures("whole_path")
    assert "rows on which student is not as planted, 16 epochs" in failed


@pytest.mark.slow
def test_a_paired_test_that_is_halved_is_noticed(monkeypatch, one_run):
    plain = statistics.mcnemar
    monkeypatch.setattr(statistics, "mcnemar", lambda *arguments: (found := plain(*arguments)) | {"p": found["p"] / 2})
    failed = failures("whole_path")
    assert "p over prompts, 16 epochs" in failed
    assert any(name.startswith("p in summary.json") for name in failed)


@pytest.mark.slow
def test_a_dropped_correction_for_the_number_of_tests_is_noticed(monkeypatch):
    monkeypatch.setattr(statistics, "holm", lambda p: list(p))
    failed = failures("whole_path")
    assert len(failed) == 2
    assert all(name.startswith("corrected p") for name in failed)


# ---------------------------------------------------------------------------------------------------------------------
# The simulation of sweeps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "design",
    [
        sweeps.Design(seeds=3, test=300, pool=600),
        sweeps.Design(2, 2, test=300, pool=700, effects="large"),
        sweeps.Design(3, 2, test=300, pool=700, rows=3, effects="large"),
    ],
    ids=lambda design: design.words,
)
def test_level_and_coverage_are_the_promised_ones(design):
    found = sweeps.table([design], 250, seed=99)
    assert [f"{q.name}: {q.got}" for q in found.quantities if not q.passed] == []


def test_runs_of_splits_that_are_counted_as_independent_are_noticed(monkeypatch):
    """The seeds of a split share what its training rows are worth."""
    plain = sweeps.draw_sweep

    def every_seed(design, null, random):
        right, prompts = plain(design, null, random)
        return [r for r in right for _ in range(3)], [p for p in prompts for _ in range(3)]

    monkeypatch.setattr(sweeps, "draw_sweep", every_seed)
    found = sweeps.table([sweeps.Design(3, 3, test=300, pool=700, effects="large")], 100, seed=7)
    assert "level, 3 splits x 3 seeds, pool of 700, large effects" in [q.name for q in found.quantities if not q.passed]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_check_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"known_answers: there is no check 'halfspace'.*halfspaces.*personas"):
        suite.chosen("halfspace")
    assert suite.chosen("all") == suite.CHECKS
    assert suite.chosen("sweeps") == suite.APART  # minutes: on its own
    assert len({check.name for check in suite.CHECKS}) == len(suite.CHECKS)


def test_a_failure_is_printed_written_and_returned(tmp_path, monkeypatch):
    found = Findings()
    found.add("two", 2.0, 3.0, 0.5, "for show")
    found.add("none", 2.0, float("nan"), 0.5, "for show", "<=")
    broken = Check("broken", "It <fails>.", "nobody", lambda bench: found)
    monkeypatch.setattr(suite, "CHECKS", (broken, *suite.chosen("product_of_contexts")))
    console = Plain(record=True, width=120)
    assert not suite.run_known_answers("all", tmp_path / "out", console)
    text = console.export_text()
    assert "FAIL broken" in text
    assert "pass product_of_contexts" in text
    assert "2 checks in" in text
    assert "failed: broken" in text
    page = (tmp_path / "out" / "known_answers.html").read_text()
    assert "1 of 2 checks hold" in page
    assert "It &lt;fails&gt;." in page
    assert page.count("<svg") == 1
    written = json.loads((tmp_path / "out" / "known_answers.json").read_text())
    assert [check["passed"] for check in written] == [False, True]
    assert [q["got"] for q in written[0]["quantities"]] == [3.0, None]
    assert suite.run_known_answers("product_of_contexts", tmp_path / "out", console)


def test_a_check_that_cannot_be_run_has_failed_and_the_others_are_run(tmp_path, monkeypatch):
    def raises(bench):
        raise ZeroDivisionError("nothing there")

    checks = (Check("broken", "It raises.", "nobody", raises), *suite.chosen("product_of_contexts"))
    monkeypatch.setattr(suite, "CHECKS", checks)
    console = Plain(record=True, width=120)
    assert not suite.run_known_answers("all", tmp_path, console)
    text = console.export_text()
    assert "FAIL broken" in text
    assert "pass product_of_contexts" in text
    written = json.loads((tmp_path / "known_answers.json").read_text())
    assert "ZeroDivisionError: nothing there" in written[0]["quantities"][0]["why"]


def test_the_folder_is_looked_at_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(suite, "run_check", lambda check: pytest.fail("began to work"))
    with pytest.raises(UserError, match=r"out: .* cannot be written"):
        suite.run_known_answers("all", tmp_path / "file", Plain())


@pytest.mark.slow
def test_the_command(tmp_path):
    printed = run_script("evaluate.py", "known_answers=loss_values", f"out={tmp_path}").stdout
    assert "pass loss_values" in printed
    assert "all hold" in printed
    assert "HYDRA" not in printed
    assert (tmp_path / "known_answers.html").exists()


def test_the_command_ends_with_1_where_an_answer_is_wrong(tmp_path, monkeypatch):
    import sys

    script = the_script("evaluate")
    monkeypatch.setattr(losses, "reverse_kl", swapped)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "known_answers=loss_values", f"out={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 1


def test_every_check_is_documented():
    text = (ROOT / "docs" / "known_answers.md").read_text()
    assert [c.name for c in (*suite.CHECKS, *suite.APART) if f"`{c.name}`" not in text] == []


def test_figures_need_no_run():
    from w2sg.known_answers.result import Line, Panel

    lines = [Line("theory", np.arange(3), torch.arange(3.0), "theory"), Line("", [1], [1.0], "measured", [0.1])]
    assert suite.figure(Panel("t", "x", "y", lines, logx=True)).startswith("<figure")


def test_the_whole_path_is_composed_inside_a_command_too(tmp_path):
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from w2sg.config.plugins import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):  # as evaluate.py itself runs
        around = GlobalHydra.instance().hydra
        assert whole_path.configured(f"out={tmp_path}", "seed=3").seed == 3
        assert GlobalHydra.instance().hydra is around
