"""Checks on labels: noise that a majority corrects, and teachers that trained on the rows they label."""

from __future__ import annotations

import json

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

from w2sg.data import audit, noise
from w2sg.known_answers.bench import Bench, Kept, linear
from w2sg.known_answers.result import Findings, Line, Panel
from w2sg.losses import cross_entropy, hard_logits
from w2sg.metrics import intervals as statistics
from w2sg.metrics import labels as metrics
from w2sg.metrics import theory as diagnostics
from w2sg.training.label_modules import SoftLabelModule

STUDENTS = (0.0, 0.25, 1.0)  # overlaps at which students are trained


class Constant(Kept):
    """One pair of logits per cluster. A row holds the number of its cluster."""

    def __init__(self, clusters: int):
        super().__init__()
        self.logits = nn.Embedding(clusters, 2)
        nn.init.zeros_(self.logits.weight)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.logits(batch["features"][:, 0, 0].long())


def clusters(bench: Bench) -> Findings:
    """A student that is constant on clusters learns the majority of their labels."""
    found, count = Findings(), 1500
    options = {"kind": "flip", "shrink": -1.0, "rates": None}
    lines = []
    for k, rate in enumerate((0.2, 0.3, 0.4)):
        points = []
        for size in (5, 15):
            cluster = torch.arange(count).repeat_interleave(size)
            gold = (cluster * 7919 % 13) % 2
            ids = [f"{size}-{i}" for i in range(len(gold))]
            clean = hard_logits(gold, 2)
            weak, _ = noise.apply_noise(clean, ids, gold, options | {"rate": rate}, seed=10)
            model = Constant(count)
            features = cluster[:, None, None].float()
            # one step of gradient descent from 0 has the majority's sign, as every later step has
            bench.fit(f"majority-{size}-{rate}", model, features, weak, cross_entropy, lr=float(count))
            student = bench.read(f"majority-{size}-{rate}", model, features)
            error = float(binom.sf(size // 2, size, rate))
            hits = [metrics.correct(y, gold).numpy() for y in (weak, student, clean)]
            deviation = np.sqrt(error * (1 - error) / count)
            words = f"flips {rate}, clusters of {size}"
            found.add(f"student error, {words}", error, 1 - hits[1].mean(), 4 * deviation, "4 s.e.")
            pgr = statistics.performance_gap_recovered(*hits, statistics.Bootstrap(len(gold), resamples=50))
            theory = 1 - error / rate
            # the student's and the teacher's errors both move the ratio
            both = np.sqrt(deviation**2 + (error / rate) ** 2 * rate * (1 - rate) / len(gold)) / rate
            found.add(f"PGR, {words}", theory, pgr["value"], 4 * both, "4 s.e.")
            points.append((size, pgr["value"], both))
        sizes = np.arange(1, 46, 2)
        theory = 1 - binom.sf(sizes // 2, sizes, rate) / rate
        x, y, e = zip(*points, strict=True)
        lines += [
            Line(f"flips {rate}", sizes, theory, "theory", colour=k),
            Line("", x, y, "measured", e, colour=k),
        ]
    whole, _ = noise.apply_noise(clean, [f"c{c}" for c in cluster.tolist()], gold, options | {"rate": 0.3}, seed=10)
    model = Constant(count)
    bench.fit("whole", model, features, whole, cross_entropy, lr=float(count))
    hits = [metrics.correct(y, gold).numpy() for y in (whole, bench.read("whole", model, features), clean)]
    pgr = statistics.performance_gap_recovered(*hits, statistics.Bootstrap(len(gold), resamples=50))
    found.add("PGR, whole clusters flipped", 0.0, pgr["value"], 1e-12, "exact: nothing contradicts the teacher")
    found.panels.append(Panel("Majority in clusters", "rows of a cluster", "PGR", lines))
    return found


class Nearest(nn.Module):
    """A nearest-neighbour classifier with the memory [M, D]."""

    def __init__(self, memory: Tensor, labels: Tensor):
        super().__init__()
        self.memory, self.labels = nn.Parameter(memory, requires_grad=False), labels

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        nearest = torch.cdist(batch["features"][:, 0], self.memory).argmin(1)
        return nn.functional.one_hot(self.labels[nearest], 2).float()


def leakage(bench: Bench) -> Findings:
    """A teacher is right on the rows that it trained on: alarm = share of them (1 - test accuracy)."""
    found, draw = Findings(), np.random.default_rng(16)
    d, n, n_test = 6, 1200, 2400
    x = draw.normal(size=(2 * n + n_test, d))
    # noisy labels, so that no model is right everywhere except on rows it has seen
    label = (x[:, 0] + 0.9 * draw.normal(size=len(x)) > 0).astype(int)
    rows = [{"text": f"row {i}", "label": int(y)} for i, y in enumerate(label)]

    def write(path, indices) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(rows[i]) + "\n" for i in indices), encoding="utf-8")

    def of(table) -> Tensor:
        return torch.tensor(x[[int(t[0].split()[1]) for t in table.texts]], dtype=torch.float32)[:, None]

    points, recovered = [], []  # how far the student stays behind
    for share in (None, 0.0, 0.1, 0.25, 0.5, 1.0):
        both = int(n * (share or 0.0))
        words = "split by prompt" if share is None else f"overlap {share}"
        folder = bench.folder / f"overlap-{share}"
        sizes: dict[str, int | None] = {"ground_truth": None, "transfer": None, "test": None}
        if share is None:
            write(folder / "rows.jsonl", range(len(rows)))
            data = bench.tables(folder / "rows.jsonl", {"ground_truth": n, "transfer": n, "test": n_test})
        else:
            write(folder / "ground_truth.jsonl", range(n))
            write(folder / "transfer.jsonl", range(n - both, 2 * n - both))
            write(folder / "test.jsonl", range(2 * n, len(rows)))
            data = bench.tables(folder, sizes)
        splits = {"ground_truth": data.ground_truth, "transfer": data.transfer, "test": data.test}
        seen = audit.overlaps(splits)["ground_truth and transfer"]
        found.add(f"prompts that the splits share, {words}", both, seen, 0, "counted")
        teacher = Nearest(of(data.ground_truth)[:, 0], torch.as_tensor(data.ground_truth.labels))
        name = f"weak-{share}"
        on = {k: bench.read(f"{name}-on-{k}", teacher, of(splits[k])) for k in ("transfer", "test")}
        gold = {k: torch.as_tensor(splits[k].labels) for k in on}
        hits = {k: metrics.correct(on[k], gold[k]).numpy() for k in on}
        alarm = diagnostics.leak(hits["transfer"], hits["test"])
        accuracy = hits["test"].mean()
        expected = (share or 0.0) * (1 - accuracy)
        deviation = np.sqrt(accuracy * (1 - accuracy) * ((1 - (share or 0.0)) / n + 1 / n_test))
        found.add(f"alarm, {words}", expected, alarm["value"], 4 * deviation, "4 s.e.")
        points.append((share or 0.0, alarm["value"], deviation))
        if share is None or share >= 0.25:
            found.add(f"alarm raised, {words}", share is not None, alarm["low"] > 0, 0, "its interval lies above 0")
        if share not in STUDENTS:
            continue
        nll = {}
        for role, labels in (("student", on["transfer"].argmax(1)), ("ceiling", gold["transfer"])):
            head = linear(d, 2)
            settings = {"lr": 0.02, "steps": 8, "batch_size": 150, "module": SoftLabelModule}
            targets = hard_logits(labels, 2)
            bench.fit(f"{role}-{share}", head, of(data.transfer), targets, cross_entropy, **settings)
            logits = bench.read(f"{role}-{share}-on-transfer", head, of(data.transfer))
            nll[role] = metrics.measure(logits, gold["transfer"])["nll"]
        recovered.append((share, nll["student"] - nll["ceiling"]))
    found.add(
        "student - ceiling (NLL) at overlap 1", 0.0, recovered[-1][1], 1e-9, "the teacher's labels are the gold ones"
    )
    behind = [nll for _, nll in recovered]
    found.add(
        "smallest gain from more overlap (NLL)", 0.0, min(-np.diff(behind), default=0.0), 0.0, "the order alone", ">="
    )
    x_, y, e = zip(*points, strict=True)
    lines = [
        Line("share (1 − accuracy)", [0, 1], [0, y[-1]], "theory"),
        Line("teacher on transfer − on test", x_, y, "measured", e),
        Line("student − ceiling, NLL", *zip(*recovered, strict=True), "measured", colour=1),
    ]
    found.panels.append(Panel("Leakage", "share of transfer rows that trained the teacher", "difference", lines))
    return found
