"""What a loss from outside gives: one number per example, with a gradient, or one line that names it."""

from functools import partial

import pytest
import torch
from fits import examples, options, stages

from w2sg.errors import OutsideError, UserError
from w2sg.models.heads import BagOfWords
from w2sg.training.label_modules import SoftLabelModule, values_of
from w2sg.training.stages import FitJob


def good(logits, targets, progress, *, scale=1.0):
    return scale * (logits.softmax(-1) - targets.softmax(-1)).square().sum(-1)


def scalar(logits, targets, progress):
    return good(logits, targets, progress).mean()


def per_class(logits, targets, progress):
    return logits - targets


def a_float(logits, targets, progress):
    return float(good(logits, targets, progress).mean().detach())


def detached(logits, targets, progress, *, scale=1.0):
    return good(logits.detach(), targets, progress, scale=scale)


def broken(logits, targets, progress):
    return logits.sofmax(-1)


MISTAKES = [
    (scalar, r"^test_own_loss\.scalar: gave shape \[\] for \d+ examples; give one number each, \[B\]"),
    (per_class, r"^test_own_loss\.per_class: gave shape \[\d+, 2\] for"),
    (a_float, r"^test_own_loss\.a_float: gave float for"),
    (partial(detached, scale=2.0), r"^test_own_loss\.detached: its values have no gradient"),
    (broken, r"^test_own_loss\.broken: AttributeError: .*'sofmax'.* \(test_own_loss.py, line \d+\)$"),
]


@pytest.mark.parametrize(("loss", "said"), MISTAKES)
def test_a_loss_is_named_in_one_line(loss, said):
    logits, targets = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)
    with pytest.raises(UserError, match=said) as error:
        values_of(loss, logits, targets, 0.0)
    assert isinstance(error.value, OutsideError) == (loss is broken)


def test_right_values_pass_unchanged():
    logits, targets = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)
    assert torch.equal(values_of(partial(good, scale=3.0), logits, targets, 0.0), good(logits, targets, 0.0, scale=3.0))
    with torch.no_grad():  # held-out rows are read without gradients
        assert not values_of(good, logits, targets, 1.0).requires_grad


def test_a_fit_stops_at_its_first_step(tmp_path):
    module = partial(SoftLabelModule, loss=scalar)
    job = FitJob(BagOfWords(64, True, 2), module, examples(), None, options(), seed=5)
    with pytest.raises(
        UserError,
        match=r"^student: test_own_loss\.scalar: gave shape \[\] for 6 examples; give one number each, \[B\]$",
    ):
        stages(tmp_path).fit("student", {"a": 1}, lambda: job)
