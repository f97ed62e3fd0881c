"""The page of one run: what was found, how sure it is, and where it came from."""

from __future__ import annotations

import html
from typing import Any

from w2sg.metrics.intervals import MCNEMAR
from w2sg.reports.html import (
    COLOURS,
    Raw,
    estimate,
    facts,
    new_figure,
    number,
    p_value,
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
