"""The verdict on a run of label models: one sentence for each case, and never one that the numbers contradict."""

import numpy as np
import pytest
import torch

from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports.label_runs import verdict
from w2sg.reports.sections.accuracy import Accuracy

ROWS = 400


def report(**accuracies):
    """A report of models whose errors are nested: the better of two is right wherever the other is."""
    labels = torch.zeros(ROWS, dtype=torch.long)
    right = {name: np.arange(ROWS) < round(share * ROWS) for name, share in accuracies.items()}
    predictions = {
        name: torch.tensor(np.where(hit, 1.0, -1.0))[:, None] * torch.tensor([1.0, -1.0]) for name, hit in right.items()
    }
    found = Accuracy.measure(predictions, labels, Bootstrap(ROWS, resamples=400)).content
    return found | {"loss": "ce", "data": {"sizes": {"test": ROWS}}}


WORKED = "Weak-to-strong generalization worked: the student is better than its teacher."
NOT_SEEN = "Weak-to-strong generalization was not seen: the student's gain over its teacher is not resolved."
PERHAPS = "The student is better than its teacher, but it may not have learned this from its teacher."
FAILED = "Weak-to-strong generalization failed: the student is worse than its teacher."
CASES = {
    "worked": (dict(weak=0.6, student=0.7, ceiling=0.8, zero_shot=0.5), WORKED, "does not explain"),
    "worked, nothing asked": (dict(weak=0.6, student=0.7, ceiling=0.8), WORKED, "was not measured"),
    "known before": (dict(weak=0.6, student=0.7, ceiling=0.8, zero_shot=0.8), PERHAPS, "it already knew more"),
    "perhaps known": (dict(weak=0.6, student=0.7, ceiling=0.8, zero_shot=0.7), PERHAPS, "may already have known"),
    "no gain": (dict(weak=0.6, student=0.6, ceiling=0.8, zero_shot=0.5), NOT_SEEN, "does not explain"),
    "no gain, known": (dict(weak=0.6, student=0.6, ceiling=0.8, zero_shot=0.8), NOT_SEEN, "it already knew more"),
    "worse": (dict(weak=0.6, student=0.5, ceiling=0.8, zero_shot=0.5), FAILED, "may already have known"),
    "no gap": (
        dict(weak=0.6, student=0.6, ceiling=0.6, zero_shot=0.5),
        "Weak-to-strong generalization cannot be judged, because the gap to the ceiling is not resolved.",
        "so no PGR is claimed",
    ),
    "ceiling below": (
        dict(weak=0.7, student=0.8, ceiling=0.6, zero_shot=0.5),
        "Weak-to-strong generalization cannot be judged, because the ceiling is worse than the teacher.",
        "so no PGR is claimed",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_sentence_is_the_answer_and_the_others_say_why(case):
    accuracies, answer, why = CASES[case]
    said = verdict(report(**accuracies))
    assert said.startswith(answer)
    assert why in said
    student, weak, ceiling = (accuracies[name] for name in ("student", "weak", "ceiling"))
    gain = f"{student - weak:+.3f}".replace("-0.000", "+0.000")
    compared = f"has {student:.3f} against its teacher's {weak:.3f}"
    if ceiling <= weak:
        how = "better than" if student > weak else "not distinguishable from"
        compared = f"is {how} its teacher: {student:.3f} against {weak:.3f}"
    assert f"On 400 test rows, the student {compared}, a difference of {gain} [" in said
    assert f"The gap from teacher to ceiling is {ceiling - weak:+.3f} [" in said
    assert ("recovers" in said) == (ceiling > weak)
    if ceiling > weak:
        assert f"the student recovers {(student - weak) / (ceiling - weak):.2f} [" in said
    if "zero_shot" in accuracies:
        assert f"The strong model without any training has {accuracies['zero_shot']:.3f}" in said


def test_a_run_without_a_teacher_or_a_ceiling_has_no_such_verdict():
    assert verdict(report(student=0.7, ceiling=0.8)) == ""
