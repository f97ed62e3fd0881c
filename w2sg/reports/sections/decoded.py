"""A decoder beside plain samples of the same prompts: rewards, wins, distance from the strong model, and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.decoding.decoders import decoder_in
from w2sg.reports.colours import looks
from w2sg.reports.figures import keyed, legend_below, new_figure, points, svg, told
from w2sg.reports.section import Report, Section, name_of
from w2sg.reports.words import (
    NONE,
    counted,
    cut_off_warning,
    estimate,
    judged,
    no_verdict_warning,
    number,
    p_value,
    stacked,
    unjudged,
    wins_cell,
)

COLUMNS = (  # of the summary of runs
    "wins over plain",
    "wins over plain, length controlled",
    "reward − plain",
    "judge's reward",
    "KL, nats per reply",
    "surprise",
    "tokens",
    "strong tokens read per token",
    "small tokens read per token",
)


def words_of(decoding: Mapping[str, Any]) -> tuple[str, str]:
    """What a report's decoder is called, and its main options; earlier reports have the options alone."""
    if "words" in decoding:
        return decoding["words"]["name"], decoding["words"]["setting"]
    decoder = decoder_in(decoding["decoder"])
    kind = decoding["decoder"]["kind"]
    return (kind, "an unknown decoder") if decoder is None else (decoder.words, decoder.setting())


def steered(report: Report) -> Mapping[str, Any] | None:
    """What was measured of the decoder; None where plain samples are all there is."""
    decoding = report["decoding"]
    return decoding["systems"].get(decoding["decoder"]["kind"])


def measured_in(report: Report) -> tuple[bool, bool, bool]:
    """Whether any system has a reward, verdicts, and a surprise."""
    systems = report["decoding"]["systems"].values()
    return tuple(any(system.get(key) for system in systems) for key in ("reward", "against", "surprise"))


class Decoded(Section):
    """The systems side by side (report.json: ``decoding.systems``, ``decoder``, ``words``, ``prompts``)."""

    key, template = "systems", "decoded.html"

    def show(self, report: Report) -> dict[str, Any]:
        """Figure and table; what no system has is left out."""
        rewarded, compared, surprised = measured_in(report)
        rows = []
        for name, system in report["decoding"]["systems"].items():
            against, cells = system.get("against", {}).get("plain", {}), [name_of(report, name)]
            cells += [stacked(system.get("reward", NONE), 3, True)] if rewarded else []
            if compared:
                cells += [stacked(against.get("gap", NONE), 3, True)] if rewarded else []
                cells += [wins_cell(against), p_value(against["p"]) if "p" in against else "–"]
                cells += [wins_cell(against, "length_controlled")]
            cells += [stacked(system.get("surprise", NONE), 2)] if surprised else []
            length = system["length"]
            cells += [number(length["mean"], 1), f"{length['truncated']:.0%}", number(system["characters"], 0)]
            rows.append((*cells, f"{system['distinct_1']:.2f} / {system['distinct_2']:.2f}"))
        head = ["", *(["reward"] if rewarded else []), *(["reward − plain"] if rewarded and compared else [])]
        head += ["wins over plain", "p", "… length\ncontrolled"] if compared else []
        head += ["surprise"] if surprised else []
        head += ["tokens", "cut off", "characters", "distinct 1 / 2"]
        return {
            "figure": _figure(report),
            "head": head,
            "rows": rows,
            "compared": compared,
            "surprised": surprised,
        }

    def warnings(self, report: Report) -> list[str]:
        """A decoder that hurts, wins that are a matter of length, replies that were cut off."""
        lines, decoding = [], report["decoding"]
        against = (steered(report) or {}).get("against", {}).get("plain")
        if against:
            gap, raw, controlled = against.get("gap"), against["win_rate"], against["length_controlled"]
            if gap and gap["high"] is not None and gap["high"] < 0:
                lines.append(
                    f"{decoding['decoder']['kind']} hurts: the judge's reward is lower than that of plain samples "
                    f"({gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]){_remedy(decoding['decoder'])}"
                )
            if raw["low"] is not None and controlled["low"] is not None and raw["low"] > 0.5 >= controlled["low"]:
                lines.append("its wins over plain samples are not resolved once length is controlled")
        over = {
            f"{name} over {other}": measured
            for name, system in decoding["systems"].items()
            for other, measured in system.get("against", {}).items()
        }
        shares = {name: system["length"]["truncated"] for name, system in decoding["systems"].items()}
        return lines + no_verdict_warning(over) + cut_off_warning(shares, systems=decoding["systems"])

    def finding(self, report: Report) -> str:
        """The win rates."""
        decoding, system = report["decoding"], steered(report)
        if system is None:
            prompts = counted(decoding["prompts"], "test prompts")
            return f"Plain samples to {prompts}; other decoders are compared with these."
        if "against" not in system:
            return "No judge was given: rewards and win rates are unknown."
        others = {"plain": "plain samples of the strong model", "guide": "the small aligned model alone"}
        over = {other: system["against"][other] for other in others if other in system["against"]}
        parts = [
            f"against {others[other]} {judged(measured['win_rate'], 0.5)}{unjudged(measured)}"
            for other, measured in over.items()
        ]
        if any(measured.get("without_verdict") for measured in over.values()):
            return f"The win rate is {'; '.join(parts)}."
        return f"On {counted(decoding['prompts'], 'test prompts')} the win rate is {'; '.join(parts)}."

    def summary(self, report: Report) -> dict[str, Any]:
        """The decoder's (or, alone, plain samples') reward, wins, distance, length and cost."""
        system = steered(report) or report["decoding"]["systems"]["plain"]
        against = system.get("against", {}).get("plain", {})
        measured = (
            against.get("win_rate"),
            against.get("length_controlled"),
            against.get("gap"),
            system.get("reward"),
            system.get("kl"),
            system.get("surprise"),
            {"value": system["length"]["mean"]},
            {"value": system["cost"]["strong"]},
            {"value": system["cost"]["guide"]},
        )
        return dict(zip(COLUMNS, measured, strict=True))

    def table(self, report: Report) -> Any:
        """The systems side by side."""
        from rich.table import Table

        grid, (rewarded, compared, _) = Table(), measured_in(report)
        head = ["", *(["reward"] if rewarded else []), *(["wins over plain", "length controlled"] if compared else [])]
        for column in (*head, "tokens", "strong / guide tokens read per token"):
            grid.add_column(column, justify="left" if not column else "right")
        for name, system in report["decoding"]["systems"].items():
            against = system.get("against", {}).get("plain", {})
            cells = [system.get("reward", NONE)] if rewarded else []
            cells += [against.get(key, NONE) for key in ("win_rate", "length_controlled")] if compared else []
            cost = f"{system['cost']['strong']:.1f} / {system['cost']['guide']:.1f}"
            grid.add_row(name, *map(estimate, cells), f"{system['length']['mean']:.0f}", cost)
        return grid


def _remedy(decoder: Mapping[str, Any]) -> str:
    """What to try with a guide that misleads; nothing for decoders that have none."""
    if not isinstance(guide := decoder.get("guide"), Mapping):
        return ""
    mean = "normalise=mean, " if guide.get("implicit") and guide.get("normalise") != "mean" else ""
    return f"; try a smaller weight of the guide, another guide, {mean}or none"


def _figure(report: Report) -> Markup | str:
    """Rewards, and rewards over the strong model's surprise: what is gained, and how far from it."""
    known = {name: system for name, system in report["decoding"]["systems"].items() if "reward" in system}
    if not known:
        return ""
    far = all("surprise" in system for system in known.values())
    figure, axes = new_figure(4.2 * (1 + far), 0.5 * len(known) + 1.4, 1 + far)
    axes, look = np.atleast_1d(axes), looks(report["decoding"]["systems"])
    for row, (name, system) in enumerate(known.items()):
        style = {"fmt": look[name].marker, "color": look[name].colour}
        points(axes[0], [row], [system["reward"]], across=True, **style)
        if far:
            keyed(axes[1], system["surprise"]["value"], system["reward"], name_of(report, name), look[name])
    axes[0].set_yticks(range(len(known)), [name_of(report, name) for name in known], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("judge's reward", fontsize=8)
    if far:
        axes[1].set_xlabel("surprise: minus log-probability per token\nunder the strong model", fontsize=8)
        axes[1].set_ylabel("judge's reward", fontsize=8)
        legend_below(figure, axes[1], 3)
    words = told("judge's reward", {name_of(report, name): system["reward"] for name, system in known.items()})
    if far:
        surprises = {name_of(report, name): system["surprise"] for name, system in known.items()}
        words += f"; {told('surprise of the strong model per token', surprises, 2)}"
    return svg(figure, words)


class Cost(Section):
    """Tokens read and time (report.json: ``decoding.systems.*.cost``)."""

    key, template = "cost", "cost.html"

    def show(self, report: Report) -> dict[str, Any]:
        """A row for each system."""
        systems = report["decoding"]["systems"]
        plain = systems["plain"]["cost"]["seconds"]
        rows = [
            (
                name_of(report, name),
                number(system["cost"]["strong"], 2),
                number(system["cost"]["guide"], 2),
                number(1000 * system["cost"]["seconds"], 1),
                number(system["cost"]["seconds"] / plain, 2) if plain else "–",
            )
            for name, system in systems.items()
        ]
        return {"rows": rows}
