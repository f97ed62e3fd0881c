"""Least squares: misfit = gain, intrinsic dimension, ensembles, the optimal surrogate.

A linear model's population risk under N(0, I) is the squared distance of its weights from the truth. Its predictions
for the unit vectors are its weights, so the risk is read off exactly, without test rows.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from w2sg.known_answers.bench import Bench, Separate, linear, whitening
from w2sg.known_answers.result import OWN, Findings, Line, known, standard_error
from w2sg.metrics.intervals import gap_recovered_over_seeds


def least_squares(bench: Bench, name: str, x: Tensor, y: Tensor) -> Tensor:
    """[R, D] weights of R regressions of y [N, R] on x [N, R, D], by one fit and one read of unit vectors."""
    white = whitening(x.transpose(0, 1))  # [R, D, K]
    model = Separate(x.shape[1], white.shape[-1])
    features = torch.einsum("nrd,rdk->nrk", x.double(), white)
    units = white.transpose(0, 1)  # row d is the unit vector e_d
    return bench.learn(name, model, features, y.float(), steps=2, on=units).mT


@known(source="Charikar et al. 2024, arXiv 2405.15116, Theorem 1")
def misfit_gain(bench: Bench) -> Findings:
    """With a convex student and squared loss, the gain over the teacher equals the distance from it."""
    # err(weak) - err(student) = ||student - weak||^2, where the class is convex and holds the truth
    facts, draw = Findings(), np.random.default_rng(1)
    d, width, teachers, n, n_test = 8, 16, 50, 2000, 8000
    x = torch.tensor(draw.normal(size=(n + n_test, d)))
    features = torch.tanh(x @ torch.tensor(draw.normal(size=(d, width))) / d**0.5 * 1.5)
    truth = features @ torch.tensor(draw.normal(size=(width, 1))) / width**0.5
    hidden = torch.tensor(draw.normal(size=(teachers, d, 24)))
    errors = torch.tanh(torch.einsum("nd,tdh->tnh", x, hidden)) @ torch.tensor(draw.normal(size=(teachers, 24, 1)))
    sizes = torch.tensor(draw.uniform(0.3, 1.5, size=teachers))
    weak = truth + (errors[..., 0] * sizes[:, None]).T / 24**0.5  # [N, teachers]
    white = (features @ whitening(features[:n]))[:, None]
    student = bench.learn("students", linear(width, teachers), white[:n], weak[:n].float(), steps=2, on=white)
    gain = (weak - truth).square() - (student - truth).square()
    misfit = (student - weak).square()
    seen, fresh = (
        {"gain": gain[part].mean(0).numpy(), "misfit": misfit[part].mean(0).numpy()}
        for part in (slice(n), slice(n, None))
    )
    worst = np.abs(seen["gain"] - seen["misfit"]).max()
    facts.add("largest |gain - misfit| of 50 students, fitted rows", 0.0, worst, 1e-5, "fp32")
    facts.add("mean gain over mean misfit", 1.0, seen["gain"].mean() / seen["misfit"].mean(), 1e-5, "fp32")
    facts.add("smallest gain", 0.0, seen["gain"].min(), 0.0, "a projection cannot lose", ">=")
    # with p features, a student's misfit on its training rows is smaller than on fresh rows by p/n
    slope, _ = np.polyfit(fresh["misfit"], fresh["gain"], 1)
    share = np.corrcoef(fresh["misfit"], fresh["gain"])[0, 1] ** 2
    facts.add("slope of gain on misfit, fresh rows", 1.0, slope, 0.1, "sampling of 2,000 and 8,000 rows")
    facts.add("R² of that", 0.9, share, 0.0, "sampling of 2,000 and 8,000 rows", ">=")
    ends = [0.0, float(fresh["misfit"].max())]
    lines = [
        Line("gain = misfit", ends, ends, "theory"),
        Line("fitted rows", seen["misfit"], seen["gain"], "measured"),
        Line("fresh rows", fresh["misfit"], fresh["gain"], "measured", colour=1),
    ]
    facts.draw("Misfit is gain", "‖student − weak‖²", "err(weak) − err(student)", lines)
    return facts


@known(source=f"Dong et al. 2025, arXiv 2502.05075; exact for Gaussian inputs, {OWN}")
def intrinsic_dimension(bench: Bench) -> Findings:
    """The less the features of teacher and student overlap, the better the student; at small N its PGR is above 1."""
    # the weak model sees d_w features, the strong one d_s; they share some, which hold the truth
    facts, draw = Findings(), np.random.default_rng(3)
    d_w, d_s, n = 30, 40, 100
    measured = []
    for overlap, n_transfer, replicates in ((10, 80, 200), (10, 200, 300), (10, 1000, 60), (20, 1000, 60)):
        only_weak, width = d_w - overlap, d_s + d_w - overlap
        truth = torch.zeros(width)
        truth[0] = 1.0
        weak_sees = torch.cat([torch.arange(overlap), torch.arange(d_s, width)])
        gold = torch.tensor(draw.normal(size=(n, replicates, width)))
        noisy = gold @ truth.double() + torch.tensor(draw.normal(size=gold.shape[:2]))
        setting = f"overlap {overlap}, N {n_transfer}"
        name = f"{overlap}-{n_transfer}"
        weak = torch.zeros(replicates, width).double()
        weak[:, weak_sees] = least_squares(bench, f"weak-{name}", gold[..., weak_sees], noisy)
        transfer = torch.tensor(draw.normal(size=(n_transfer, replicates, width)))
        labels = torch.einsum("nrd,rd->nr", transfer, weak)
        strong = transfer[..., :d_s]
        student = least_squares(bench, f"student-{name}", strong, labels)
        gold_labels = transfer @ truth.double() + torch.tensor(draw.normal(size=labels.shape))
        ceiling = least_squares(bench, f"ceiling-{name}", strong, gold_labels)
        risks = [(w - truth[: w.shape[1]]).square().sum(1).numpy() for w in (weak, student, ceiling)]
        spare = n_transfer - d_s - 1
        expected = [d_w / (n - d_w - 1), (overlap + only_weak * d_s / spare) / (n - d_w - 1), d_s / spare]
        for role, risk, theory in zip(("weak", "student", "ceiling"), risks, expected, strict=True):
            facts.mean(f"{role} risk, {setting}", theory, risk)
        pgr = gap_recovered_over_seeds(*(-risk for risk in risks))
        theory = (expected[0] - expected[1]) / (expected[0] - expected[2])
        recovered = (risks[0] - risks[1]) - theory * (risks[0] - risks[2])
        error = standard_error(recovered) / abs(expected[0] - expected[2])
        if expected[2] > expected[0]:  # too few rows for the ceiling: there is no gap, so no PGR may be reported
            facts.add(f"PGR is claimed, {setting}", 0, pgr["resolved"], 0, "the ceiling is worse than the weak model")
        else:
            facts.add(f"PGR of risks, {setting}", theory, pgr["value"], 4 * error, "4 s.e.")
        if overlap == 10 and pgr["resolved"]:
            measured.append((n_transfer, pgr["value"], error))
        if n_transfer == 200:
            facts.add(f"PGR above 1, {setting}", 1.0, pgr["low"], 0.0, "the whole interval", ">=")
    grid = np.geomspace(150, 10000, 60)
    risk = (10 + 20 * d_s / (grid - d_s - 1)) / (n - d_w - 1)
    weak_risk = d_w / (n - d_w - 1)
    theory = (weak_risk - risk) / (weak_risk - d_s / (grid - d_s - 1))
    lines = [Line("theory", grid, theory, "theory"), Line.runs(measured, "runs")]
    facts.draw("PGR above 1 at small N (overlap 10)", "weak labels N", "PGR of risks", lines, logx=True)
    return facts


@known(source=OWN)
def ensembles(bench: Bench) -> Findings:
    """A committee's error is bias + variance/M, and a student of its labels has the same error."""
    facts, draw = Findings(), np.random.default_rng(11)
    d, n, missed, replicates, most = 20, 60, 0.5, 60, 16
    variance = (1.0 + missed) * d / (n - d - 1)
    models = replicates * most
    x = torch.tensor(draw.normal(size=(n, models, d)))
    noise = torch.tensor(draw.normal(size=(n, models))) * (1.0 + missed) ** 0.5  # plus features that no member sees
    truth = torch.full((d,), d**-0.5, dtype=torch.float64)
    members = least_squares(bench, "members", x, x @ truth + noise).reshape(replicates, most, d)
    transfer = torch.tensor(draw.normal(size=(80, replicates, d)))
    measured = []
    for size in (1, 2, 4, 8, 16):
        labels = torch.einsum("nrd,rd->nr", transfer, members[:, :size].mean(1))
        student = least_squares(bench, f"student-{size}", transfer, labels)
        risk = missed + (student - truth).square().sum(1).numpy()
        facts.mean(f"risk, {size} members", missed + variance / size, risk)
        measured.append((size, risk.mean(), standard_error(risk)))
    grid = np.geomspace(1, 16, 40)
    lines = [Line("bias + variance/M", grid, missed + variance / grid, "theory"), Line.runs(measured, "runs")]
    facts.draw("Ensembles of teachers", "members M", "risk", lines, logx=True)
    return facts


@known(source="Ildiz et al. 2024, arXiv 2410.18837, Figure 1")
def surrogate(bench: Bench) -> Findings:
    """Some labels teach better than gold ones: they amplify large features and leave out small ones."""
    facts, draw = Findings(), np.random.default_rng(14)
    p, n, replicates = 500, 200, 16
    i = np.arange(1, p + 1.0)
    scale, truth = i**-2.0, np.sqrt(i**-1.5 / i**-2.0)
    kappa = brentq(lambda k: (scale / (scale + k)).sum() - n, 1e-12, 1.0)
    zeta = kappa / (scale + kappa)  # share of each feature that the fit leaves out
    omega = ((1 - zeta) ** 2).sum() / n
    spread = omega / (1 - omega)

    def risk(taught: np.ndarray) -> float:
        """Risk of the fit to labels x.taught, against the truth."""
        return float((scale * ((1 - zeta) * taught - truth) ** 2 + spread * scale * zeta**2 * taught**2).sum())

    best = truth * (1 - zeta) / ((1 - zeta) ** 2 + spread * zeta**2)
    teachers = {"gold labels": truth, "best mask": truth * (zeta**2 < 1 - omega), "optimal surrogate": best}
    facts.add("features to amplify", (zeta < 1 - omega).sum(), (best > truth).sum(), 0, "zeta < 1 - Omega")
    x = torch.tensor(draw.normal(size=(n, replicates, p)) * scale**0.5)
    risks = {}
    for name, taught in teachers.items():
        labels = x @ torch.tensor(taught)
        learnt = least_squares(bench, name.replace(" ", "-"), x, labels).numpy()
        risks[name] = (scale * (learnt - truth) ** 2).sum(1)
        why = "4 s.e. and 2 %: the theory is a limit"
        facts.mean(f"risk of a student of {name}", risk(taught), risks[name], why, slack=0.02 * risk(taught))
    ahead = risks["gold labels"] - risks["optimal surrogate"]
    facts.add("gold labels - optimal surrogate, s.e.", 4, ahead.mean() / standard_error(ahead), 0, "resolved", ">=")
    blend = np.linspace(0, 1.6, 60)
    theory = [risk(truth + t * (best - truth)) for t in blend]
    ends = enumerate(risks[name] for name in ("gold labels", "optimal surrogate"))
    lines = [
        Line("theory", blend, theory, "theory"),
        Line("best mask", [0, 1.6], [risk(teachers["best mask"])] * 2, "theory", colour=1),
        Line.runs([(place, end.mean(), standard_error(end)) for place, end in ends], "runs"),
    ]
    axes = ("from gold labels (0) to the optimal surrogate (1)", "student's risk")
    facts.draw("Labels that teach better than gold", *axes, lines)
    return facts
