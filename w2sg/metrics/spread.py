"""Sources of noise that add up: Student's quantiles and p values of a contrast of means, and Fieller's interval.

Shapes: M quantities, G clusters of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from w2sg.metrics.bootstrap import cluster_sums


@dataclass(frozen=True)
class Spread:
    """One source of noise: the covariance of the means of M quantities, and the degrees of freedom behind it.

    Attributes:
        covariance: [M, M]. freedom: of all contrasts alike.
        terms: [G, M, M] what each cluster adds to the covariance, where the freedom of a contrast is to be told from
            how much they differ: that of a variable of this mean and this variance (Satterthwaite), at least 1.
    """

    covariance: np.ndarray
    freedom: float
    terms: np.ndarray | None = None

    def along(self, contrast: np.ndarray) -> tuple[float, float]:
        """The variance of a contrast, not below 0, and its degrees of freedom."""
        variance = max(0.0, float(contrast @ self.covariance @ contrast))
        if self.terms is None or not variance:
            return variance, self.freedom
        each = np.einsum("gij,i,j->g", self.terms, contrast, contrast)
        noise = len(each) * each.var()
        return variance, float(np.clip(2 * variance**2 / noise, 1.0, self.freedom)) if noise else self.freedom

    @staticmethod
    def of(values: np.ndarray) -> Spread:
        """Of the column means of [n, M] independent rows."""
        n = len(values)
        return Spread(np.cov(values, rowvar=False, ddof=1).reshape(values.shape[1], -1) / n, n - 1)

    @staticmethod
    def of_clusters(values: np.ndarray, codes: np.ndarray | None) -> Spread:
        """Of the column means of [n, M] rows that come in independent clusters (linearised); one cluster has none."""
        sums = values if codes is None else cluster_sums(values - values.mean(0), codes)
        count = len(sums)
        if count < 2:
            return Spread(np.zeros((values.shape[1],) * 2), 1)
        if codes is None:
            return Spread.of(values)
        return Spread(sums.T @ sums / len(values) ** 2 * (count / (count - 1)), count - 1)


def quantile(spreads: Sequence[Spread], contrast: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's quantile for a contrast of means, and the contrast's standard error.

    Several sources of noise add up. Their degrees of freedom are put together as the harmonic mean, each weighted by
    its share of the variance: with two or three repeats the formula of Welch and Satterthwaite, which squares shares
    that are themselves hardly known, rejects up to 8 % (13 % with two) of true nulls at 5 %. Where a source has one
    degree of freedom the quantiles themselves are averaged (Cochran and Cox 1950), which errs on the safe side.
    """
    shares, freedoms, error = _sources(spreads, contrast)
    return (_critical(shares, freedoms, (1 - level) / 2), error) if error else (0.0, 0.0)


def _sources(spreads: Sequence[Spread], contrast: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    parts, freedoms = (np.array(x) for x in zip(*(s.along(contrast) for s in spreads), strict=True))
    total = parts.sum()
    if not total:
        return parts, np.ones(len(parts)), 0.0
    present = parts > 0
    return parts[present] / total, freedoms[present], math.sqrt(total)


def _critical(shares: np.ndarray, freedoms: np.ndarray, tail: float) -> float:
    from scipy.special import stdtrit

    if freedoms.min() > 1:
        return -float(stdtrit(1 / (shares / freedoms).sum(), tail))
    return -float(shares @ stdtrit(freedoms, tail))


def two_sided(value: float, spreads: Sequence[Spread], contrast: np.ndarray) -> float:
    """The p value that belongs to `quantile`: of a contrast of means that is ``value``, where 0 is its truth."""
    from scipy.optimize import brentq
    from scipy.special import stdtr

    shares, freedoms, error = _sources(spreads, contrast)
    if not error:  # nothing varies
        return float(value == 0.0)
    far = abs(value) / error
    if freedoms.min() > 1 or len(freedoms) == 1:
        return float(2 * stdtr(1 / (shares / freedoms).sum(), -far))
    least, most = math.log(1e-12), math.log(0.5)
    if _critical(shares, freedoms, math.exp(most)) >= far:
        return 1.0
    if _critical(shares, freedoms, math.exp(least)) < far:
        return 2e-12
    return 2 * math.exp(brentq(lambda x: _critical(shares, freedoms, math.exp(x)) - far, least, most))


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
