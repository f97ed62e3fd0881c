"""How often tests reject a true null and intervals hold the truth, over simulated sweeps of every shape.

A row's latent score is a sum of normal effects: of the row and its prompt (shared by all models, and per model), of the
split's training rows, of the seed, and a residual. A model is right if its score is above 0. So the true accuracies,
differences and PGR are known. Test rows of several splits are drawn from one pool. The simulated rows pass through the
functions that reports and `evaluate.py runs=` use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from w2sg.known_answers.bench import Bench
from w2sg.known_answers.result import Findings, known
from w2sg.metrics import intervals as statistics
from w2sg.metrics.bootstrap import Bootstrap

SIMULATIONS, SEED = 1000, 2718
NOMINAL, PROMISE = 0.05, 0.02  # level within 3 to 7 %, coverage within 92 to 98 %
ACCURACIES = {"weak": 0.68, "student": 0.73, "ceiling": 0.80}  # PGR .417; under the null the student equals the weak
ROW, OWN, PROMPT = 0.45, 0.15, 0.5  # variances: of a row for all models, for one; the prompt's share of both
EFFECTS = {"small": (0.01, 0.01), "large": (0.05, 0.05)}  # standard deviations of split and seed, in latent units


@dataclass(frozen=True)
class Design:
    """One shape of a sweep.

    Attributes:
        splits: number of splits.
        seeds: number of seeds for each split.
        pool: number of rows from which test splits are drawn.
        test: rows of a test split.
        rows: rows of a prompt.
        effects: a key of `EFFECTS`.
    """

    splits: int = 1
    seeds: int = 1
    pool: int = 2400
    test: int = 650
    rows: int = 1
    effects: str = "small"

    @property
    def words(self) -> str:
        shape = f"{self.splits} splits x {self.seeds} seeds" if self.splits > 1 else f"{self.seeds} seeds, one split"
        if self.splits > 1 and self.seeds == 1:
            shape = f"{self.splits} split seeds"
        if self.splits == self.seeds == 1:
            shape = "one run"
        pool = f", pool of {self.pool:,}" if self.splits > 1 else ""
        prompts = f", {self.rows} rows a prompt" if self.rows > 1 or self.splits == self.seeds == 1 else ""
        return f"{shape}{pool}{prompts}" + (f", {self.effects} effects" if self.splits * self.seeds > 1 else "")

    @property
    def repeats(self) -> int:
        return self.splits if self.splits > 1 else self.seeds


def designs() -> Iterator[Design]:
    """Every design for which level and coverage are promised."""
    for rows in (1, 3, 5):
        yield Design(rows=rows)
    for effects in EFFECTS:
        for seeds in (2, 3, 4, 5):
            yield Design(seeds=seeds, effects=effects)
        for splits in (2, 3, 5):
            for pool in (1500, 2400, 5000):
                yield Design(splits, pool=pool, effects=effects)
            yield Design(splits, 3, effects=effects)
    for shape in ((1, 3), (3, 1), (3, 3)):
        yield Design(*shape, rows=3, effects="large")


def draw_sweep(design: Design, null: bool, random: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Simulate one sweep.

    Returns:
        For each repeat: [n, 3] how often weak, student and ceiling are right, averaged over seeds; [n] prompts of rows.
    """
    split_sd, seed_sd = EFFECTS[design.effects]
    if design.splits == 1:  # its training rows are given: only seeds and test rows vary
        split_sd = 0.0
    if design.repeats == 1:
        seed_sd = 0.0
    prompt = np.arange(design.pool) // design.rows
    count = prompt[-1] + 1

    def effect(variance: float, columns: int) -> np.ndarray:
        of_row = random.normal(size=(design.pool, columns))
        shared = random.normal(size=(count, columns))[prompt]
        part = PROMPT if design.rows > 1 else 0.0
        return variance**0.5 * ((1 - part) ** 0.5 * of_row + part**0.5 * shared)

    worth = effect(ROW, 1) + effect(OWN, 3)
    total = (1 + split_sd**2 + seed_sd**2) ** 0.5
    accuracy = np.array(list(ACCURACIES.values()))
    if null:
        accuracy[1] = accuracy[0]
    mean, rest = norm.ppf(accuracy) * total, (1 - ROW - OWN) ** 0.5
    right, prompts = [], []
    for _ in range(max(design.splits, 1)):
        order = random.permutation(count)[: -(-design.test // design.rows)]
        chosen = (order[:, None] * design.rows + np.arange(design.rows)).ravel()
        chosen = chosen[chosen < design.pool][: design.test]
        base = mean + worth[chosen] + split_sd * random.normal(size=3)
        shift = seed_sd * random.normal(size=(design.seeds, 1, 3))
        hits = base + shift + rest * random.normal(size=(design.seeds, len(chosen), 3)) > 0
        if design.splits > 1:
            right.append(hits.mean(0))
            prompts.append(prompt[chosen])
        else:
            right += list(hits.astype(np.float64))
            prompts += [prompt[chosen]] * design.seeds
    return right, prompts


def measured(design: Design, right: list[np.ndarray], prompts: list[np.ndarray]) -> tuple[float, dict, dict]:
    """The p of student against weak, their difference and the PGR, computed as in reports."""
    if design.repeats == 1:
        weak, student, ceiling = right[0].T > 0
        difference = statistics.paired_difference(student[None], weak[None], prompts[0])
        bootstrap = Bootstrap(len(weak), resamples=400, clusters=prompts[0])
        return difference["p"], difference, statistics.performance_gap_recovered(weak, student, ceiling, bootstrap)
    difference = statistics.difference_over_repeats([r[:, 1] - r[:, 0] for r in right], prompts)
    return difference["p"], difference, statistics.gap_recovered([r[:, 1:] - r[:, :1] for r in right], prompts)


def figures(design: Design, simulations: int, seed: int) -> dict[str, float]:
    """Level of the test, and coverage of the difference and the PGR, as shares of ``simulations``.

    A PGR that is not resolved is unbounded and holds the truth; ``unresolved`` is how often it is.
    """
    random = np.random.default_rng([seed, *np.frombuffer(design.words.encode(), np.uint8).tolist()])
    weak, student, ceiling = ACCURACIES.values()
    truth = (student - weak) / (ceiling - weak)
    rejected = covered = recovered = unresolved = 0
    for _ in range(simulations):
        rejected += measured(design, *draw_sweep(design, True, random))[0] < NOMINAL
        _, difference, pgr = measured(design, *draw_sweep(design, False, random))
        covered += difference["low"] <= student - weak <= difference["high"]
        unresolved += not pgr["resolved"]
        low, high = (far if pgr[end] is None else pgr[end] for end, far in (("low", -np.inf), ("high", np.inf)))
        recovered += low <= truth <= high
    counts = {"level": rejected, "coverage": covered, "PGR coverage": recovered, "unresolved": unresolved}
    return {name: count / simulations for name, count in counts.items()}


@known(source="simulation; the truth is known because the draws are normal")
def sweeps(bench: Bench) -> Findings:
    """Tests reject a true null in 5 % of sweeps and intervals hold the truth in 95 %, over seeds, split seeds, both
    and prompts of several rows.
    """
    return table(list(designs()), SIMULATIONS, SEED)


def table(chosen: list[Design], simulations: int, seed: int) -> Findings:
    """Check some designs. The tolerance is the promise plus two standard errors of the simulation."""
    facts = Findings()
    error = (NOMINAL * (1 - NOMINAL) / simulations) ** 0.5
    why = f"promised: within 2 points; s.e. {error:.4f} of {simulations:,} simulations"
    for design in chosen:
        got = figures(design, simulations, seed)
        # two repeats cannot reach that level, so the test is conservative
        sides = ("<=", ">=") if design.repeats == 2 else ("=", "=")
        tolerance = PROMISE + 2 * error
        facts.add(f"level, {design.words}", NOMINAL, got["level"], tolerance, why, sides[0])
        for name in ("coverage", "PGR coverage"):
            far = name == "PGR coverage" and got["unresolved"] > 0.02
            side = ">=" if far else sides[1]
            facts.add(f"{name}, {design.words}", 1 - NOMINAL, got[name], tolerance, why, side)
    return facts
