"""What students are taught, on both axes, before any training."""

from __future__ import annotations

from typing import Any

from w2sg.reports.section import Report, Section
from w2sg.reports.sections.axes import axes_of
from w2sg.reports.words import NONE, estimate, stacked

LABELS = {
    "weak": "weak answers",
    "student": "refined answers",
    "self": "the strong model's own",
    "self_cot": "… step by step",
    "shuffled": "refined, shuffled exemplars",
    "gold_exemplars": "refined, gold exemplars",
    "ceiling": "gold answers",
}


class LabelsBeforeTraining(Section):
    """Labels on both axes and what refinement kept (report.json: ``refinement.labels``, ``retention``, ``counts``)."""

    key, template = "labels_before_training", "labels_before_training.html"

    def show(self, report: Report) -> dict[str, Any]:
        """A row for each kind of label."""
        refinement, rows = report["refinement"], []
        axes = axes_of(refinement)
        for name, measured in refinement["labels"].items():
            cells: list[Any] = [LABELS.get(name, name), f"{measured['questions']:,}", f"{measured['answers']:,}"]
            for axis in axes:
                kept = refinement["retention"].get(axis, {}).get(name, {})
                change, share = kept.get("change", NONE), kept.get("share", NONE)
                cells += [stacked(measured[axis]), stacked(change, 3, True), stacked(share, 0, kind="%")]
            copied = (measured.get(key, NONE) for key in ("copy_rate", "exemplar_copy_rate"))
            rows.append((*cells, *(stacked(rate, 2) for rate in copied)))
        head = ["", "questions", "answers"]
        head += [words for axis in axes for words in (axis, "change from\nweak", "share of\nweak")]
        facts = {"refined answers": refinement["counts"], "contexts": refinement["labels"]["student"].get("exemplars")}
        return {"head": [*head, "copied\nfrom weak", "from an\nexemplar"], "rows": rows, "counts": facts}

    def warnings(self, report: Report) -> list[str]:
        """Labels that lack the concept, copy the weak ones, or had fewer exemplars than were asked for."""
        refinement, lines = report["refinement"], []
        kept = refinement["retention"].get("concept", {}).get("student")
        if kept and kept["change"]["high"] is not None and kept["change"]["high"] < 0:
            share = f", {kept['share']['value']:.0%} of it" if "share" in kept else ""
            lines.append(
                f"the refined labels have less of the concept than the weak ones before any training "
                f"({kept['change']['value']:+.3f}{share}): what they lack no training can bring back"
            )
        copies = refinement["labels"]["student"].get("copy_rate")
        if copies and refinement["kind"] != "none" and copies["value"] > 0.8:
            lines.append(f"refined answers copy the weak ones (copy rate {copies['value']:.2f})")
        shown = refinement["labels"]["student"].get("exemplars")
        if shown and shown["mean"] < shown["asked"]:
            lines.append(
                f"contexts have {shown['mean']:.1f} exemplars on average and {shown['least']} at least, "
                f"{shown['asked']} were asked for: raise strong.max_length, or lower refine.max_new_tokens"
            )
        return lines

    def finding(self, report: Report) -> str:
        """How much of the concept the refined labels have."""
        refinement = report["refinement"]
        if not (kept := refinement["retention"].get("concept", {}).get("student")):
            return ""
        weak, refined = (refinement["labels"][name]["concept"] for name in ("weak", "student"))
        share = f", {kept['share']['value']:.0%} of theirs" if "share" in kept else ""
        return (
            f"Before any training the refined labels have a concept score of {estimate(refined)}{share}; the weak ones "
            f"have {estimate(weak)}."
        )

    def summary(self, report: Report) -> dict[str, Any]:
        """What refinement kept and copied, and how many exemplars it had."""
        refinement = report["refinement"]
        student = refinement.get("labels", {}).get("student", {})
        exemplars = student.get("exemplars")
        return {
            "share of the weak concept in the refined labels": (
                refinement.get("retention", {}).get("concept", {}).get("student", {}).get("share")
            ),
            "copy rate": student.get("copy_rate"),
            "exemplars in a context": exemplars and {"value": exemplars["mean"]},
        }
