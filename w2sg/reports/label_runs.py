"""The report of a method whose models label: its story, and the sections that all of them have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from w2sg.errors import UserError
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.metrics.theory import theorem_conditions
from w2sg.reports.section import Report, Section, Story
from w2sg.reports.sections.accuracy import Accuracy
from w2sg.reports.sections.confidence import Confidence
from w2sg.reports.sections.other_tests import HOME, OtherTests, Predicted
from w2sg.reports.sections.overturned import Overturned
from w2sg.reports.sections.splits import LabelSplits
from w2sg.reports.sections.steps import AccuracyOverSteps
from w2sg.reports.sections.theory import Taught, Teacher, Theory
from w2sg.reports.sections.training import LabelTraining
from w2sg.reports.verdict import verdict
from w2sg.reports.words import loss_name, short

NAMES = {
    "weak": "weak supervisor",
    "student": "strong student",
    "ceiling": "strong ceiling",
    "zero_shot": "strong, untrained",
}
COLUMNS = ("id", "prompt", "label")  # of predictions.parquet, before those of the models
TEXTS = ("prompt_text", "first_text", "second_text", "text", "weak_label")  # after them


def label_story(config: Any) -> Story:
    """Title, verdict and names of a run whose models label."""
    return Story(title, verdict, loss_name(config.loss["_target_"]), NAMES)


def label_sections(
    run: Any,
    predictions: Mapping[str, Tensor],
    taught: tuple[Any, Tensor, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
) -> list[Section]:
    """Accuracy, confidence, the student and its teacher, theory, data and training.

    Args:
        run: of which ``config``, ``data`` and ``stages`` are read.
        predictions: name -> [N, C] logits on the test split, in its order.
        taught: the rows that the student was trained on, the label logits that it saw, and its own.
        notes: facts of the method.
        models: name -> the `w2sg.models.trained.Trained` that predicted; None for what is no single model.
        others: second test sets by name, as `w2sg.reports.sections.other_tests.OtherTests.measure` takes them.
    """
    config, test = run.config, run.data.test
    models = {name: model for name, model in (models or {}).items() if model is not None}
    labels, bootstrap = torch.as_tensor(test.labels), Bootstrap(len(test), clusters=test.clusters)
    seen = None if taught is None else Taught(*taught, noiseless=config.dataset.noise.kind == "none")
    conditions = theorem_conditions(
        loss_name(config.loss["_target_"]), config.strong.train == "head", config.strong.head == "mixture"
    )
    elsewhere = OtherTests.measure({HOME: Predicted(test, predictions), **(others or {})})
    return [
        Accuracy.measure(predictions, labels, bootstrap),
        *([elsewhere] if elsewhere.content else []),
        Confidence.measure(predictions, labels),
        Teacher.measure(predictions, labels, bootstrap, seen),
        Overturned.measure(predictions, test, config.report.texts),
        Theory.measure(predictions, labels, bootstrap, seen, conditions),
        LabelSplits(),
        AccuracyOverSteps.measure(run.stages),
        LabelTraining.measure(config, run.stages, {k: v for k, v in (notes or {}).items() if k != "noise"}, models),
    ]


def check_names(names: Iterable[str], whose: str) -> None:
    """Refuse names of models that are columns of predictions.parquet already.

    Args:
        names: of models. whose: what they were given to, for the message.

    Raises:
        UserError: a name is taken.
    """
    for name in names:
        if name in (*COLUMNS, *TEXTS):
            raise UserError(f"{whose}: {name!r} is a column of predictions.parquet; give the model another name")


def columns_of(test: Any, predictions: Mapping[str, Tensor], texts: bool = True) -> dict[str, list]:
    """Columns of predictions.parquet: a row per test example, its id, a hash of its prompt, its label, each model's
    logits, and `TEXTS`: what the models read, and the class that the weak model chooses.

    C = 2: the logit of the first reply (or class 0); C > 2: all logits.

    Args:
        texts: whether prompts and texts are there.
    """
    columns: dict[str, list] = dict(zip(COLUMNS, (list(test.ids), test.clusters, test.labels.tolist()), strict=True))
    for name, logits in predictions.items():
        columns[name] = (logits[:, 0] - logits[:, 1]).tolist() if logits.shape[1] == 2 else logits.tolist()
    if "weak" in predictions:
        columns["weak_label"] = predictions["weak"].argmax(-1).tolist()
    if texts:
        columns["prompt_text"] = [prompt.text for prompt in test.prompts]
        if test.kind == "pairs":
            for name, second in (("first_text", 0), ("second_text", 1)):
                columns[name] = [t[int(f) ^ second] for t, f in zip(test.texts, test.first, strict=True)]
        else:
            columns["text"] = [text for (text,) in test.texts]
    return columns


def title(report: Report) -> str:
    """What was run, in one line."""
    loss, noise = report["loss"], report["data"].get("label_noise") or {}
    loss = loss if "." in loss else loss.replace("_", " ")
    target = report["config"]["method"]["_target_"]
    what = f"{loss}, seed {report['seed']}"
    if not target.startswith("w2sg."):
        what = f"{target.rpartition('.')[2]}, {what}"
    if noise.get("rows_hit"):
        what += f", {noise['kind']} noise on {noise['rate_applied']:.0%} of labels"
    return f"{short(report['weak'])} supervises {short(report['strong'])} on {report['dataset']}: {what}"
