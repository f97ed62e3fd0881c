"""Where the strong model took over from a draft of a small one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from w2sg.reports.colours import COLOURS
from w2sg.reports.figures import new_figure, svg
from w2sg.reports.section import Report, Section
from w2sg.reports.words import counted

FATES = {
    "reached": "the strong model took over",
    "complete": "the draft came to its end first",
    "longest": "the draft reached its longest",
}


class Draft(Section):
    """How much of the drafts was kept, and why they ended (report.json: ``decoding.switch``)."""

    key, template = "draft", "draft.html"

    @classmethod
    def measure(cls, kept: np.ndarray, lengths: np.ndarray, fates: list[str]) -> Draft:
        """From [N] tokens of each draft that were kept, [N] tokens of each reply, and why each draft ended."""
        switch = {
            "kept": kept.tolist(),
            "share": float(kept.sum() / max(lengths.sum(), 1)),
            "fates": {fate: fates.count(fate) for fate in FATES},
        }
        return cls(content={"decoding": {"switch": switch}})

    def show(self, report: Report) -> dict[str, Any]:
        """A histogram and the counts."""
        switch = report["decoding"]["switch"]
        figure, axis = new_figure(5.2, 2.3)
        kept = np.array(switch["kept"])
        axis.hist(kept, bins=min(30, max(int(kept.max()) + 1, 2)), color=COLOURS["student"])
        axis.set_xlabel("tokens of the draft that were kept", fontsize=8)
        axis.set_ylabel("replies", fontsize=8)
        counts = {FATES[fate]: counted(count, "replies") for fate, count in switch["fates"].items()}
        counts |= {"share drafted": f"{switch['share']:.0%}"}
        words = f"tokens of the draft that were kept, of {counted(len(kept), 'replies')}: median {np.median(kept):.0f}"
        return {
            "figure": svg(figure, words, (("tokens kept", "replies"), sorted(Counter(switch["kept"]).items()))),
            "counts": counts,
        }
