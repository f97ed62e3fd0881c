"""Who judged the replies, how often that judge agrees with people, and what else to know of its opinion."""

from __future__ import annotations

from typing import Any

from w2sg.reports.section import Report, Section
from w2sg.reports.words import position_warning


class JudgeFacts(Section):
    """The judge on the test split's own pairs (report.json: ``judge`` within what the run measured).

    Args:
        root: the top-level key that holds it, as "text".
        judge: what `w2sg.judges.base.Judge.accuracy` says and ``notes``; None where there is no judge.
        on_replies: what its verdicts on replies say about it, where it gives no rewards.
    """

    key, template = "judge", "judge.html"

    def __init__(self, root: str, judge: dict[str, Any] | None = None, on_replies: dict[str, Any] | None = None):
        super().__init__(content={root: {"judge": judge}} if judge else {})
        self.root, self.on_replies = root, on_replies

    def show(self, report: Report) -> dict[str, Any] | None:
        """Its accuracy, and how it goes by length and by position."""
        judge = report[self.root].get("judge")
        if judge is None:
            return None
        how = {True: "trained here on the transfer split's pairs", False: "used as it is"}.get(judge.get("trained"), "")
        return {"judge": judge, "how": how, "seen": judge.get("on_test_pairs")}

    def warnings(self, report: Report) -> list[str]:
        """A judge that is no better than a coin, prefers a position, or does not understand the question."""
        judge = report[self.root].get("judge")
        if judge is None:
            return []
        lines = list(judge.get("notes", []))
        lines += position_warning(self.on_replies or judge.get("on_test_pairs", {}))
        if judge["accuracy"]["low"] is not None and judge["accuracy"]["low"] <= 0.5:
            opinion = "rewards and win rates" if judge.get("gives_rewards", True) else "win rates"
            lines.append(
                f"the judge cannot be told from a coin on the test split's own pairs, so its {opinion} say little"
            )
        return lines
