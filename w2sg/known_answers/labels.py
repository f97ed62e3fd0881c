"""Checks on labels: noise that a majority corrects, and teachers that trained on the rows they label."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

from w2sg.data import audit, noise
from w2sg.known_answers.bench import Bench, Kept, linear, numbered, write_rows
from w2sg.known_answers.result import OWN, Findings, Line, known
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


@known(source="pseudolabel correction: Lang et al. 2024, arXiv 2405.16043; P(Bin(m, α) > m/2)")
def clusters(bench: Bench) -> Findings:
    """Independent label noise is corrected by the majority of a cluster; noise on whole clusters is not."""
    facts, count = Findings(), 1500
    options = {"kind": "flip", "shrink": -1.0, "rates": None}
    lines = []

    def taught(name: str, weak: Tensor) -> tuple[list[np.ndarray], float]:
        """[N] who is right (teacher, student, gold) after a student of these labels, and the PGR of its rows."""
        model, features = Constant(count), cluster[:, None, None].float()
        # one step of gradient descent from 0 has the majority's sign, and so has every later one
        student = bench.learn(name, model, features, weak, cross_entropy, lr=float(count), on=features)
        hits = [metrics.correct(y, gold).numpy() for y in (weak, student, clean)]
        bootstrap = statistics.Bootstrap(len(gold), resamples=50)
        return hits, statistics.performance_gap_recovered(*hits, bootstrap)["value"]

    for k, rate in enumerate((0.2, 0.3, 0.4)):
        points = []
        for size in (5, 15):
            cluster = torch.arange(count).repeat_interleave(size)
            gold = (cluster * 7919 % 13) % 2
            ids = [f"{size}-{i}" for i in range(len(gold))]
            clean = hard_logits(gold, 2)
            weak, _ = noise.apply_noise(clean, ids, gold, options | {"rate": rate}, seed=10)
            hits, pgr = taught(f"majority-{size}-{rate}", weak)
            error = float(binom.sf(size // 2, size, rate))
            deviation = np.sqrt(error * (1 - error) / count)
            words = f"flips {rate}, clusters of {size}"
            facts.add(f"student error, {words}", error, 1 - hits[1].mean(), 4 * deviation, "4 s.e.")
            theory = 1 - error / rate
            # the student's and the teacher's errors both move the ratio
            both = np.sqrt(deviation**2 + (error / rate) ** 2 * rate * (1 - rate) / len(gold)) / rate
            facts.add(f"PGR, {words}", theory, pgr, 4 * both, "4 s.e.")
            points.append((size, pgr, both))
        sizes = np.arange(1, 46, 2)
        theory = 1 - binom.sf(sizes // 2, sizes, rate) / rate
        lines += [Line(f"flips {rate}", sizes, theory, "theory", colour=k), Line.runs(points, colour=k)]
    whole, _ = noise.apply_noise(clean, [f"c{c}" for c in cluster.tolist()], gold, options | {"rate": 0.3}, seed=10)
    _, pgr = taught("whole", whole)
    facts.add("PGR, whole clusters flipped", 0.0, pgr, 1e-12, "exact: nothing contradicts the teacher")
    facts.draw("Majority in clusters", "rows of a cluster", "PGR", lines)
    return facts


class Nearest(nn.Module):
    """A nearest-neighbour classifier with the memory [M, D]."""

    def __init__(self, memory: Tensor, labels: Tensor):
        super().__init__()
        self.memory, self.labels = nn.Parameter(memory, requires_grad=False), labels

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        nearest = torch.cdist(batch["features"][:, 0], self.memory).argmin(1)
        return nn.functional.one_hot(self.labels[nearest], 2).float()


@known(source=OWN)
def leakage(bench: Bench) -> Findings:
    """A teacher that trained on rows it labels is detected by its accuracy on them; splits by prompt share no rows."""
    # alarm = share (1 - test accuracy): on the rows that it has seen the teacher is right
    facts, draw = Findings(), np.random.default_rng(16)
    d, n, n_test = 6, 1200, 2400
    x = draw.normal(size=(2 * n + n_test, d))
    # noisy labels, so that no model is right everywhere except on rows it has seen
    label = (x[:, 0] + 0.9 * draw.normal(size=len(x)) > 0).astype(int)
    rows = [{"text": f"row {i}", "label": int(y)} for i, y in enumerate(label)]
    points, recovered = [], []  # how far the student stays behind
    for share in (None, 0.0, 0.1, 0.25, 0.5, 1.0):
        both = int(n * (share or 0.0))
        words = "split by prompt" if share is None else f"overlap {share}"
        folder = bench.folder / f"overlap-{share}"
        sizes = {"ground_truth": n, "transfer": n, "test": n_test}
        if share is None:
            data = bench.tables(write_rows(folder / "rows.jsonl", rows), sizes)
        else:
            begins = {"ground_truth": 0, "transfer": n - both, "test": 2 * n}
            for split, begin in begins.items():
                write_rows(folder / f"{split}.jsonl", rows[begin : begin + sizes[split]])
            data = bench.tables(folder, dict.fromkeys(sizes))
        splits = {name: getattr(data, name) for name in sizes}
        inputs = {name: numbered(table, x) for name, table in splits.items()}
        seen = audit.overlaps(splits)["ground_truth and transfer"]
        facts.add(f"prompts that the splits share, {words}", both, seen, 0, "counted")
        teacher = Nearest(inputs["ground_truth"][:, 0], torch.as_tensor(data.ground_truth.labels))
        name = f"weak-{share}"
        on = {k: bench.read(f"{name}-on-{k}", teacher, inputs[k]) for k in ("transfer", "test")}
        gold = {k: torch.as_tensor(splits[k].labels) for k in on}
        hits = {k: metrics.correct(on[k], gold[k]).numpy() for k in on}
        alarm = diagnostics.leak(hits["transfer"], hits["test"])
        accuracy = hits["test"].mean()
        expected = (share or 0.0) * (1 - accuracy)
        deviation = np.sqrt(accuracy * (1 - accuracy) * ((1 - (share or 0.0)) / n + 1 / n_test))
        facts.add(f"alarm, {words}", expected, alarm["value"], 4 * deviation, "4 s.e.")
        points.append((share or 0.0, alarm["value"], deviation))
        if share is None or share >= 0.25:
            facts.add(f"alarm raised, {words}", share is not None, alarm["low"] > 0, 0, "its interval lies above 0")
        if share not in STUDENTS:
            continue
        nll = {}
        for role, labels in (("student", on["transfer"].argmax(1)), ("ceiling", gold["transfer"])):
            settings = {"lr": 0.02, "steps": 8, "batch_size": 150, "module": SoftLabelModule, "on": inputs["transfer"]}
            given = (linear(d, 2), inputs["transfer"], hard_logits(labels, 2), cross_entropy)
            logits = bench.learn(f"{role}-{share}", *given, **settings)
            nll[role] = metrics.measure(logits, gold["transfer"])["nll"]
        recovered.append((share, nll["student"] - nll["ceiling"]))
    facts.add(
        "student - ceiling (NLL) at overlap 1", 0.0, recovered[-1][1], 1e-9, "the teacher's labels are the gold ones"
    )
    gain = min(-np.diff([nll for _, nll in recovered]), default=0.0)
    facts.add("smallest gain from more overlap (NLL)", 0.0, gain, 0.0, "the order alone", ">=")
    lines = [
        Line("share (1 − accuracy)", [0, 1], [0, points[-1][1]], "theory"),
        Line.runs(points, "teacher on transfer − on test"),
        Line.runs(recovered, "student − ceiling, NLL", colour=1),
    ]
    facts.draw("Leakage", "share of transfer rows that trained the teacher", "difference", lines)
    return facts
