"""Label runs as one result: settings side by side, means over seeds, and which differences are there."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from w2sg.compare.names import key_of, losses_in_words, settings_in_words
from w2sg.compare.runs import Finished, by_split, loss_of, varying
from w2sg.data.table import Groups
from w2sg.metrics import intervals as statistics
from w2sg.reports.words import counted


class Prompts:
    """Which test rows of all runs belong together: rows of one prompt, whichever run says so.

    Attributes:
        unknown: how many runs do not say it; each of their rows is its own prompt unless another run says more.
    """

    def __init__(self, runs: Iterable[Finished]):
        shared, self.unknown, seen = Groups(), 0, set()
        for run in runs:
            if run.prompts is None:
                self.unknown += 1
            elif (rows := (run.right[0], tuple(run.prompts))) not in seen:
                seen.add(rows)
                for row, prompt in zip(*rows, strict=True):
                    shared.join((f"row {row}", f"prompt {prompt}"))
        self._shared, self._numbers = shared, {}
        self._of_ids: dict[tuple[str, ...], np.ndarray] = {}

    def of(self, ids: tuple[str, ...]) -> np.ndarray:
        """[N] the number of each row's prompt."""
        if ids not in self._of_ids:
            roots = [self._shared.root(f"row {row}") for row in ids]
            numbers = [self._numbers.setdefault(root, len(self._numbers)) for root in roots]
            self._of_ids[ids] = np.array(numbers, np.int64)
        return self._of_ids[ids]


@dataclass
class Cell:
    """Runs of one setting and one loss, by seed.

    Attributes:
        values: what sets it apart from the other settings.
        loss_values: the path of its loss, and those of its options in which runs differ.
        prompts: of the rows of all runs.
        setting: the values in words that no other setting has.
        loss: the loss in words that no other loss has.
        runs: (split seed, seed) -> run.
    """

    values: dict[str, Any]
    loss_values: dict[str, Any]
    prompts: Prompts
    setting: str = ""
    loss: str = ""
    runs: dict[tuple[int, int], Finished] = field(default_factory=dict)

    def hits(self, model: str, replicates: Iterable[tuple[int, int]] | None = None) -> list[np.ndarray]:
        """Per run, [N] whether a model was right."""
        return [self.runs[r].right[1][model] for r in (replicates or self.runs)]

    def accuracy(self, model: str) -> dict[str, float | int | None]:
        """Mean and standard deviation over splits, their seeds averaged before (over seeds where there is one split);
        sd is None where there is one.
        """
        values = by_split({r: float(hits.mean()) for r, hits in zip(self.runs, self.hits(model), strict=True)})
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "sd": sd, "seeds": len(self.runs)}

    def repeats(self, values: dict[tuple[int, int], np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Values of each run's rows as `w2sg.metrics.intervals.over_repeats` takes them.

        Args:
            values: of some of the runs [N, ...].

        Returns:
            Of each split, its seeds averaged (of each seed where there is one split), the values and the rows' prompts.
        """
        several = len({split for split, _ in values}) > 1
        groups: dict[Any, list[tuple[tuple[str, ...], np.ndarray]]] = defaultdict(list)
        for replicate, column in values.items():
            groups[replicate[0] if several else replicate].append((self.runs[replicate].right[0], column))
        columns, prompts = [], []
        for runs in groups.values():
            ids = runs[0][0]
            if all(other == ids for other, _ in runs):
                columns.append(np.mean([column for _, column in runs], 0))
            else:  # another dataset.path, say: a row counts as often as it was tested
                ids = tuple(i for other, _ in runs for i in other)
                columns.append(np.concatenate([column for _, column in runs]))
            prompts.append(self.prompts.of(ids))
        return columns, prompts


def what_varies(replicates: Iterable[tuple[int, int]]) -> str:
    """What the repeats are, in words."""
    splits = Counter(split for split, _ in replicates)
    if len(splits) == 1:
        (count,) = splits.values()
        return f"{counted(count, 'seeds')} of one split"
    most, least = max(splits.values()), min(splits.values())
    seeds = "" if most == 1 else f", {least if least == most else f'{least} to {most}'} seeds of each averaged"
    return f"{len(splits)} splits{seeds}"


def compare_label_runs(runs: list[Finished]) -> tuple[list[Cell], dict[str, Any], list[str]]:
    """Cells in the order of settings, then losses; what is said of them; and runs that were left out, and why."""
    prompts, left_out = Prompts(runs), []
    cells, older, same = _cells(runs, prompts)
    if older:
        left_out.append(f"{counted(len(older), 'older runs')} of the same configuration: {_folders(older)}")
    if same:
        left_out.append(
            f"{counted(len(same), 'runs')} with the predictions, to the last digit, of a run of another split seed (or "
            f"seed): nothing that these choose differs there, so they are no repeats: {_folders(same)}"
        )
    comparisons = _comparisons(cells)
    teachers = _against(cells, "weak")
    twins = {(e["setting"], e["a"]): e["b"] for e in reversed(comparisons) if e["identical"]}
    _correct(comparisons, lambda e: {twins.get((e["setting"], e[k]), e[k]) for k in ("a", "b")})
    _correct(teachers, lambda e: {twins.get((e["setting"], e["loss"]), e["loss"])})
    content = {
        "cells": [_row(cell) for cell in cells],
        "student_against_teacher": teachers,
        "between_losses": comparisons,
        "ahead": _ahead(comparisons),
        "notes": _notes(cells, prompts),
    }
    return cells, content, left_out


def _folders(runs: list[Finished]) -> str:
    return ", ".join(sorted(run.where for run in runs))


def _cells(runs: list[Finished], prompts: Prompts) -> tuple[list[Cell], list[Finished], list[Finished]]:
    """Group by setting and loss; of two runs with the same seed the newer counts, and of two that are one the first.

    Returns:
        Cells in order, the older runs, and those that are one with another.
    """
    varyings, loss_options = varying(runs)
    cells: dict[tuple[str, str], Cell] = {}
    older, same = [], []
    for run in sorted(runs, key=lambda run: run.newest):
        values = {k: run.settings.get(k) for k in varyings}
        loss = loss_of(run, loss_options)
        cell = cells.setdefault((key_of(values), key_of(loss)), Cell(values, loss, prompts))
        if run.replicate in cell.runs:
            older.append(cell.runs[run.replicate])
        cell.runs[run.replicate] = run
    settings = settings_in_words([cell.values for cell in cells.values()])
    losses = losses_in_words([cell.loss_values for cell in cells.values()])
    for cell, cell.setting, cell.loss in zip(cells.values(), settings, losses, strict=True):
        fingerprints: set[str] = set()
        kept = {}
        for replicate, run in sorted(cell.runs.items()):
            if run.fingerprint in fingerprints:
                same.append(run)
            else:
                kept[replicate] = run
            fingerprints.add(run.fingerprint)
        cell.runs = kept
    return sorted(cells.values(), key=_order), older, same


def _notes(cells: list[Cell], prompts: Prompts) -> list[str]:
    """What to know of the repeats before believing an interval."""
    lines = []
    if prompts.unknown:
        lines.append(
            f"{counted(prompts.unknown, 'runs')} of an earlier version, without which test rows share a prompt: each "
            "of their rows counts as a separate prompt"
        )
    for what in ("seeds", "splits"):
        two = [
            cell
            for cell in cells
            if len({split for split, _ in cell.runs} if what == "splits" else cell.runs) == 2
            and (len({split for split, _ in cell.runs}) > 1) == (what == "splits")
        ]
        if two:
            lines.append(
                f"two {what} in {len(two)} of {counted(len(cells), 'cells')}: how much {what} differ has one degree of "
                "freedom there, so the intervals are wide and err on the safe side, and what is not resolved may well "
                "be there"
            )
    return lines


def _order(cell: Cell) -> tuple:
    values = [(0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for v in cell.values.values()]
    known = ["cross_entropy", "forward_kl", "reverse_cross_entropy", "reverse_kl", "confidence", "reverse_confidence"]
    name = cell.loss_values["loss._target_"].rpartition(".")[2]
    return (values, known.index(name) if name in known else len(known), cell.loss)


def _row(cell: Cell) -> dict[str, Any]:
    """A line of the table: means over seeds with their spread, PGR with its interval."""
    models = set.intersection(*(set(run.right[1]) for run in cell.runs.values()))
    reports = [run.content for run in cell.runs.values()]
    row: dict[str, Any] = {
        "setting": cell.setting,
        "values": cell.values,
        "loss": cell.loss,
        "loss_target": cell.loss_values["loss._target_"],
        "seeds": [seed for _, seed in cell.runs],
        "accuracy": {model: cell.accuracy(model) for model in sorted(models)},
        "length_only": float(np.mean([r["data"]["length_only"]["accuracy"] for r in reports])),
    }
    for measure in ("auroc", "nll", "ece", "overconfidence"):
        values = [r["metrics"]["student"][measure] for r in reports]
        row[measure] = None if None in values else float(np.mean(values))
    for part in ("gain", "misfit", "remainder"):
        row[part] = float(np.mean([r["diagnostics"]["test"][part]["value"] for r in reports]))
    row["repeats"] = what_varies(cell.runs)
    row["parameters"] = reports[0].get("parameters")  # None in reports of an earlier version
    if len(cell.runs) == 1:
        row["pgr"] = reports[0]["pgr"] | {"seeds": 1}
    else:
        above = {r: _above(run) for r, run in cell.runs.items()}
        values, prompts = cell.repeats(above)
        row["pgr"] = statistics.gap_recovered(values, prompts, f"{what_varies(cell.runs)}, and test prompts")
        alone = statistics.gap_recovered_over_seeds(*_accuracies(cell))
        row["pgr_over_seeds_alone"] = alone
    return row


def _above(run: Finished) -> np.ndarray:
    """[N, 2] how far the student and the ceiling are above the weak model, row by row."""
    weak, student, ceiling = (run.right[1][m].astype(np.float64) for m in ("weak", "student", "ceiling"))
    return np.stack([student - weak, ceiling - weak], 1)


def _accuracies(cell: Cell) -> Iterable[np.ndarray]:
    """Of weak model, student and ceiling the accuracies of each repeat."""
    for model in ("weak", "student", "ceiling"):
        hits = zip(cell.runs, cell.hits(model), strict=True)
        yield np.array(by_split({r: float(h.mean()) for r, h in hits}))


def _difference(
    cell: Cell, a: dict[tuple[int, int], np.ndarray], b: dict[tuple[int, int], np.ndarray]
) -> dict[str, Any]:
    """Of two models on the same rows of each run: over repeats and prompts, and the exact test of each run."""
    exact = [statistics.mcnemar(a[r], b[r], cell.prompts.of(cell.runs[r].right[0])) for r in a]
    if len(a) == 1:
        ((replicate, mine),) = a.items()
        prompts = cell.prompts.of(cell.runs[replicate].right[0])
        difference = statistics.paired_difference(mine[None], b[replicate][None], prompts)
        test = f"{exact[0]['test']}, one run"
    else:
        values, prompts = cell.repeats({r: a[r].astype(np.float64) - b[r] for r in a})
        difference = statistics.difference_over_repeats(values, prompts)
        test = f"Student's t over {what_varies(a)}, and test prompts"
    return difference | {"test": test, "mcnemar_p": [e["p"] for e in exact], "exact": exact[0]["test"]}


def _against(cells: list[Cell], other: str) -> list[dict[str, Any]]:
    """Each student against another model of its own runs."""
    return [
        {
            "setting": cell.setting,
            "loss": cell.loss,
            "seeds": len(cell.runs),
            **_difference(cell, *({r: run.right[1][m] for r, run in cell.runs.items()} for m in ("student", other))),
        }
        for cell in cells
    ]


def _correct(family: list[dict[str, Any]], losses: Callable[[dict[str, Any]], set[str]]) -> None:
    """Add p values corrected for the number of tests (Holm).

    A loss that predicts what another does counts once, where it was run with the same seeds: with others it is a test
    of its own, with a p of its own.
    """

    def test(e: dict[str, Any]) -> tuple[Any, ...]:
        return (e["setting"], *sorted(losses(e)), e["seeds"], abs(e["difference"]), e["p"])

    tests = {test(e): e["p"] for e in family if not e.get("identical")}
    corrected = dict(zip(tests, statistics.holm(list(tests.values())), strict=True))
    for entry in family:
        entry["p_holm"] = 1.0 if entry.get("identical") else corrected[test(entry)]


def _comparisons(cells: list[Cell]) -> list[dict[str, Any]]:
    """Every two losses of a setting, on the seeds that both have."""
    rows = []
    by_setting = defaultdict(list)
    for cell in cells:
        by_setting[key_of(cell.values)].append(cell)
    for group in by_setting.values():
        for first, second in combinations(group, 2):
            common = [r for r in second.runs if r in first.runs]
            same = common and all(
                np.array_equal(first.runs[r].right[1]["student"], second.runs[r].right[1]["student"]) for r in common
            )
            if not common or any(first.runs[r].right[0] != second.runs[r].right[0] for r in common):
                continue
            a, b = ({r: cell.runs[r].right[1]["student"] for r in common} for cell in (second, first))
            rows.append(
                {
                    "setting": first.setting,
                    "a": second.loss,
                    "b": first.loss,
                    "seeds": len(common),
                    "identical": bool(same),
                    **_difference(second, a, b),
                }
            )
    return rows


def _ahead(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every two losses that meet in several settings: in how many the first is ahead, with the exact sign test, and
    its p corrected for the number of pairs (Holm).
    """
    from scipy.stats import binomtest

    wins: Counter = Counter()
    losses: Counter = Counter()
    for entry in comparisons:
        pair = entry["a"], entry["b"]
        wins[pair] += entry["difference"] > 0
        losses[pair] += entry["difference"] < 0
    rows = []
    for (a, b), ahead in wins.items():
        behind = losses[a, b]
        settings = sum(e["a"] == a and e["b"] == b for e in comparisons)
        if settings > 1:
            p = binomtest(ahead, ahead + behind).pvalue if ahead + behind else 1.0
            rows.append({"a": a, "b": b, "settings": settings, "ahead": ahead, "behind": behind, "p": float(p)})
    for entry, p in zip(rows, statistics.holm([e["p"] for e in rows]), strict=True):
        entry["p_holm"] = p
    return rows
