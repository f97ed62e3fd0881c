"""AlpacaEval's files: replies as its tool reads them, and its annotations as a table of win rates.

The formats are those of https://github.com/tatsu-lab/alpaca_eval: ``model_outputs.json`` and ``annotations.json``.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.data.messages import instruction
from w2sg.data.replies import Replies
from w2sg.errors import UserError
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports.words import estimate, p_value
from w2sg.store.files import read_json, write_json

FOLDER = "alpaca_eval"


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def outputs(replies: Replies, generator: str, dataset: str) -> list[dict[str, str]]:
    """Rows of ``model_outputs.json``."""
    return [
        {"instruction": instruction(prompt), "output": text, "generator": generator, "dataset": dataset}
        for prompt, text in zip(replies.prompts, replies.texts, strict=True)
    ]


def export_replies(run: Path, systems: Mapping[str, Replies], dataset: str) -> list[Path]:
    """Write ``alpaca_eval/<system>.json`` for each system of a run; generators are called ``<run>:<system>``.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = run / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, replies in systems.items():
            write_json(folder / f"{name}.json", outputs(replies, f"{run.name}:{name}", dataset))
    except OSError as error:
        raise UserError(
            f"the replies cannot be written to {folder} ({error.strerror or error}); free space or choose another "
            "folder with out=, and run the same command: all stages are in the store"
        ) from error
    return [folder / f"{name}.json" for name in systems]


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotation:
    """One row of ``annotations.json``.

    Attributes:
        row: its place, from 1. outputs, generators: the two replies and who wrote them.
        preference: how far the second is preferred, in [0, 1]; None where the annotator came to no verdict.
        annotator: who judged, where it is said.
    """

    row: int
    instruction: str
    outputs: tuple[str, str]
    generators: tuple[str, str]
    preference: float | None
    annotator: str


def read_annotations(file: Path) -> list[Annotation]:
    """The rows of an ``annotations.json``.

    Raises:
        UserError: it cannot be read, or a row is not one; names the first such row.
    """
    try:
        rows = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"annotations: {file} cannot be read ({getattr(error, 'strerror', None) or error}); name the "
            "annotations.json that alpaca_eval wrote"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"annotations: {file} holds no list of annotations; name the one that alpaca_eval wrote")
    return [_annotation(number, row, file) for number, row in enumerate(rows, 1)]


def _annotation(number: int, row: Any, file: Path) -> Annotation:
    where = f"annotations: row {number} of {file}"
    if not isinstance(row, dict):
        raise UserError(f"{where} is no object but {str(row)[:40]!r}; mend or remove it")
    for key in ("instruction", "output_1", "output_2", "generator_1", "generator_2"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where}: {key} must be text (got {row.get(key)!r}); mend or remove it")
    if row["generator_1"] == row["generator_2"]:
        raise UserError(f"{where} compares {row['generator_1']!r} with itself; give the two sides different generators")
    if "preference" not in row:
        raise UserError(f"{where} has no preference; mend or remove it (null where there is no verdict)")
    value = row["preference"]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(f"{where}: preference must be a number from 1 to 2 (got {value!r}); mend or remove it")
    if value is not None and math.isnan(value):  # as pandas writes that there is none
        value = None
    if value == 0:
        value = 1.5  # as the tool once wrote a draw
    if value is not None and not 1 <= value <= 2:
        raise UserError(f"{where}: preference must lie between 1 and 2 (got {value!r}); mend or remove it")
    return Annotation(
        number,
        row["instruction"],
        (row["output_1"], row["output_2"]),
        (row["generator_1"], row["generator_2"]),
        None if value is None else value - 1.0,
        str(row.get("annotator") or "not said"),
    )


def replies_of(run: Path) -> dict[str, dict[str, set[str]]]:
    """Generator -> instruction -> replies, of a run that was exported.

    Raises:
        UserError: there are none.
    """
    files = sorted((run / FOLDER).glob("*.json"))
    if not files:
        raise UserError(f"of: {run} has no {FOLDER}/*.json; name the folder of a finished run whose models wrote")
    replies: dict[str, dict[str, set[str]]] = {}
    for file in files:
        try:
            for row in read_json(file):
                of_generator = replies.setdefault(row["generator"], {})
                of_generator.setdefault(row["instruction"], set()).add(row["output"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"of: {file} is not as it was written ({error!r}); run the same command anew") from error
    return replies


def recognise(annotations: list[Annotation], of_run: dict[str, dict[str, set[str]]]) -> dict[str, str]:
    """Who of the annotations' generators is who in a run, by instruction and reply, whatever they are called there.

    A generator is the one of the run that wrote most of its replies, and at least half of them; others are strangers.

    Raises:
        UserError: a generator of the run is annotated with replies that are not its own; or nothing matches.
    """
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    count: Counter[str] = Counter()
    for a in annotations:
        for output, generator in zip(a.outputs, a.generators, strict=True):
            count[generator] += 1
            votes[generator].update(name for name, texts in of_run.items() if output in texts.get(a.instruction, ()))
    names = {}
    for generator, agreed in votes.items():
        likeliest = max(agreed, key=lambda name: (agreed[name], name == generator), default=None)
        if likeliest is not None and 2 * agreed[likeliest] >= count[generator]:
            names[generator] = likeliest
        elif generator in of_run:
            names[generator] = generator  # it says who it is; the rows below say where it is wrong
    if not names:
        raise UserError(
            "annotations: no reply of the run is among them, by instruction and output; name the run that was annotated"
        )
    for a in annotations:
        for output, generator in zip(a.outputs, a.generators, strict=True):
            name = names.get(generator)
            if name is not None and output not in of_run[name].get(a.instruction, ()):
                raise UserError(
                    f"annotations: row {a.row}: this is not what {name!r} replied in the run; annotate its replies as "
                    f"they are in {FOLDER}, or name the run that was annotated"
                )
    return names


def win_rates(annotations: list[Annotation], of_run: dict[str, dict[str, set[str]]] | None = None) -> dict[str, Any]:
    """Win rates of all pairs of generators.

    Two replies that were judged more than once, in both orders or by several annotators, count once, by the mean. The
    length control is that of `w2sg.metrics.replies`, fitted on these prompts alone; AlpacaEval's own has a term for
    each prompt's difficulty besides, which comes from its leaderboard.

    Args:
        of_run: replies of a run, by which generators are recognised.

    Returns:
        ``pairs``: of each pair ``system`` (the second generator of its first row), ``over``, ``prompts``, ``win_rate``,
        ``length_controlled``, ``longer`` (characters) and ``p``; ``rows``, ``without_verdict``, ``annotators``.

    Raises:
        UserError: no row has a verdict; see also `recognise`.
    """
    names = {} if of_run is None else recognise(annotations, of_run)
    judged: dict[tuple[str, str], dict[tuple[str, str, str], list[float]]] = {}
    for a in annotations:
        if a.preference is None:
            continue
        other, system = (names.get(generator, generator) for generator in a.generators)
        (other_reply, reply), preferred = a.outputs, a.preference
        if system == other:
            raise UserError(f"annotations: row {a.row}: both sides are replies of {system!r}; compare two systems")
        if (other, system) in judged:
            system, other, reply, other_reply, preferred = other, system, other_reply, reply, 1 - preferred
        judged.setdefault((system, other), {}).setdefault((a.instruction, reply, other_reply), []).append(preferred)
    if not judged:
        raise UserError("annotations: none of them has a preference; annotate again")
    pairs = []
    for (system, other), rows in judged.items():
        preferred = np.array([np.mean(values) for values in rows.values()])
        lengths = [np.array([len(key[side]) for key in rows], np.float64) for side in (1, 2)]
        prompts = [instruction_ for instruction_, *_ in rows]
        bootstrap = Bootstrap(len(rows), clusters=prompts)
        pairs.append(
            {
                "system": system,
                "over": other,
                "prompts": len(rows),
                "win_rate": comparisons.preference_rate(preferred, bootstrap).as_dict(),
                "length_controlled": comparisons.length_controlled_preference(preferred, *lengths, bootstrap).as_dict(),
                "longer": bootstrap.mean(lengths[0] - lengths[1]).as_dict(),
                "p": comparisons.paired_test(preferred, np.full(len(rows), 0.5), prompts),
            }
        )
    return {
        "pairs": pairs,
        "rows": len(annotations),
        "without_verdict": sum(a.preference is None for a in annotations),
        "annotators": sorted({a.annotator for a in annotations}),
    }


def print_annotations(file: Path, run: Path | None, to: Path | None, console: Any) -> dict[str, Any]:
    """Print the table of an ``annotations.json``, and write it as win_rates.json beside it or into another folder."""
    from rich.table import Table as Grid

    rates = win_rates(read_annotations(file), None if run is None else replies_of(run))
    grid = Grid(title=f"Judged by {', '.join(rates['annotators'])}", title_justify="left")
    for column in ("", "over", "prompts", "wins", "length controlled", "p", "longer by"):
        grid.add_column(column, justify="left" if column in ("", "over") else "right")
    for pair in rates["pairs"]:
        controlled = pair["length_controlled"]
        grid.add_row(
            pair["system"],
            pair["over"],
            f"{pair['prompts']:,}",
            estimate(pair["win_rate"]),
            "–" if controlled["value"] is None else estimate(controlled),
            p_value(pair["p"]),
            f"{pair['longer']['value']:+.0f}",
        )
    console.print(grid)
    if rates["without_verdict"]:
        console.print(f"left out: {rates['without_verdict']} of {rates['rows']} rows, which have no verdict")
    target = (to or file.parent) / "win_rates.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, rates)
    except OSError as error:
        raise UserError(f"to: {target} cannot be written ({error.strerror or error}); name another folder") from error
    console.say(f"written: {target}")
    return rates
