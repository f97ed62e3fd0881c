"""A finished run, read from its folder: what report.json holds, under names, and its tables as DataFrames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from w2sg.api.columns import PREDICTIONS, read_table
from w2sg.api.statistics import PGR
from w2sg.config import renamed
from w2sg.errors import UserError
from w2sg.reports.stored import NEEDED, no_report
from w2sg.reports.words import estimate, number
from w2sg.store.files import read_json

if TYPE_CHECKING:
    import pandas as pd

FILE = "report.json"


class ReadOnly(dict):
    """A dictionary that is looked at and not changed."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a report is read-only; make a copy first, as dict(...)")

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadOnly, (dict(self),)  # copies and pickles are made without setting items

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ReadOnly({key: _frozen(part) for key, part in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@dataclass(frozen=True, repr=False)
class Report:
    """A finished run. `read_report`, `train` and `decode` give one; nothing in it can be changed.

    Accuracies and probabilities are between 0 and 1, NLL is in nats, seconds are wall clock, intervals are at 95 %.

    Attributes:
        folder: of the run.
        content: everything that report.json holds, as read-only dictionaries and tuples.
    """

    folder: Path
    content: Mapping[str, Any] = field(hash=False)

    @property
    def title(self) -> str:
        """What was run, in one line."""
        return self.content.get("title", "")

    @property
    def verdict(self) -> str:
        """What came out, in a few sentences."""
        return self.content.get("verdict", "")

    @property
    def method(self) -> str:
        """The last name of the method's path, such as ``finetune``."""
        return self.content.get("method", "")

    @property
    def dataset(self) -> str:
        """The data's name."""
        return self.content.get("dataset", "")

    @property
    def weak(self) -> str:
        """The weak model's name."""
        return self.content.get("weak", "")

    @property
    def strong(self) -> str:
        """The strong model's name."""
        return self.content.get("strong", "")

    @property
    def loss(self) -> str:
        """The student's loss."""
        return self.content.get("loss", "")

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.content["config"]["seed"]

    @property
    def command(self) -> str:
        """What runs it again from a terminal."""
        return self.content.get("command", "")

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """By model: ``accuracy``, ``auroc``, ``nll``, ``brier``, ``ece``, ``overconfidence`` and ``intervals``.

        Models are ``weak``, ``student``, ``ceiling``, ``zero_shot`` and what else the method measures. Runs whose
        models write have other measures (docs/measurement.md).
        """
        return self.content["metrics"]

    @property
    def pgr(self) -> PGR | None:
        """The performance gap recovered; None for methods without a weak supervisor, student and ceiling of labels."""
        if not (found := self.content.get("pgr")):
            return None
        return PGR(**{f.name: found[f.name] for f in fields(PGR) if f.name in found})

    @property
    def tests(self) -> Mapping[str, Mapping[str, Any]]:
        """Paired tests of the student against each other model, as ``student - weak``; empty where there are none."""
        return self.content.get("tests", ReadOnly())

    @property
    def diagnostics(self) -> Mapping[str, Any]:
        """Gain, misfit, remainder, agreement and what else the sections measured."""
        return self.content["diagnostics"]

    @property
    def data(self) -> Mapping[str, Any]:
        """Sizes of splits, overlaps, the length-only baseline, label noise."""
        return self.content.get("data", ReadOnly())

    @property
    def stages(self) -> tuple[Mapping[str, Any], ...]:
        """Each with ``name``, ``key``, ``cached``, ``seconds``, ``tokens`` and ``useful_token_fraction``."""
        return self.content["stages"]

    @property
    def config(self) -> Mapping[str, Any]:
        """Every option, under its name of today."""
        return self.content["config"]

    @property
    def summary(self) -> Mapping[str, Mapping[str, float | None]]:
        """Its columns in the summary of runs: heading -> ``value``, ``low``, ``high``."""
        return self.content.get("summary") or ReadOnly()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before believing a number."""
        return self.content.get("warnings", ())

    @property
    def predictions(self) -> pd.DataFrame:
        """One row per test example: ``id``, ``prompt`` (a hash), ``label``, a column for each model, and the texts.

        A model's column is the logit of class 0 against class 1 (of the first reply of a pair), or the logits of all
        classes. `pgr` and `paired_test` take this table as ``data``.

        Raises:
            UserError: the file is not there, or cannot be read.
        """
        return self._predictions.copy()

    @cached_property
    def _predictions(self) -> pd.DataFrame:
        return read_table(self.folder / PREDICTIONS, "read_report")

    @property
    def samples(self) -> pd.DataFrame | None:
        """What models wrote, a row per reply; None where the method's models only label."""
        file = self.folder / "samples.parquet"
        return read_table(file, "read_report") if file.is_file() else None

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.folder / "report.html"

    def _table(self) -> list[tuple[str, ...]]:
        """Rows of text: a model's measures where there are accuracies, else the columns of the summary."""
        names = self.content.get("names", {})
        if self.metrics and all("accuracy" in (m.get("intervals") or ()) for m in self.metrics.values()):
            rows: list[tuple[str, ...]] = [("", "accuracy", "95 % interval", "AUROC", "NLL")]
            for name, measured in self.metrics.items():
                ends = " to ".join(map(number, measured["intervals"]["accuracy"]))
                values = (number(measured.get(key)) for key in ("auroc", "nll"))
                rows.append((names.get(name, name), number(measured["accuracy"]), ends, *values))
            return rows
        rows = [("", "value")]
        for heading, found in self.summary.items():
            rows.append((heading, estimate(found) if found["low"] is not None else number(found["value"])))
        return rows

    def __repr__(self) -> str:
        student = self.metrics.get("student", {}).get("accuracy")
        found = [] if student is None else [f"student {student:.3f}"]
        found += [] if self.pgr is None else [str(self.pgr)]
        return f"<Report: {'; '.join([self.title or self.method, *found])}>"

    def _repr_html_(self) -> str:
        head, *rows = self._table()
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        said = [str(self.pgr)] if self.pgr is not None else []
        said += [self.verdict] * bool(self.verdict) + [f"Note: {line}" for line in self.warnings]
        below = "".join(f"<p>{escape(line)}</p>" for line in said)
        table = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
        return f"<div><p><strong>{escape(self.title)}</strong></p>{table}{below}</div>"


def read_report(folder: str | Path) -> Report:
    """The report of a finished run.

    Args:
        folder: of the run, as ``outputs/default``.

    Raises:
        UserError: there is no finished run in the folder.
    """
    folder = Path(folder).expanduser().absolute()  # which is found after a change of the working folder, too
    if not folder.is_dir():
        raise UserError(f"read_report: there is no folder {folder}")
    if not (folder / FILE).is_file():
        if (folder / ".hydra").is_dir():
            raise UserError(f"read_report: the run in {folder} is not finished (no {FILE}); start its command again")
        if inside := sorted(folder.rglob(FILE)):
            raise UserError(
                f"read_report: {folder} is no run and holds {len(inside)}; name one, as {inside[0].parent}, or read "
                "all with w2sg.runs"
            )
        raise UserError(f"read_report: {folder} is no finished run (no {FILE})")
    try:
        content = read_json(folder / FILE)
    except (OSError, ValueError) as error:
        raise UserError(f"read_report: {folder / FILE} cannot be read ({error})") from error
    reason = no_report(content) or next((f"it has no {key}" for key in NEEDED if key not in content), None)
    if reason:
        raise UserError(f"read_report: {folder / FILE} is no report of a run ({reason}); run its command again")
    content["config"] = renamed.tree(content["config"], quiet=True)
    return Report(folder, _frozen(content))
