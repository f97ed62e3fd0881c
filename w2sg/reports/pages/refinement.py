"""The page of refinement: both axes, the labels before training, who was trained, and what they said."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from w2sg.reports.html import (
    Raw,
    estimate,
    facts,
    new_figure,
    number,
    p_value,
    page,
    points,
    stacked,
    svg,
    table,
    training_figures,
)
from w2sg.reports.pages.labels import judge_facts, opening, pgr_sentence, provenance, short

WORDS = {
    "weak": "weak model",
    "naive": "naive fine-tuning",
    "student": "student (refined)",
    "icl": "in context, not trained",
    "self": "trained on its own answers",
    "self_cot": "… step by step",
    "base": "strong, untrained",
    "shuffled": "shuffled exemplars",
    "gold_exemplars": "gold exemplars",
    "ceiling": "ceiling (gold answers)",
}
INK = {
    "weak": "#94a3b8",
    "naive": "#0891b2",
    "student": "#2563eb",
    "icl": "#60a5fa",
    "self": "#a16207",
    "self_cot": "#ca8a04",
    "base": "#d97706",
    "shuffled": "#be185d",
    "gold_exemplars": "#059669",
    "ceiling": "#334155",
}
LABELS = {
    "weak": "weak answers",
    "student": "refined answers",
    "self": "the strong model's own",
    "self_cot": "… step by step",
    "shuffled": "refined, shuffled exemplars",
    "gold_exemplars": "refined, gold exemplars",
    "ceiling": "gold answers",
}
KINDS = {"icl": "ICL refinement", "iar": "infer and respond", "improve": "improvement", "none": "no refinement"}
NONE = {"value": None, "low": None, "high": None}


def refinement_page(content: dict[str, Any], curves: dict[str, list[dict[str, float]]]) -> str:
    """The whole page, from what report.json holds and the loss curves."""
    found = content["refinement"]
    return page(
        title(content),
        [
            *opening(content, title(content), verdict(content)),
            "<h2>Systems</h2>",
            pareto_figure(found),
            _systems_table(found),
            judge_facts(found.get("judge")),
            f"<p>Content: {html.escape(pgr_sentence(found['pgr']))}</p>" if "pgr" in found else "",
            "<h2>Labels before training</h2>",
            *_labels(found),
            "<h2>Answers</h2>",
            *_examples(found["examples"]),
            "<h2>Training</h2>",
            *training_figures(curves),
            _identities(found["trained"]),
            "<h2>Data</h2>",
            facts(content["data"]),
            *provenance(content),
        ],
    )


def title(content: dict[str, Any]) -> str:
    """What was run, in one line."""
    found = content["refinement"]
    size = f", batches of {found['options']['batch_size']}" if "batch_size" in found["options"] else ""
    how = f"{KINDS[found['kind']]}{size}, seed {content['seed']}"
    file = content["config"]["method"]["answers"]
    whose = short(content["weak"]) if file is None else f"the answers of {short(file)}"
    return f"{short(content['strong'])} refines {whose} on {content['dataset']}: {how}"


def _axes(found: dict[str, Any]) -> list[str]:
    return [axis for axis in ("content", "concept") if axis in found["systems"]["student"]]


def verdict(content: dict[str, Any]) -> str:
    """The finding in a few sentences."""
    found, lines = content["refinement"], []
    kept = found["retention"].get("concept", {}).get("student")
    if kept:
        weak, own = (found["labels"][name]["concept"] for name in ("weak", "student"))
        share = f", {kept['share']['value']:.0%} of theirs" if "share" in kept else ""
        lines.append(
            f"Before any training the refined labels have a concept score of {estimate(own)}{share}; the weak ones "
            f"have {estimate(weak)}."
        )
    for axis in _axes(found):
        parts = []
        for other, words in (("naive", "naive fine-tuning"), ("base", "the untrained strong model")):
            gap = found["differences"].get(f"student - {other}", {}).get(axis)
            if gap:
                resolved = gap["low"] is not None and (gap["low"] > 0 or gap["high"] < 0)
                parts.append(f"{estimate(gap, 3, True)} over {words}{'' if resolved else ' (not resolved)'}")
        score = estimate(found["systems"]["student"][axis])
        lines.append(
            f"{axis.capitalize()} of the student on {found['prompts']:,} test prompts: {score}; {', '.join(parts)}."
        )
    lines.append(
        "95 % intervals over test prompts, of one run: other seeds and training rows add to them. “Not resolved”: "
        "the interval includes no difference."
    )
    return " ".join(lines)


def pareto_figure(found: dict[str, Any]) -> str:
    """Content over concept, a point for each system; content alone where no concept is measured."""
    systems, axes = found["systems"], _axes(found)
    figure, axis = new_figure(7.4, 4.4 if len(axes) == 2 else 0.9 + 0.36 * len(systems))
    if len(axes) == 1:
        for row, (name, measured) in enumerate(systems.items()):
            points(axis, [row], [measured[axes[0]]], across=True, fmt="o", color=INK.get(name, "#777"))
        axis.set_yticks(range(len(systems)), [WORDS.get(n, n) for n in systems])
        axis.invert_yaxis()
        axis.set_xlabel(f"{axes[0]}, with 95 % interval", fontsize=8)
        return svg(figure, f"{axes[0]} of each system with its interval")
    for name, measured in systems.items():
        x, y = measured["concept"], measured["content"]
        style = {"color": INK.get(name, "#777"), "fmt": "*" if name == "student" else "o"}
        style["ms"] = 13 if name == "student" else 6
        points(axis, [x["value"]], [y], label=WORDS.get(name, name), **style)
        points(axis, [y["value"]], [x], across=True, fmt="none", color=style["color"])
    axis.set_xlabel("concept: how much an answer is as the weak model was told", fontsize=8)
    axis.set_ylabel("content: how right it is", fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return svg(figure, "content over concept of each system, with intervals on both axes")


def _systems_table(found: dict[str, Any]) -> str:
    axes, rows = _axes(found), []
    for name, measured in found["systems"].items():
        cells: list[Any] = [WORDS.get(name, name)]
        for axis in axes:
            gap = found["differences"].get(f"student - {name}", {}).get(axis)
            cells += [stacked(measured[axis]), stacked(gap or NONE, 3, True), p_value(gap["p"]) if gap else "–"]
        if "wins" in found:
            against = found["wins"].get(name, {})
            cells += [stacked(against.get(key, NONE)) for key in ("win_rate", "length_controlled")]
        rows.append((*cells, number(measured["characters"], 0), f"{measured['cut_off']:.0%}"))
    head = [Raw(words) for axis in axes for words in (axis, "student −<br>this", "p")]
    head += [Raw("student wins<br>over this"), Raw("… length<br>controlled")] if "wins" in found else []
    note = (
        "<p class=note>Means over test prompts with 95 % bootstrap intervals; p: exact sign test on the same prompts, "
        "not corrected for their number. Every model but those in context answers the plain prompt.</p>"
    )
    return table(("", *head, "characters", "cut off"), rows, "dense") + note


def _labels(found: dict[str, Any]) -> Iterable[str]:
    axes, rows = _axes(found), []
    for name, own in found["labels"].items():
        cells: list[Any] = [LABELS[name], f"{own['questions']:,}", f"{own['answers']:,}"]
        for axis in axes:
            kept = found["retention"].get(axis, {}).get(name, {})
            share = kept.get("share", NONE)
            cells += [stacked(own[axis]), stacked(kept.get("change", NONE), 3, True), stacked(share, 0, kind="%")]
        rows.append((*cells, stacked(own.get("copy_rate", NONE), 2), stacked(own.get("exemplar_copy_rate", NONE), 2)))
    head = [Raw(words) for axis in axes for words in (axis, "change from<br>weak", "share of<br>weak")]
    yield table(
        ("", "questions", "answers", *head, Raw("copied<br>from weak"), Raw("from an<br>exemplar")), rows, "dense"
    )
    yield (
        "<p class=note>What students are taught, measured as the systems are: what a label lacks of the concept no "
        "training brings back. Changes and shares are over the questions that both have. Copied: words in common, in "
        "order.</p>"
    )
    yield facts({"refined answers": found["counts"], "contexts": found["labels"]["student"].get("exemplars")})
    yield "<p class=note>refined.parquet has every label with its prompt's hash, exemplars, model and scores.</p>"


def _identities(trained: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            WORDS.get(name, name),
            short(who["model"]),
            who["revision"][:16],
            who["train"] or "not trained",
            who["stage"] or "–",
            "yes" if who["is_the_refiner"] else "NO",
        )
        for name, who in trained.items()
    ]
    head = ("", "model", "revision", "trained", "stage", "started from the model that refined")
    return "<h3>Who was trained</h3>" + table(head, rows)


def _examples(examples: list[dict[str, Any]]) -> Iterable[str]:
    for part in examples:
        yield "<p class=note>The first test prompts in the order of their hashes; not chosen by content.</p>"
        for k, example in enumerate(part["test"], 1):
            yield f"<h3>Prompt {k}</h3><div class=said>{html.escape(example['prompt'].strip())}</div>"
            rows = [(WORDS.get(name, name), _said(text)) for name, text in example["answers"].items()]
            yield table(("", "answer"), rows, "replies")
        if part["labels"]:
            yield "<h3>Refined labels</h3>"
            rows = []
            for row in part["labels"]:
                marks = f"{row['source']}{'' if row['used'] else ', refused'}"
                concept = f"<br><small>concept: {html.escape(row['concept'])}</small>" if row.get("concept") else ""
                both = f"{html.escape(row['weak_answer'])}</div><hr><div class=said>{html.escape(row['refined'])}"
                asked = html.escape(row["prompt"].strip()[:200])
                rows.append((Raw(f"{asked}{concept}"), marks, Raw(f"<div class=said>{both}</div>")))
            yield table(("prompt", "source", "weak answer, refined answer"), rows, "replies words")


def _said(text: str) -> Raw:
    return Raw(f"<div class=said>{html.escape(text)}</div>")


def terminal_table(content: dict[str, Any]) -> Any:
    """The systems and the labels on both axes, for the terminal."""
    from rich.table import Table as Grid

    found = content["refinement"]
    axes = _axes(found)
    grid = Grid(title=title(content), title_justify="left")
    for column in ("", *axes, "cut off"):
        grid.add_column(column, justify="left" if not column else "right")
    for name, measured in found["systems"].items():
        cells = [estimate(measured[axis]) for axis in axes]
        grid.add_row(WORDS.get(name, name), *cells, f"{measured['cut_off']:.0%}")
    grid.add_section()
    for name, words in (("weak", "labels: weak answers"), ("student", "labels: refined answers")):
        if name in found["labels"]:
            grid.add_row(words, *(estimate(found["labels"][name][axis]) for axis in axes), "")
    return grid
