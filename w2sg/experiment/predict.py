"""Labels that models give to the rows of a table, trained ones and untrained ones that are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from w2sg.data.labels import Labels
from w2sg.data.loading import Examples, Features
from w2sg.data.table import Table
from w2sg.errors import TrainingError
from w2sg.experiment.asking import as_read, questions_of, scorer_of
from w2sg.experiment.context import Context
from w2sg.experiment.keys import found_key
from w2sg.models.heads import load_head
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.models.zero_shot import answers_key, load_zero_shot, questioned, why_not
from w2sg.store.keys import folder_name
from w2sg.training import foreseen
from w2sg.training.inputs import VERSION, Beside, content_key
from w2sg.training.label_modules import oriented
from w2sg.training.stage_values import values_of
from w2sg.training.stages import ReadJob


def predict(run: Context, model: Trained, table: Table) -> Labels:
    """The model's label logits for every row of a table."""
    labels = _predict(run, model, table)
    if not (questions_of(run, model.source) and run.pairs and model.source.spec.label_tokens.both_orders):
        return labels
    swapped = _predict(run, model, table, swapped=True)
    logits = (labels.logits + swapped.logits.flip(-1)) / 2
    return Labels(table, logits, {**labels.key, "both_orders": swapped.key})


def _predict(run: Context, model: Trained, table: Table, swapped: bool = False) -> Labels:
    reader, read = as_read(run, model.source, table, swapped)
    key: dict[str, Any] = {"version": VERSION, "data": content_key(read)}
    if model.folder is not None:
        key["model"] = model.folder.name
    else:
        key["model"] = found_key(reader, read)
        key["precision"] = run.scoring_precision
        if questions := questions_of(run, model.source):
            key["label_tokens"] = questions.key()
    key |= run.inputs.read(reader, read)
    name = f"{model.name}-on-{table.name}{'-swapped' if swapped else ''}"
    folder = run.stages.read(name, key, lambda: _read_job(run, model, reader, read))
    run.labelled[folder.name] = model
    return replace(_labels(folder, model.name, read), table=table)


def _labels(folder: Path, name: str, table: Table) -> Labels:
    """The scores of a finished reading, joined by id, the first reply in front."""
    scores = values_of(folder, table.ids)
    bad = [i for i, ok in zip(table.ids, torch.isfinite(scores).all(-1).tolist(), strict=True) if not ok]
    if bad:
        raise TrainingError(
            f"{name}: the scores of {len(bad)} examples are not finite, first that of {bad[0]}; train it "
            "with a lower learning rate, clipping, or in float32"
        )
    return Labels(table, oriented(scores, torch.as_tensor(table.first)), {"stage": folder.name})


def zero_shot(run: Context, source: Source, table: Table) -> Labels | None:
    """What the untrained model answers to ``dataset.zero_shot``; None where it has none (the notes say why).

    Where its features of the table were read in this run, the same forward has given the answers (`asked`).
    """
    task = run.config.dataset.zero_shot
    if reason := why_not(source, table, task):
        run.notes["zero_shot"] = f"none: {reason}"
        return None
    run.notes["zero_shot"] = f"{task.question!r}, {' or '.join(map(repr, task.answers))}"
    asking = questioned(table, task.question)
    key = _zero_shot_key(run, source, asking)

    def make() -> ReadJob:
        scorer = load_zero_shot(source, run.pairs, task.answers)
        inputs = run.inputs.tokens(source, asking, scorer)
        examples = Examples(inputs, table.ids, torch.zeros(len(table), dtype=torch.long))
        return ReadJob(scorer, scorer, examples, inputs.notes(source.spec.share_prompt), foreseen=_scores(run, table))

    name = f"zero-shot-on-{table.name}"
    together = run.inputs.read_beside(folder_name(name, key))
    folder = run.stages.read(name, key, make) if together is None else run.stages.copy(name, key, together)
    return _labels(folder, "zero-shot", table)


def _zero_shot_key(run: Context, source: Source, asking: Table) -> dict[str, Any]:
    task = run.config.dataset.zero_shot
    return {
        "version": VERSION,
        "model": found_key(source, asking),
        "answers": task.answers,
        "question": task.question,
        "data": content_key(asking),
        "precision": run.scoring_precision,
        **answers_key(source, task.answers),
        **run.inputs.read(source, asking),
    }


def asked(run: Context, source: Source, table: Table) -> Beside | None:
    """The strong model's zero-shot answers on test, which every report has, to be read with its features of these rows.

    None where it has none, or where they are in the store.
    """
    task = run.config.dataset.zero_shot
    if source is not run.strong or table is not run.data.test or why_not(source, table, task):
        return None
    asking = questioned(table, task.question)
    stage = folder_name(f"zero-shot-on-{table.name}", _zero_shot_key(run, source, asking))
    if run.devices.first((run.stages.store.root / stage).is_dir):
        return None
    return Beside(stage, asking, lambda: load_zero_shot(source, run.pairs, task.answers))


def _read_job(run: Context, model: Trained, reader: Source, table: Table) -> ReadJob:
    notes: dict[str, Any] = {}
    if model.layer is not None:
        scorer = load_head(model.saved)
        inputs = Features(run.inputs.features(model.source, table, model.layer, asked(run, model.source, table)))
    else:
        scorer = scorer_of(run, model.source, model.saved, as_it_is=model.folder is None)
        inputs = run.inputs.tokens(reader, table, scorer)
        notes |= inputs.notes(model.source.spec.share_prompt)
    examples = Examples(inputs, table.ids, torch.zeros(len(table), dtype=torch.long))
    return ReadJob(scorer, scorer, examples, notes, foreseen=_scores(run, table))


def _scores(run: Context, table: Table) -> Callable[[], foreseen.Foreseen]:
    """What a plan takes for scores: one for each text of a pair, or one for each class."""
    return partial(foreseen.numbers, len(table), len(table.texts[0]) if table.kind == "pairs" else table.classes)
