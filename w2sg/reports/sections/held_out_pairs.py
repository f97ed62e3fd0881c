"""Which of the test split's two replies each model's implicit reward prefers."""

from __future__ import annotations

from typing import Any

from w2sg.reports.section import Report
from w2sg.reports.sections.accuracy import Accuracy, accuracy_of


class HeldOutPairs(Accuracy):
    """Accuracy of implicit rewards beta log(π / π_0) (report.json: ``metrics``, ``tests``, ``pgr``)."""

    key, template = "held_out_pairs", "held_out_pairs.html"
    heading = "Held-out preferences"

    def warnings(self, report: Report) -> list[str]:
        """None: what a run of writing models found are its replies."""
        return []

    def summary(self, report: Report) -> dict[str, Any]:
        """The student's accuracy."""
        return {"preference accuracy": accuracy_of(report, "student")}
