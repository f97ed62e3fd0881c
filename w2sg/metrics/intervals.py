"""What is known and what is noise: the gap recovered, Fieller's interval over repeated runs, exact paired tests.

Shapes: N test rows, G clusters of them (rows of one prompt), K repeats (seeds, or splits). Every interval is at 95 %
unless ``level`` says otherwise. Where no clusters are given each row is one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from w2sg.errors import UserError
from w2sg.metrics.bootstrap import (
    Bootstrap,
    Estimate,
    cluster_codes,
    cluster_sums,
    difference_interval,
    few_discordant,
    interval,
)
from w2sg.metrics.spread import Spread, fieller, quantile, two_sided

MCNEMAR, SIGN_FLIP = "exact McNemar", "exact sign flips over prompts"


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
    pieces = {
        "gap": difference_interval(hits[:, 2], hits[:, 0], bootstrap, interval(c - w)),
        "gained": difference_interval(hits[:, 1], hits[:, 0], bootstrap),
        "missing": difference_interval(hits[:, 2], hits[:, 1], bootstrap),
    }
    gap = Estimate(float(means[2] - means[0]), *pieces["gap"])
    ratio = Estimate(None)
    if gap.positive:
        # the few samples without a gap say nothing about the ratio's size: they widen it without limit, on their side
        samples = np.where(c > w, (s - w) / np.where(c > w, c - w, 1.0), np.where(s > w, np.inf, -np.inf))
        low, high = interval(samples)
        # a student that (nearly) is its teacher, or its ceiling, has samples that (nearly) do not vary
        for piece, sign, start in (("gained", 1, 0.0), ("missing", -1, 1.0)):
            if pieces[piece] is not None:
                ends = sorted(start + sign * end / gap.value for end in pieces[piece])
                low, high = min(low, ends[0]), max(high, ends[1])
        ratio = Estimate(float((means[1] - means[0]) / gap.value), *_finite((low, high)))
    return _pgr(ratio, gap, (means[1] - means[0]) / gap.value if gap.value else None, _over(bootstrap))


def _over(bootstrap: Bootstrap) -> str:
    return "test rows" if bootstrap.codes is None else "test prompts"


def _finite(values: tuple[float, float]) -> tuple[float | None, ...]:
    return tuple(x if math.isfinite(x) else None for x in values)


def _pgr(ratio: Estimate, gap: Estimate, estimate: float | None, over: str) -> dict[str, Any]:
    return {
        **ratio.as_dict(),
        "resolved": bool(gap.positive),
        "estimate": None if estimate is None else float(estimate),
        "gap": gap.value,
        "gap_low": gap.low,
        "gap_high": gap.high,
        "over": over,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Repeated runs
# ---------------------------------------------------------------------------------------------------------------------


def over_repeats(
    values: Sequence[np.ndarray], clusters: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, list[Spread]]:
    """[M] means of M quantities over K repeats, and their sources of noise.

    A repeat is a split, its seeds averaged before, or a seed where there is one split. With B the sample covariance of
    the K means and C the mean covariance of two repeats' means that comes of clusters which both were tested on, the
    covariance of the mean is ``B / K + C``: two-way clusters (Cameron, Gelbach and Miller 2011), by repeat and by row.
    For any overlap of their test rows B has the expectation variance - C, so this has no bias for small K, which sums
    of squared residuals have. B has K - 1 degrees of freedom and holds all that differs between repeats (training rows,
    order, start, rows that one alone has); those of C come of how much its clusters differ in what they add.

    Args:
        values: of each repeat [n_k, M], row by row. clusters: of each repeat [n_k] the number of each row's cluster,
            the same in all repeats; None: its place (all repeats have the same rows).
    """
    if len(values) == 1:
        rows = values[0]
        codes = None if clusters[0] is None else Bootstrap(len(rows), clusters=clusters[0]).codes
        nothing = Spread(np.zeros((rows.shape[1],) * 2), 1)
        return rows.mean(0), [Spread.of_clusters(rows, codes) if len(rows) > 1 else nothing]
    numbers = [np.arange(len(v)) if c is None else c for v, c in zip(values, clusters, strict=True)]
    means = np.stack([v.mean(0) for v in values])
    count, width = 1 + max(int(c.max()) for c in numbers), means.shape[1]
    # what each cluster adds, over all repeats [G, M]; the part of its square that is of one repeat alone [G, M, M]; and
    # the repeats that were tested on it [G]
    total, within, tested = np.zeros((count, width)), np.zeros((count, width, width)), np.zeros(count, np.int64)
    for v, c, mean in zip(values, numbers, means, strict=True):
        sums = np.stack([np.bincount(c, column, count) for column in (v - mean).T], 1) / len(v)
        total += sums
        within += sums[:, :, None] * sums[:, None, :]
        tested += np.bincount(c, minlength=count) > 0
    spreads = [Spread.of(means)]
    shared, repeats = int((tested > 1).sum()), len(values)
    if shared > 1:
        # the square of a sum less the squares is what two different repeats have in common
        together = (total[:, :, None] * total[:, None, :] - within)[tested > 1]
        together *= shared / (shared - 1) / (repeats * (repeats - 1))
        spreads.append(Spread(together.sum(0), shared - 1, together))
    return means.mean(0), spreads


def gap_recovered(
    values: Sequence[np.ndarray], clusters: Sequence[np.ndarray | None], over: str = "seeds and test rows"
) -> dict[str, Any]:
    """PGR of several runs, with Fieller's interval.

    Args:
        values: of each repeat [n_k, 2], row by row, how far the student and the ceiling are above the weak model.
        clusters: as in `over_repeats`. over: what varies, in words.

    Returns:
        As `performance_gap_recovered`, and the number of repeats as ``seeds``.
    """
    means, spreads = over_repeats(values, clusters)
    return _gap_recovered(*means.tolist(), spreads, over) | {"seeds": len(values)}


def gap_recovered_over_seeds(weak: np.ndarray, student: np.ndarray, ceiling: np.ndarray) -> dict[str, Any]:
    """`gap_recovered` of seeds of one split.

    Args:
        weak, student, ceiling: accuracies [K], paired by seed; or [K, N] whether each was right, where all seeds were
            tested on the same N rows. The interval then also covers the draw of those rows.
    """
    values = [np.asarray(x, np.float64) for x in (weak, student, ceiling)]
    above = np.stack([values[1] - values[0], values[2] - values[0]], -1)  # [K, (N,) 2]
    if above.ndim == 3:
        return gap_recovered(list(above), [None] * len(above))
    return _gap_recovered(*above.mean(0).tolist(), [Spread.of(above)], "seeds") | {"seeds": len(above)}


def _gap_recovered(numerator: float, denominator: float, spreads: list[Spread], over: str) -> dict[str, Any]:
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
    return _pgr(ratio, gap, estimate, over)


def difference_over_repeats(values: Sequence[np.ndarray], clusters: Sequence[np.ndarray | None]) -> dict[str, Any]:
    """The mean of differences of two models that were run several times.

    Args:
        values: of each repeat [n_k], row by row. clusters: as in `over_repeats`.

    Returns:
        ``difference`` with its interval ``low``, ``high``; ``p`` by Student's t over repeats and clusters; ``wins``:
        repeats in which it is above 0. Where no row differs in any run, the interval is that of one run, and p is 1.
    """
    means, spreads = over_repeats([np.asarray(v, np.float64)[:, None] for v in values], clusters)
    wins = sum(bool(v.mean() > 0) for v in values)
    if not any(v.any() for v in values):
        names = [np.arange(len(v)) if c is None else c for v, c in zip(values, clusters, strict=True)]
        low, high = few_discordant(0, 0, len(np.unique(np.concatenate(names))))
        return {"difference": 0.0, "low": low, "high": high, "p": 1.0, "wins": wins}
    return _students_t(float(means[0]), spreads) | {"wins": wins}


def paired_difference(a: np.ndarray, b: np.ndarray, clusters: np.ndarray | None = None) -> dict[str, Any]:
    """Accuracy of ``a`` minus accuracy of ``b`` over seeds and test rows.

    Args:
        a, b: [K, N] whether each was right; row k of both has the same seed. clusters: [N] the prompt of each row.

    Returns:
        As `difference_over_repeats`, but ``p`` for K = 1 is that of `mcnemar`; ``mcnemar_p``: that test of each seed.
    """
    above = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    exact = [mcnemar(x, y, clusters)["p"] for x, y in zip(a, b, strict=True)]
    codes = None if clusters is None else cluster_codes(clusters)
    difference = difference_over_repeats(list(above), [codes] * len(above))
    if len(above) == 1:
        bootstrap = Bootstrap(len(above[0]), clusters=clusters)
        difference["p"] = exact[0]
        difference["low"], difference["high"] = difference_interval(
            a[0], b[0], bootstrap, (difference["low"], difference["high"])
        )
    return difference | {"mcnemar_p": exact}


def difference_over_seeds(differences: np.ndarray) -> dict[str, Any]:
    """The mean of [K] differences, one per seed, K > 1: as `paired_difference`, by Student's t over seeds alone."""
    spreads = [Spread.of(np.asarray(differences, np.float64)[:, None])]
    return _students_t(float(np.mean(differences)), spreads) | {"wins": int((differences > 0).sum())}


def _students_t(value: float, spreads: Sequence[Spread]) -> dict[str, Any]:
    t, error = quantile(spreads, np.ones(1))
    p = two_sided(value, spreads, np.ones(1))
    return {"difference": value, "low": value - t * error, "high": value + t * error, "p": p}


# ---------------------------------------------------------------------------------------------------------------------
# Paired tests of one run
# ---------------------------------------------------------------------------------------------------------------------


def mcnemar(a: np.ndarray, b: np.ndarray, clusters: Sequence[Hashable] | np.ndarray | None = None) -> dict[str, Any]:
    """The exact paired test of two models on the same rows.

    Where each prompt has one row it is McNemar's. Where prompts have several it is the sign-flip test over prompts: the
    difference of the numbers right, under all 2^G ways to swap the two models on whole prompts. Their distribution is
    worked out and not drawn. McNemar's is the same test where all prompts have one row.

    Args:
        a, b: [N] whether each was right. clusters: [N] the prompt of each row; None: each row is its own.

    Returns:
        ``only_a``, ``only_b``: rows that one alone has right; ``p``: two-sided, 1 where there are none; ``test``.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    codes = Bootstrap(len(a), clusters=clusters).codes
    if codes is None:
        p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    else:
        p = sign_flip(cluster_sums(a.astype(np.int64) - b, codes))
    return {"only_a": only_a, "only_b": only_b, "p": float(p), "test": MCNEMAR if codes is None else SIGN_FLIP}


def paired_test(
    a: np.ndarray, b: np.ndarray, clusters: Sequence[Hashable] | np.ndarray | None = None
) -> dict[str, Any]:
    """Accuracy of ``a`` minus accuracy of ``b`` in one run: the difference with its interval, and the exact test.

    Args:
        a, b: [N] whether each was right, on the same rows. clusters: as in `mcnemar`.

    Returns:
        ``difference``, ``low``, ``high`` as in `paired_difference`; ``only_a``, ``only_b``, ``p``, ``test`` as in
        `mcnemar`.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    difference = paired_difference(a[None], b[None], clusters)
    return {key: difference[key] for key in ("difference", "low", "high")} | mcnemar(a, b, clusters)


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p that [G] whole numbers are as likely to have the one sign as the other, each with its own size.

    The share of all ways to choose signs in which the sum is at least as far from 0 as it is: the distributions of
    numbers of one size are binomial, and that of the sum is their convolution.
    """
    from scipy.signal import fftconvolve
    from scipy.stats import binom

    whole = np.asarray(differences, np.int64)
    sizes, counts = np.unique(np.abs(whole[whole != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    law = np.ones(1)  # of the sum of the sizes whose sign is positive
    for size, count in zip(sizes, counts, strict=True):
        of_size = np.zeros(size * count + 1)
        of_size[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        law = (
            np.convolve(law, of_size)
            if min(len(law), len(of_size)) < 4096
            else np.maximum(fftconvolve(law, of_size), 0)
        )
    total, far = int(sizes @ counts), abs(int(whole.sum()))
    # the sum is 2 x - total; both tails, which are equal
    return float(min(1.0, 2 * law[(total + far) // 2 :].sum())) if far else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for their number, in the order given (Holm 1979, Scand. J. Statist. 6, 65-70).

    Args:
        p: [K] p values of one family of tests.

    Returns:
        [K] of which those below the level alpha are resolved while the family's error stays below alpha.

    Raises:
        UserError: one is no number between 0 and 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    try:
        p = np.asarray(p, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"holm: takes a list of p values between 0 and 1 (got {str(p)[:60]})") from error
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():  # NaN is not, either, and would be sorted to the end
        raise UserError(f"holm: takes a list of p values between 0 and 1 (got {p.tolist()})")
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    out = np.empty_like(p)
    out[order] = np.minimum(corrected, 1.0)
    return out.tolist()
