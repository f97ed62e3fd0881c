"""Ridge teachers, and early stopping on random features: when a student that only shrinks beats its teacher."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from w2sg.known_answers.bench import Bench, Separate, linear
from w2sg.known_answers.result import OWN, Findings, Line, known, standard_error


class Ridge:
    """Ridge on isotropic inputs in the limit p / n = gamma, where Marchenko-Pastur's law gives every trace.

    Args:
        gamma: p / n.
        teacher: the teacher's penalty. The truth has norm 1 and the noise variance 1.
    """

    def __init__(self, gamma: float, teacher: float):
        self.gamma = gamma
        m, square = self._traces(teacher)
        self.overlap = 1 - teacher * m  # overlap of the teacher's weights with the truth
        self.norm = 1 - 2 * teacher * m + teacher**2 * square + gamma * (m - teacher * square)
        self.risk = 1 - 2 * self.overlap + self.norm

    def _traces(self, penalty: float) -> tuple[float, float]:
        """tr (S + penalty)^-1 / p and tr (S + penalty)^-2 / p of a sample covariance S."""
        g, b = self.gamma, 1 - self.gamma + penalty
        root = np.sqrt(b * b + 4 * g * penalty)
        m = (root - b) / (2 * g * penalty)
        slope = ((b + 2 * g) / root - 1) / (2 * g * penalty) - m / penalty
        return m, -slope

    def student(self, penalty: float) -> float:
        """Risk of a ridge student on the teacher's labels of fresh inputs."""
        m, square = self._traces(penalty)
        kept, squared = 1 - penalty * m, 1 - 2 * penalty * m + penalty**2 * square
        return squared * self.norm - 2 * kept * self.overlap + 1

    @property
    def best(self) -> float:
        """The best penalty of the student, near 0 if none helps."""
        return minimize_scalar(self.student, bounds=(1e-6, 5.0), method="bounded", options={"xatol": 1e-7}).x


@known(source="Moniri & Hassani 2025, arXiv 2505.18346")
def ridge(bench: Bench) -> Findings:
    """A ridge student beats its ridge teacher exactly if the teacher is under-regularised."""
    facts, draw = Findings(), np.random.default_rng(6)
    gamma, p, replicates = 0.5, 80, 40
    n = int(p / gamma)
    truth = torch.full((p,), p**-0.5)
    units = torch.eye(p)[:, None].expand(-1, replicates, -1)

    def learn(name: str, x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
        model = Separate(replicates, p)
        # the largest eigenvalue is near (1 + gamma^1/2)^2 = 2.9, so this is close to the fastest stable rate
        settings = {"lr": 2 / (3.6 + 2 * penalty), "steps": 80, "weight_decay": penalty}
        return bench.learn(name, model, x, y, on=units, **settings).T.float()

    lines = []
    for k, penalty in enumerate((0.02, 0.25, 1.0)):
        theory = Ridge(gamma, penalty)
        x = torch.tensor(draw.normal(size=(n, replicates, p)), dtype=torch.float32)
        y = x @ truth + torch.tensor(draw.normal(size=(n, replicates)), dtype=torch.float32)
        teacher = learn(f"teacher-{penalty}", x, y, penalty)
        helps = penalty < gamma
        student_penalty = theory.best if helps else 0.2
        fresh = torch.tensor(draw.normal(size=(n, replicates, p)), dtype=torch.float32)
        student = learn(f"student-{penalty}", fresh, torch.einsum("nrp,rp->nr", fresh, teacher), student_penalty)
        risks = [(w - truth).square().sum(1).double().numpy() for w in (teacher, student)]
        words, why = f"teacher's penalty {penalty}", f"4 s.e. and 2/p, p = {p}: the theory is a limit"
        facts.mean(f"teacher's risk, {words}", theory.risk, risks[0], why, slack=2 / p * theory.risk)
        ratio, mean = theory.student(student_penalty) / theory.risk, risks[1].mean() / risks[0].mean()
        error = standard_error(risks[1] - mean * risks[0]) / risks[0].mean()
        facts.add(f"student / teacher, {words}, own {student_penalty:.3f}", ratio, mean, 4 * error + 2 / p * ratio, why)
        gain = risks[0] - risks[1]
        # above gamma every student loses; below, the best one gains
        relation = ">=" if helps else "<="
        facts.add(f"teacher - student, penalty {penalty}", 0.0, gain.mean(), 0.0, "paired by replicate", relation)
        grid = np.geomspace(0.005, 3, 60)
        curve = [theory.student(g) / theory.risk for g in grid]
        lines.append(Line(f"teacher's penalty {penalty}", grid, curve, "theory", colour=k))
        lines.append(Line.runs([(student_penalty, mean, error)], colour=k))
    facts.draw("Ridge", "student's penalty", "student's risk / teacher's", lines, logx=True)
    return facts


def contraction_floor(teacher: float) -> float:
    """Least risk of a student that contracts the labels of a projection teacher of risk L (both over ||truth||^2)."""
    return ((np.sqrt(1 + 3 * teacher) - np.sqrt(1 - teacher)) / 2) ** 2


@known(source=f"Medvedev et al. 2025, arXiv 2503.02877; the exact floor: {OWN}")
def random_features(bench: Bench) -> Findings:
    """Early stopping makes a student beat teachers on few random features, but no student contracts below a floor."""
    facts, draw = Findings(), np.random.default_rng(4)
    published = {4: 0.708, 8: 0.515, 16: 0.320, 32: 0.223}
    rate, replicates = 0.25, 60
    more = {4: (150,), 16: (2, 8, 24, 120)}  # steps of further students
    lowest, lines, late = [], [], np.nan
    for k, width in enumerate(published):
        d, important = round(width**1.5), round(width**0.5)
        scale = np.where(np.arange(d) < important, 1.0, 1.0 / width)
        truth = np.where(np.arange(d) < important, width**0.75, 1.0)
        size = (scale * truth**2).sum()
        learnt = []
        for _ in range(replicates):  # least squares on M random features, all inputs seen
            features = draw.normal(size=(d, width))
            covariance = features.T @ (scale[:, None] * features)
            learnt.append(features @ np.linalg.solve(covariance, features.T @ (scale * truth)))
        teacher = np.array(learnt).T  # [d, R]
        risk = (scale[:, None] * (teacher - truth[:, None]) ** 2).sum(0)
        # rows whose mean square is the population's: gradient descent on them is that of the theory
        rows = torch.tensor(np.diag((d * scale) ** 0.5))
        steps = np.arange(0, 160)
        path = (1 - (1 - rate * scale[:, None]) ** steps)[:, None, :] * teacher[..., None]
        ratios = (scale[:, None, None] * (path - truth[:, None, None]) ** 2).sum(0) / risk[:, None]
        best = ratios.min(1)
        floor = np.array([contraction_floor(r / size) * size for r in risk]) / risk
        stop = int(ratios.mean(0).argmin())
        points = []
        for count in (stop, *more.get(width, ())):
            name, labels = f"student-{width}-{count}", (rows @ torch.tensor(teacher)).float()
            settings = {"lr": rate, "steps": count, "on": torch.eye(d)[:, None]}
            got = bench.learn(name, linear(d, replicates), rows[:, None], labels, **settings).numpy()
            ratio = (scale[:, None] * (got - truth[:, None]) ** 2).sum(0) / risk
            words = f"student / teacher, M = {width}, {count} steps"
            facts.add(words, ratios[:, count].mean(), ratio.mean(), 1e-4, "fp32; the path is exact")
            facts.add(f"nearest to the floor, {words}", 0.0, (ratio - floor).min(), 0.0, "no contraction", ">=")
            points.append((rate * count, ratio.mean(), standard_error(ratio)))
            late = ratio.mean() if count == 150 else late
        why = "an independent calculation, and its tolerance"
        facts.add(f"best ratio, M = {width}, on the path", published[width], best.mean(), 0.05, why)
        lowest.append(best.mean())
        lines.append(Line(f"M = {width}", rate * steps[1:], ratios[:, 1:].mean(0), "theory", colour=k))
        lines.append(Line.runs(points, colour=k))
    facts.add("without stopping, M = 4, 150 steps", 1.0, late, 1e-3, "the student becomes the teacher")
    facts.add("best ratios fall with M", 0.0, max(np.diff(lowest)), 0.0, "the order alone", "<=")
    facts.draw("Early stopping on random features", "time of training", "student's risk / teacher's", lines)
    return facts
