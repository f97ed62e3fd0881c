"""Training on the most confident weak labels, and perhaps on the rest after relabelling."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from w2sg.data.labels import Labels
from w2sg.data.table import uniform
from w2sg.methods import checks

if TYPE_CHECKING:
    from w2sg.config.schema import TrainConfig
    from w2sg.experiment.run import Run
    from w2sg.reports.assemble import Report


def problems(config: TrainConfig) -> list[str]:
    """Conflicts between this method's options and the rest of the configuration."""
    problems = checks.label_problems(config)
    method = config.method
    if method["score"] == "zero_shot" and config.dataset.zero_shot is None:
        problems.append("method.score: zero_shot asks the strong model, but dataset.zero_shot says no question; set it")
    if method["recycle"] == "none" and method["recycled"] != 1.0:
        problems.append("method.recycled: read only where the dropped rows are recycled; set it to 1.0")
    return problems


def filtered(
    run: Run,
    score: Literal["confidence", "zero_shot"] = "confidence",
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    balanced: bool = True,
    recycle: Literal["none", "student"] = "none",
    recycled: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ceiling_split: Literal["transfer", "weak_train"] = "transfer",
) -> Report:
    """Train the strong model on the weak labels with the highest score, and perhaps again on all rows.

    Filtering narrows what is covered. So with ``recycle="student"`` the student of the kept rows relabels the dropped
    ones, and a fresh strong model learns both (arXiv 2503.04249). There are two baselines. `direct` learns all weak
    labels. `random_rows` learns a random subset of equal size, which separates the effect of selection from the effect
    of having fewer rows.

    Args:
        score: confidence of the weak label | zero_shot: the untrained strong model's probability of it.
        keep: share of the rows that is kept.
        balanced: keep the same share of each label.
        recycle: none drops the other rows | student relabels them by the student of the kept ones, and they are learned
            too.
        recycled: recycle=student: share of the dropped rows to learn, those on which the student is most confident.
        ceiling_split: split whose ground truth trains the ceiling: transfer or weak_train, as in method=finetune.
    """
    data, transfer = run.data, run.data.transfer
    weak = run.fit("weak", run.weak, data.ground_truth, run.gold(data.ground_truth))
    labels = run.noisy(run.predict(weak, transfer))
    scores = scores_of(run, labels, score)
    kept = best(scores, labels.logits.argmax(-1).numpy(), transfer.ids, keep, balanced)
    learn = partial(run.fit, source=run.strong, table=transfer, loss=run.loss, like="student")
    student = first = learn("kept-rows", labels=labels, rows=kept)
    taught, rows = labels, kept
    if recycle == "student":
        taught, rows = relabelled(labels, run.predict(first, transfer), kept, recycled)
        student = learn("recycled", labels=taught, rows=rows)
    drawn = np.array([uniform(run.config.seed, "random rows", i) for i in transfer.ids])
    random = np.sort(np.argsort(drawn, kind="stable")[: len(kept)])
    systems = {
        "direct": run.fit("student", run.strong, transfer, labels, loss=run.loss),
        "random_rows": learn("random-rows", labels=labels, rows=random),
    }
    if recycle != "none":
        systems["kept_rows"] = first
    ceiling = run.ceiling(ceiling_split)
    right = labels.logits.argmax(-1).numpy() == transfer.labels
    after = taught.logits.argmax(-1).numpy() == transfer.labels
    return run.report(
        weak=run.predict(weak, data.test),
        student=run.predict(student, data.test),
        **{name: run.predict(model, data.test) for name, model in systems.items()},
        ceiling=run.predict(ceiling, data.test),
        taught=(taught.take(rows), run.predict(student, transfer).take(rows)),
        notes={
            "ceiling_split": ceiling_split,
            "filter": {
                "kept": len(kept),
                "rows": len(transfer),
                "label_accuracy": float(right.mean()),
                "label_accuracy_kept": float(right[kept].mean()),
                "label_accuracy_taught": float(after[rows].mean()),
            },
        },
    )


def scores_of(run: Run, labels: Labels, score: str) -> np.ndarray:
    """[N] confidence in each weak label, without using ground truth."""
    probabilities = labels.logits.double().softmax(-1)
    if score == "confidence":
        return probabilities.amax(-1).numpy()
    from w2sg.errors import UserError

    zero_shot = run.zero_shot(run.strong, labels.table)
    if zero_shot is None:
        raise UserError(f"method.score: the strong model has no zero-shot answer here ({run.notes['zero_shot']})")
    strong = zero_shot.logits.double().softmax(-1)
    return strong.gather(1, labels.logits.argmax(-1)[:, None])[:, 0].numpy()


def best(scores: np.ndarray, labels: np.ndarray, ids: list[str], keep: float, balanced: bool) -> np.ndarray:
    """Row numbers with the best scores, sorted; the same share of each label if ``balanced``. Ties go by id."""
    rank = np.argsort(np.argsort(ids, kind="stable"))
    chosen = []
    for label in np.unique(labels) if balanced else [None]:
        rows = np.arange(len(scores)) if label is None else np.flatnonzero(labels == label)
        order = rows[np.lexsort((rank[rows], -scores[rows]))]
        chosen.append(order[: max(1, round(keep * len(rows)))])
    return np.sort(np.concatenate(chosen))


def relabelled(labels: Labels, student: Labels, kept: np.ndarray, part: float) -> tuple[Labels, np.ndarray]:
    """Replace the weak labels of dropped rows by the student's, and choose the rows to learn.

    Args:
        labels: weak labels of all rows.
        student: the student's labels of all rows.
        kept: row numbers that the student learned.
        part: share of the dropped rows to learn, by the student's confidence.

    Returns:
        Labels of all rows, and the numbers of the rows to learn.
    """
    dropped = np.setdiff1d(np.arange(len(labels.table)), kept)
    sure = student.logits.double().softmax(-1).amax(-1).numpy()[dropped]
    ids = [labels.table.ids[row] for row in dropped]
    taken = dropped[best(sure, np.zeros(len(dropped)), ids, part, False)] if len(dropped) else dropped
    logits = labels.logits.clone()
    logits[torch.from_numpy(dropped)] = student.logits[torch.from_numpy(dropped)].to(logits.dtype)
    key = {"weak": labels.key, "student": student.key}  # the student's key already says which rows were kept
    return Labels(labels.table, logits, key), np.sort(np.concatenate([kept, taken]))
