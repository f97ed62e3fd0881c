"""What a run of label models found, in plain words: the first sentence is the answer, those after it say why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from w2sg.metrics.intervals import MCNEMAR
from w2sg.reports.section import Report
from w2sg.reports.sections.accuracy import test_name
from w2sg.reports.sections.splits import tested
from w2sg.reports.words import LEVEL, estimate, number, p_text


def verdict(report: Report) -> str:
    """The finding; empty where weak model, student or ceiling was not measured.

    The cases, in this order: the ceiling is worse than the teacher; their gap is not resolved; the student is worse
    than its teacher; its gain is not resolved; its gain is resolved. The last depends on the untrained model: where it
    is as good as the student, the gain may not come from the teacher.
    """
    if not {"weak", "student", "ceiling"} <= report["metrics"].keys():
        return ""
    return " ".join(filter(None, (_answer(report), _gap(report), _untrained(report), _scope(report))))


def _accuracy(report: Report, name: str) -> str:
    return number(report["metrics"][name]["accuracy"])


def _side(test: Mapping[str, Any]) -> int:
    """1 where the student is better, -1 where it is worse, 0 where the test does not tell."""
    return 0 if test["p"] >= LEVEL else 1 if test["difference"] > 0 else -1


def _answer(report: Report) -> str:
    gain, pgr = report["tests"]["student - weak"], report["pgr"]
    side, untrained = _side(gain), report["tests"].get("student - zero_shot")
    if not pgr["resolved"]:
        if pgr["gap_high"] is not None and pgr["gap_high"] < 0:
            answer = "Weak-to-strong generalization cannot be judged, because the ceiling is worse than the teacher"
        else:
            answer = "Weak-to-strong generalization cannot be judged, because the gap to the ceiling is not resolved"
    elif side < 0:
        answer = "Weak-to-strong generalization failed: the student is worse than its teacher"
    elif side == 0:
        answer = "Weak-to-strong generalization was not seen: the student's gain over its teacher is not resolved"
    elif untrained is None or _side(untrained) > 0:
        answer = "Weak-to-strong generalization worked: the student is better than its teacher"
    else:
        answer = "The student is better than its teacher, but it may not have learned this from its teacher"
    loss = f", trained by {report['loss']}," if "." in report["loss"] else ""
    student, weak = _accuracy(report, "student"), _accuracy(report, "weak")
    compared = f"has {student} against its teacher's {weak}"
    if not pgr["resolved"]:  # then the answer has not said it
        how = {1: "better than", 0: "not distinguishable from", -1: "worse than"}[side]
        compared = f"is {how} its teacher: {student} against {weak}"
    numbers = (
        f"On {tested(report['data'])}, the student{loss} {compared}, a difference of "
        f"{estimate({**gain, 'value': gain['difference']}, sign=True)} ({test_name(gain)}, p {p_text(gain['p'])})."
    )
    return f"{answer}. {numbers}"


def _gap(report: Report) -> str:
    pgr = report["pgr"]
    gap = estimate({"value": pgr["gap"], "low": pgr["gap_low"], "high": pgr["gap_high"]}, sign=True)
    if not pgr["resolved"]:
        return f"The gap from teacher to ceiling is {gap}, so no PGR is claimed."
    return f"The gap from teacher to ceiling is {gap}, and the student recovers {estimate(pgr, 2)} of it (PGR)."


def _untrained(report: Report) -> str:
    untrained = report["tests"].get("student - zero_shot")
    if untrained is None:
        return "Whether the strong model knew the answers before any training was not measured."
    alone = f"The strong model without any training has {_accuracy(report, 'zero_shot')}"
    side = _side(untrained)
    if side > 0:
        return f"{alone}, less than the student, so what it already knew does not explain the student's answers."
    if side < 0:
        return f"{alone}, more than the student: it already knew more than the student shows."
    return f"{alone}, not distinguishable from the student: it may already have known what the student can do."


def _scope(report: Report) -> str:
    over = "rows" if test_name(report["tests"]["student - weak"]) == MCNEMAR else "prompts"
    return f"One run: intervals are over test {over} alone; other seeds and training rows add to them."
