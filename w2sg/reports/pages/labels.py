"""The page of one run: what was found, how sure it is, and where it came from."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from w2sg.metrics.intervals import MCNEMAR
from w2sg.reports.html import (
    COLOURS,
    LEVEL,
    Raw,
    estimate,
    facts,
    new_figure,
    number,
    p_text,
    p_value,
    page,
    reach,
    svg,
    table,
)
from w2sg.reports.reading import reading_section

ROLES = {
    "weak": "weak supervisor",
    "student": "strong student",
    "ceiling": "strong ceiling",
    "zero_shot": "strong, untrained",
    # of methods whose models write
    "base": "strong, untrained",
    "cong_s": "ConG-S",
    "cong": "strong student",
    "weak_sft": "weak SFT",
    "plain": "ConG on plain samples",
    "aux_conf": "AuxConf",
    "wspo": "WSPO",
}
MEASURES = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE-15",
    "overconfidence": "overconfidence",
}


def run_page(content: dict[str, Any], curves: dict[str, list[dict[str, float]]]) -> str:
    """The whole page, from what report.json holds and the loss curves."""
    found = content["diagnostics"]
    return page(
        title(content),
        [
            *opening(content, title(content), verdict(content)),
            "<h2>Accuracy</h2>",
            accuracy_figure(content),
            f"<p>{html.escape(pgr_sentence(content['pgr']))}</p>" if "pgr" in content else "",
            metrics_table(content),
            tests_table(content["tests"]),
            "<h2>Confidence</h2>",
            reliability_figure(found["reliability"]),
            "<p class=note>Above: a calibrated model lies on the diagonal, an overconfident one below it; dots grow "
            "with their rows. Below: how sure each model is, and how often it is wrong (red).</p>",
            confidence_figure(found["reliability"]),
            _agreement(found),
            _theory(found),
            "<h2>Data</h2>",
            split_figure(content),
            facts({k: v for k, v in content["data"].items() if k not in ("sizes", "overlaps")}),
            "<h2>Training</h2>",
            curves_figure(curves),
            facts(content["training"]),
            *provenance(content),
        ],
    )


def opening(content: dict[str, Any], what: str, finding: str) -> list[str]:
    """What was run, what was found, and what a reader must know before believing it."""
    return [
        f"<h1>{html.escape(what)}</h1>",
        f"<p class=command>{html.escape(content['command'])}</p>",
        f"<p class=verdict>{html.escape(finding)}</p>",
        *(f"<p class=warning>{html.escape(line)}</p>" for line in (*content["warnings"], *content.get("unread", ()))),
    ]


def provenance(content: dict[str, Any]) -> list[str]:
    """What the models read, stages, versions and configuration."""
    from omegaconf import OmegaConf

    return [
        *reading_section(content.get("reading")),
        "<h2>Stages</h2>",
        _stages_table(content["stages"]),
        "<h2>Versions</h2>",
        facts(content["versions"]),
        "<details><summary>Configuration</summary><pre>"
        + html.escape(OmegaConf.to_yaml(OmegaConf.create(content["config"])))
        + "</pre></details>",
    ]


def judge_facts(judge: dict[str, Any] | None) -> str:
    """Who judged, and how often it agrees with people."""
    if judge is None:
        return ""
    lines = {"judge": judge["model"], "its accuracy": judge["accuracy"]}
    if seen := judge.get("on_test_pairs"):
        lines |= {
            "prefers what is shown first by": seen["position_bias"],
            "verdicts that change with the order": f"{seen['flips']:.0%}",
            "probability of its two answers": f"{seen['label_mass']:.1%}",
        }
    return facts(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def short(name: str) -> str:
    """The last part of a model's name."""
    return name.rstrip("/").rpartition("/")[2]


def title(content: dict[str, Any]) -> str:
    """What was run, in one line."""
    loss, noise = content["loss"].replace("_", " "), content["data"].get("label_noise") or {}
    what = f"{loss}, seed {content['seed']}"
    if noise.get("rows_hit"):
        what += f", {noise['kind']} noise on {noise['rate_applied']:.0%} of labels"
    return f"{short(content['weak'])} supervises {short(content['strong'])} on {content['dataset']}: {what}"


def pgr_sentence(pgr: dict[str, Any]) -> str:
    """The performance gap recovered, or that there is no gap to speak of."""
    gap = "gap " + estimate({"value": pgr["gap"], "low": pgr["gap_low"], "high": pgr["gap_high"]}, sign=True)
    if not pgr["resolved"]:
        no_gap = pgr["gap_high"] is not None and pgr["gap_high"] < 0
        return f"performance gap recovered: {'no gap' if no_gap else 'gap not resolved'} ({gap})"
    return f"performance gap recovered: {estimate(pgr, 2)} ({gap})"


def verdict(content: dict[str, Any]) -> str:
    """The finding in two sentences."""
    measured, tests = content["metrics"], content["tests"]
    if not {"weak", "student", "ceiling"} <= measured.keys():
        return ""
    weak = tests["student - weak"]
    resolved = weak["p"] < LEVEL
    how = ("better than" if weak["difference"] > 0 else "worse than") if resolved else "not told apart from"
    pgr = content["pgr"]
    share = f"The performance gap recovered is {estimate(pgr, 2)}."
    if not pgr["resolved"]:
        share = "The gap to the ceiling is not resolved, so no share of it is claimed."
    return (
        f"The student is {how} its teacher: {measured['student']['accuracy']:.3f} against "
        f"{measured['weak']['accuracy']:.3f}, a difference of "
        f"{estimate({**weak, 'value': weak['difference']}, sign=True)} on {tested(content['data'])} "
        f"({test_name(weak)}, p {p_text(weak['p'])}). {share} One run: intervals are over test "
        f"{'prompts' if test_name(weak) != MCNEMAR else 'rows'} alone; other seeds and training rows add to them."
    )


def tested(data: dict[str, Any]) -> str:
    """How many test rows there are, and of how many prompts."""
    within = data.get("prompts_within_test", {})
    of = f" of {within['prompts']:,} prompts" if within and within["prompts"] < within["rows"] else ""
    return f"{data['sizes']['test']:,} test rows{of}"


def test_name(found: dict[str, Any]) -> str:
    """Which test a p value is of."""
    return found.get("test", MCNEMAR)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def metrics_table(content: dict[str, Any]) -> str:
    """Every measure of each model with its interval."""
    rows = []
    for name, values in content["metrics"].items():
        cells = []
        for key in MEASURES:
            bounds = values["intervals"][key] or (None, None)
            signed = key == "overconfidence"
            inside = "–" if bounds[0] is None else f"{number(bounds[0], 3, signed)} to {number(bounds[1], 3, signed)}"
            cells.append(Raw(f"{number(values[key], 3, signed)}<br><small>{inside}</small>"))
        rows.append((ROLES.get(name, name), *cells))
    length = content["data"]["length_only"]
    alone = Raw(f"{number(length['accuracy'])}<br><small>{number(length['low'])} to {number(length['high'])}</small>")
    rows.append((f"length alone ({length['rule']})", alone, *["–"] * (len(MEASURES) - 1)))
    return table(("", *MEASURES.values()), rows)


def tests_table(tests: dict[str, Any]) -> str:
    """The student against every other model on the same rows."""
    rows = [
        (
            f"student − {ROLES.get(name.removeprefix('student - '), name)}",
            estimate({**found, "value": found["difference"]}, sign=True),
            found["only_student"],
            found["only_other"],
            p_value(found["p"]),
        )
        for name, found in tests.items()
    ]
    if not rows:
        return ""
    name = test_name(next(iter(tests.values())))
    head = ("accuracy, paired", "difference", "student alone right", "other alone right", f"p ({name})")
    what = "prompts" if name != MCNEMAR else "test rows"
    note = (
        f"<p class=note>Differences with 95 % intervals over {what}; p values are not corrected for their number.</p>"
    )
    return table(head, rows) + note


def _agreement(found: dict[str, Any]) -> str:
    if "agreement" not in found:
        return ""
    splits = [("test", found)] + ([("transfer", found["transfer"])] if "transfer" in found else [])
    rows = []
    for words, group, key in (
        ("agrees with its teacher", "agreement", "all"),
        ("… where the teacher is right", "agreement", "teacher_right"),
        ("… where the teacher is wrong (copied errors)", "agreement", "teacher_wrong"),
        ("teacher's errors that it gets right", "overturned", "errors"),
        ("teacher's right answers that it gets wrong", "overturned", "successes"),
    ):
        cells = [f"{estimate(part[group][key])} of {part[group][key]['rows']:,}" for _, part in splits]
        rows.append((words, *cells))
    cells = [f"{estimate(p['confident_disagreement'])} of {p['confident_disagreement']['rows']:,}" for _, p in splits]
    rows.append(("disagrees, among the tenth it is surest of", *cells))
    note = (
        "<p class=note>A student that only copied would agree as often where its teacher is wrong as where it is "
        "right. On transfer the teacher's labels are those that the student was trained on, noise included.</p>"
    )
    return "<h2>The student and its teacher</h2>" + table(("", *(name for name, _ in splits)), rows) + note


def _theory(found: dict[str, Any]) -> str:
    parts = [(name, found[name]) for name in ("test", "transfer") if name in found and "gain" in found[name]]
    if not parts:
        return ""
    words = {
        "gain": "gain: NLL of the teacher − NLL of the student",
        "misfit": "misfit: KL(student ‖ teacher)",
        "remainder": "remainder = gain − misfit",
        "forward_misfit": "forward misfit: KL(teacher ‖ student)",
    }
    rows = [(text, *(estimate(part[key], 4, sign=True) for _, part in parts)) for key, text in words.items()]
    rows.append(("gain ≥ misfit on these rows", *(part["theorem"] for _, part in parts)))
    conditions = found["theorem_conditions"]
    met = ", ".join(f"{k.replace('_', ' ')}: {'yes' if v else 'no'}" for k, v in conditions.items())
    return (
        "<h2>Theory</h2>"
        + table(("nats per row", *(name for name, _ in parts)), rows)
        + "<p class=note>The identity gain = misfit + remainder is exact. Theorem 2 of arXiv 2502.11107 promises "
        f"gain ≥ misfit where all of these hold: {html.escape(met)}. A linear head is convex in logits, not in "
        "probabilities; strong.head=mixture is of the theorem's class.</p>"
    )


def _stages_table(stages: list[dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        fraction = stage["useful_token_fraction"]
        rows.append(
            (
                stage["name"],
                stage["key"].rpartition("-")[2],
                "from the store" if stage["cached"] else "computed",
                f"{stage['seconds']:,.1f}",
                f"{stage['tokens']:,}" if stage["tokens"] else "–",
                "–" if fraction is None else f"{fraction:.1%}",
            )
        )
    spent = sum(s["seconds"] for s in stages if not s["cached"])
    saved = sum(s["seconds"] for s in stages if s["cached"])
    words = f"<p>{spent:,.1f} s of computing here; the store saved {saved:,.1f} s.</p>"
    return words + table(("stage", "key", "", "seconds", "tokens", "useful of all read"), rows)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def accuracy_figure(content: dict[str, Any]) -> str:
    """Bars of accuracy with 95 % intervals, and the length-only rule as a line."""
    names = list(content["metrics"])
    figure, axes = new_figure(6.6, 0.75 + 0.42 * len(names))
    for row, name in enumerate(names):
        values = content["metrics"][name]
        low, high = values["intervals"]["accuracy"]
        accuracy = values["accuracy"]
        axes.barh(row, accuracy, color=COLOURS.get(name, "#777"), height=0.62)
        axes.errorbar(accuracy, row, xerr=reach(accuracy, low, high), color="black", capsize=3, lw=1)
        axes.text(high + 0.008, row, f"{accuracy:.3f}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [ROLES.get(n, n) for n in names])
    axes.invert_yaxis()
    length = content["data"]["length_only"]["accuracy"]
    lowest = min(length, *(v["intervals"]["accuracy"][0] for v in content["metrics"].values()))
    axes.set_xlim(max(0.0, min(0.45, lowest - 0.05)), 1.02)
    axes.axvline(length, color=COLOURS["length"], ls=":", lw=1, label=f"length alone, {length:.3f}")
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axes.set_xlabel("accuracy on test, with 95 % bootstrap interval (the axis does not begin at 0)")
    return svg(figure, "accuracy of each model with its interval")


def reliability_figure(found: dict[str, list[dict[str, float]]]) -> str:
    """Accuracy over confidence, in 15 bins."""
    figure, axes = new_figure(2.45 * len(found), 2.6, len(found))
    lowest = min(b["confidence"] for bins in found.values() for b in bins)
    start = max(0.0, min(0.5, lowest - 0.05))
    for axis, (name, bins) in zip(np.atleast_1d(axes), found.items(), strict=True):
        total = sum(b["rows"] for b in bins)
        axis.plot([start, 1], [start, 1], color="#94a3b8", lw=1, ls="--")
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axis.plot(x, y, color=COLOURS.get(name, "#777"), lw=1.2)
        size = [12 + 220 * b["rows"] / total for b in bins]
        axis.scatter(x, y, s=size, color=COLOURS.get(name, "#777"), alpha=0.8)
        axis.set_title(ROLES.get(name, name), fontsize=9)
        axis.set_xlim(start, 1.03)
        axis.set_ylim(-0.03, 1.05)
        axis.set_xlabel("confidence", fontsize=8)
    np.atleast_1d(axes)[0].set_ylabel("accuracy", fontsize=8)
    return svg(figure, "accuracy over confidence of each model")


def confidence_figure(found: dict[str, list[dict[str, float]]]) -> str:
    """How many rows are chosen with which confidence, right and wrong."""
    figure, axes = new_figure(2.45 * len(found), 1.8, len(found))
    lowest = min(b["low"] for bins in found.values() for b in bins)
    most = max(b["rows"] for bins in found.values() for b in bins)
    for axis, (name, bins) in zip(np.atleast_1d(axes), found.items(), strict=True):
        left, width = [b["low"] for b in bins], [b["high"] - b["low"] for b in bins]
        right = [b["rows"] * b["accuracy"] for b in bins]
        wrong = [b["rows"] - r for b, r in zip(bins, right, strict=True)]
        axis.bar(left, right, width, align="edge", color=COLOURS.get(name, "#777"), edgecolor="white", lw=0.5)
        axis.bar(left, wrong, width, bottom=right, align="edge", color="#f87171", edgecolor="white", lw=0.5)
        axis.set_xlim(lowest, 1.0)
        axis.set_ylim(0, 1.05 * most)
        axis.set_xlabel("confidence", fontsize=8)
    np.atleast_1d(axes)[0].set_ylabel("test rows", fontsize=8)
    return svg(figure, "histogram of confidence of each model, wrong rows on top")


def split_figure(content: dict[str, Any]) -> str:
    """Which rows train whom: the splits with their counts, the prompts that they share, and the models."""
    from matplotlib.patches import FancyBboxPatch

    sizes, shared = content["data"]["sizes"], content["data"]["overlaps"]
    figure, axis = new_figure(8.2, 3.1)
    axis.set_axis_off()
    axis.set_xlim(0, 10)
    axis.set_ylim(0, 4)

    def box(x: float, y: float, text: str, colour: str, ink: str = "white") -> None:
        patch = FancyBboxPatch((x, y), 2.1, 0.8, boxstyle="round,pad=0.02,rounding_size=0.12", color=colour)
        axis.add_patch(patch)
        axis.text(x + 1.05, y + 0.4, text, ha="center", va="center", fontsize=8.5, color=ink)

    def arrow(begin: tuple[float, float], end: tuple[float, float], text: str, above: float = 0.12) -> None:
        axis.annotate("", end, begin, arrowprops={"arrowstyle": "-|>", "color": "#475569", "lw": 1.1})
        axis.text((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2 + above, text, ha="center", fontsize=7.5)

    rows = {"ground_truth": 3.0, "transfer": 1.6, "test": 0.2}
    for name, y in rows.items():
        box(0.1, y, f"{name.replace('_', ' ')}\n{sizes[name]:,} rows", "#e2e8f0", "#1e293b")
    noise = content["data"].get("label_noise") or {}
    hit = f"\n{noise['rate_applied']:.0%} {noise['kind']} noise" if noise.get("rows_hit") else ""
    box(4.2, 3.0, "weak supervisor", COLOURS["weak"])
    box(4.2, 1.6, f"strong student\non the weak labels{hit}", COLOURS["student"])
    box(7.8, 1.6, "strong ceiling\non ground truth", COLOURS["ceiling"])
    arrow((2.25, 3.4), (4.15, 3.4), "gold labels train")
    arrow((2.25, 2.0), (4.15, 2.0), "texts")
    arrow((5.25, 2.95), (5.25, 2.5), "")
    axis.text(5.4, 2.66, "labels the transfer rows", fontsize=7.5)
    split = content["training"].get("ceiling_split", "transfer").replace("_", " ")
    axis.text(8.85, 2.55, f"trained on {split},\nwith its gold labels", ha="center", fontsize=7.5)
    arrow((2.25, 0.6), (4.15, 0.6), "all models answer")
    axis.text(4.25, 0.5, "accuracy, PGR, paired tests: joined by row id", fontsize=8.5)
    words = "; ".join(f"{k}: {v}" for k, v in shared.items() if v) or "none"
    axis.text(0.1, -0.2, f"prompts shared between splits: {words}", fontsize=7.5, color="#475569")
    return svg(figure, "which split trains which model")


def curves_figure(curves: dict[str, list[dict[str, float]]]) -> str:
    """Training loss (and held-out loss) of every fit over its steps."""
    curves = {name: points for name, points in curves.items() if points and "expert" not in name}
    if not curves:
        return ""
    figure, axes = new_figure(3.0 * len(curves), 2.2, len(curves))
    for axis, (name, points) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        for key, style in (("loss", {"color": "#2563eb"}), ("held_out_loss", {"color": "#dc2626", "marker": "."})):
            xy = [(p["step"], p[key]) for p in points if key in p]
            if xy:
                axis.plot(*zip(*xy, strict=True), lw=1, label=key.replace("_", "-", 1).replace("_", " "), **style)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.legend(frameon=False, fontsize=7)
    return svg(figure, "loss over optimizer steps")
