"""The three-point identity against independent numbers, and what agreement means."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from measures import reference

from w2sg.metrics import theory as diagnostics
from w2sg.metrics.bootstrap import Bootstrap


def pair(z):
    z = torch.as_tensor(np.asarray(z, np.float64))
    return torch.stack([z, torch.zeros_like(z)], 1)


def means(student, teacher, truth):
    return {k: float(v.mean()) for k, v in diagnostics.three_point(student, teacher, truth).items()}


def test_three_point_matches_independent_numbers():
    (weak, student), labels = reference()
    hard = means(student, weak, F.one_hot(labels, 2))
    assert hard["gain"] == pytest.approx(0.1302822590122174, abs=1e-9)
    assert hard["misfit"] == pytest.approx(0.06635708979771904, abs=1e-9)
    assert hard["remainder"] == pytest.approx(0.06392516921449837, abs=1e-9)
    assert hard["forward_misfit"] == pytest.approx(0.08765394511923674, abs=1e-9)
    i = np.arange(64)
    h = np.stack([np.sin(0.7 * (i + 1)), np.cos(1.1 * (i + 1)), np.sin(0.37 * (i + 1) ** 1.5)], 1)
    soft = means(student, weak, torch.softmax(pair(h @ [2.0, -1.0, 1.5]), 1))
    assert soft["gain"] == pytest.approx(0.03770333778151816, abs=1e-9)
    assert soft["remainder"] == pytest.approx(-0.02865375201620087, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_identity_is_exact_for_any_logits_and_classes(classes):
    random = torch.Generator().manual_seed(classes)
    student, teacher, truth = (3 * torch.randn(500, classes, generator=random).double() for _ in range(3))
    found = diagnostics.three_point(student, teacher, truth.softmax(1))
    assert torch.allclose(found["gain"], found["misfit"] + found["remainder"], atol=1e-12)
    assert (found["misfit"] >= -1e-12).all()
    assert (found["forward_misfit"] >= -1e-12).all()
    nll = -(truth.softmax(1) * student.log_softmax(1)).sum(1)
    assert torch.allclose(found["gain"], -(truth.softmax(1) * teacher.log_softmax(1)).sum(1) - nll)


def mixture():
    """64 points, four fixed experts, a truth that is a mixture of them and a teacher that is not."""
    i = np.arange(64)
    h = np.stack([np.sin(0.7 * (i + 1)), np.cos(1.1 * (i + 1)), np.sin(0.37 * (i + 1) ** 1.5)], 1)
    v = np.array([[3, 0, 0.5], [-0.5, -2, 0.3], [0.2, 0.7, 2.5], [-2, 1, -1]])
    experts = 1 / (1 + np.exp(-h @ v.T))
    truth = experts @ [0.55, 0.25, 0.2, 0.0]
    logit = np.log(truth / (1 - truth))
    return experts, truth, 0.6 * logit + 0.8 * np.cos(1.7 * i + 0.3)


@pytest.mark.parametrize(
    ("weights", "remainder"),
    [
        ([0.4690159160474553, 0.23027598961778753, 0.1796523401822015, 0.12105575415255566], 0.0),  # reverse KL
        ([0.46019636432471217, 0.22604954488479642, 0.1760551163867543, 0.13769897440373702], -0.0033606309488891364),
    ],
)
def test_in_the_theorems_class_reverse_kl_keeps_its_promise_and_forward_kl_does_not(weights, remainder):
    experts, truth, teacher = mixture()
    p = experts @ weights
    found = means(pair(np.log(p / (1 - p))), pair(teacher), torch.softmax(pair(np.log(truth / (1 - truth))), 1))
    assert found["remainder"] == pytest.approx(remainder, abs=1e-9)


def test_a_linear_head_is_not_of_the_theorems_class():
    """The reverse-KL optimum of a logit-linear head, realizable: the remainder is negative all the same."""
    i = np.arange(64)
    h = np.stack([np.sin(0.7 * (i + 1)), np.cos(1.1 * (i + 1)), np.sin(0.37 * (i + 1) ** 1.5)], 1)
    truth = h @ [2.0, -1.0, 1.5]
    teacher = 0.7 * truth + 0.9 * np.cos(1.3 * i)
    student = h @ [1.4434655982836369, -0.7245773925675388, 1.0897212937289198]
    found = means(pair(student), pair(teacher), torch.softmax(pair(truth), 1))
    assert found["gain"] == pytest.approx(0.03513568765345272, abs=1e-9)
    assert found["remainder"] == pytest.approx(-0.00037646621541842333, abs=1e-9)


def test_the_theorem_line_says_what_the_interval_says():
    (weak, student), labels = reference()
    found = diagnostics.identity(student, weak, labels, Bootstrap(64))
    low, high = found["remainder"]["low"], found["remainder"]["high"]
    assert found["theorem"] == ("holds" if low > 0 else "fails" if high < 0 else "not resolved")
    assert 0 < found["lemma_ratio"] < 1
    copy = diagnostics.identity(weak, weak, labels, Bootstrap(64))
    assert copy["theorem"] == "not resolved"
    assert copy["gain"]["value"] == copy["misfit"]["value"] == 0.0


def test_agreement_is_split_by_the_teacher_and_overturning_counts_its_errors():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    teacher = pair([2, 2, 2, -2, -2, -2, 2, 2])  # right on 5: wrong on rows 3, 6, 7
    student = pair([3, 3, -3, 3, -3, -3, -3, 3])  # row 2 spoilt; rows 3 and 6 mended; row 7 copied
    found = diagnostics.agreement(student, teacher, labels, Bootstrap(8))
    assert found["agreement"]["all"]["value"] == pytest.approx(5 / 8)
    assert found["agreement"]["teacher_right"]["value"] == pytest.approx(4 / 5)
    assert found["agreement"]["teacher_wrong"]["value"] == pytest.approx(1 / 3)
    assert found["overturned"]["errors"]["value"] == pytest.approx(2 / 3)
    assert found["overturned"]["successes"]["value"] == pytest.approx(1 / 5)
    assert found["overturned"]["errors"]["rows"] == 3
    perfect = diagnostics.agreement(student, pair([9, 9, 9, 9, -9, -9, -9, -9]), labels, Bootstrap(8))
    assert perfect["overturned"]["errors"]["value"] is None


def test_certainty_counts_saturated_logits():
    found = diagnostics.certainty(pair([0.0, 7.0, -7.0, 1.0]))
    assert found["saturated"] == 0.5
    assert 0 < found["entropy"] < np.log(2)


def test_a_teacher_that_saw_the_transfer_rows_sets_off_the_alarm():
    random = np.random.default_rng(0)
    clean = diagnostics.leak(random.random(2000) < 0.7, random.random(2000) < 0.7)
    assert clean["low"] < 0 < clean["high"]
    assert diagnostics.leak(random.random(2000) < 0.85, random.random(2000) < 0.7)["low"] > 0


def test_a_teacher_that_is_always_right_on_transfer_has_an_interval_of_some_width():
    all_right, most = np.ones(50, bool), np.arange(50) < 48
    same = diagnostics.leak(all_right, all_right)
    assert same["low"] == -same["high"] < 0
    found = diagnostics.leak(all_right, most)
    assert found["value"] == pytest.approx(0.04)
    assert found["low"] < 0.04 < found["high"]
    rows = diagnostics.leak(np.repeat(all_right, 2), np.repeat(most, 2), *[np.repeat(np.arange(50), 2)] * 2)
    assert rows == pytest.approx(found)  # twice the rows of the same prompts
