"""What models read, and where the numbers came from: stages, versions and configuration."""

from __future__ import annotations

from typing import Any

from w2sg.reports.section import Report, Section


class Reading(Section):
    """Texts as the models read them, and the shares that lose their start (report.json: ``reading``)."""

    key, template = "reading", "reading.html"

    def show(self, report: Report) -> dict[str, Any] | None:
        """Rows of the table of what is cut; None for older reports."""
        reading = report.get("reading")
        if not reading or not (reading["cut"] or reading["examples"]):
            return None
        rows = [
            (
                part["model"],
                part["split"].replace("_", " "),
                f"{part['max_length']:,}",
                f"{part['texts']:,}",
                f"{part['cut']:,} ({part['cut'] / max(part['texts'], 1):.1%})",
                f"{part['alike']:,}" if part["alike"] else "–",
            )
            for part in reading["cut"]
        ]
        return {"rows": rows}


class Provenance(Section):
    """Stages with their keys and seconds, in which numbers was computed, versions, configuration (``stages``,
    ``arithmetic``, ``versions``, ``config``).
    """

    key, template = "provenance", "provenance.html"

    def show(self, report: Report) -> dict[str, Any]:
        """Rows of the table of stages, and the configuration as YAML."""
        from omegaconf import OmegaConf

        rows = [
            (
                stage["name"],
                stage["key"].rpartition("-")[2],
                "from the store" if stage["cached"] else "computed",
                f"{stage['seconds']:,.1f}",
                f"{stage['tokens']:,}" if stage["tokens"] else "–",
                "–" if stage["useful_token_fraction"] is None else f"{stage['useful_token_fraction']:.1%}",
            )
            for stage in report["stages"]
        ]
        spent, saved = (
            sum(s["seconds"] for s in report["stages"] if s["cached"] == cached) for cached in (False, True)
        )
        return {
            "rows": rows,
            "spent": f"{spent:,.1f}",
            "saved": f"{saved:,.1f}",
            "config": OmegaConf.to_yaml(OmegaConf.create(report["config"])),
        }
