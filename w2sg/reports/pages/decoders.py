"""The page of a decoder: it and plain samples side by side, and how a few of its replies came about."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import numpy as np

from w2sg.decoding.decoders import decoder_in
from w2sg.reports.html import (
    Raw,
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
from w2sg.reports.pages.labels import judge_facts, opening, provenance, short

WORDS = {
    "plain": "strong model, plain",
    "guide": "small aligned model alone",
    "search": "weak-to-strong search",
    "best_of_n": "best of n",
    "eft": "emulated fine-tuning",
    "wsd": "weak-to-strong decoding",
    "nudging": "nudging",
    "contrastive": "contrastive decoding",
}
INK = {"plain": "#d97706", "guide": "#94a3b8"}
STEERED = "#2563eb"
FATES = {
    "reached": "the strong model took over",
    "complete": "the draft came to its end first",
    "longest": "the draft reached its longest",
}


def decode_page(content: dict[str, Any], curves: dict[str, list[dict[str, float]]]) -> str:
    """The whole page, from what report.json holds and the loss curves."""
    found = content["decoding"]
    return page(
        title(content),
        [
            STYLE,
            *opening(content, title(content), verdict(content)),
            "<h2>Systems</h2>",
            reward_figure(found["systems"]),
            _systems_table(found["systems"]),
            _cost_table(found["systems"]),
            *(_best_of_n(found["best_of_n"]) if "best_of_n" in found else ()),
            *(_switch(found["switch"]) if "switch" in found else ()),
            *(_traces(found["traces"]) if found["traces"] else ()),
            *_frontier(found),
            *(_tax(found["tax"], found["decoder"]["kind"]) if "tax" in found else ()),
            "<h2>Replies</h2>",
            *_examples(found["examples"]),
            *(["<h2>Training</h2>", *training_figures(curves)] if curves else []),
            "<h2>Data</h2>",
            facts(content["data"]),
            judge_facts(found.get("judge")),
            *provenance(content),
        ],
    )


def title(content: dict[str, Any]) -> str:
    """What was run, in one line."""
    name, setting = words_of(content["decoding"])
    whom = f"{short(content['strong'])} on {content['dataset']}"
    guide = f", guided by {short(content['weak'])}" if "guide" in content["decoding"]["systems"] else ""
    return f"{name[0].upper()}{name[1:]} ({setting}) of {whom}{guide}, seed {content['seed']}"


def words_of(decoding: dict[str, Any]) -> tuple[str, str]:
    """What a report's decoder is called, and its main options; earlier reports have the options alone."""
    if "words" in decoding:
        return decoding["words"]["name"], decoding["words"]["setting"]
    decoder = decoder_in(decoding["decoder"])
    kind = decoding["decoder"]["kind"]
    return (kind, "an unknown decoder") if decoder is None else (decoder.words, decoder.setting())


def verdict(content: dict[str, Any]) -> str:
    """The finding in a sentence or two."""
    found = content["decoding"]
    own = found["systems"].get(found["decoder"]["kind"])
    if own is None:
        return f"Plain samples to {found['prompts']:,} test prompts; other decoders are compared with these."
    if "against" not in own:
        return "No judge was given: rewards and win rates are unknown."
    parts = []
    for other, words in (("plain", "plain samples of the strong model"), ("guide", "the small aligned model alone")):
        if other in own["against"]:
            wins = own["against"][other]["win_rate"]
            parts.append(f"against {words} {_judged(wins)}")
    return (
        f"On {found['prompts']:,} test prompts the win rate is {'; '.join(parts)}: 95 % intervals over "
        "prompts, of one run; other seeds add to them."
    )


def _judged(wins: dict[str, Any]) -> str:
    resolved = wins["low"] is not None and (wins["low"] > 0.5 or wins["high"] < 0.5)
    inside = f"{number(wins['value'])} [{number(wins['low'])}, {number(wins['high'])}]"
    return inside + ("" if resolved else " (not resolved)")


# ---------------------------------------------------------------------------------------------------------------------
# Systems
# ---------------------------------------------------------------------------------------------------------------------


def reward_figure(systems: dict[str, dict[str, Any]]) -> str:
    """Rewards, and rewards over the strong model's surprise: what is gained, and how far from it."""
    known = {name: found for name, found in systems.items() if "reward" in found}
    if not known:
        return ""
    far = all("surprise" in found for found in known.values())
    figure, axes = new_figure(4.2 * (1 + far), 0.5 * len(known) + 1.4, 1 + far)
    axes = np.atleast_1d(axes)
    for row, (name, found) in enumerate(known.items()):
        colour = INK.get(name, STEERED)
        points(axes[0], [row], [found["reward"]], across=True, fmt="o", color=colour)
        if far:
            points(
                axes[1],
                [found["surprise"]["value"]],
                [found["reward"]],
                fmt="o",
                color=colour,
                label=WORDS.get(name, name),
            )
    axes[0].set_yticks(range(len(known)), [WORDS.get(name, name) for name in known], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("judge's reward", fontsize=8)
    if far:
        axes[1].set_xlabel("surprise: minus log-probability per token\nunder the strong model", fontsize=8)
        axes[1].set_ylabel("judge's reward", fontsize=8)
        axes[1].legend(frameon=False, fontsize=7)
    return svg(figure, "the judge's reward of each system, and over the strong model's surprise at its replies")


def _systems_table(systems: dict[str, dict[str, Any]]) -> str:
    rows = []
    none = {"value": None, "low": None, "high": None}
    for name, found in systems.items():
        against = found.get("against", {}).get("plain", {})
        rows.append(
            (
                WORDS.get(name, name),
                stacked(found.get("reward", none), 3, True),
                stacked(against.get("gap", none), 3, True),
                stacked(against.get("win_rate", none)),
                p_value(against["p"]) if "p" in against else "–",
                stacked(against.get("length_controlled", none)),
                stacked(found.get("surprise", none), 2),
                number(found["length"]["mean"], 1),
                f"{found['length']['truncated']:.0%}",
                number(found["characters"], 0),
                f"{found['distinct_1']:.2f} / {found['distinct_2']:.2f}",
            )
        )
    head = ["", "reward", "reward − plain", "wins over plain", "p", Raw("… length<br>controlled"), "surprise", "tokens"]
    note = (
        "<p class=note>Means over prompts with 95 % bootstrap intervals; p: exact sign test against plain samples, not "
        "corrected. Length control by characters. Surprise: minus the strong model's log-probability of a reply, per "
        "token; temperature 1. Distinct: different words and pairs of words among all.</p>"
    )
    return table((*head, "cut off", "characters", "distinct 1 / 2"), rows, "dense") + note


def _cost_table(systems: dict[str, dict[str, Any]]) -> str:
    plain = systems["plain"]["cost"]["seconds"]
    rows = [
        (
            WORDS.get(name, name),
            number(found["cost"]["strong"], 2),
            number(found["cost"]["guide"], 2),
            number(1000 * found["cost"]["seconds"], 1),
            number(found["cost"]["seconds"] / plain, 2) if plain else "–",
        )
        for name, found in systems.items()
    ]
    head = ("", "tokens read by the strong model", "by each small one", "ms per token of the replies", "of plain")
    note = "<p class=note>Per token of the replies that were chosen, prompts included. Times are of this machine, with "
    return "<h3>Cost</h3>" + table(head, rows) + note + "whatever else it did.</p>"


def _best_of_n(curve: list[dict[str, Any]]) -> Iterable[str]:
    yield "<h2>Best of n</h2>"
    figure, axes = new_figure(7.6, 2.8, 2)
    for axis, kind, colour in zip(axes, ("proxy", "gold"), ("#4d7c0f", "#7c3aed"), strict=True):
        points(axis, [max(p["kl"], 0.0) for p in curve], [p[kind] for p in curve], fmt="o-", color=colour)
        axis.set_title("guide's value" if kind == "proxy" else "judge's reward", fontsize=9)
        axis.set_xlabel("KL from one sample, at most: log n − (n − 1)/n", fontsize=8)
    yield svg(figure, "the guide's value and the judge's reward of the best of n")
    rows = [(p["n"], number(p["kl"], 2), stacked(p["proxy"], 3, True), stacked(p["gold"], 3, True)) for p in curve]
    yield table(("n", "KL, at most", "guide's value", "judge's reward"), rows)
    yield (
        "<p class=note>Means over all ways to draw n of the samples. Where the guide's value rises and the judge's "
        "reward falls, the guide is over-optimised.</p>"
    )


def frontier_figure(shown: list[tuple[str, str, dict[str, Any]]], curve: list[dict[str, Any]] | None = None) -> str:
    """Rewards over the divergence from the strong model.

    Args:
        shown: name, colour and what was measured of each system. curve: of the best of n.
    """
    figure, axis = new_figure(5.6, 3.2)
    if curve:
        points(
            axis,
            [p["kl"] for p in curve],
            [p["gold"] for p in curve],
            fmt=".--",
            color="#7c3aed",
            label="the best of 1, 2, 4, …",
        )
    for name, colour, found in shown:
        kl, bound = found["kl"], found["kl"]["how"] == "at most"
        points(axis, [kl["value"]], [found["reward"]], fmt="<" if bound else "o", color=colour, label=name)
        if kl["low"] is not None:
            axis.hlines(found["reward"]["value"], kl["low"], kl["high"], color=colour, lw=1)
    axis.set_xlabel("KL from the strong model, nats per reply (◂ at most)", fontsize=8)
    axis.set_ylabel("judge's reward", fontsize=8)
    axis.legend(frameon=False, fontsize=7)
    return svg(figure, "the judge's reward over the divergence from the strong model, in nats per reply")


def _frontier(found: dict[str, Any]) -> Iterable[str]:
    systems = found["systems"]
    known = [(WORDS.get(n, n), INK.get(n, STEERED), s) for n, s in systems.items() if "kl" in s and "reward" in s]
    if len(known) < 2:
        return
    yield "<h2>Reward and divergence</h2>"
    yield frontier_figure(known, found.get("best_of_n"))
    ways = {"itself": "itself", "exact": "mean over its replies", "at most": "at most"}
    rows = [
        (
            name,
            stacked(own["kl"], 2),
            ways[own["kl"]["how"]],
            stacked(own["reward"], 3, True),
            number(own["cost"]["strong"], 2),
            number(own["cost"]["guide"], 2),
        )
        for name, _, own in known
    ]
    head = ("", "KL, nats per reply", "how", "reward", "tokens read by the strong model", "by each small one")
    yield table(head, rows, "dense")
    left = "".join(f" {WORDS.get(name, name)}: {html.escape(why)}." for name, why in found["without_kl"].items())
    yield (
        "<p class=note>Divergence of whole replies from what the strong model writes at the same temperature: the sum "
        "over a reply of that of each next token, over all the vocabulary. Best of n: log n − (n − 1)/n, a bound."
        f"{left}</p>"
    )


def _tax(found: dict[str, Any], kind: str) -> Iterable[str]:
    yield "<h2>Alignment tax</h2>"
    rows = []
    for how, words in (("decoded", "replies that are the answer"), ("scored", "the right letter is the likeliest")):
        if (own := found.get(how)) is None:
            continue
        accuracy = own["accuracy"]
        difference = stacked(own["difference"], 3, True) if "difference" in own else "–"
        of_decoder = stacked(accuracy[kind]) if kind in accuracy else "–"
        rows.append(
            (words, stacked(accuracy["plain"]), of_decoder, difference, p_value(own["p"]) if "p" in own else "–")
        )
    yield table(("", "plain", WORDS.get(kind, kind), "difference", "p"), rows, "dense")
    yield (
        f"<p class=note>Accuracy on {found['questions']:,} questions ({found['kind']}) with 95 % bootstrap intervals, "
        "differences in pairs; p: exact McNemar. Replies count where they are the answer and no more, but for case, "
        "spaces and the marks around words.</p>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# How replies came about
# ---------------------------------------------------------------------------------------------------------------------


def _switch(found: dict[str, Any]) -> Iterable[str]:
    yield "<h2>Where the strong model took over</h2>"
    figure, axis = new_figure(5.2, 2.3)
    kept = np.array(found["kept"])
    axis.hist(kept, bins=min(30, max(int(kept.max()) + 1, 2)), color=STEERED)
    axis.set_xlabel("tokens of the draft that were kept", fontsize=8)
    axis.set_ylabel("replies", fontsize=8)
    yield svg(figure, "how many tokens of the draft were kept")
    yield facts(
        {FATES[k]: f"{v} replies" for k, v in found["fates"].items()} | {"share drafted": f"{found['share']:.0%}"}
    )


def _traces(traces: list[dict[str, Any]]) -> Iterable[str]:
    yield "<h2>Searches, chunk by chunk</h2>"
    yield (
        "<p class=note>Every hypothesis of every round with its value, best first; those in green went on. Grey is "
        "what was written before.</p>"
    )
    for number_of, trace in enumerate(traces, 1):
        yield f"<h3>Prompt {number_of}</h3><div class=said>{html.escape(trace['prompt'].strip())}</div>"
        yield f"<p>Chosen, with value {trace['value']:+.3f} ({trace['rule']}):</p>"
        yield f"<div class=said>{html.escape(trace['best'])}</div>"
        rounds = []
        for k, hypotheses in enumerate(trace["rounds"], 1):
            rows = []
            for h in sorted(hypotheses, key=lambda h: -h["value"]):
                end = " ▪" if h["finished"] else ""
                text = f"<span class=before>{html.escape(h['before'])}</span>{html.escape(h['chunk'])}{end}"
                kind = "kept" if h["kept"] else "dropped"
                rows.append((f"{h['value']:+.3f}", Raw(f"<div class='said {kind}'>{text}</div>")))
            rounds.append(f"<h4>Round {k}</h4>" + table(("value", "hypothesis"), rows, "replies"))
        yield "<details><summary>Its rounds</summary>" + "".join(rounds) + "</details>"


def _examples(examples: list[dict[str, Any]]) -> Iterable[str]:
    yield "<p class=note>The first test prompts in the order of their hashes; not chosen by content.</p>"
    for number_of, example in enumerate(examples, 1):
        yield f"<h3>Prompt {number_of}</h3><div class=said>{html.escape(example['prompt'].strip())}</div>"
        rows, scores = [], not any("over_plain" in reply for reply in example["replies"])
        for reply in example["replies"]:
            said, draft = reply["reply"], reply.get("draft")
            text = html.escape(said)
            if draft is not None and said.startswith(draft):
                text = f"<span class=draft>{html.escape(draft)}</span>{html.escape(said[len(draft) :])}"
            cut = Raw(f"{reply['tokens']:,}{'' if reply['finished'] else '<br><small>cut off</small>'}")
            name = WORDS.get(reply["system"], reply["system"])
            judged = number(reply.get("reward"), 3, True) if scores else number(reply.get("over_plain"))
            rows.append((name, judged, cut, Raw(f"<div class=said>{text}</div>")))
        head = "reward" if scores else "preferred to plain"
        yield table(("", head, "tokens", "reply (a draft's part in green)"), rows, "replies")


STYLE = (
    "<style>.before { color: #94a3b8 } .kept { background: #dcfce7 } .draft { background: #dcfce7 } "
    ".replies td:first-child { white-space: normal; min-width: 6rem }</style>"
)
