"""What systems answered to a few prompts, and a few refined labels beside the weak ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.words import Cell

SHOWN_OF_LABEL = ("prompt", "weak_answer", "refined", "source", "used", "concept", "copy_rate", "concept_score")


class Answers(Section):
    """The first test prompts and the first labels (report.json: ``refinement.examples``).

    Args:
        prompts: texts. answers: of each system, in their order. labels: rows of refined.parquet.
    """

    key, template, texts = "answers", "answers.html", True

    def __init__(
        self,
        prompts: Sequence[str] = (),
        answers: Mapping[str, Sequence[str]] | None = None,
        labels: Sequence[Mapping[str, Any]] = (),
    ):
        test = [
            {"prompt": prompt, "answers": {name: texts[k] for name, texts in (answers or {}).items()}}
            for k, prompt in enumerate(prompts)
        ]
        shown = [{key: row.get(key) for key in SHOWN_OF_LABEL} for row in labels]
        super().__init__(content={"refinement": {"examples": [{"test": test, "labels": shown}]}})

    def show(self, report: Report) -> dict[str, Any]:
        """A table for each prompt, and one of the labels."""
        (part,) = report["refinement"]["examples"]
        examples = [
            (
                example["prompt"].strip(),
                [(name_of(report, name), Cell(text, kind="said")) for name, text in example["answers"].items()],
            )
            for example in part["test"]
        ]
        labels = []
        for row in part["labels"]:
            concept = f"concept: {row['concept']}" if row.get("concept") else ""
            marks = f"{row['source']}{'' if row['used'] else ', refused'}"
            both = Cell(row["weak_answer"], row["refined"], "said")
            labels.append((Cell(row["prompt"].strip()[:200], concept), marks, both))
        return {"examples": examples, "labels": labels}
