"""Which model each system is."""

from __future__ import annotations

from typing import Any

from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.words import short


class Identities(Section):
    """Models, revisions and stages of what was trained (report.json: ``refinement.trained``)."""

    key, template = "identities", "identities.html"

    def show(self, report: Report) -> dict[str, Any]:
        """A row for each system."""
        rows = [
            (
                name_of(report, name),
                short(who["model"]),
                who["revision"][:16],
                who["train"] or "not trained",
                who["stage"] or "–",
                "yes" if who["is_the_refiner"] else "NO",
            )
            for name, who in report["refinement"]["trained"].items()
        ]
        return {"rows": rows}

    def warnings(self, report: Report) -> list[str]:
        """Models that did not start from the one that refined."""
        trained = report["refinement"]["trained"]
        strangers = [name for name, who in trained.items() if not who["is_the_refiner"]]
        return [f"trained from another model than the one that refined: {', '.join(strangers)}"] if strangers else []
