"""Test prompts on which the trained student, or a decoder, wins and loses against what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.sections.overturned import EACH, PROMPT, SHOWN, cut
from w2sg.reports.words import Cell

KINDS = ("won", "lost")


class WonAndLost(Section):
    """Counts of verdicts, and a few prompts of both kinds (report.json: ``won_and_lost``)."""

    key, template, texts = "won_and_lost", "won_and_lost.html", True

    @classmethod
    def measure(cls, systems: tuple[str, str], preferred: np.ndarray, mine: Any, theirs: Any) -> WonAndLost:
        """From the replies of two systems to the same prompts.

        Args:
            systems: the one that the run is about, and the other.
            preferred: [N] how far each reply of the first is preferred, from 0 to 1; NaN for none.
            mine, theirs: their `w2sg.data.replies.Replies`; those of the other are joined by the prompt's id.
        """
        place = {i: k for k, i in enumerate(theirs.ids)}
        rows = {
            "won": np.flatnonzero(preferred > 0.5),
            "tied": np.flatnonzero(preferred == 0.5),
            "lost": np.flatnonzero(preferred < 0.5),
            "without a verdict": np.flatnonzero(np.isnan(preferred)),
        }
        content: dict[str, Any] = {"systems": list(systems), "prompts": {kind: len(k) for kind, k in rows.items()}}
        for kind in KINDS:
            shown = sorted((k for k in rows[kind] if mine.ids[k] in place), key=lambda k: mine.ids[k])[:EACH]
            content[kind] = [
                {
                    "id": mine.ids[k],
                    "prompt": cut(mine.prompts[k].text.strip(), PROMPT),
                    "replies": [
                        cut(mine.texts[k].strip(), SHOWN),
                        cut(theirs.texts[place[mine.ids[k]]].strip(), SHOWN),
                    ],
                    "preferred": round(float(preferred[k]), 4),
                }
                for k in shown
            ]
        return cls(content={"won_and_lost": content})

    def show(self, report: Report) -> dict[str, Any] | None:
        """The counts, and a fold for each kind."""
        content = report.get("won_and_lost")
        if not content:
            return None
        names = [name_of(report, system) for system in content["systems"]]
        folds = []
        for kind in KINDS:
            rows = [(row["prompt"], _table(names, row["replies"])) for row in content[kind]]
            if rows:
                folds.append((kind, len(rows), content["prompts"][kind], rows))
        counts = [(kind, f"{count:,}") for kind, count in content["prompts"].items()]
        return {"names": names, "counts": counts, "folds": folds}


def _table(names: Sequence[str], replies: Sequence[str]) -> list[tuple[Any, ...]]:
    return [(name, Cell(text, kind="said")) for name, text in zip(names, replies, strict=True)]
