"""Metrics against independent numbers, ties, and a performance gap that may not be there."""

import numpy as np
import pytest
import torch
from measures import reference

from w2sg.metrics import labels as metrics
from w2sg.metrics.bootstrap import Bootstrap


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


def test_every_measure_lies_in_its_interval_and_the_auroc_of_resamples_is_that_of_torchmetrics():
    (weak, student), labels = reference()
    bootstrap = Bootstrap(64, 500)
    for logits in (weak, student):
        measured, found = metrics.measure(logits, labels), metrics.intervals(logits, labels, bootstrap)
        assert measured.keys() == found.keys()
        for name, (low, high) in found.items():
            if name != "ece":  # resampling adds noise to every bin, so its samples lie above it
                assert low <= measured[name] <= high, name
    score = (student[:, 0] - student[:, 1]).round().numpy()  # with many ties
    once = Bootstrap(64, 3)
    drawn = once.samples(lambda weights: weights)
    for weights, area in zip(drawn, metrics.weighted_auroc(score, (labels == 0).numpy(), once), strict=True):
        rows = np.repeat(np.arange(64), (weights * 64).round().astype(int))
        again = torch.tensor(np.stack([score, np.zeros(64)], 1))[rows]
        assert metrics.measure(again, labels[rows])["auroc"] == pytest.approx(float(area), abs=1e-6)


def test_intervals_work_for_more_classes_and_for_a_class_that_is_missing():
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(90, 3, generator=random), torch.arange(90) % 3
    measured, found = metrics.measure(logits, labels), metrics.intervals(logits, labels, Bootstrap(90, 300))
    assert found["auroc"][0] < measured["auroc"] < found["auroc"][1]
    assert metrics.intervals(logits[:, :2], torch.zeros(90, dtype=torch.long), Bootstrap(90, 100))["auroc"] is None


def test_reliability_bins_hold_every_row_and_give_the_calibration_error():
    (_, student), labels = reference()
    bins = metrics.reliability(student, labels)
    assert sum(b["rows"] for b in bins) == 64
    error = sum(b["rows"] / 64 * abs(b["confidence"] - b["accuracy"]) for b in bins)
    assert error == pytest.approx(metrics.measure(student, labels)["ece"], abs=1e-6)
