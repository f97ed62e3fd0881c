"""Test rows on which the student overturns its teacher, rightly and wrongly, with their texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from w2sg.metrics import labels as metrics
from w2sg.reports.section import Report, Section
from w2sg.reports.words import Cell

EACH, SHOWN, PROMPT = 3, 700, 400  # rows of a kind; characters of a text, and of a prompt
CELLS = ("both right", "student alone right", "teacher alone right", "both wrong")


class Overturned(Section):
    """Counts of who is right, and a few rows of two kinds (report.json: ``overturned``)."""

    key, template = "overturned", "overturned.html"

    @classmethod
    def measure(cls, predictions: Mapping[str, Tensor], test: Any, texts: bool = True) -> Overturned:
        """From what models predict of the test split.

        Args:
            predictions: name -> [N, C] logits, of which ``weak`` and ``student`` are read.
            test: the table. texts: whether rows are shown.
        """
        if not {"weak", "student"} <= predictions.keys():
            return cls()
        weak, student = predictions["weak"], predictions["student"]
        labels = torch.as_tensor(test.labels)
        t, s = (metrics.correct(logits, labels) for logits in (weak, student))
        kinds = dict(zip(CELLS, (s & t, s & ~t, ~s & t, ~s & ~t), strict=True))
        content: dict[str, Any] = {"rows": {name: int(rows.sum()) for name, rows in kinds.items()}}
        if texts:
            order = sorted(range(len(test)), key=lambda k: test.ids[k])
            chance = [logits.softmax(-1) for logits in (weak, student)]
            for name in CELLS[1:3]:
                shown = [k for k in order if kinds[name][k]][:EACH]
                content[name.replace(" ", "_")] = [_row(test, k, *chance) for k in shown]
        return cls(content={"overturned": content})

    def show(self, report: Report) -> dict[str, Any] | None:
        """The counts, and a fold for each kind."""
        content = report.get("overturned")
        if not content:
            return None
        total = sum(content["rows"].values())
        counts = [(name, f"{count:,}", f"{count / max(total, 1):.1%}") for name, count in content["rows"].items()]
        folds = []
        for name, words in ((CELLS[1], "the student is right"), (CELLS[2], "the teacher is right")):
            rows = content.get(name.replace(" ", "_"))
            if rows:
                folds.append((words, len(rows), content["rows"][name], [(r["prompt"], _table(r)) for r in rows]))
        return {"counts": counts, "folds": folds, "texts": len(content) > 1}


def _row(test: Any, k: int, weak: Tensor, student: Tensor) -> dict[str, Any]:
    prompt, pairs = test.prompts[k].text, test.kind == "pairs"
    texts = list(test.texts[k]) if not pairs else [test.texts[k][j] for j in (test.first[k], 1 - test.first[k])]
    own = [text[len(prompt) :] if pairs and text.startswith(prompt) else text for text in texts]
    return {
        "id": test.ids[k],
        "prompt": cut(prompt.strip(), PROMPT) if pairs else "",
        "texts": [cut(text.strip(), SHOWN) for text in own],
        "label": int(test.labels[k]),
        "weak": [round(float(p), 4) for p in weak[k]],
        "student": [round(float(p), 4) for p in student[k]],
    }


def cut(text: str, most: int) -> str:
    """A text without its middle, where it is longer; says how much is left out."""
    if len(text) <= most:
        return text
    half, lost = most // 2, len(text) - most
    return f"{text[:half]} [... {lost:,} characters left out ...] {text[half + lost :]}"


def _table(row: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """A pair: a line for each reply. A text: a line for it, with the classes that were chosen."""
    weak, student, label = row["weak"], row["student"], row["label"]
    if len(row["texts"]) == 2:
        return [
            (Cell("better" if k == label else "worse"), f"{weak[k]:.0%}", f"{student[k]:.0%}", Cell(text, kind="said"))
            for k, text in enumerate(row["texts"])
        ]
    chosen = [f"{p.index(max(p))} ({max(p):.0%})" for p in (weak, student)]
    return [(f"class {label}", *chosen, Cell(row["texts"][0], kind="said"))]
