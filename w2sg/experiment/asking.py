"""Rows as a model of labels reads them: as they are, or as questions for one that answers with a label token."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from w2sg.data.table import Table
from w2sg.experiment.context import Context
from w2sg.models.label_questions import Questions
from w2sg.models.label_tokens import load_label_tokens
from w2sg.models.scorer import load_scorer
from w2sg.models.source import Source


def questions_of(run: Context, source: Source) -> Questions | None:
    """How a model is asked for labels; None where it reads texts as they are."""
    if source.spec.head != "label_tokens":
        return None
    if id(source) not in run.questions:  # a model of a run is one object, which its questions keep
        run.questions[id(source)] = Questions(source, run.pairs, run.classes)
    return run.questions[id(source)]


def as_read(run: Context, source: Source, table: Table, swapped: bool = False) -> tuple[Source, Table]:
    """A model and rows, as it reads them.

    Args:
        swapped: pairs with the second reply in front, where both are in one question.
    """
    questions = questions_of(run, source)
    return (source, table) if questions is None else (questions.reader, questions.table(table, swapped))


def scorer_of(run: Context, source: Source, saved: Path | None = None, as_it_is: bool = False) -> nn.Module:
    """The token-reading model of a role: pretrained, from a finished stage, or ``as_it_is`` with its own head."""
    questions = questions_of(run, source)
    if questions is None:
        return load_scorer(source, run.pairs, run.classes, saved, as_it_is=as_it_is)
    return load_label_tokens(questions, saved, trainable=saved is None and not as_it_is)
