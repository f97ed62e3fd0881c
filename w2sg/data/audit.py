"""What to know of the data before believing a result: sizes, leakage, balance, and what length alone achieves."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.data.table import Table

if TYPE_CHECKING:
    from w2sg.data.splits import Tables


def length_only(ground_truth: Table, test: Table) -> dict[str, Any]:
    """Test accuracy of choosing by length, in the direction that is right more often on the ground-truth split."""
    rule, credit = length_rule(ground_truth, test)
    return {"rule": rule, "accuracy": float(credit.mean())}


def length_rule(ground_truth: Table, test: Table) -> tuple[str, np.ndarray]:
    """What choosing by length says, and [N] whether it is right on test.

    Pairs: the longer (or shorter) reply, ties count one half. Classes: the best of 19 thresholds on
    length (every 5 %), with the best class on either side.
    """
    if test.kind == "pairs":
        longer = np.mean(_longer_is_preferred(ground_truth)) >= 0.5
        credit = _longer_is_preferred(test)
        return f"{'longer' if longer else 'shorter'} is preferred", credit if longer else 1.0 - credit
    lengths = np.array([len(t[0]) for t in ground_truth.texts])
    labels = ground_truth.labels
    best = (-1.0, 0.0, 0, 0)
    for threshold in np.quantile(lengths, np.linspace(0.05, 0.95, 19)):
        short = lengths < threshold
        sides = [np.bincount(labels[part], minlength=test.classes) for part in (short, ~short)]
        right = sum(side.max() for side in sides) / len(labels)
        if right > best[0]:
            best = (right, float(threshold), int(sides[0].argmax()), int(sides[1].argmax()))
    _, threshold, below, above = best
    guess = np.where(np.array([len(t[0]) for t in test.texts]) < threshold, below, above)
    return f"class {below} below {threshold:.0f} characters, else {above}", (guess == test.labels).astype(float)


def _longer_is_preferred(table: Table) -> np.ndarray:
    """[N] 1 where the preferred reply is the longer one, 0 where it is the shorter one, one half where they tie."""
    lengths = np.array([[len(t) for t in pair] for pair in table.texts])
    rows = np.arange(len(table))
    first, second = lengths[rows, table.first], lengths[rows, 1 - table.first]
    return (np.sign(np.where(table.labels == 0, first - second, second - first)) + 1) / 2


def overlaps(tables: dict[str, Table]) -> dict[str, int]:
    """Prompts (texts, where there are no prompts) that every two splits share."""
    seen = {}
    for name, table in tables.items():
        seen[name] = {prompt.text for prompt in table.prompts} - {""} or {
            text for texts in table.texts for text in texts
        }
    return {f"{a} and {b}": len(seen[a] & seen[b]) for a, b in combinations(seen, 2)}


def prompts_within(table: Table) -> dict[str, int]:
    """How many rows and prompts a split has, and how many of its rows share their prompt with another of its rows."""
    counts = Counter(table.clusters)
    shared = sum(count for count in counts.values() if count > 1)
    return {"rows": len(table), "prompts": len(counts), "rows that share a prompt": shared}


def summary(tables: Tables) -> dict[str, Any]:
    """Everything of the above, with what was dropped while reading."""
    splits = {"ground_truth": tables.ground_truth, "transfer": tables.transfer, "test": tables.test}
    return {
        "sizes": {name: len(table) for name, table in splits.items()},
        "overlaps": overlaps(splits),
        "prompts_within_test": prompts_within(tables.test),
        "length_only": length_only(tables.ground_truth, tables.test),
        "class_balance": {
            name: [round(float(x), 4) for x in np.bincount(t.labels, minlength=t.classes) / len(t)]
            for name, t in splits.items()
        },
        **tables.report,
    }
