"""The data: which split is for what, what splits share, and what length alone achieves."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from w2sg.data import audit
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports.colours import COLOURS, INK, NOTE, PAPER
from w2sg.reports.figures import new_figure, svg
from w2sg.reports.section import Report, Section
from w2sg.reports.words import counted, overlap_warning


def data_of(run: Any) -> dict[str, Any]:
    """Facts of a run's data: sizes, overlaps, balance, noise, and the accuracy of choosing by length.

    Questions with answers have no labels, so of them there are sizes and overlaps alone.
    """
    data = run.data
    splits = {name: getattr(data, name) for name in ("ground_truth", "transfer", "test")}
    if data.test.kind == "answers":
        sizes = {name: len(table) for name, table in splits.items()}
        return {"sizes": sizes, "overlaps": audit.overlaps(splits), **data.report}
    rule, credit = audit.length_rule(data.ground_truth, data.test)
    length = Bootstrap(len(data.test), clusters=data.test.clusters).share(credit)
    return {
        **audit.summary(data),
        "length_only": {"rule": rule, "accuracy": length.value, "low": length.low, "high": length.high},
        "label_noise": run.notes.get("noise", {}),
    }


def tested(data: dict[str, Any]) -> str:
    """How many test rows there are, and of how many prompts."""
    within = data.get("prompts_within_test", {})
    of = f" of {counted(within['prompts'], 'prompts')}" if within and within["prompts"] < within["rows"] else ""
    return f"{counted(data['sizes']['test'], 'test rows')}{of}"


class Splits(Section):
    """Splits and what each is for (report.json: ``data``, ``uses_of_splits``)."""

    key, template = "data", "splits.html"

    def show(self, report: Report) -> dict[str, Any]:
        """Sizes with uses, then everything else."""
        uses, sizes = report.get("uses_of_splits", {}), report["data"]["sizes"]
        splits = {n: f"{counted(size, 'rows')}{f'; {uses[n]}' if n in uses else ''}" for n, size in sizes.items()}
        return {"rows": splits | {k: v for k, v in report["data"].items() if k != "sizes"}, "figure": ""}

    def warnings(self, report: Report) -> list[str]:
        """Rows that share their prompt, within test and between splits; what reading the data found."""
        lines, data = [], report["data"]
        within = data.get("prompts_within_test")
        if within and within["prompts"] < within["rows"]:
            lines.append(
                f"{within['rows that share a prompt']:,} of {within['rows']:,} test rows share their prompt with "
                f"others ({counted(within['prompts'], 'prompts')}): intervals and tests are over prompts, not rows"
            )
        return [*lines, *overlap_warning(data["overlaps"]), *data.get("notes", [])]


class LabelSplits(Splits):
    """The same with a figure of which rows train weak supervisor, student and ceiling."""

    def show(self, report: Report) -> dict[str, Any]:
        """The figure has sizes and overlaps."""
        rows = {k: v for k, v in report["data"].items() if k not in ("sizes", "overlaps")}
        return {"rows": rows, "figure": split_figure(report)}


def split_figure(report: Report) -> Markup:
    """Which rows train whom: the splits with their counts, the prompts that they share, and the models."""
    from matplotlib.patches import FancyBboxPatch

    sizes, shared = report["data"]["sizes"], report["data"]["overlaps"]
    figure, axis = new_figure(8.2, 3.1)
    axis.set_axis_off()
    axis.set_xlim(0, 10)
    axis.set_ylim(0, 4)

    def box(x: float, y: float, text: str, colour: str, ink: str = PAPER) -> None:
        patch = FancyBboxPatch((x, y), 2.1, 0.8, boxstyle="round,pad=0.02,rounding_size=0.12", fc=colour, ec=NOTE)
        axis.add_patch(patch)
        axis.text(x + 1.05, y + 0.4, text, ha="center", va="center", fontsize=8.5, color=ink)

    def arrow(begin: tuple[float, float], end: tuple[float, float], text: str, above: float = 0.12) -> None:
        axis.annotate("", end, begin, arrowprops={"arrowstyle": "-|>", "color": NOTE, "lw": 1.1})
        axis.text((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2 + above, text, ha="center", fontsize=7.5)

    rows = {"ground_truth": 3.0, "transfer": 1.6, "test": 0.2}
    for name, y in rows.items():
        box(0.1, y, f"{name.replace('_', ' ')}\n{counted(sizes[name], 'rows')}", "none", INK)
    noise = report["data"].get("label_noise") or {}
    hit = f"\n{noise['rate_applied']:.0%} {noise['kind']} noise" if noise.get("rows_hit") else ""
    if "weak" in report["metrics"]:
        box(4.2, 3.0, "weak supervisor", COLOURS["weak"])
        arrow((2.25, 3.4), (4.15, 3.4), "gold labels train")
    if {"weak", "student"} <= report["metrics"].keys():
        box(4.2, 1.6, f"strong student\non the weak labels{hit}", COLOURS["student"])
        arrow((2.25, 2.0), (4.15, 2.0), "texts")
        arrow((5.25, 2.95), (5.25, 2.5), "")
        axis.text(5.4, 2.66, "labels the transfer rows", fontsize=7.5)
    if "ceiling" in report["metrics"]:
        box(7.8, 1.6, "strong ceiling\non ground truth", COLOURS["ceiling"])
        split = report["training"].get("ceiling_split", "transfer").replace("_", " ")
        axis.text(8.85, 2.55, f"trained on {split},\nwith its gold labels", ha="center", fontsize=7.5)
    arrow((2.25, 0.6), (4.15, 0.6), "all models answer")
    axis.text(4.25, 0.5, "accuracy, PGR, paired tests: joined by row id", fontsize=8.5)
    words = "; ".join(f"{k}: {v}" for k, v in shared.items() if v) or "none"
    axis.text(0.1, -0.2, f"prompts shared between splits: {words}", fontsize=7.5, color=NOTE)
    counts = ", ".join(f"{name.replace('_', ' ')} {counted(sizes[name], 'rows')}" for name in rows)
    return svg(figure, f"which split trains which model: {counts}; prompts shared between splits: {words}")
