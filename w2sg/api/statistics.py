"""PGR and paired tests of anybody's predictions: the numbers that the reports of w2sg print, by the same functions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from w2sg.api.columns import Clusters, hits_of
from w2sg.metrics import intervals
from w2sg.metrics.bootstrap import Bootstrap


@dataclass(frozen=True)
class PGR:
    """The performance gap recovered, (student - weak) / (ceiling - weak) on accuracy, with its 95 % interval.

    Attributes:
        value, low, high: the share and its interval; None where the gap is not resolved. An end is also None where
            nothing bounds it.
        resolved: whether the interval of the gap lies above 0. A ratio over a gap within noise says nothing.
        estimate: the quotient in any case; None where the gap is 0.
        gap, gap_low, gap_high: ceiling minus weak, as a difference of accuracies, with its interval.
        over: what the intervals are over, in words.
    """

    value: float | None
    low: float | None
    high: float | None
    resolved: bool
    estimate: float | None
    gap: float
    gap_low: float
    gap_high: float
    over: str = "test rows"

    def as_dict(self) -> dict[str, Any]:
        """As report.json has it."""
        return asdict(self)

    def __str__(self) -> str:
        gap = f"gap {self.gap:+.3f} [{self.gap_low:+.3f}, {self.gap_high:+.3f}]"
        if not self.resolved:
            return f"PGR not resolved ({gap})"
        low, high = ("–" if end is None else f"{end:.2f}" for end in (self.low, self.high))
        return f"PGR {self.value:.2f} [{low}, {high}] ({gap})"


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same rows of one run.

    Attributes:
        difference, low, high: accuracy of ``a`` minus accuracy of ``b``, with its 95 % interval.
        p: of the exact two-sided test.
        only_a, only_b: rows that one alone has right.
        test: its name: exact McNemar, or exact sign flips over prompts where prompts have several rows.
    """

    difference: float
    low: float
    high: float
    p: float
    only_a: int
    only_b: int
    test: str

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p {self.p:.3g} ({self.test})"


def pgr(
    weak: Any = "weak",
    student: Any = "student",
    ceiling: Any = "ceiling",
    *,
    labels: Any = None,
    clusters: Clusters | str = None,
    data: Any = None,
) -> PGR:
    """The performance gap recovered in one run, with its interval by the paired bootstrap over test prompts.

    N rows, C classes. The 2,000 resamples are drawn with a fixed seed, so the numbers are those of the report.

    Args:
        weak, student, ceiling: whether each row was right: [N] bools, or 0 and 1. With ``labels`` what each model
            predicts: [N] whole numbers are classes, [N] floats are logits of class 0 against class 1, [N, C] are
            logits. pandas Series are joined by their index, arrays and tensors stand in one order. With ``data`` the
            names of its columns.
        labels: [N] gold classes, from 0.
        clusters: [N] the prompt of each row, by any name. Rows of one prompt are drawn together.
        data: a DataFrame like predictions.parquet, that file, the folder of a run, or a `Report`. Its columns ``id``,
            ``label`` and ``prompt`` are used.

    Raises:
        UserError: rows do not join, shapes do not fit, or a column holds no correctness.

    >>> from w2sg import pgr
    >>> weak, student, ceiling = [1, 0, 0, 0] * 50, [1, 1, 0, 0] * 50, [1, 1, 1, 0] * 50
    >>> print(pgr(weak, student, ceiling))
    PGR 0.50 [0.40, 0.60] (gap +0.500 [+0.430, +0.570])

    References:
        Burns et al. 2023, arXiv 2312.09390, section 3.
    """
    (w, s, c), groups = hits_of("pgr", {"weak": weak, "student": student, "ceiling": ceiling}, labels, clusters, data)
    return PGR(**intervals.performance_gap_recovered(w, s, c, Bootstrap(len(w), clusters=groups)))


def paired_test(a: Any, b: Any, *, labels: Any = None, clusters: Clusters | str = None, data: Any = None) -> PairedTest:
    """Whether two models differ in accuracy on the same rows, by an exact test.

    Where each prompt has one row it is McNemar's exact test (1947, Psychometrika 12, 153-157). Where prompts have
    several rows it is the sign-flip test over prompts, whose distribution is worked out and not drawn.

    Args:
        a, b, labels, clusters, data: as the models and columns of `pgr`.

    Raises:
        UserError: as `pgr`.

    >>> from w2sg import paired_test
    >>> test = paired_test([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1])
    >>> test.only_a, test.only_b, test.p
    (6, 1, 0.125)
    """
    (x, y), groups = hits_of("paired_test", {"a": a, "b": b}, labels, clusters, data)
    return PairedTest(**intervals.paired_test(x, y, groups))
