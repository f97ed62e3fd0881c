"""One comparison over several test sets: each by itself, corrected for their number, and their mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from w2sg.metrics.bootstrap import Bootstrap, interval
from w2sg.metrics.intervals import holm

MIN_SETS = 3  # for an interval over sets


def over_sets(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The student's gain over the weak model, over test sets of which each counts the same.

    Two means are told apart. Over these very sets, test prompts are drawn within each (hierarchically, sets fixed).
    Over sets like these, each set is one draw, and the interval is Student's t over their differences (from three).

    Args:
        sets: name -> ``right``: {weak, student, ceiling: [N] whether it was right}, ``clusters``: [N] prompts, and
            ``p`` of the paired test.

    Returns:
        ``holm``: name -> p corrected over the sets; ``difference``: mean gain with ``low`` and ``high`` over prompts;
        ``over_sets``: ``low``, ``high`` over sets, None below three; ``pgr``: mean gain over mean gap with its interval
        over prompts, None where the mean gap is not above 0.
    """
    names = list(sets)
    gains, gaps, samples = [], [], []
    for place, name in enumerate(names):
        right = sets[name]["right"]
        columns = np.stack([np.asarray(right[k], np.float64) for k in ("weak", "student", "ceiling")], 1)
        means = columns.mean(0)
        gains.append(means[1] - means[0])
        gaps.append(means[2] - means[0])
        # sets are independent of each other, so each draws from a seed of its own
        samples.append(Bootstrap(len(columns), seed=place, clusters=sets[name]["clusters"]).means(columns))
    drawn = np.mean(samples, 0)  # [R, 3]
    gain, gap = drawn[:, 1] - drawn[:, 0], drawn[:, 2] - drawn[:, 0]
    low, high = interval(gain)
    gap_low, gap_high = interval(gap)
    pgr = None
    if gap_low > 0:
        ends = interval(np.where(gap > 0, gain / np.where(gap > 0, gap, 1.0), np.sign(gain) * np.inf))
        ends = [end if np.isfinite(end) else None for end in ends]
        pgr = {"value": float(np.mean(gains) / np.mean(gaps)), "low": ends[0], "high": ends[1]}
    return {
        "holm": dict(zip(names, holm([sets[name]["p"] for name in names]), strict=True)),
        "difference": {"value": float(np.mean(gains)), "low": low, "high": high},
        "over_sets": _over_draws(np.array(gains)),
        "gap": {"value": float(np.mean(gaps)), "low": gap_low, "high": gap_high},
        "pgr": pgr,
    }


def _over_draws(values: np.ndarray) -> dict[str, float | None]:
    """Student's t over the numbers themselves."""
    from scipy.stats import t

    mean, count = float(values.mean()), len(values)
    if count < MIN_SETS:
        return {"value": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return {"value": mean, "low": mean - half, "high": mean + half}
