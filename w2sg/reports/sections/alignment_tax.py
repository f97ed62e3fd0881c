"""The alignment tax: what a decoder costs on questions that have an answer."""

from __future__ import annotations

from typing import Any

from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.words import p_value, stacked

WAYS = {"decoded": "replies that are the answer", "scored": "the right letter is the likeliest"}


class AlignmentTax(Section):
    """Accuracies of plain samples and of the decoder (report.json: ``decoding.tax``).

    Args:
        tax: what `w2sg.evaluation.alignment_tax.alignment_tax` gives.
    """

    key, template = "alignment_tax", "alignment_tax.html"

    def __init__(self, tax: dict[str, Any] | None = None):
        super().__init__(content={} if tax is None else {"decoding": {"tax": tax}})

    def show(self, report: Report) -> dict[str, Any] | None:
        """A row for each way of measuring."""
        if (tax := report["decoding"].get("tax")) is None:
            return None
        kind, rows = report["decoding"]["decoder"]["kind"], []
        for how, words in WAYS.items():
            if (measured := tax.get(how)) is None:
                continue
            accuracy = measured["accuracy"]
            difference = stacked(measured["difference"], 3, True) if "difference" in measured else "–"
            of_decoder = stacked(accuracy[kind]) if kind in accuracy else "–"
            p = p_value(measured["p"]) if "p" in measured else "–"
            rows.append((words, stacked(accuracy["plain"]), of_decoder, difference, p))
        return {"tax": tax, "name": name_of(report, kind), "rows": rows}

    def warnings(self, report: Report) -> list[str]:
        """Questions that are lost."""
        lines = []
        tax = report["decoding"].get("tax", {})
        for how in WAYS:
            difference = tax.get(how, {}).get("difference")
            if difference and difference["high"] is not None and difference["high"] < 0:
                lines.append(
                    f"alignment tax: {-difference['value']:.3f} [{-difference['high']:.3f}, {-difference['low']:.3f}] "
                    f"of the questions are lost ({tax['kind']}, {how})"
                )
        return lines

    def summary(self, report: Report) -> dict[str, Any]:
        """The difference in accuracy of what is decoded."""
        return {"accuracy − plain on questions": report["decoding"].get("tax", {}).get("decoded", {}).get("difference")}
