"""The one place where a report comes together: its files, its page, and what the terminal shows.

It adds to the sections of a method what every run has: what was typed, the data, what models read, stages, versions,
configuration and warnings.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from w2sg import __version__, progress
from w2sg.config.programs import command
from w2sg.config.unread import unread
from w2sg.data import blocks
from w2sg.errors import UserError
from w2sg.reports.closing import notes
from w2sg.reports.render import page, render
from w2sg.reports.section import Section, Story
from w2sg.reports.sections.provenance import Provenance, Reading
from w2sg.reports.sections.splits import Splits, data_of
from w2sg.reports.words import PROMPTS_ALONE
from w2sg.store.files import write_json
from w2sg.training.precision import words_of

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "torchmetrics", "datasets", "peft")
STAND_FIRST = ("metrics", "diagnostics")  # in every report.json, empty where nothing of the kind was measured
STAND_LAST = ("data", "reading", "stages", "arithmetic", "versions", "config")
STAND_LAST += ("sections", "title", "verdict", "warnings", "summary")

TEXTS_LEFT_OUT = (
    "texts are left out of this page and of the files beside it (report.texts=false): no examples are shown, and "
    "samples.parquet and other files of replies are not written"
)

Rows = Sequence[Mapping[str, Any]]
MakeFiles = Callable[[Path], Iterable[Path]]


@dataclass(frozen=True)
class Report:
    """A finished run's report.

    Attributes:
        content: what report.json holds.
        sections: in the order of the page.
        predictions: columns of predictions.parquet. samples: rows of samples.parquet; None where no model wrote.
    """

    content: dict[str, Any]
    sections: Sequence[Section]
    predictions: Mapping[str, list]
    samples: Rows | None = None

    def page(self) -> str:
        """The whole page, HTML."""
        content = self.content
        return page(content["title"], [render("opening.html", report=content), *map(self._part, self.sections)])

    def _part(self, section: Section) -> str:
        try:
            html = section.html(self.content)
            if not isinstance(html, str):
                raise TypeError(f"html() returned {type(html).__name__}, not text")
            return html
        except Exception as error:
            raise _broken(section, "page", error) from error

    def write(self, out: Path) -> list[Path]:
        """Write the files into a folder, each whole or not at all, and print the tables.

        Raises:
            UserError: the folder cannot be written (a full disk, say). Every stage is in the store by then, so the same
                command only has the report left to do. Or a section cannot be shown; the other files are written.
        """
        try:
            files = self._write(out)
        except OSError as error:
            raise UserError(
                f"the report cannot be written to {out} ({error.strerror or error}); free space or choose another "
                "folder with out=, and run the same command: all stages are in the store"
            ) from error
        self.show()
        return files

    def _write(self, out: Path) -> list[Path]:
        out.mkdir(parents=True, exist_ok=True)
        files = [
            out / "report.json",
            _write_parquet(self.predictions, out / "predictions.parquet"),
            out / "report.html",
        ]
        failed = None
        try:
            html = self.page()
        except UserError as error:  # the numbers are kept all the same
            failed = error
        else:
            (out / "report.html.tmp").write_text(html, encoding="utf-8")
            (out / "report.html.tmp").replace(out / "report.html")
        if self.samples is not None:
            columns = dict.fromkeys(key for row in self.samples for key in row)  # not all have all
            rows = {key: [row.get(key) for row in self.samples] for key in columns}
            files.append(_write_parquet(rows, out / "samples.parquet"))
        write_json(out / "report.json", self.content)
        if failed is not None:
            raise failed
        return files

    def show(self) -> None:
        """Print the title, the tables of the sections and the warnings; of a run in a sweep what is new of these."""
        from w2sg.console import Plain

        content, console = self.content, Plain()
        progress.rest()
        alone = progress.sweep() is None
        if alone:
            console.print(content["title"], style="italic")
        for section in self.sections if alone else ():
            try:
                table = section.table(content)
            except Exception as error:
                raise _broken(section, "table", error) from error
            if table is not None:
                console.print(table)
        for line in notes(content):
            console.say(f": {line}", "note", "yellow", words=True)


def _write_parquet(columns: Mapping[str, list], file: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = file.with_name(f"{file.name}.tmp")
    with open(temporary, "wb") as opened:  # pyarrow takes no path that is not UTF-8
        pq.write_table(pa.table(dict(columns)), opened, compression="zstd")  # of texts a third less than snappy
    temporary.replace(file)
    return file


def _broken(section: Section, what: str, error: Exception) -> UserError:
    return UserError(
        f"section {section.key!r} ({type(section).__module__}.{type(section).__qualname__}): its {what} cannot be made "
        f"({type(error).__name__}: {error}); mend it and run the same command: all stages are in the store"
    )


def assemble(
    run: Any,
    story: Story,
    sections: Sequence[Section],
    predictions: Mapping[str, list],
    samples: Rows | None = None,
    files: Sequence[MakeFiles] = (),
) -> Report:
    """Put a report together and write it, on the main process alone; all processes wait for it.

    Args:
        run: what was run; its ``config``, ``typed``, ``weak``, ``strong``, ``data``, ``stages``, ``reading``,
            ``notes``, ``out``, ``loggers`` and ``devices`` are read.
        story: what the method says of it.
        sections: in the order of the page; data, what models read, stages, versions and configuration follow.
        predictions: columns of predictions.parquet.
        samples: rows of samples.parquet, where models wrote.
        files: makers of other files, each of the run's folder.

    Raises:
        UserError: two sections give the same key, a section cannot be shown, or the folder cannot be written.
    """
    progress.between("writing the report")
    report = compose(run, story, sections, predictions, samples)
    files = files if run.config.report.texts else ()

    def write() -> None:
        written = report.write(run.out)
        written += [file for make in files for file in make(run.out)]
        run.loggers.summarise(report.content, dict(report.predictions), written, samples)

    run.devices.first(write)
    return report


def compose(
    run: Any, story: Story, sections: Sequence[Section], predictions: Mapping[str, list], samples: Rows | None = None
) -> Report:
    """The same without writing anything."""
    texts = run.config.report.texts
    sections = [section for section in sections if texts or not getattr(section, "texts", False)]
    if not any(isinstance(section, Splits) for section in sections):
        sections.append(Splits())
    sections += [Reading(), Provenance()]
    _check(sections)
    if twice := [s.key for k, s in enumerate(sections) if s.key in {other.key for other in sections[:k]}]:
        raise UserError(f"sections: two have the key {twice[0]!r}; give one of them another")
    content = heading(run, story) | {key: {} for key in STAND_FIRST}
    for section in sorted(sections, key=_is_outside):  # what is shipped shares some keys; anything else has its own
        if _is_outside(section) and (taken := sorted({*section.content} & {*content, *STAND_LAST})):
            raise UserError(f"section {section.key!r}: {taken[0]} is in the report already; give it another name")
        _merge(content, section.content, section.key)
    _merge(content, {"data": data_of(run)}, "data")
    content["stages"] = [record.as_dict() for record in run.stages.records]
    content["arithmetic"] = words_of(run.config.trainer)
    content["versions"] = versions()
    content["config"] = run.config.model_dump(by_alias=True)
    run.reading.into(content)
    if not texts:
        content["reading"]["examples"], samples = [], None
    content["sections"] = [section.key for section in sections]
    content["title"] = story.title(content) if callable(story.title) else story.title
    verdict = story.verdict(content) if callable(story.verdict) else story.verdict
    content["verdict"] = findings_of(content, sections, verdict)
    warnings, summary = said_of_models(run.stages) + ([] if texts else [TEXTS_LEFT_OUT]), {}
    for section in sections:
        try:
            lines, columns = section.warnings(content), section.summary(content)
            if isinstance(lines, str) or not all(isinstance(line, str) for line in lines):
                raise TypeError("warnings() returned no list of texts")
            warnings += lines
            columns = {heading: _numbers(heading, v) for heading, v in columns.items() if v is not None}
        except Exception as error:
            raise _broken(section, "warnings or summary", error) from error
        if taken := sorted({*columns} & {*summary}):
            raise UserError(f"section {section.key!r}: another has the column {taken[0]!r}; give it another heading")
        summary |= columns
    content["warnings"], content["summary"] = list(dict.fromkeys(warnings)), summary
    return Report(content, sections, predictions, samples)


def findings_of(content: Mapping[str, Any], sections: Sequence[Section], verdict: str = "") -> str:
    """What the method says, then what the sections found; where they alone speak, what their intervals are, too."""
    findings = []
    for section in sections:
        try:
            if not isinstance(sentence := section.finding(content), str):
                raise TypeError(f"finding() returned {type(sentence).__name__}, not text")
        except Exception as error:
            raise _broken(section, "finding", error) from error
        findings += [sentence] if sentence else []
    about = [PROMPTS_ALONE] if findings and not verdict else []
    return " ".join([*([verdict] if verdict else []), *findings, *about])


def _numbers(heading: str, estimate: Mapping[str, float | None] | float) -> dict[str, float | None]:
    """Value, low and high of a column; of a number alone, no interval is known."""
    parts = estimate if isinstance(estimate, Mapping) else {"value": estimate}
    if "value" not in parts:
        raise TypeError(f"column {heading!r} has no value; give {{value, low, high}}")
    for end in ("value", "low", "high"):
        number = parts.get(end)
        if number is not None and not (isinstance(number, Real) and math.isfinite(number)):
            raise TypeError(f"column {heading!r}: its {end} is {number!r}; give a finite number, or None if unknown")
    return {end: None if parts.get(end) is None else float(parts[end]) for end in ("value", "low", "high")}


def _is_outside(section: Section) -> bool:
    return type(section) is Section or not type(section).__module__.startswith("w2sg.")


def _check(sections: Sequence[Section]) -> None:
    """Refuse what is no section, has no key, or holds what JSON cannot."""
    for section in sections:
        if not isinstance(section, Section):
            raise UserError(f"sections: {str(section)[:60]!r} is none; make it a w2sg.reports.section.Section")
        if not section.key:
            raise UserError(f"section {type(section).__qualname__}: give it a key, its name in report.json")
        try:
            json.dumps(section.content, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"section {section.key!r}: report.json cannot hold its content ({error}); give numbers, texts, lists "
                "and dictionaries, and None for what is not known"
            ) from error


def _merge(content: dict[str, Any], more: Mapping[str, Any], key: str, path: str = "") -> None:
    """Add what a section gives; dictionaries are merged, anything else must be said once."""
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(content.setdefault(name, {}), dict):
            _merge(content[name], value, key, f"{path}{name}.")
        elif name in content:
            raise UserError(f"section {key!r}: {path}{name} is in the report already; give it another name")
        else:
            content[name] = value


def heading(run: Any, story: Story) -> dict[str, Any]:
    """What was run."""
    config = run.config
    return {
        "method": config.method["_target_"].rpartition(".")[2],
        "dataset": config.dataset.name,
        "weak": config.weak.name,
        "strong": config.strong.name,
        "parameters": {role: getattr(run, role).parameters for role in ("weak", "strong") if hasattr(run, role)},
        "loss": story.loss,
        "seed": config.seed,
        "command": command(story.verb, *run.typed),
        "unread": unread(config, run.typed),
        "names": dict(story.names),
        "uses_of_splits": dict(story.uses_of_splits),
    }


def said_of_models(stages: Any) -> list[str]:
    """What was found about the models of a run, when they were looked for and when they were loaded."""
    heads = [
        f"{record.name}: its head is {head}"
        for record in stages.records
        if (head := record.info.get("head")) and ":" in head
    ]
    kernels = [
        f"{record.name}: read with attention={name}"
        for record in stages.records
        if (name := record.info.get("attention", "sdpa")) != "sdpa"
    ]
    return list(dict.fromkeys([*stages.notes, *heads, *kernels, *blocks.SAID]))


def versions() -> dict[str, str]:
    """What this ran on."""
    here = {"w2sg": __version__, "python": platform.python_version()}
    here |= {package: importlib.metadata.version(package) for package in PACKAGES}
    if torch.cuda.is_available():
        here["gpu"] = torch.cuda.get_device_name()
    return here
