"""Generated replies compared by a scalar judge, prompt by prompt: win rates, length control, reward gaps.

The comparison of ConG (arXiv 2510.07884) with the length control of AlpacaEval 2 (Dubois et al. 2024, arXiv
2404.04475).

Shapes: N prompts, K systems, R bootstrap samples. Row n of every array is the same prompt: replies are joined by prompt
before they come here. Rewards are the judge's own scale; lengths are in any one unit (AlpacaEval counts characters).
Intervals are at 95 %, over prompts. Where (nearly) every prompt agrees, that of a win rate is Clopper and Pearson's.

Every function raises ValueError for arrays that are empty, of different lengths or of another length than
``bootstrap.n``, and for NaN and infinity in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from w2sg.metrics.bootstrap import Bootstrap, Estimate, interval, share_interval
from w2sg.metrics.intervals import mcnemar
from w2sg.metrics.logistic import logistic_fits, slope_told_apart

ENTRIES = 32_768  # of [r, N] arrays worked on at a time: they stay in a core's cache


# ---------------------------------------------------------------------------------------------------------------------
# Who wins
# ---------------------------------------------------------------------------------------------------------------------


def win_rate(a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    """The share of prompts on which a's reward is higher; a tie counts half.

    Args:
        a, b: [N] rewards.
    """
    a, b = _columns(bootstrap, a=a, b=b)
    return _rates(_wins(a, b)[:, None], bootstrap)[0]


def preference_rate(preferred: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    """The win rate by a judge that compares replies and does not score them: the mean of its preferences.

    Args:
        preferred: [N] in [0, 1], how far a is preferred; 0.5 is a tie.
    """
    (preferred,) = _preferences(bootstrap, preferred=preferred)
    return bootstrap.share(preferred)


def win_matrix(rewards: dict[str, np.ndarray], bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """Every system's win rate against every other, all from the same draws of prompts.

    Args:
        rewards: [N] of each of K systems.
        bootstrap: of N prompts; a new one if not given.

    Returns:
        ``names`` [K]; ``value``, ``low``, ``high``: [K][K] lists, how often the row beats the column, None on the
        diagonal. Entry (j, i) is 1 minus entry (i, j), and its interval the mirror image.
    """
    if not rewards:
        raise ValueError("There are no systems to compare.")
    columns = _columns(bootstrap, **rewards)
    bootstrap = bootstrap or Bootstrap(len(columns[0]))
    names = list(rewards)
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    parts = {key: [[None] * len(names) for _ in names] for key in ("value", "low", "high")}
    if pairs:
        wins = np.stack([_wins(columns[i], columns[j]) for i, j in pairs], 1)
        for (i, j), rate in zip(pairs, _rates(wins, bootstrap), strict=True):
            mirror = Estimate(1 - rate.value, 1 - rate.high, 1 - rate.low)
            for key, table in parts.items():
                table[i][j], table[j][i] = getattr(rate, key), getattr(mirror, key)
    return {"names": names, **parts}


def paired_test(a: np.ndarray, b: np.ndarray, prompts: Sequence[Hashable] | None = None) -> float:
    """Two-sided p of the exact sign test that a and b win equally often; 1 where all prompts are ties.

    The sign test rather than Wilcoxon's: it tests what `win_rate` reports and holds for any rescaling of a prompt's
    rewards, whereas signed ranks compare the sizes of differences between prompts (and assume them symmetric), which a
    judge trained on pairs within a prompt does not calibrate. Ties are left out, and the test is exact all the same.

    Args:
        a, b: [N] rewards. prompts: [N] the prompt of each row, where some have several: then the exact test flips the
            signs of whole prompts.
    """
    a, b = _columns(None, a=a, b=b)
    return mcnemar(a > b, b > a, prompts)["p"]


def _wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N] 1 where a is ahead, 0 where b is, 0.5 for ties."""
    return (1 + np.sign(a - b)) / 2


def _rates(wins: np.ndarray, bootstrap: Bootstrap) -> list[Estimate]:
    """Of each column of wins [N, M]."""
    samples = bootstrap.means(wins).astype(np.float64)
    if bootstrap.codes is None:
        # a win rate is a number of half prompts: float32 weights alone would give rates above 1
        halves = 2 * len(wins)
        samples = np.rint(samples * halves) / halves
    rates = []
    for column, sample in zip(wins.T, samples.T, strict=True):
        value = float(column.mean())
        low, high = share_interval(column, bootstrap.codes, interval(sample))
        rates.append(Estimate(value, max(low, 0.0), min(high, 1.0)))
    return rates


# ---------------------------------------------------------------------------------------------------------------------
# Length control
# ---------------------------------------------------------------------------------------------------------------------


def length_controlled_win_rate(
    a: np.ndarray, b: np.ndarray, length_a: np.ndarray, length_b: np.ndarray, bootstrap: Bootstrap
) -> Estimate:
    """The win rate of a predicted for replies of the same length (AlpacaEval 2, Dubois et al. 2024, arXiv 2404.04475).

    Logistic regression of a's wins (ties 0.5) on an intercept and tanh(d / sd(d)), where d is length_a - length_b; the
    prediction at d = 0. As in AlpacaEval d is divided by its standard deviation over these prompts but not centred.
    Three things differ from it: no term for the prompt's difficulty (it comes from a leaderboard's many models), no
    "gamed" copies of the baseline as a prior, and a tiny ridge instead of a cross-validated L1 penalty. The ridge only
    keeps separable data finite: a side that always wins gets 0.99999 rather than 1.

    Every bootstrap sample is fitted anew, with sd(d) as found on all prompts. Where one side is longer on nearly every
    prompt the prediction is an extrapolation, and its interval wide.

    Args:
        a, b: [N] rewards.
        length_a, length_b: [N] lengths of the replies, in one unit.

    Returns:
        The raw `win_rate` where all lengths are equal. No value where d is the same on all prompts or always far from
        0 beside sd(d): length then cannot be told from system.
    """
    a, b, length_a, length_b = _columns(bootstrap, a=a, b=b, length_a=length_a, length_b=length_b)
    if np.array_equal(length_a, length_b):
        return win_rate(a, b, bootstrap)
    return length_controlled_preference(_wins(a, b), length_a, length_b, bootstrap)


def length_controlled_preference(
    preferred: np.ndarray, length_a: np.ndarray, length_b: np.ndarray, bootstrap: Bootstrap
) -> Estimate:
    """`length_controlled_win_rate` of a judge that compares replies and does not score them.

    Args:
        preferred: [N] in [0, 1], how far a is preferred; 0.5 is a tie.
        length_a, length_b: [N] lengths of the replies, in one unit.
    """
    (wins,) = _preferences(bootstrap, preferred=preferred)
    length_a, length_b = _columns(bootstrap, length_a=length_a, length_b=length_b)
    longer = length_a - length_b
    if not longer.any():
        return preference_rate(wins, bootstrap)
    if np.ptp(longer) == 0:
        return Estimate(None)
    from scipy.special import expit

    x = np.tanh(longer / longer.std(ddof=1))
    uniform = np.full((1, len(x)), 1 / len(x))
    if not slope_told_apart(x, uniform)[0]:
        return Estimate(None)
    whole = logistic_fits(x, wins, uniform, np.zeros(2))[0]

    def predicted(weights: np.ndarray) -> np.ndarray:
        return np.where(slope_told_apart(x, weights), expit(logistic_fits(x, wins, weights, whole)[:, 0]), np.nan)

    return _estimate(expit(whole[0]), _samples(predicted, bootstrap))


# ---------------------------------------------------------------------------------------------------------------------
# How much better
# ---------------------------------------------------------------------------------------------------------------------


def reward_gap(a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    """The mean of a - b over prompts, in the judge's units.

    Args:
        a, b: [N] rewards.
    """
    a, b = _columns(bootstrap, a=a, b=b)
    return bootstrap.mean(a - b)


def standardised_gap(a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    """`reward_gap` in units of the pooled standard deviation, sqrt((var(a) + var(b)) / 2), found anew in each sample.

    Args:
        a, b: [N] rewards.

    Returns:
        No value where neither side's rewards vary.
    """
    a, b = _columns(bootstrap, a=a, b=b)
    n = len(a)
    if not (np.ptp(a) or np.ptp(b)):
        return Estimate(None)
    gap, pooled = (a - b).mean(), np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    u, v = (a - a.mean()) / pooled, (b - b.mean()) / pooled  # centred: squares of large rewards would cancel badly
    mean_u, mean_v, squares = bootstrap.means(np.stack([u, v, u * u + v * v], 1)).astype(np.float64).T
    variance = (squares - mean_u**2 - mean_v**2) / 2 * n / (n - 1)
    # a sample of one prompt drawn again and again has no variance but for rounding
    spread = np.sqrt(np.where(variance > 1e-5, variance, np.nan))
    return _estimate(gap / pooled, (gap / pooled + mean_u - mean_v) / spread)


def min_max_per_prompt(rewards: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each prompt's rewards scaled to [0, 1] over the systems (ConG, arXiv 2510.07884, Figure 2).

    Args:
        rewards: [N] of each of K systems.

    Returns:
        [N] of each: 0 for the worst system on that prompt, 1 for the best, 0.5 for all where all are equal.
    """
    if not rewards:
        return {}
    table = np.stack(_columns(None, **rewards))
    low, width = table.min(0), np.ptp(table, 0)
    scaled = np.where(width > 0, (table - low) / np.where(width > 0, width, 1), 0.5)
    return dict(zip(rewards, scaled, strict=True))


def best_of_n(
    proxy: np.ndarray, gold: np.ndarray, bootstrap: Bootstrap, sizes: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """What the best of n samples by a proxy is worth, for every n, from N samples to each prompt.

    The mean over all ways to draw n of the N, worked out and not sampled (as the unbiased estimate of Nakano et al.
    2021, arXiv 2112.09332, appendix I): sample of rank i from below is the best of n with probability
    C(i - 1, n - 1) / C(N, n). Equal proxies share their ranks.

    Args:
        proxy, gold: [P, N] rewards of the guide and of the judge. sizes: the n; default is 1, 2, 4, ... and N.

    Returns:
        For each n: ``n``, ``proxy``, ``gold`` (estimates over prompts) and ``kl``: `best_of_n_bound`.

    Raises:
        ValueError: the two have other shapes, or rewards that are no numbers: NaN would be the best of all.
    """
    proxy, gold = (np.asarray(x, np.float64) for x in (proxy, gold))
    if proxy.ndim != 2 or proxy.shape != gold.shape:
        raise ValueError(f"proxy and gold are [P, N] each; their shapes are {proxy.shape} and {gold.shape}.")
    _columns(None, proxy=proxy.ravel(), gold=gold.ravel())
    count = proxy.shape[1]
    if sizes is None:
        sizes = sorted({count, *(2**k for k in range(count.bit_length()) if 2**k <= count)})
    order = np.argsort(proxy, 1, kind="stable")
    by_rank = {"proxy": np.take_along_axis(proxy, order, 1), "gold": np.take_along_axis(gold, order, 1)}
    # among equal proxies every order is as likely: each gets the mean of what they are worth
    for row, values in enumerate(by_rank["proxy"]):
        _, group, sizes_of = np.unique(values, return_inverse=True, return_counts=True)
        by_rank["gold"][row] = (np.bincount(group, by_rank["gold"][row]) / sizes_of)[group]
    curve = []
    for n in sizes:
        weights = np.array([math.comb(i, n - 1) for i in range(count)], np.float64) / math.comb(count, n)
        worth = {name: bootstrap.mean(values @ weights).as_dict() for name, values in by_rank.items()}
        curve.append({"n": int(n), **worth, "kl": best_of_n_bound(n)})
    return curve


def best_of_n_bound(n: int) -> float:
    """What KL(best of n || one sample) does not exceed, in nats (Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def distinctness(texts: Sequence[str], sizes: Sequence[int] = (1, 2)) -> dict[str, float]:
    """Different n-grams of words among all of them, as a share (distinct-n; Li et al. 2016, arXiv 1510.03055)."""
    shares = {}
    for n in sizes:
        grams = [tuple(words[k : k + n]) for words in (t.split() for t in texts) for k in range(len(words) - n + 1)]
        shares[f"distinct_{n}"] = len(set(grams)) / max(len(grams), 1)
    return shares


# ---------------------------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------------------------


def length_summary(lengths: np.ndarray, truncated: np.ndarray) -> dict[str, float]:
    """How long replies are, in the unit of ``lengths``.

    Args:
        lengths: [N].
        truncated: [N] whether the reply was cut off at the limit.

    Returns:
        ``mean``, ``median``; ``truncated``, ``empty``: the shares of replies cut off and of length 0.
    """
    lengths, truncated = _columns(None, lengths=lengths, truncated=truncated)
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "truncated": float((truncated != 0).mean()),
        "empty": float((lengths == 0).mean()),
    }


def reward_length_correlation(reward: np.ndarray, length: np.ndarray, bootstrap: Bootstrap) -> Estimate:
    """Spearman's correlation of reward and length over prompts; every bootstrap sample is ranked anew.

    Ranks, since lengths are skewed and a judge's scale is arbitrary.

    Args:
        reward, length: [N] of one system's replies.

    Returns:
        No value where either does not vary.
    """
    columns = _columns(bootstrap, reward=reward, length=length)
    if not all(np.ptp(column) for column in columns):
        return Estimate(None)
    n, ranks = len(columns[0]), [_midranks(column) for column in columns]

    def correlation(weights: np.ndarray) -> np.ndarray:
        weights = weights.astype(np.float64)
        weights /= weights.sum(1, keepdims=True)
        u, v = (rank(weights) - 0.5 for rank in ranks)  # the weighted mean of midranks is 1/2
        squares = (weights * u * u).sum(1) * (weights * v * v).sum(1)
        # a sample may hold one value alone
        return (weights * u * v).sum(1) / np.sqrt(np.where(squares > 1e-20, squares, np.nan))

    return _estimate(correlation(np.full((1, n), 1 / n))[0], _samples(correlation, bootstrap))


def _midranks(column: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Of weights [r, N] the share below each of [N] values, and half of that on the value itself: [r, N]."""
    order = np.argsort(column)
    _, group, sizes = np.unique(column, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes

    def of(weights: np.ndarray) -> np.ndarray:
        mass = np.add.reduceat(weights[:, order], starts, axis=1)
        return (mass.cumsum(1) - mass / 2)[:, group]

    return of


# ---------------------------------------------------------------------------------------------------------------------


def _columns(bootstrap: Bootstrap | None, /, **columns: np.ndarray) -> list[np.ndarray]:
    """The columns as float64 [N], checked."""
    checked = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    for name, column in checked.items():
        if column.ndim != 1 or not len(column):
            raise ValueError(f"{name} must be a list of numbers, one per prompt; its shape is {column.shape}.")
        if bad := int((~np.isfinite(column)).sum()):
            raise ValueError(f"{name}: {bad} of {len(column)} numbers are NaN or infinite.")
    lengths = {name: len(column) for name, column in checked.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The same prompts are needed on all sides, but their numbers are {lengths}.")
    if bootstrap is not None and set(lengths.values()) != {bootstrap.n}:
        raise ValueError(f"The bootstrap draws from {bootstrap.n} prompts, but there are {lengths}.")
    return list(checked.values())


def _preferences(bootstrap: Bootstrap, /, **columns: np.ndarray) -> list[np.ndarray]:
    """The same of preferences, which lie between 0 and 1."""
    checked = _columns(bootstrap, **columns)
    for name, column in zip(columns, checked, strict=True):
        if column.min() < 0 or column.max() > 1:
            raise ValueError(f"{name}: preferences lie between 0 and 1, not {column.min():g} to {column.max():g}.")
    return checked


def _samples(statistic: Callable[[np.ndarray], np.ndarray], bootstrap: Bootstrap) -> np.ndarray:
    """[R] of ``statistic(weights [r, N]) -> [r]``, a few samples at a time."""
    rows = max(1, ENTRIES // bootstrap.n)

    def piecewise(weights: np.ndarray) -> np.ndarray:
        return np.concatenate([statistic(weights[i : i + rows]) for i in range(0, len(weights), rows)])

    return bootstrap.samples(piecewise)


def _estimate(value: float, samples: np.ndarray) -> Estimate:
    if np.isnan(samples).all():
        return Estimate(float(value))
    return Estimate(float(value), *interval(samples))
