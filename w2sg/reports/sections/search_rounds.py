"""A few searches, chunk by chunk."""

from __future__ import annotations

from typing import Any

from w2sg.reports.section import Report, Section
from w2sg.reports.words import Cell


class SearchRounds(Section):
    """Every hypothesis of every round (report.json: ``decoding.traces``).

    Args:
        traces: of a few prompts, as `w2sg.experiment.decode.Decoders.traces` gives them.
    """

    key, template, texts = "search_rounds", "search_rounds.html", True

    def __init__(self, traces: list[dict[str, Any]] | None = None):
        super().__init__(content={"decoding": {"traces": traces or []}})

    def show(self, report: Report) -> dict[str, Any] | None:
        """Rounds as tables, the best hypothesis first."""
        traces = report["decoding"].get("traces")
        if not traces:
            return None
        return {"traces": [(trace, [_round(hypotheses) for hypotheses in trace["rounds"]]) for trace in traces]}


def _round(hypotheses: list[dict[str, Any]]) -> list[tuple[str, Cell]]:
    rows = []
    for h in sorted(hypotheses, key=lambda h: -h["value"]):
        kind = "said kept" if h["kept"] else "said dropped"
        text = f"{h['chunk']}{' ▪' if h['finished'] else ''}"
        rows.append((f"{h['value']:+.3f}", Cell(text, kind=kind, first=h["before"], first_kind="before")))
    return rows
