"""Contrastive decoding over alpha: rewards, wins, lengths, beside plain samples of the same prompts.

Shapes: N prompts, each answered once with every setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports.colours import COLOURS, NOTE, SLATE, ink_on
from w2sg.reports.figures import band, new_figure, points, svg, told
from w2sg.reports.section import Report, Section
from w2sg.reports.words import NONE, Cell, counted, judged, no_verdict_warning, p_value, stacked, wilson, wins_cell

KINDS = {"implicit_per_token": "implicit reward per token", "explicit": "explicit reward"}
DIGITS = {"implicit_per_token": 4, "explicit": 3}
INK = {kind: COLOURS[kind] for kind in KINDS}


class AlphaSweep(Section):
    """Every setting of the sweep (report.json: ``text.alphas``)."""

    key, template = "alpha_sweep", "alpha_sweep.html"

    @classmethod
    def measure(
        cls,
        alphas: Mapping[str, float | None],
        chosen: str,
        lengths: Mapping[str, np.ndarray],
        finished: Mapping[str, np.ndarray],
        rewards: Mapping[str, Mapping[str, np.ndarray]],
        compared: Mapping[str, Any] | None = None,
    ) -> AlphaSweep:
        """From what was measured of each reply, by setting.

        Args:
            alphas: of each setting, plain samples first (None).
            chosen: which setting the samples for training were written with.
            lengths: [N] tokens.
            finished: [N] whether the reply came to its end.
            rewards: [N] by kind, "implicit", "implicit_per_token" and, where a judge gives it, "explicit".
            compared: each setting over plain samples by a judge that compares and gives no rewards.
        """
        names, count = list(alphas), len(lengths[chosen])
        plain, bootstrap = names[0], Bootstrap(count)
        sweep: dict[str, Any] = {
            "names": names,
            "alphas": list(alphas.values()),
            "chosen": chosen,
            "prompts": count,
            "length": {n: comparisons.length_summary(lengths[n], ~finished[n]) for n in names},
        }
        for kind, values in rewards.items():
            scaled = comparisons.min_max_per_prompt(dict(values))
            sweep[kind] = {
                "mean": {n: bootstrap.mean(values[n]).as_dict() for n in names},
                "scaled": {n: bootstrap.mean(scaled[n]).as_dict() for n in names},
                "over_plain": {
                    n: {
                        "gap": comparisons.reward_gap(values[n], values[plain], bootstrap).as_dict(),
                        "standardised": comparisons.standardised_gap(values[n], values[plain], bootstrap).as_dict(),
                        "p": comparisons.paired_test(values[n], values[plain]),
                    }
                    for n in names[1:]
                },
                "wins": comparisons.win_matrix(dict(values), bootstrap),
                "length_correlation": {
                    n: comparisons.reward_length_correlation(values[n], lengths[n], bootstrap).as_dict() for n in names
                },
            }
        if judge := rewards.get("explicit"):
            sweep["explicit"]["length_controlled"] = {
                n: comparisons.length_controlled_win_rate(
                    judge[n], judge[plain], lengths[n], lengths[plain], bootstrap
                ).as_dict()
                for n in names[1:]
            }
        if compared:
            sweep["compared"] = {"over_plain": dict(compared)}
        return cls(content={"text": {"alphas": sweep}})

    def show(self, report: Report) -> dict[str, Any] | None:
        """Figures, and a table for each kind of reward."""
        if (sweep := report["text"].get("alphas")) is None:
            return None
        return {
            "sweep": sweep,
            "figures": [reward_figure(sweep), matrix_figure(sweep) + length_figure(sweep)],
            "tables": _compared(sweep) + [(KINDS[kind].capitalize(), *_table(sweep, kind)) for kind in _kinds(sweep)],
        }

    def warnings(self, report: Report) -> list[str]:
        """Contrastive samples without a verdict, and those that were cut off."""
        if not (sweep := report["text"].get("alphas")):
            return []
        over = sweep.get("compared", {}).get("over_plain", {})
        lines = no_verdict_warning({f"alpha {name} over plain": measured for name, measured in over.items()})
        if (cut := sweep["length"][sweep["chosen"]]["truncated"]) <= 0.2:
            return lines
        return [
            *lines,
            f"contrastive decoding: {cut:.0%} of its replies were cut off at max_new_tokens; the student is not taught "
            "to end there",
        ]

    def finding(self, report: Report) -> str:
        """The gaps over plain samples at the alpha that was used."""
        if (sweep := report["text"].get("alphas")) is None:
            return ""
        gaps = [
            f"{KINDS[kind]} {judged(sweep[kind]['over_plain'][sweep['chosen']]['gap'], 0.0, DIGITS[kind], True)}"
            for kind in _kinds(sweep)
        ]
        return (
            f"Contrastive samples at alpha {sweep['chosen']} over plain ones of the aligned weak model, on "
            f"{counted(sweep['prompts'], 'test prompts')}: {', '.join(gaps)}."
        )

    def summary(self, report: Report) -> dict[str, Any]:
        """Gaps over plain samples at the alpha that was trained on."""
        sweep = report["text"].get("alphas", {})
        words = {"implicit": "implicit reward over plain", "explicit": "judge's reward over plain"}
        return {
            text: sweep[kind]["over_plain"][sweep["chosen"]]["gap"] for kind, text in words.items() if kind in sweep
        }


def _kinds(sweep: Mapping[str, Any]) -> list[str]:
    return [kind for kind in KINDS if kind in sweep]


def _order(sweep: Mapping[str, Any]) -> list[str]:
    """Plain sampling, then by alpha."""
    alphas = dict(zip(sweep["names"], sweep["alphas"], strict=True))
    return sorted(alphas, key=lambda name: (alphas[name] is not None, alphas[name] or 0.0, name))


def length_cells(length: Mapping[str, float], count: int) -> tuple[Cell, Cell]:
    """Cells of a table: tokens, and the share of ``count`` replies that were cut off."""
    return (
        Cell(f"{length['mean']:,.1f}", f"median {length['median']:,.0f}"),
        stacked(wilson(length["truncated"], count), 1, kind="%"),
    )


def _table(sweep: Mapping[str, Any], kind: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Heading and rows."""
    measured, digits, plain, rows = sweep[kind], DIGITS[kind], sweep["names"][0], []
    wins, controlled = measured["wins"], measured.get("length_controlled")
    for name in _order(sweep):
        over = measured["over_plain"].get(name, {"gap": NONE, "standardised": NONE})
        row, column = wins["names"].index(name), wins["names"].index(plain)
        cells = [
            f"{name} (used)" if name == sweep["chosen"] else name,
            stacked(measured["mean"][name], digits, True),
            stacked(over["gap"], digits, True),
            stacked(over["standardised"], 2, True),
            stacked({key: wins[key][row][column] for key in NONE}),
            p_value(over["p"]) if "p" in over else "–",
            *([] if controlled is None else [stacked(controlled.get(name, NONE))]),
            stacked(measured["length_correlation"][name], 2, True),
        ]
        rows.append((*cells, *length_cells(sweep["length"][name], sweep["prompts"])))
    head = ["alpha", "reward", "reward − plain", "standardised", "wins over\nplain", "p"]
    head += [] if controlled is None else ["… length\ncontrolled"]
    return [*head, "correlation", "tokens", "cut off"], rows


def _compared(sweep: Mapping[str, Any]) -> list[tuple[str, list[str], list[tuple[Any, ...]]]]:
    """Of a judge that compares: how often each setting beats plain sampling."""
    rows = []
    for name in _order(sweep):
        if over := sweep.get("compared", {}).get("over_plain", {}).get(name):
            words = f"{name} (used)" if name == sweep["chosen"] else name
            rows.append((words, wins_cell(over), wins_cell(over, "length_controlled"), p_value(over["p"])))
    return [("By the judge", ["alpha", "wins over\nplain", "… length\ncontrolled", "p"], rows)] if rows else []


def reward_figure(sweep: Mapping[str, Any]) -> Markup:
    """Rewards over alpha, scaled per prompt, and their gaps over plain sampling."""
    kinds, plain = _kinds(sweep), sweep["names"][0]
    figure, axes = new_figure(3.7 * (1 + len(kinds)), 3.1, 1 + len(kinds))
    for kind in kinds:
        scaled = sweep[kind]["scaled"]
        _over_alpha(axes[0], sweep, scaled, INK[kind], KINDS[kind])
        band(axes[0], scaled[plain], INK[kind])
    axes[0].set_title("scaled per prompt", fontsize=9)
    for axis, kind in zip(axes[1:], kinds, strict=True):
        _over_alpha(axis, sweep, _gaps(sweep, kind), INK[kind])
        axis.axhline(0, color=INK[kind], ls="--", lw=1)
        axis.set_title(f"{KINDS[kind]}, minus plain", fontsize=9)
    _finish(figure, axes, sweep)
    shown = [
        told(f"{KINDS[kind]} minus that of plain sampling, by alpha", _gaps(sweep, kind), DIGITS[kind])
        for kind in kinds
    ]
    return svg(figure, f"rewards scaled per prompt, over alpha; {'; '.join(shown)}")


def _gaps(sweep: Mapping[str, Any], kind: str) -> dict[str, Mapping[str, Any]]:
    return {name: over["gap"] for name, over in sweep[kind]["over_plain"].items()}


def length_figure(sweep: Mapping[str, Any]) -> Markup:
    """Reply length and the share of replies that were cut off, over alpha."""
    figure, axes = new_figure(5.0, 2.9, 2)
    lengths, plain, ink = sweep["length"], sweep["names"][0], COLOURS["student"]
    for key, colour in (("mean", ink), ("median", SLATE)):
        _over_alpha(axes[0], sweep, {n: {**NONE, "value": v[key]} for n, v in lengths.items()}, colour, key)
        axes[0].axhline(lengths[plain][key], color=colour, ls="--", lw=1)
    axes[0].set_title("tokens per reply", fontsize=9)
    axes[0].set_ylim(0, 1 + 1.1 * max(v[key] for v in lengths.values() for key in ("mean", "median")))
    cut = {n: wilson(v["truncated"], sweep["prompts"]) for n, v in lengths.items()}
    _over_alpha(axes[1], sweep, cut, ink)
    band(axes[1], cut[plain], ink)
    axes[1].set_title("share cut off", fontsize=9)
    axes[1].set_ylim(-0.03, 1.03)
    _finish(figure, axes, sweep)
    tokens = told("tokens per reply by alpha", {n: v["mean"] for n, v in lengths.items()}, 1)
    return svg(figure, f"{tokens}; {told('share of replies cut off', cut)}")


def matrix_figure(sweep: Mapping[str, Any]) -> Markup:
    """How often each setting beats each other one."""
    kind = "explicit" if "explicit" in sweep else "implicit_per_token"
    wins, order = sweep[kind]["wins"], _order(sweep)
    place = [wins["names"].index(name) for name in order]
    low, value, high = (
        np.array([[np.nan if wins[key][i][j] is None else wins[key][i][j] for j in place] for i in place])
        for key in ("low", "value", "high")
    )
    side = 1.5 + (0.44 if len(order) < 9 else 0.36) * len(order)
    figure, axis = new_figure(side + 0.25, side)
    shades = axis.imshow(value, cmap="RdBu", vmin=0, vmax=1).to_rgba
    for i, j in zip(*np.nonzero(~np.isnan(value)), strict=True):
        clear = low[i, j] > 0.5 or high[i, j] < 0.5
        ink = {"color": ink_on(*shades(value[i, j])), "weight": "bold" if clear else "normal"}
        words = f"{value[i, j]:.2f}".removeprefix("0")
        axis.text(j, i, words, ha="center", va="center", fontsize=8, **ink)
    axis.set_xticks(range(len(order)), order, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(order)), order)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        labels[order.index(sweep["chosen"])].set_weight("bold")
    axis.spines[:].set_visible(False)
    axis.set_title(f"win rate of row over column,\nby {KINDS[kind]}", fontsize=9)
    axis.set_xlabel("bold: interval without .5; bold setting: used", fontsize=8)
    over = {name: None if np.isnan(value[k, 0]) else float(value[k, 0]) for k, name in enumerate(order) if k}
    return svg(figure, told(f"win rates between settings by {KINDS[kind]}; over {order[0]}", over, 2))


def _over_alpha(
    axis: Any, sweep: Mapping[str, Any], estimates: dict[str, dict[str, Any]], colour: str, label: str | None = None
) -> None:
    """Estimates over alpha with intervals; a setting of another temperature (gamma) stands beside the line."""
    alphas = dict(zip(sweep["names"], sweep["alphas"], strict=True))
    for style, size, tilted in (("-o", 4, False), ("D", 6, True)):
        names = [n for n in _order(sweep) if alphas[n] is not None and ("gamma" in n) == tilted]
        if names:
            x, y = [alphas[n] for n in names], [estimates[n] for n in names]
            points(axis, x, y, fmt=style, ms=size, color=colour, label=None if tilted else label)


def _finish(figure: Any, axes: Any, sweep: Mapping[str, Any]) -> None:
    """Mark the alpha used, and say what the lines are."""
    used = sweep["alphas"][sweep["names"].index(sweep["chosen"])]
    for axis in axes:
        axis.axvline(used, color=NOTE, ls=":", lw=1, label="alpha used" if axis is axes[0] else None)
        axis.set_xlabel("alpha", fontsize=8)
    axes[0].plot([], [], color=NOTE, ls="--", lw=1, label="plain sampling")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
