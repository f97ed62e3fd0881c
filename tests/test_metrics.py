"""Metrics against independent numbers, ties, and a performance gap that may not be there."""

import numpy as np
import pytest
import torch

from w2sg import metrics


def reference():
    """64 examples by formula: teacher and student logits of a known truth (independent numbers below)."""
    i = np.arange(64)
    h = np.stack([np.sin(0.7 * (i + 1)), np.cos(1.1 * (i + 1)), np.sin(0.37 * (i + 1) ** 1.5)], 1)
    truth = h @ np.array([2.0, -1.0, 1.5])
    weak = 0.7 * truth + 0.9 * np.cos(1.3 * i)
    student = 1.2 * truth + 0.4 * np.sin(2.1 * i)
    labels = torch.tensor((truth <= 0).astype(int))  # class 0 is the positive one
    return [torch.tensor(np.stack([z, np.zeros(64)], 1)) for z in (weak, student)], labels


def test_metrics_match_independent_numbers():
    (weak, student), labels = reference()
    w, s = metrics.measure(weak, labels), metrics.measure(student, labels)
    assert w["accuracy"] == pytest.approx(0.875)
    assert s["accuracy"] == pytest.approx(0.96875)
    assert w["nll"] == pytest.approx(0.34940312744589547, abs=1e-9)
    assert s["nll"] == pytest.approx(0.21912086843367812, abs=1e-9)
    assert w["auroc"] == pytest.approx(0.9521016617790812, abs=1e-6)
    assert s["auroc"] == pytest.approx(0.9980449657869013, abs=1e-6)
    assert s["brier"] == pytest.approx(0.054294607990789, abs=1e-9)
    assert w["ece"] == pytest.approx(0.16842221288824488, abs=1e-6)
    assert s["ece"] == pytest.approx(0.1485833008778577, abs=1e-6)
    assert s["overconfidence"] == pytest.approx(-0.14858330087785776, abs=1e-9)


def test_auroc_counts_ties_as_one_half_in_any_order():
    """EleutherAI/w2s gives 0 or 1 for all-tied scores, depending on their order."""
    labels = torch.tensor([0, 1, 0, 1, 1])
    for order in (labels, labels.flip(0)):
        assert metrics.measure(torch.zeros(5, 2), order)["auroc"] == pytest.approx(0.5)
    scores = torch.tensor([1.0, 1.0, 2.0, 0.0, 1.0])
    logits = torch.stack([scores, torch.zeros(5)], 1)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 0] for b in scores[labels == 1]]
    assert metrics.measure(logits, labels)["auroc"] == pytest.approx(float(sum(pairs)) / len(pairs))


def test_auroc_does_not_saturate_at_large_logits():
    logits = torch.tensor([[60.0, 0.0], [50.0, 0.0], [70.0, 0.0], [40.0, 0.0]])
    assert metrics.measure(logits, torch.tensor([0, 1, 0, 1]))["auroc"] == pytest.approx(1.0)


def test_auroc_uses_the_difference_of_logits_and_is_none_without_both_classes():
    logits = torch.tensor([[5.0, 4.0], [1.0, 3.0]])
    assert metrics.measure(logits, torch.tensor([0, 1]))["auroc"] == 1.0
    assert metrics.measure(logits, torch.tensor([0, 0]))["auroc"] is None


def test_a_tie_counts_as_the_first_reply():
    assert metrics.correct(torch.zeros(2, 2), torch.tensor([0, 1])).tolist() == [True, False]


def test_three_classes():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(20)
    logits = torch.nn.functional.one_hot(labels, 3) * 3.0 + torch.randn(60, 3)
    found = metrics.measure(logits, labels)
    assert found["accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert found["auroc"] > 0.9
    assert found["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits.double(), labels)))


def hits(rate, n=2000, seed=0):
    return torch.tensor(np.random.default_rng(seed).random(n) < rate)


def test_pgr_is_the_share_of_the_gap_and_lies_in_its_interval():
    found = metrics.performance_gap_recovered(hits(0.6, seed=1), hits(0.7, seed=2), hits(0.8, seed=3))
    means = [float(hits(r, seed=s).double().mean()) for r, s in ((0.6, 1), (0.7, 2), (0.8, 3))]
    assert found["value"] == pytest.approx((means[1] - means[0]) / (means[2] - means[0]))
    assert found["low"] < found["value"] < found["high"]
    assert found["resolved"]


def test_no_pgr_is_claimed_where_the_gap_is_within_noise():
    """The public notebook drops such cases silently."""
    weak = hits(0.70, 400, 1)
    found = metrics.performance_gap_recovered(weak, hits(0.7, 400, 2), hits(0.71, 400, 3))
    assert not found["resolved"]
    assert found["low"] is None
    assert found["high"] is None
    reverse = metrics.performance_gap_recovered(hits(0.8, 400, 1), hits(0.7, 400, 2), hits(0.6, 400, 3))
    assert reverse["value"] is None


def test_the_interval_of_an_accuracy_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        sample = hits(0.7, 300, seed).double().numpy().astype(np.float32)
        low, high = metrics.interval(metrics.bootstrap_weights(300, 500, seed) @ sample)
        covered += low <= 0.7 <= high
    assert 0.9 <= covered / 200 <= 0.99
