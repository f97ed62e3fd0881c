"""Refinement in context, with Gaussian concepts: y = beta_k . x + noise, and a biased weak model.

The strong model knows the concepts beta_1 .. beta_K and infers which one a context of weak examples shows. Shapes: T
contexts of n examples (x [D], y), K concepts. Concept 1 is the target.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import chi2
from torch import Tensor, nn

from w2sg.known_answers.bench import Bench, linear
from w2sg.known_answers.linear import least_squares
from w2sg.known_answers.result import OWN, Findings, Line, known, standard_error
from w2sg.methods.refine.select import product_of_contexts as pooled
from w2sg.methods.votes import combine

D, K = 16, 8
# Off-target mass with a bias of 1 and its s.e., by an independent simulation: it has no closed form.
SIMULATED = {
    1: (0.810252, 0.00111),
    4: (0.608266, 0.00233),
    8: (0.399353, 0.00271),
    16: (0.16113, 0.00218),
    32: (0.0263847, 0.00097),
}


class InContext(nn.Module):
    """The strong model: log-posterior [B, K] over concepts (the first K unit vectors) after examples [B, n, D + 1]."""

    def __init__(self):
        super().__init__()
        self.concepts = nn.Parameter(torch.eye(D)[:K], requires_grad=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x, y = batch["features"][..., :-1], batch["features"][..., -1]
        residual = y[..., None] - x @ self.concepts.T  # [B, n, K]
        return torch.log_softmax(-0.5 * residual.square().sum(1), -1)


def contexts(draw: np.random.Generator, count: int, n: int, weak: np.ndarray) -> Tensor:
    """[T, n, D + 1] examples of a weak model with the weights ``weak`` and noise of variance 1."""
    x = draw.normal(size=(count, n, D))
    y = x @ weak + draw.normal(size=(count, n))
    return torch.tensor(np.concatenate([x, y[..., None]], -1))


def rate(bias: float) -> float:
    """rho: off-target mass is at most (K - 1) rho^n, for a squared bias orthogonal to all concepts."""
    v = 1 + bias
    s = min(1.0, 1 / (2 * v))
    return (1 + 2 * s * (1 - s * v)) ** -0.5


def biased(size: float) -> np.ndarray:
    """Concept 1 with a squared bias that no concept can express."""
    weights = np.zeros(D)
    weights[0], weights[-1] = 1.0, size**0.5
    return weights


@known(source=f"Somerstep et al. 2024, arXiv 2405.16236, Theorem 4.3; the rate: {OWN}")
def refinement(bench: Bench) -> Findings:
    """Labels refined in context lose the weak model's bias exponentially in the examples of a context."""
    facts, draw = Findings(), np.random.default_rng(8)
    lines, model = [], InContext()
    for colour, bias in enumerate((0.0, 1.0)):
        points, bound = [], rate(bias)
        for n in (1, 4, 8, 16, 24, 32):
            rows = contexts(draw, 6000, n, biased(bias))
            off = 1 - bench.read(f"posterior-{bias}-{n}", model, rows).exp()[:, 0].numpy()
            points.append((n, off.mean(), standard_error(off)))
            ceiling = min(1.0, (K - 1) * bound**n)
            words = f"off-target mass, bias {bias}, n = {n}"
            if n >= 16:
                facts.mean(f"{words}, bound", ceiling, off, relation="<=")
            if bias == 1.0 and n in SIMULATED:
                value, error = SIMULATED[n]
                error = 4 * np.hypot(standard_error(off), error)
                facts.add(words, value, off.mean(), error, "4 s.e. of both simulations; no closed form")
        sizes, masses, errors = map(np.array, zip(*points[2:], strict=True))
        slope = np.polyfit(sizes, np.log(masses), 1, w=masses / errors)[0]
        facts.add(f"slope of log mass, bias {bias}", np.log(bound), slope, 0.015, "tight: no slower, no faster")
        x = np.arange(1, 41)
        lines += [
            Line(f"(K − 1) ρⁿ, bias {bias:g}", x, np.minimum(1, (K - 1) * bound**x), "theory", colour=colour),
            Line.runs(points, f"in context, bias {bias:g}", colour),
        ]
    facts.draw("Refinement rate", "examples in a context", "mass off the target", lines, logy=True)
    _fine_tuned(bench, facts, draw)
    return facts


def _fine_tuned(bench: Bench, facts: Findings, draw: np.random.Generator) -> None:
    """Refine batches of prompts by the others' weak answers (leave one out), then fit least squares on the labels."""
    n, replicates = 990, 24
    published = {5: (0.41965, 0.00841), 33: (0.00173, 0.00042)}
    weak = biased(1.0)
    prompts = contexts(draw, replicates, n, weak)  # [R, n, D + 1]
    x = prompts[..., :-1].transpose(0, 1)
    truth = torch.eye(D)[0].double()
    naive = least_squares(bench, "naive", x, prompts[..., -1].T)
    risk = (naive - truth).square().sum(1).numpy()
    expected = 1.0 + D / (n - D - 1)  # bias plus variance of least squares
    facts.mean("naive excess risk, 990 prompts", expected, risk)
    for size, (value, error) in published.items():
        grouped = prompts.reshape(-1, size, D + 1)
        others = torch.tensor([[j for j in range(size) if j != i] for i in range(size)])
        posterior = bench.read(f"refined-{size}", InContext(), grouped[:, others].flatten(0, 1)).exp()
        labels = (posterior * prompts.reshape(-1, D + 1)[:, :K]).sum(1)  # posterior mean of beta_k . x
        student = least_squares(bench, f"student-{size}", x, labels.reshape(replicates, n).T)
        risk = (student - truth).square().sum(1).numpy()
        tolerance = 4 * np.hypot(error, standard_error(risk))
        words = f"refined excess risk, batches of {size}"
        facts.add(words, value, risk.mean(), tolerance, "4 s.e. of both simulations; no closed form")


@known(source=f"arXiv 2405.16236, Proposition 3.2; our statement of it, {OWN}")
def naive_floor(bench: Bench) -> Findings:
    """Naive fine-tuning on biased labels has an error floor, however strong its anchor to the source."""
    facts = Findings()
    lines = []
    anchors = (0.25, 1 / 0.875, 4.0)
    for colour, bias in enumerate((0.25, 1.0)):
        source = torch.full((K,), 1 / K)
        source = torch.cat([source, torch.zeros(D - K)])
        weak, truth = torch.tensor(biased(bias), dtype=torch.float32), torch.eye(D)[0]
        ep, eq = float((source - truth).square().sum()), bias
        floor = ep * eq / (ep + eq)
        rows = torch.eye(D)[:, None] * D**0.5  # their second moment is the identity, so they stand for the population
        points = []
        for anchor in sorted({*anchors, eq / ep}):
            # the student is the source plus the trained head, and the penalty anchors it to the source
            labels = rows[:, 0] @ (weak - source)[:, None]
            settings = {"lr": 0.9 / (1 + anchor), "steps": 12, "weight_decay": anchor, "on": torch.eye(D)[:, None]}
            learnt = source + bench.learn(f"naive-{bias}-{anchor:.3g}", linear(D, 1), rows, labels, **settings)[:, 0]
            share = anchor / (1 + anchor)
            risk = float((learnt - truth).square().sum())
            words = f"bias {bias}, anchor {anchor:.3g}"
            expected = share**2 * ep + (1 - share) ** 2 * eq
            facts.add(f"excess risk, {words}", expected, risk, 1e-5, "fp32")
            facts.add(f"at least the floor, {words}", floor, risk, 1e-5, "fp32", ">=")
            points.append((anchor, risk))
        best = min(risk for _, risk in points)
        facts.add(f"best anchor, bias {bias}", floor, best, 1e-5, "fp32")
        grid = np.geomspace(0.05, 20, 80)
        share = grid / (1 + grid)
        lines += [
            Line(f"theory, bias {bias:g}", grid, share**2 * ep + (1 - share) ** 2 * eq, "theory", colour=colour),
            Line("", grid, np.full_like(grid, floor), "theory", colour=8),
            Line.runs(points, colour=colour),
        ]
    facts.draw("The floor of naive fine-tuning (grey)", "anchor to the source", "excess risk", lines, logx=True)
    return facts


def wrong_mass(c: float, n: int) -> float:
    """Expected mass on concept 2 among concepts 1 and 2, when the weak model leans from 1 to 2 by a share c.

    With S = sum of ((beta_1 - beta_2) . x)^2 ~ 2 chi^2(n), the log-odds of concept 1 are N((1/2 - c) S, S).
    """
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    levels = (np.arange(400) + 0.5) / 400
    s = 2 * chi2.ppf(levels, n)[:, None]
    return float((expit(-((0.5 - c) * s + np.sqrt(s) * points)) @ weights).mean() / np.sqrt(2 * np.pi))


@known(source=OWN)
def refinement_fails(bench: Bench) -> Findings:
    """If the bias leans towards another concept by more than one half, refinement is worse than naive training."""
    facts, draw = Findings(), np.random.default_rng(88)
    n, points = 64, []
    rows = torch.eye(D)[:, None] * D**0.5
    concepts, truth = torch.eye(D)[:K], torch.eye(D)[0]
    for c in (0.25, 0.45, 0.5, 0.55, 0.75):
        weak = np.zeros(D)
        weak[0], weak[1] = 1 - c, c
        posterior = bench.read(f"posterior-{c}", InContext(), contexts(draw, 2000, n, weak)).exp().numpy()
        wrong = posterior[:, 1] / posterior[:, :2].sum(1)
        expected = wrong_mass(c, n)
        facts.mean(f"mass on the wrong concept, c = {c}", expected, wrong)
        risks = {}
        taught = {
            "naive": torch.tensor(weak, dtype=torch.float32),
            "refined": torch.tensor(posterior.mean(0), dtype=torch.float32) @ concepts,
        }
        for name, weights in taught.items():
            given = (linear(D, 1), rows, rows[:, 0] @ weights[:, None])
            learnt = bench.learn(f"{name}-{c}", *given, steps=2, on=torch.eye(D)[:, None])[:, 0]
            risks[name] = float((learnt - truth).square().sum())
        facts.add(f"naive excess risk, c = {c}", 2 * c * c, risks["naive"], 1e-5, "fp32")
        # the other six concepts keep a little mass, which moves the excess by at most that
        others = 1 - posterior[:, :2].sum(1).mean()
        tolerance = 4 * expected * 4 * standard_error(wrong) + 4 * others + 1e-5
        words = f"refined excess risk, c = {c}"
        facts.add(words, 2 * expected**2, risks["refined"], tolerance, "4 s.e., other concepts")
        if c != 0.5:
            relation, words = "<=" if c < 0.5 else ">=", f"refined - naive excess, c = {c}"
            facts.add(words, 0.0, risks["refined"] - risks["naive"], 0.0, "refinement turns at 1/2", relation)
        points.append((c, risks["naive"], risks["refined"], 4 * expected * standard_error(wrong)))
    grid = np.linspace(0, 1, 61)
    lines = [
        Line("naive, 2c²", grid, 2 * grid**2, "theory"),
        Line.runs([(c, naive) for c, naive, *_ in points]),
        Line(f"refined, n = {n}", grid, [2 * wrong_mass(c, n) ** 2 for c in grid], "theory", colour=1),
        Line.runs([(c, *refined) for c, _, *refined in points], colour=1),
    ]
    facts.draw("Where refinement fails", "share c of the bias towards another concept", "excess risk", lines)
    return facts


@known(source=OWN)
def product_of_contexts(bench: Bench) -> Findings:
    """The product of m contexts is one context m times as long; their average is no better than one."""
    facts, draw = Findings(), np.random.default_rng(17)
    count, n, most = 3000, 4, 8
    rows = contexts(draw, count, n * most, biased(1.0))
    each = bench.read("contexts", InContext(), rows.unflatten(1, (most, n)).flatten(0, 1)).reshape(count, most, K)
    none = torch.full((count, K), -np.log(K), dtype=torch.float64)
    off, curves = {}, {"single": [], "average": [], "vote": [], "product": []}
    for m in (1, 2, 4, 8):
        laws = torch.cat([each[:, :m].movedim(1, 0), none[None]])  # [m + 1, T, K], and after no context
        product = torch.softmax(torch.as_tensor(pooled(laws.numpy())), -1)
        one = bench.read(f"one-{m}", InContext(), rows[:, : n * m]).exp()
        worst = float((product - one).abs().max())
        facts.add(f"largest |product - one context|, m = {m}", 0.0, worst, 2e-5, "fp32 logarithms")
        off["product"] = 1 - product[:, 0].numpy()
        off["average"] = 1 - combine(each[:, :m].unbind(1), "mean").exp()[:, 0].numpy()
        drawn = each[:, :m].exp().numpy().cumsum(-1) > draw.random((count, m, 1))
        votes = np.eye(K)[drawn.argmax(-1)].sum(1) + 1e-6 * draw.random((count, K))  # random tie-break
        off["vote"] = (votes.argmax(1) != 0).astype(float)
        off["single"] = 1 - one[:, 0].numpy()
        for name, values in off.items():
            curves[name].append((m, values.mean(), standard_error(values)))
    (_, single, error), *_, (_, average, deviation) = curves["average"]
    error = 4 * np.hypot(deviation, error)
    facts.add("off-target mass, average of 8", single, average, error, "averaging buys nothing")
    # numbers of an independent simulation
    for name, expected in (("vote", 0.28115), ("product", 0.025827)):
        _, value, deviation = curves[name][-1]
        words, why = f"off-target mass, {name} of 8", "4 s.e. and its tolerance, 0.01"
        facts.add(words, expected, value, 4 * deviation + 0.01, why)
    labels = {"average": "average", "vote": "vote of samples", "product": "product"}
    lines = [Line.runs(curves[k], words, i) for i, (k, words) in enumerate(labels.items())]
    sizes, single, _ = zip(*curves["single"], strict=True)
    lines.append(Line("one context of 4 m", sizes, single, "theory", colour=2))
    facts.draw("Pooling contexts of 4", "contexts m", "mass off the target", lines, logy=True)
    return facts
