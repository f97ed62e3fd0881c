"""Trained models of finished runs, ready to score or to write."""

from __future__ import annotations

from pathlib import Path

from w2sg.api.report import Report
from w2sg.errors import UserError
from w2sg.models import student
from w2sg.models.student import Student


def load_student(
    run: Report | str | Path, system: str | None = None, *, out: str | Path = "outputs", root: str | Path | None = None
) -> Student:
    """A trained model of a run, with ``.model``, ``.tokenizer`` and ``.score(texts)``.

    ``score`` gives [N, C] class logits, or [N, 1] rewards for runs of pairs, in fp32 and without gradients;
    ``label_logits`` gives what predictions.parquet has, of texts or of pairs. A model that writes has no scores.

    Args:
        run: a report, the folder of a finished run, a stage of a store, or a folder that ``w2sg export`` wrote.
        system: which model of the run: ``weak``, ``student``, ``ceiling`` or what else the report names; of a run its
            student if none is given.
        out: the folder of runs, where ``run`` is a stage: their reports say what it is.
        root: a store to look into where the run's own has been moved.

    Raises:
        UserError: the model is not there; the message says what is, or how to make it.
    """
    if isinstance(run, Report):
        run = run.folder
    elif not isinstance(run, str | Path):
        raise UserError(f"load_student: {type(run).__name__} was given; give a report or a folder")
    return student.load_student(run, system, out, root)
