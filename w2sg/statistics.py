"""What is known and what is noise: bootstrap over test rows, Fieller's interval over seeds, exact paired tests.

Shapes: N test rows, K seeds, R bootstrap samples. Every interval is at 95 % unless ``level`` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

RESAMPLES = 2000
BLOCK = 16_000_000  # entries of bootstrap weights held at a time: 64 MB


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @property
    def positive(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def negative(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high is not None and self.high < 0


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples; samples that are not numbers are left out."""
    low, high = np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Bootstrap:
    """Draws test rows with replacement. Two statistics of one object see the same draws, so differences are paired.

    Args:
        n: rows.
    """

    def __init__(self, n: int, resamples: int = RESAMPLES, seed: int = 0):
        self.n, self.resamples, self.seed = n, resamples, seed

    def samples(self, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[R, ...] of ``statistic(weights [r, N]) -> [r, ...]``; the weights of a sample sum to 1."""
        return np.concatenate([statistic(weights) for weights in self._blocks()])

    def means(self, columns: np.ndarray) -> np.ndarray:
        """[R, M] resampled means of columns [N, M]."""
        columns = np.asarray(columns, np.float32)
        return self.samples(lambda weights: weights @ columns)

    def mean(self, column: np.ndarray) -> Estimate:
        """The mean of [N] numbers with its interval."""
        column = np.asarray(column, np.float64)
        return Estimate(float(column.mean()), *interval(self.means(column[:, None])[:, 0]))

    def ratio(self, part: np.ndarray, whole: np.ndarray) -> Estimate:
        """``sum(part) / sum(whole)`` with its interval, of [N] numbers; no value where ``whole`` sums to 0."""
        part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
        if not whole.any():
            return Estimate(None)
        above, below = self.means(np.stack([part, whole], 1)).T
        quotients = above / np.where(below > 0, below, np.nan)  # a sample may miss a small group altogether
        return Estimate(float(part.sum() / whole.sum()), *interval(quotients))

    def _blocks(self) -> Iterator[np.ndarray]:
        yield from self._kept if self.n * self.resamples <= 4 * BLOCK else self._draw()

    @cached_property
    def _kept(self) -> list[np.ndarray]:
        return list(self._draw())

    def _draw(self) -> Iterator[np.ndarray]:
        random, n = np.random.default_rng(self.seed), self.n
        rows = max(1, BLOCK // n)
        for begin in range(0, self.resamples, rows):
            count = min(rows, self.resamples - begin)
            drawn = random.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
            yield (np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n) / n).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The performance gap recovered
# ---------------------------------------------------------------------------------------------------------------------


def performance_gap_recovered(
    weak: np.ndarray, student: np.ndarray, ceiling: np.ndarray, bootstrap: Bootstrap
) -> dict[str, Any]:
    """PGR = (student - weak) / (ceiling - weak) on accuracy (Burns et al. 2023) of one run, by the paired bootstrap.

    Args:
        weak, student, ceiling: [N] whether each was right, on the same rows.

    Returns:
        ``value``, its interval ``low``, ``high``, and ``resolved``: whether the interval of the gap itself lies above
        0. Where it does not, value, low and high are None: a ratio over noise is not a number worth printing.
        ``estimate`` is the quotient all the same, ``gap``, ``gap_low``, ``gap_high`` the gap.
    """
    hits = np.stack([weak, student, ceiling], 1).astype(np.float64)
    means = hits.mean(0)
    w, s, c = bootstrap.means(hits).T
    gap = Estimate(float(means[2] - means[0]), *interval(c - w))
    ratio = Estimate(None)
    if gap.positive:
        # the few samples without a gap say nothing about the ratio's size: they widen it without limit, on their side
        samples = np.where(c > w, (s - w) / np.where(c > w, c - w, 1.0), np.where(s > w, np.inf, -np.inf))
        ratio = Estimate(float((means[1] - means[0]) / gap.value), *_finite(interval(samples)))
    return _pgr(ratio, gap, (means[1] - means[0]) / gap.value if gap.value else None, "test rows")


def _finite(values: tuple[float, float]) -> tuple[float | None, ...]:
    return tuple(x if math.isfinite(x) else None for x in values)


def _pgr(ratio: Estimate, gap: Estimate, estimate: float | None, over: str) -> dict[str, Any]:
    return {
        **ratio.as_dict(),
        "resolved": gap.positive,
        "estimate": None if estimate is None else float(estimate),
        "gap": gap.value,
        "gap_low": gap.low,
        "gap_high": gap.high,
        "over": over,
    }


@dataclass(frozen=True)
class Spread:
    """One source of noise: the covariance of the means of some quantities, and the degrees of freedom behind it."""

    covariance: np.ndarray
    freedom: float

    @staticmethod
    def of(values: np.ndarray) -> Spread:
        """Of the column means of [n, M] independent rows."""
        n = len(values)
        return Spread(np.cov(values, rowvar=False, ddof=1).reshape(values.shape[1], -1) / n, n - 1)


def quantile(spreads: Sequence[Spread], contrast: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's quantile for a contrast of means, and the contrast's standard error.

    Several sources of noise add up, with the degrees of freedom of Welch and Satterthwaite.
    """
    from scipy.stats import t

    parts = np.array([max(0.0, float(contrast @ s.covariance @ contrast)) for s in spreads])
    total = parts.sum()
    if total == 0.0:
        return 0.0, 0.0
    freedom = total**2 / sum(part**2 / s.freedom for part, s in zip(parts, spreads, strict=True))
    return float(t.ppf((1 + level) / 2, freedom)), math.sqrt(total)


def fieller(
    numerator: float, denominator: float, spreads: Sequence[Spread], level: float = 0.95
) -> tuple[float | None, float | None]:
    """Fieller's (1954) interval for a ratio of two means; (None, None) where it is unbounded.

    Args:
        spreads: of (numerator, denominator), 2 x 2 each. It is unbounded when the denominator cannot be told from 0.
    """
    covariance = sum(s.covariance for s in spreads)
    t, _ = quantile(spreads, np.array([1.0, -numerator / denominator]), level) if denominator else (math.inf, 0.0)
    if t == 0.0 and not covariance.any():
        return numerator / denominator, numerator / denominator
    if t == 0.0:  # the ratio itself does not vary, though its parts do
        t, _ = quantile(spreads, np.array([0.0, 1.0]), level)
    a = denominator**2 - t**2 * covariance[1, 1]
    b = numerator * denominator - t**2 * covariance[0, 1]
    c = numerator**2 - t**2 * covariance[0, 0]
    if not a > 0:
        return None, None
    root = math.sqrt(max(0.0, b * b - a * c))
    return (b - root) / a, (b + root) / a


def gap_recovered_over_seeds(weak: np.ndarray, student: np.ndarray, ceiling: np.ndarray) -> dict[str, Any]:
    """PGR of several seeds, with Fieller's interval.

    Args:
        weak, student, ceiling: accuracies [K], paired by seed; or [K, N] whether each was right, where all seeds were
            tested on the same N rows. The interval then also covers the draw of those rows (the two sources add up;
            their interaction is counted in both, so the interval is a little wide rather than narrow).

    Returns:
        As `performance_gap_recovered`.
    """
    values = [np.asarray(x, np.float64) for x in (weak, student, ceiling)]
    above = np.stack([values[1] - values[0], values[2] - values[0]], -1)  # [K, (N,) 2]
    rows = above.ndim == 3
    spreads = [Spread.of(above.mean(1) if rows else above)]
    if rows:
        spreads.append(Spread.of(above.mean(0)))
    numerator, denominator = (float(x) for x in above.reshape(-1, 2).mean(0))
    t, error = quantile(spreads, np.array([0.0, 1.0]))
    gap = Estimate(denominator, denominator - t * error, denominator + t * error)
    ratio = Estimate(None)
    estimate = numerator / denominator if denominator else None
    if gap.positive:
        low, high = fieller(numerator, denominator, spreads)
        if low is None:  # the gap's own noise has more degrees of freedom than the ratio's
            gap = Estimate(gap.value, min(0.0, gap.low), gap.high)
        else:
            ratio = Estimate(estimate, low, high)
    return _pgr(ratio, gap, estimate, "seeds and test rows" if rows else "seeds") | {"seeds": len(above)}


# ---------------------------------------------------------------------------------------------------------------------
# Paired tests
# ---------------------------------------------------------------------------------------------------------------------


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict[str, float | int]:
    """The exact McNemar test of two models on the same rows.

    Args:
        a, b: [N] whether each was right.

    Returns:
        ``only_a``, ``only_b``: rows that one alone has right; ``p``: two-sided, 1 where there are none.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": float(p)}


def paired_difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Accuracy of ``a`` minus accuracy of ``b`` over seeds and test rows.

    Args:
        a, b: [K, N] whether each was right; row k of both has the same seed.

    Returns:
        ``difference`` with its interval ``low``, ``high``; ``p``: by Student's t over seeds and rows for K > 1, by the
        exact McNemar test for K = 1; ``mcnemar_p``: the exact test of each seed; ``wins``: seeds in which a is ahead.
    """
    above = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    exact = [mcnemar(x, y)["p"] for x, y in zip(a, b, strict=True)]
    spreads = [Spread.of(above.mean(0)[:, None])]
    if len(above) > 1:
        spreads.append(Spread.of(above.mean(1)[:, None]))
    found = _students_t(float(above.mean()), spreads)
    if len(above) == 1:
        found["p"] = exact[0]
    return found | {"mcnemar_p": exact, "wins": int((above.mean(1) > 0).sum())}


def difference_over_seeds(differences: np.ndarray) -> dict[str, Any]:
    """The mean of [K] differences, one per seed, K > 1: as `paired_difference`, by Student's t over seeds alone."""
    spreads = [Spread.of(np.asarray(differences, np.float64)[:, None])]
    return _students_t(float(np.mean(differences)), spreads) | {"wins": int((differences > 0).sum())}


def _students_t(value: float, spreads: Sequence[Spread]) -> dict[str, Any]:
    from scipy.stats import t as student_t

    t, error = quantile(spreads, np.ones(1))
    parts = [float(s.covariance[0, 0]) for s in spreads]
    p = float(value == 0.0)  # nothing varies
    if error:
        freedom = sum(parts) ** 2 / sum(part**2 / s.freedom for part, s in zip(parts, spreads, strict=True))
        p = float(2 * student_t.sf(abs(value) / error, freedom))
    return {"difference": value, "low": value - t * error, "high": value + t * error, "p": p}


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979), in the order given."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    out = np.empty_like(p)
    out[order] = np.minimum(corrected, 1.0)
    return out.tolist()
