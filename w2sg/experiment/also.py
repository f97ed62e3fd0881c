"""What a run's models predict on second test sets."""

from __future__ import annotations

from collections.abc import Mapping

from w2sg.data.labels import Labels
from w2sg.experiment.context import Context
from w2sg.experiment.predict import predict, zero_shot
from w2sg.reports.sections.other_tests import Predicted


def on_other_tests(run: Context, predictions: Mapping[str, Labels]) -> dict[str, Predicted]:
    """The models behind predictions of the test split, on every other test set; what is no single model is left out."""
    sets = {}
    for name, table in run.data.also.items():
        logits = {}
        for system, labels in predictions.items():
            model = run.labelled.get(labels.key.get("stage"))
            if model is not None:
                logits[system] = predict(run, model, table).logits
            elif system == "zero_shot" and (untrained := zero_shot(run, run.strong, table)) is not None:
                logits[system] = untrained.logits
        sets[name] = Predicted(table, logits)
    return sets
