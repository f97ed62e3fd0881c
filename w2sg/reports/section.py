"""What a report is made of: a story that the method tells, and sections that own their numbers, words and warnings.

Every showing method of a section is a function of the whole report alone, which is what report.json holds. So a page, a
warning or a row of `evaluate.py runs=` needs no model, and an old report can be shown again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from w2sg.reports.render import render

Report = Mapping[str, Any]  # what report.json holds
Estimate = Mapping[str, float | None]  # value, and perhaps low and high: the ends of its 95 % interval


@dataclass(frozen=True)
class Story:
    """What a method says of a run as a whole.

    Args:
        title: one line; a function of the report where it needs numbers.
        verdict: the finding in two or three sentences, likewise; what the sections found follows it.
        loss: which objective was compared, in a word. names: systems in words, as "cong_s" is "ConG-S".
        uses_of_splits: what each split was used for, as {"test": "prompts that all systems answered"}.
        verb: which command was typed, train or decode.
    """

    title: str | Callable[[Report], str]
    verdict: str | Callable[[Report], str] = ""
    loss: str = "none"
    names: Mapping[str, str] = field(default_factory=dict)
    uses_of_splits: Mapping[str, str] = field(default_factory=dict)
    verb: str = "train"


class Section:
    """One part of a report: numbers, and how they are shown.

    Give the numbers and a template, or make a subclass that gives any of the methods below.

    Args:
        key: its name in report.json's list of sections.
        content: what it adds to report.json, by top-level key; dictionaries of several sections are merged.
        template: a Jinja2 template, or the name of a file in w2sg/reports/templates. It sees ``report`` and what `show`
            gives. Nothing is shown where it is empty.
        warnings: what a reader must know before believing a number.
        texts: whether it shows texts of the data or of models, and nothing without them; `report.texts=false` drops it.
        summary: its columns in `evaluate.py runs=`, {heading: {value, low, high}}, the most telling first.

    Example:
        >>> section = Section("words", {"words": {"mean": 7.5}}, "<h2>Words</h2><p>{{ report.words.mean }}</p>")
        >>> print(section.html(section.content))
        <h2>Words</h2><p>7.5</p>
    """

    key = ""
    template = ""
    texts = False

    def __init__(
        self,
        key: str | None = None,
        content: Mapping[str, Any] | None = None,
        template: str | None = None,
        warnings: Sequence[str] = (),
        summary: Mapping[str, Estimate] | None = None,
    ):
        self.key = self.key if key is None else key
        self.content = dict(content or {})
        self.template = self.template if template is None else template
        self._warnings, self._summary = list(warnings), dict(summary or {})

    def show(self, report: Report) -> Mapping[str, Any] | None:
        """What the template puts in besides ``report``; None where this report has nothing to show."""
        return {}

    def html(self, report: Report) -> str:
        """Its part of the page, HTML; empty where there is nothing to show."""
        values = self.show(report) if self.template else None
        return "" if values is None else render(self.template, report=report, **values)

    def warnings(self, report: Report) -> list[str]:
        """What a reader must know before believing a number, a sentence each."""
        return self._warnings

    def finding(self, report: Report) -> str:
        """Its part of the verdict, in a sentence or two."""
        return ""

    def summary(self, report: Report) -> Mapping[str, Estimate | None]:
        """Its columns in `evaluate.py runs=`; what is None was not measured."""
        return self._summary

    def table(self, report: Report) -> Any:
        """What the terminal shows, a `rich` renderable; None for nothing."""
        return None


def name_of(report: Report, system: str) -> str:
    """A system in the words of the run's method."""
    return report.get("names", {}).get(system, system)
