"""Intervals of the PGR: how often they cover the truth, and how often the gap is not resolved."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from scipy.stats import nct, t

from w2sg.known_answers.bench import Bench
from w2sg.known_answers.result import Findings, Line, known
from w2sg.metrics import intervals as statistics
from w2sg.metrics import labels as metrics
from w2sg.reports.words import pgr_sentence

LEVEL = 0.95


@known(source="Fieller 1954; the noncentral t distribution")
def pgr_intervals(bench: Bench) -> Findings:
    """Fieller's interval covers the true PGR in 95 % of experiments, and small gaps are reported as not resolved."""
    facts, draw = Findings(), np.random.default_rng(13)
    seeds, rows, draws = 5, 1000, 1000
    points = []
    for gap in (0.10, 0.04, 0.01):
        truth = np.array([0.7, 0.7 + 0.6 * gap, 0.7 + gap])
        covers = unresolved = reported = 0
        for hits in draw.binomial(rows, truth, size=(draws, seeds, 3)) / rows:
            pgr = statistics.gap_recovered_over_seeds(*hits.T)
            reported += "gap not resolved" in pgr_sentence(pgr) or "no gap" in pgr_sentence(pgr)
            unresolved += not pgr["resolved"]
            covers += not pgr["resolved"] or pgr["low"] <= 0.6 <= pgr["high"]
        spread = np.sqrt((truth[[0, 2]] * (1 - truth[[0, 2]])).sum() / rows / seeds)
        expected = float(nct.cdf(t.ppf((1 + LEVEL) / 2, seeds - 1), seeds - 1, gap / spread))
        error = np.sqrt(expected * (1 - expected) / draws)
        words = f"gap {gap:.2f}, {seeds} seeds"
        why = "4 s.e. of draws; near-normal means"
        facts.add(f"not resolved, {words}", expected, unresolved / draws, 4 * error + 0.005, why)
        facts.add(f"report says so, {words}", unresolved / draws, reported / draws, 0.0, "the same draws")
        error = np.sqrt(LEVEL * (1 - LEVEL) / draws)
        # an unresolved interval is unbounded and covers; with a gap of 10 points every interval is resolved
        relation = "=" if gap == 0.10 else ">="
        facts.add(f"coverage, {words}", LEVEL, covers / draws, 4 * error, "4 s.e. of draws", relation)
        points.append((gap, unresolved / draws, np.sqrt(max(expected * (1 - expected), 1e-9) / draws)))
    bootstrap = statistics.Bootstrap(rows, resamples=400)
    gold = torch.zeros(rows, dtype=torch.long)
    covers, runs = 0, 400
    for _ in range(runs):
        # one run: models that are right on different rows
        right = torch.tensor(draw.random((3, rows)) < np.array([0.7, 0.76, 0.8])[:, None])
        hits = [metrics.correct(torch.stack([h.float(), 1 - h.float()], 1), gold).numpy() for h in right]
        pgr = statistics.performance_gap_recovered(*hits, bootstrap)
        covers += not pgr["resolved"] or pgr["low"] <= 0.6 <= pgr["high"]
    why = "4 s.e. of draws, and 0.01: a percentile bootstrap"
    facts.add("coverage, one run, gap 0.10", LEVEL, covers / runs, 4 * np.sqrt(LEVEL * (1 - LEVEL) / runs) + 0.01, why)
    none = statistics.performance_gap_recovered(
        *(np.array([True] * 70 + [False] * 30),) * 3, statistics.Bootstrap(100, resamples=50)
    )
    facts.add("PGR is claimed, weak = ceiling", 0, none["resolved"], 0, "there is no gap")
    gaps = np.linspace(0.005, 0.1, 60)
    power = partial(nct.cdf, t.ppf((1 + LEVEL) / 2, seeds - 1), seeds - 1)
    theory = [power(g / np.sqrt((0.21 + (0.7 + g) * (0.3 - g)) / rows / seeds)) for g in gaps]
    lines = [Line("noncentral t", gaps, theory, "theory"), Line.runs(points, "runs")]
    facts.draw("“Gap not resolved”", "true gap", "share of experiments", lines)
    return facts
