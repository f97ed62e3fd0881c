"""Classification end to end, with halfspaces as teacher and student: file, splits, fits, test accuracy, PGR."""

from __future__ import annotations

import json
from math import atan, cos, pi, sin, sqrt, tan

import numpy as np
import torch

from w2sg.data.table import Table
from w2sg.known_answers.bench import Bench, linear
from w2sg.known_answers.result import Findings, Line, Panel
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


def halfspaces(bench: Bench) -> Findings:
    """PGR = 1 - atan(rho tan theta) / theta, theta = pi (1 - weak accuracy)."""
    found, draw = Findings(), np.random.default_rng(7)
    n_transfer, n_test = 12000, 16000
    x = draw.normal(size=(100 + n_transfer + n_test, D))
    file = bench.folder / "halfspaces.jsonl"
    lines = [json.dumps({"text": f"point {i}", "label": int(p[0] < 0)}) + "\n" for i, p in enumerate(x)]
    file.write_text("".join(lines), encoding="utf-8")
    data = bench.tables(file, {"ground_truth": 100, "transfer": n_transfer, "test": n_test})
    shared = set(data.transfer.texts) & set(data.test.texts)
    found.add("rows that transfer and test share", 0, len(shared), 0, "splits are disjoint")

    def of(table: Table, width: int) -> torch.Tensor:
        rows = [int(texts[0].split()[1]) for texts in table.texts]
        return torch.tensor(x[rows, :width], dtype=torch.float32)[:, None]

    def learn(name: str, labels: torch.Tensor) -> torch.Tensor:
        head = linear(D_STUDENT, 2)
        settings = {"lr": 0.05, "steps": 10, "batch_size": 800, "schedule": "cosine", "module": SoftLabelModule}
        bench.fit(name, head, of(data.transfer, D_STUDENT), hard_logits(labels, 2), cross_entropy, **settings)
        return bench.read(f"{name}-on-test", head, of(data.test, D_STUDENT))

    gold = torch.as_tensor(data.test.labels)
    ceiling = learn("ceiling", torch.as_tensor(data.transfer.labels))
    theta = pi * (1 - WEAK)
    bootstrap = statistics.Bootstrap(n_test, resamples=400)
    hits = {"ceiling": metrics.correct(ceiling, gold).numpy()}
    bound = student_accuracy(0.0, 0.0, n_transfer)
    found.add("ceiling accuracy", bound, metrics.measure(ceiling, gold)["accuracy"], 0.003, "at least that", ">=")
    measured = []
    for rho in SHARES:
        weights = torch.zeros(D)
        weights[0], weights[1], weights[-1] = cos(theta), rho * sin(theta), sqrt(1 - rho**2) * sin(theta)
        teacher = linear(D, 2)
        teacher.score.weight.data = torch.stack([weights, -weights])
        weak = bench.read(f"weak-{rho}-on-test", teacher, of(data.test, D))
        student = learn(
            f"student-{rho}", bench.read(f"weak-{rho}-on-transfer", teacher, of(data.transfer, D)).argmax(1)
        )
        hits["weak"], hits["student"] = (metrics.correct(y, gold).numpy() for y in (weak, student))
        pgr = statistics.performance_gap_recovered(hits["weak"], hits["student"], hits["ceiling"], bootstrap)
        accuracy = student_accuracy(rho, theta, n_transfer)
        error = _error(accuracy, rho, theta, n_transfer, n_test)
        got = metrics.measure(student, gold)["accuracy"]
        found.add(f"student accuracy, rho {rho}", accuracy, got, 4 * error, "4 s.e.: test rows and transfer rows")
        # the ceiling is fitted to n rows too, so its distance from 1 is part of the gap
        expected = (accuracy - WEAK) / (1 - WEAK)
        limit = 1 - atan(rho * tan(theta)) / theta
        slack = abs(expected - limit) + (1 - bound)
        both = sqrt(error**2 + WEAK * (1 - WEAK) / n_test)
        why = "4 s.e. and what n rows cost student and ceiling"
        found.add(f"PGR, rho {rho}", limit, pgr["value"], 4 * both / (1 - WEAK) + slack, why)
        measured.append((rho, pgr["value"], (pgr["high"] - pgr["low"]) / 4))
    grid = np.linspace(0, 1, 60)
    theory = [1 - atan(rho * tan(theta)) / theta for rho in grid]
    x_, y_, e_ = zip(*measured, strict=True)
    lines = [Line("1 − atan(ρ tan θ)/θ", grid, theory, "theory"), Line("runs", x_, y_, "measured", e_)]
    title = f"Halfspaces, weak accuracy {WEAK}"
    found.panels.append(Panel(title, "ρ (ρ²: share of the error the student can express)", "PGR", lines))
    return found


def _error(accuracy: float, rho: float, theta: float, n: int, n_test: int) -> float:
    """s.e. of the student's accuracy, from test rows and from the transfer rows along the teacher's error."""
    residual = 1 - (2 / pi) * (cos(theta) ** 2 + rho**2 * sin(theta) ** 2)
    slope = sqrt((pi / 2) * residual / n) / cos(theta) / (pi * (1 + (rho * tan(theta)) ** 2))
    return sqrt(accuracy * (1 - accuracy) / n_test + slope**2)
