"""Bootstrap over prompts: draws of test rows, cluster by cluster, and intervals where draws have no width.

Shapes: N test rows, G clusters of them (rows of one prompt), R bootstrap samples. Every interval is at 95 % unless
``level`` says otherwise. Where no clusters are given each row is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

RESAMPLES = 2000
BLOCK = 16_000_000  # entries of bootstrap weights held at a time: 64 MB
FEW = 5  # clusters; where fewer differ from the others, exact limits take the place of a bootstrap's


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
        return self.low is not None and bool(self.low > 0)  # a bool of NumPy is none that JSON can write

    @property
    def negative(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high is not None and bool(self.high < 0)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples; samples that are not numbers are left out."""
    low, high = np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def binomial_interval(share: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's (1934) interval for a share of ``count`` independent draws; at 0 of n about [0, 3.7 / n].

    Args:
        share: in [0, 1]; ``share * count`` need not be whole.
    """
    from scipy.stats import beta

    hits, tail = float(share) * count, (1 - level) / 2
    low = 0.0 if hits <= 0 else float(beta.ppf(tail, hits, count - hits + 1))
    high = 1.0 if hits >= count else float(beta.ppf(1 - tail, hits + 1, count - hits))
    return low, high


def share_interval(column: np.ndarray, codes: np.ndarray | None, ends: tuple[float, float]) -> tuple[float, float]:
    """A bootstrap's interval for the mean of numbers in [0, 1], or exact limits where draws of what was seen cannot
    show what was not: where fewer than `FEW` clusters miss, fewer hit, or fewer are not ties. At 0 or n of n a
    bootstrap has no width.

    Args:
        column: [N]; 0 and 1, or halves for ties, or graded. codes: [N] the number of each row's cluster. ends: of the
            bootstrap.
    """
    column = np.asarray(column, np.float64)
    share, shares = float(column.mean()), column
    if codes is not None:
        _, codes = np.unique(codes, return_inverse=True)
        shares = cluster_sums(column, codes) / np.bincount(codes)
    count, ties = len(shares), int((shares == 0.5).sum())
    graded = not np.isin(column, (0.0, 0.5, 1.0)).all()
    if graded and ends[1] - ends[0] > 1e-6:  # wider than the rounding of float32 weights
        return ends
    if ties and count - ties < FEW <= count:
        low, high = few_discordant((shares - 0.5).clip(0).sum() * 2, (0.5 - shares).clip(0).sum() * 2, count)
        return 0.5 + low / 2, 0.5 + high / 2
    return ends if min(share, 1 - share) * count >= FEW else binomial_interval(share, count)


def few_discordant(only_a: float, only_b: float, count: int) -> tuple[float, float]:
    """The interval of a difference of two paired shares of which few of ``count`` clusters differ.

    The exact limits of both shares, put together as squares (Zou and Donner 2008). Where none differs it is about
    -3.7 / n to 3.7 / n.
    """
    a, b = float(only_a) / count, float(only_b) / count
    (low_a, high_a), (low_b, high_b) = (binomial_interval(x, count) for x in (a, b))
    return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


def cluster_codes(clusters: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """[N] the number of each row's cluster, from 0 in the order in which they come first."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters], np.int64)


def cluster_sums(values: np.ndarray, codes: np.ndarray | None) -> np.ndarray:
    """[G, ...] the sums of [N, ...] over clusters; the values themselves where there are none."""
    if codes is None:
        return values
    sums = np.zeros((int(codes.max()) + 1 if len(codes) else 0, *values.shape[1:]), values.dtype)
    np.add.at(sums, codes, values)
    return sums


class Bootstrap:
    """Draws clusters of test rows with replacement, each with all its rows. Two statistics of one object see the same
    draws, so differences are paired.

    Args:
        n: rows. clusters: [n] what each row belongs to (its prompt); None: each row is a cluster of its own.

    Attributes:
        codes: [n] the number of each row's cluster; None where all have one row. count: clusters.
    """

    def __init__(
        self,
        n: int,
        resamples: int = RESAMPLES,
        seed: int = 0,
        clusters: Sequence[Hashable] | np.ndarray | None = None,
    ):
        self.n, self.resamples, self.seed = n, resamples, seed
        self.codes, self.count = None, n
        if clusters is not None:
            if len(clusters) != n:
                raise ValueError(f"{len(clusters)} clusters were given for {n} rows")
            codes = cluster_codes(clusters)
            if n and int(codes.max()) + 1 < n:
                self.codes, self.count = codes, int(codes.max()) + 1

    def samples(self, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[R, ...] of ``statistic(weights [r, N]) -> [r, ...]``; the weights of a sample sum to 1."""
        return np.concatenate([statistic(weights) for weights in self._blocks()])

    def means(self, columns: np.ndarray) -> np.ndarray:
        """[R, M] resampled means of columns [N, M]."""
        columns = np.asarray(columns, np.float32)
        return self.samples(lambda weights: weights @ columns)

    def mean(self, column: np.ndarray) -> Estimate:
        """The mean of [N] numbers with its interval; no value where there are none."""
        column = np.asarray(column, np.float64)
        if not self.n:
            return Estimate(None)
        return Estimate(float(column.mean()), *interval(self.means(column[:, None])[:, 0]))

    def share(self, part: np.ndarray, whole: np.ndarray | None = None) -> Estimate:
        """The mean of [N] numbers in [0, 1], of the rows ``whole``; its interval has a width at 0 and 1, too.

        Args:
            whole: [N] which rows count (all); no value where none does.
        """
        mean = self.mean(part) if whole is None else self.ratio(part, whole)
        if mean.value is None:
            return mean
        rows = slice(None) if whole is None else np.asarray(whole, bool)
        codes = None if self.codes is None else self.codes[rows]
        low, high = share_interval(np.asarray(part)[rows], codes, (mean.low, mean.high))
        return Estimate(mean.value, max(low, 0.0), min(high, 1.0))  # float32 weights alone would give 1.0000001

    def ratio(self, part: np.ndarray, whole: np.ndarray) -> Estimate:
        """``sum(part) / sum(whole)`` with its interval, of [N] numbers; no value where ``whole`` sums to 0."""
        part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
        if not whole.any():
            return Estimate(None)
        above, below = self.means(np.stack([part, whole], 1)).T
        quotients = above / np.where(below > 0, below, np.nan)  # a sample may miss a small group altogether
        return Estimate(float(part.sum() / whole.sum()), *interval(quotients))

    def _blocks(self) -> Iterator[np.ndarray]:
        # kept where they fit, since every statistic asks for the same draws; drawn again from the seed where not
        yield from self._kept if self.n * self.resamples <= 4 * BLOCK else self._draw()

    @cached_property
    def _kept(self) -> list[np.ndarray]:
        return list(self._draw())

    def _draw(self) -> Iterator[np.ndarray]:
        random, n = np.random.default_rng(self.seed), self.count
        rows = max(1, BLOCK // max(self.n, 1))
        for begin in range(0, self.resamples, rows):
            count = min(rows, self.resamples - begin)
            # each sample counts in a range of its own, so that one bincount does for all: [count, G] times drawn
            drawn = random.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
            times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
            if self.codes is None:
                yield (times / n).astype(np.float32)
            else:  # prompts of many rows weigh more, so the rows of a sample are not always n
                weights = times[:, self.codes]
                yield (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def difference_interval(
    a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap, ends: tuple[float, float] | None = None
) -> tuple[float, float] | None:
    """`few_discordant` of two columns of hits where fewer than `FEW` clusters tell them apart, else ``ends``."""
    above = cluster_sums(np.asarray(a, np.float64) - np.asarray(b, np.float64), bootstrap.codes)
    if (above != 0).sum() >= FEW:
        return ends
    scale = bootstrap.count / bootstrap.n
    return few_discordant(scale * above[above > 0].sum(), -scale * above[above < 0].sum(), bootstrap.count)
