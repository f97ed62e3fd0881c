"""Results of a check: measured and expected numbers, and curves to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from w2sg.known_answers.bench import Bench


OWN = "closed form derived here and checked by simulation"  # a source


@dataclass(frozen=True)
class Quantity:
    """One number.

    Attributes:
        tolerance: largest allowed error.
        why: where the tolerance comes from.
        relation: ``=``, or for a bound ``<=`` or ``>=`` (``got`` is on the left).
    """

    name: str
    expected: float
    got: float
    tolerance: float
    why: str
    relation: Literal["=", "<=", ">="] = "="

    @property
    def passed(self) -> bool:
        """Whether the relation holds within the tolerance. NaN never does."""
        above = self.got - self.expected
        return bool({"=": abs(above), "<=": above, ">=": -above}[self.relation] <= self.tolerance)


@dataclass(frozen=True)
class Line:
    """Points of a figure: ``theory`` is drawn as a line, ``measured`` as points with ``error`` (one s.e.) on each."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["theory", "measured"]
    error: Sequence[float] | None = None
    colour: int = 0

    @staticmethod
    def runs(points: Sequence[tuple[float, ...]], label: str = "", colour: int = 0) -> Line:
        """Measured points (x, y), or (x, y, error)."""
        x, y, *error = zip(*points, strict=True)
        return Line(label, x, y, "measured", *error, colour=colour)


@dataclass(frozen=True)
class Panel:
    """One figure."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    logx: bool = False
    logy: bool = False


@dataclass
class Findings:
    """Quantities and figures of one check."""

    quantities: list[Quantity] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)

    def add(
        self,
        name: str,
        expected: float,
        got: float | None,
        tolerance: float,
        why: str,
        relation: Literal["=", "<=", ">="] = "=",
    ) -> None:
        """Add a quantity. None means that it could not be computed, so it fails."""
        value = np.nan if got is None else float(got)
        self.quantities.append(Quantity(name, float(expected), value, float(tolerance), why, relation))

    def mean(
        self, name: str, expected: float, draws: np.ndarray, why: str = "4 s.e.", slack: float = 0, relation: str = "="
    ) -> None:
        """The mean of [R] independent draws, which may miss by 4 standard errors and ``slack``."""
        self.add(name, expected, np.mean(draws), 4 * standard_error(draws) + slack, why, relation)

    def draw(self, title: str, x: str, y: str, lines: Sequence[Line], **log: bool) -> None:
        """One more figure, as `Panel`."""
        self.panels.append(Panel(title, x, y, lines, **log))

    @property
    def passed(self) -> bool:
        return bool(self.quantities) and all(quantity.passed for quantity in self.quantities)


@dataclass(frozen=True)
class Check:
    """An experiment with a known answer.

    Attributes:
        says: what it shows, in one sentence.
        source: paper or derivation.
        run: runs it on a `Bench`.
    """

    name: str
    says: str
    source: str
    run: Callable[[Bench], Findings]


def known(source: str) -> Callable[[Callable[[Bench], Findings]], Check]:
    """Makes a check of a function: its name is the check's, and its docstring says what it shows."""
    return lambda run: Check(run.__name__, " ".join((run.__doc__ or "").split()), source, run)


def standard_error(draws: np.ndarray) -> float:
    """Standard error of the mean of [R] independent draws."""
    draws = np.asarray(draws, np.float64)
    return float(draws.std(ddof=1) / np.sqrt(len(draws)))
