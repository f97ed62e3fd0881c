"""Classification end to end, with halfspaces as teacher and student: file, splits, fits, test accuracy, PGR."""

from __future__ import annotations

from math import atan, cos, pi, sin, sqrt, tan

import numpy as np
import torch

from w2sg.known_answers.bench import Bench, linear, numbered, write_rows
from w2sg.known_answers.result import OWN, Findings, Line, known
from w2sg.losses import cross_entropy, hard_logits
from w2sg.metrics import intervals as statistics
from w2sg.metrics import labels as metrics
from w2sg.training.label_modules import SoftLabelModule

D, D_STUDENT = 64, 17
WEAK = 0.75  # the teacher's accuracy
SHARES = (0.0, 0.25, 0.5, 1.0)  # rho; its square is the share of the teacher's error that the student can express


def student_accuracy(rho: float, theta: float, n: float = np.inf) -> float:
    """Accuracy of a student on n hard labels of a teacher at the angle theta (n infinite: 1 - atan(rho tan)/pi)."""
    residual = 1 - (2 / pi) * (cos(theta) ** 2 + rho**2 * sin(theta) ** 2)
    return 1 - atan(sqrt(rho**2 * sin(theta) ** 2 + (pi / 2) * (D_STUDENT - 1) * residual / n) / cos(theta)) / pi


@known(source=OWN)
def halfspaces(bench: Bench) -> Findings:
    """PGR of classification is 1 − atan(ρ tan θ)/θ, if the student can express the share ρ² of its teacher's error."""
    # theta = pi (1 - weak accuracy) is the angle of teacher and truth
    facts, draw = Findings(), np.random.default_rng(7)
    n_transfer, n_test = 12000, 16000
    x = draw.normal(size=(100 + n_transfer + n_test, D))
    rows = ({"text": f"point {i}", "label": int(p[0] < 0)} for i, p in enumerate(x))
    file = write_rows(bench.folder / "halfspaces.jsonl", rows)
    data = bench.tables(file, {"ground_truth": 100, "transfer": n_transfer, "test": n_test})
    shared = set(data.transfer.texts) & set(data.test.texts)
    facts.add("rows that transfer and test share", 0, len(shared), 0, "splits are disjoint")

    transfer, test = (numbered(table, x) for table in (data.transfer, data.test))

    def learn(name: str, labels: torch.Tensor) -> torch.Tensor:
        settings = {"lr": 0.05, "steps": 10, "batch_size": 800, "schedule": "cosine", "module": SoftLabelModule}
        given = (linear(D_STUDENT, 2), transfer[..., :D_STUDENT], hard_logits(labels, 2), cross_entropy)
        return bench.learn(name, *given, on=test[..., :D_STUDENT], **settings)

    gold = torch.as_tensor(data.test.labels)
    ceiling = learn("ceiling", torch.as_tensor(data.transfer.labels))
    theta = pi * (1 - WEAK)
    bootstrap = statistics.Bootstrap(n_test, resamples=400)
    hits = {"ceiling": metrics.correct(ceiling, gold).numpy()}
    bound = student_accuracy(0.0, 0.0, n_transfer)
    facts.add("ceiling accuracy", bound, metrics.measure(ceiling, gold)["accuracy"], 0.003, "at least that", ">=")
    measured = []
    for rho in SHARES:
        weights = torch.zeros(D)
        weights[0], weights[1], weights[-1] = cos(theta), rho * sin(theta), sqrt(1 - rho**2) * sin(theta)
        teacher = linear(D, 2)
        teacher.score.weight.data = torch.stack([weights, -weights])
        weak = bench.read(f"weak-{rho}-on-test", teacher, test)
        student = learn(f"student-{rho}", bench.read(f"weak-{rho}-on-transfer", teacher, transfer).argmax(1))
        hits["weak"], hits["student"] = (metrics.correct(y, gold).numpy() for y in (weak, student))
        pgr = statistics.performance_gap_recovered(hits["weak"], hits["student"], hits["ceiling"], bootstrap)
        accuracy = student_accuracy(rho, theta, n_transfer)
        error = _error(accuracy, rho, theta, n_transfer, n_test)
        got = metrics.measure(student, gold)["accuracy"]
        facts.add(f"student accuracy, rho {rho}", accuracy, got, 4 * error, "4 s.e.: test rows and transfer rows")
        # the ceiling is fitted to n rows too, so its distance from 1 is part of the gap
        expected = (accuracy - WEAK) / (1 - WEAK)
        limit = 1 - atan(rho * tan(theta)) / theta
        slack = abs(expected - limit) + (1 - bound)
        both = sqrt(error**2 + WEAK * (1 - WEAK) / n_test)
        why = "4 s.e. and what n rows cost student and ceiling"
        facts.add(f"PGR, rho {rho}", limit, pgr["value"], 4 * both / (1 - WEAK) + slack, why)
        measured.append((rho, pgr["value"], (pgr["high"] - pgr["low"]) / 4))
    grid = np.linspace(0, 1, 60)
    theory = [1 - atan(rho * tan(theta)) / theta for rho in grid]
    lines = [Line("1 − atan(ρ tan θ)/θ", grid, theory, "theory"), Line.runs(measured, "runs")]
    axes = ("ρ (ρ²: share of the error the student can express)", "PGR")
    facts.draw(f"Halfspaces, weak accuracy {WEAK}", *axes, lines)
    return facts


def _error(accuracy: float, rho: float, theta: float, n: int, n_test: int) -> float:
    """s.e. of the student's accuracy, from test rows and from the transfer rows along the teacher's error."""
    residual = 1 - (2 / pi) * (cos(theta) ** 2 + rho**2 * sin(theta) ** 2)
    slope = sqrt((pi / 2) * residual / n) / cos(theta) / (pi * (1 + (rho * tan(theta)) ** 2))
    return sqrt(accuracy * (1 - accuracy) / n_test + slope**2)
