"""Figures of many label runs: losses side by side, over a setting, over the strong model's size, over gaps, over pairs.

Each is drawn only where the runs have the axis; whiskers are one standard deviation over repeats unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.compare.names import settings_in_words, shortest
from w2sg.reports.colours import COLOURS, INK, MARKERS, NOTE, PAPER, assigned, ink_on
from w2sg.reports.figures import ends, legend_below, new_figure, reach, svg, told
from w2sg.reports.section import Report
from w2sg.reports.words import LEVEL, counted, number

BASELINES = {"weak": "weak", "ceiling": "ceiling", "zero_shot": "untrained"}
PANELS = 3  # beside each other in one figure
RATE, PAIR = "dataset.noise.rate", ("weak.name", "strong.name")
Rows = Sequence[Mapping[str, Any]]


def settings_of(content: Report) -> list[str]:
    """The settings, in their order."""
    return list(dict.fromkeys(row["setting"] for row in content["cells"]))


def colours_of(content: Report) -> dict[str, str]:
    """One colour on the page for each reference, loss and weak model."""
    losses = (row["loss"] for row in content["cells"])
    weak = (row["values"][PAIR[0]] for row in content["cells"] if PAIR[0] in row["values"])
    return assigned([*BASELINES, *losses, *weak])


def markers_of(content: Report) -> dict[str, str]:
    """One marker for each loss."""
    losses = dict.fromkeys(row["loss"] for row in content["cells"])
    return {loss: MARKERS[k % len(MARKERS)] for k, loss in enumerate(losses)}


def bars_figure(content: Report) -> Markup:
    """Figure 2 of arXiv 2502.11107: a group of bars per pair (and setting), a bar per loss, sd over seeds."""
    settings, colour = settings_of(content), colours_of(content)
    losses = list(dict.fromkeys(row["loss"] for row in content["cells"]))
    width = 0.82 / len(losses)
    figure, axes = new_figure(max(6.5, 1.2 + len(settings) * max(1.1, 0.3 * len(losses))), 3.8)
    lowest, highest, seen = 1.0, 0.0, set()

    def once(label: str) -> str | None:
        return None if label in seen else seen.add(label) or label

    for x, setting in enumerate(settings):
        rows = {row["loss"]: row for row in content["cells"] if row["setting"] == setting}
        for k, loss in enumerate(losses):
            if loss not in rows:
                continue
            accuracy = rows[loss]["accuracy"]["student"]
            place = x + (k - (len(losses) - 1) / 2) * width
            label = once(loss.replace("_", " "))
            axes.bar(place, accuracy["mean"], width * 0.92, color=colour[loss], label=label)
            if accuracy["sd"] is not None:
                axes.errorbar(place, accuracy["mean"], yerr=accuracy["sd"], color=INK, capsize=2, lw=1)
            lowest, highest = min(lowest, accuracy["mean"]), max(highest, accuracy["mean"])
        for model, style in (("weak", "-"), ("ceiling", "--"), ("zero_shot", ":")):
            means = [row["accuracy"][model]["mean"] for row in rows.values() if model in row["accuracy"]]
            if means:
                line = {"color": COLOURS[model], "ls": style, "lw": 1.8, "label": once(BASELINES[model])}
                axes.hlines(np.mean(means), x - 0.46, x + 0.46, **line)
                lowest, highest = min(lowest, *means), max(highest, *means)
    axes.set_ylim(max(0.0, lowest - 0.05), min(1.0, highest + 0.03))
    words = [s.replace(", ", "\n").replace(" → ", "\n→ ") for s in settings]
    axes.set_xticks(range(len(settings)), words, fontsize=8 if len(settings) <= 4 else 7)
    axes.set_ylabel("test accuracy", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return svg(figure, _students("accuracy of the student by setting and loss", content["cells"]))


def lines_figure(content: Report) -> Markup:
    """Accuracy over the noise rate, or over the one number that runs differ in: a panel for the rest of the setting."""
    cells = content["cells"]
    numeric = [key for key in cells[0]["values"] if _is_axis([row["values"].get(key) for row in cells])]
    key = RATE if RATE in numeric else numeric[0] if len(numeric) == 1 else None
    if key is None:
        return Markup()
    colour, marker = colours_of(content), markers_of(content)

    def draw(axis: Any, group: Rows) -> None:
        for loss in dict.fromkeys(row["loss"] for row in group):
            found = [(row["values"][key], row["accuracy"]["student"]) for row in group if row["loss"] == loss]
            _line(axis, found, colour[loss], marker[loss], loss.replace("_", " "))
        for (model, words), ls in zip(BASELINES.items(), ("-.", "--", ":"), strict=True):
            _reference(axis, group, lambda row: row["values"][key], model, words, ls)
        axis.set_xlabel(key, fontsize=9)

    head = (key, *(k for k in cells[0]["values"] if k != key), "loss", "accuracy of the student", "sd")
    data = [
        (row["values"][key], *(v for k, v in row["values"].items() if k != key), row["loss"], *_accuracy(row))
        for row in cells
    ]
    return _panels(cells, (key,), False, draw, _students(f"accuracy over {key}, by loss", cells), (head, data))


def size_figure(content: Report) -> Markup:
    """Accuracy over the size of the strong model: a line for each weak supervisor, and one for ground truth."""
    cells = [row for row in content["cells"] if (row.get("parameters") or {}).get("strong")]
    if len({row["parameters"]["strong"] for row in cells}) < 2:
        return Markup()
    colour = colours_of(content)
    names = shortest([str(row["values"].get(PAIR[0], "the weak model")) for row in cells])

    def draw(axis: Any, group: Rows) -> None:
        weak = dict.fromkeys(str(row["values"].get(PAIR[0], "the weak model")) for row in group)
        for k, name in enumerate(weak):
            mine = [row for row in group if str(row["values"].get(PAIR[0], "the weak model")) == name]
            found = [(row["parameters"]["strong"], row["accuracy"]["student"]) for row in mine]
            ink = colour.get(name, COLOURS["student"])
            _line(axis, found, ink, MARKERS[k % len(MARKERS)], f"taught by {names[name]}")
        for model, words, ls in (("ceiling", "ground truth", "--"), ("zero_shot", "untrained", ":")):
            _reference(axis, group, lambda row: row["parameters"]["strong"], model, words, ls)
        axis.set_xscale("log")
        sizes = sorted({row["parameters"]["strong"] for row in group})
        axis.set_xticks(sizes, [_size(n) for n in sizes])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("parameters of the strong model", fontsize=9)

    head = ("parameters of the strong model", "setting", "loss", "accuracy of the student", "sd", "of the ceiling")
    data = [
        (row["parameters"]["strong"], row["setting"], row["loss"], *_accuracy(row), *_accuracy(row, "ceiling")[:1])
        for row in cells
    ]
    words = _students("accuracy of the student over the strong model's size, by weak supervisor", cells)
    return _panels(cells, PAIR, True, draw, words, (head, data))


def gap_figure(content: Report) -> Markup:
    """PGR over the gap between weak model and ceiling, for cells whose gap is resolved."""
    cells = [row for row in content["cells"] if row["pgr"]["resolved"] and row["pgr"]["value"] is not None]
    if len({round(row["pgr"]["gap"], 4) for row in cells}) < 3:
        return Markup()
    colour, marker, seen = colours_of(content), markers_of(content), set()
    figure, axis = new_figure(6.4, 3.4)
    for row in cells:
        pgr, loss = row["pgr"], row["loss"]
        style = {"fmt": marker[loss], "color": colour[loss], "ms": 5, "lw": 1, "capsize": 2}
        style["label"] = None if loss in seen else loss.replace("_", " ")
        seen.add(loss)
        if pgr["low"] is not None:
            style["yerr"] = reach(pgr["value"], pgr["low"], pgr["high"])
        axis.errorbar(pgr["gap"], pgr["value"], **style)
    for level, ls in ((0, "-"), (1, ":")):
        axis.axhline(level, color=NOTE, lw=0.8, ls=ls)
    values = [row["pgr"]["value"] for row in cells]
    axis.set_ylim(max(-2.0, min([-0.1, *values]) - 0.4), min(3.0, max([1.1, *values]) + 0.4))  # whiskers may be endless
    axis.set_xlabel("gap: accuracy of the ceiling − accuracy of the weak model", fontsize=9)
    axis.set_ylabel("PGR, with 95 % interval", fontsize=9)
    legend_below(figure, axis, 3)
    left_out = len(content["cells"]) - len(cells)
    words = told("performance gap recovered over the gap", {_name(row): row["pgr"] for row in cells}, 2)
    data = [(row["setting"], row["loss"], number(row["pgr"]["gap"]), *ends(row["pgr"])) for row in cells]
    without = f"; without {counted(left_out, 'cells')} whose gap is not resolved" if left_out else ""
    return svg(figure, words + without, (("setting", "loss", "gap", "PGR", "low", "high"), data))


def pairs_figure(content: Report) -> Markup:
    """A heat map of the PGR for each loss and rest of the setting: weak models down, strong models across."""
    cells = [row for row in content["cells"] if all(key in row["values"] for key in PAIR)]
    weak, strong = (list(dict.fromkeys(str(row["values"][key]) for row in cells)) for key in PAIR)
    if len(weak) < 2 or len(strong) < 2:
        return Markup()
    rows, columns = shortest(weak), shortest(strong)

    from matplotlib import colormaps

    def draw(axis: Any, group: Rows) -> None:
        table = np.full((len(weak), len(strong)), np.nan)
        for row in group:
            place = weak.index(str(row["values"][PAIR[0]])), strong.index(str(row["values"][PAIR[1]]))
            resolved = row["pgr"]["resolved"] and row["pgr"]["value"] is not None
            table[place] = row["pgr"]["value"] if resolved else np.nan
            shown = f"{table[place]:.2f}" if resolved else "no gap"
            ink = ink_on(*colormaps["RdBu"]((table[place] + 1) / 2)) if resolved else NOTE
            axis.text(place[1], place[0], shown, ha="center", va="center", fontsize=8, color=ink)
        axis.pcolormesh(np.arange(len(strong)), np.arange(len(weak)), table, cmap="RdBu", vmin=-1, vmax=1)
        tilted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(len(strong)), [columns[n] for n in strong], **tilted)
        axis.set_yticks(range(len(weak)), [rows[n] for n in weak])
        axis.invert_yaxis()
        axis.spines[:].set_visible(False)
        axis.set_xlabel("strong model", fontsize=9)

    pgr = {_name(row): row["pgr"] if row["pgr"]["resolved"] else None for row in cells}
    words = told("PGR of each pair", {k: v if v is not None else {"value": None} for k, v in pgr.items()}, 2)
    data = [(*(row["values"][key] for key in PAIR), row["loss"], *ends(pgr[_name(row)])) for row in cells]
    head = ("weak", "strong", "loss", "PGR", "low", "high")
    return _panels(cells, PAIR, True, draw, words, (head, data), "weak model", 0.9 + 0.42 * len(weak))


def difference_figure(content: Report) -> Markup:
    """Student minus teacher with intervals, a row per setting and loss."""
    entries, colour, marker = content["student_against_teacher"], colours_of(content), markers_of(content)
    settings = settings_of(content)
    figure, axes = new_figure(7.4, 0.8 + 0.2 * len(entries) + 0.25 * len(settings))
    y, ticks, names = 0.0, [], []
    for setting in settings:
        over = {"transform": axes.get_yaxis_transform(), "va": "center", "bbox": {"fc": PAPER, "ec": "none", "pad": 1}}
        axes.text(0.01, y, setting, fontsize=8, weight="bold", **over)
        y += 1
        for entry in (e for e in entries if e["setting"] == setting):
            firm = entry["p_holm"] < LEVEL
            axes.errorbar(
                entry["difference"],
                y,
                xerr=reach(entry["difference"], entry["low"], entry["high"]),
                color=colour[entry["loss"]],
                marker=marker[entry["loss"]],
                ms=5,
                mfc=colour[entry["loss"]] if firm else PAPER,
                lw=1.3,
                capsize=2,
            )
            ticks.append(y)
            names.append(entry["loss"].replace("_", " "))
            y += 1
    axes.axvline(0, color=NOTE, lw=1)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_ylim(y - 0.4, -0.8)
    axes.set_xlabel("accuracy of the student − accuracy of its teacher", fontsize=9)
    found = {f"{e['setting']}, {e['loss']}".replace("_", " "): {**e, "value": e["difference"]} for e in entries}
    return svg(figure, told("accuracy of the student minus that of its teacher", found))


# ---------------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------------


def _is_axis(values: Sequence[Any]) -> bool:
    """Whether values are numbers that differ."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values) and len(set(values)) > 1


def _line(axis: Any, found: Sequence[tuple[float, Mapping[str, Any]]], colour: str, marker: str, label: str) -> None:
    """Means over x with their standard deviations."""
    found = sorted(found, key=lambda pair: pair[0])
    spread = [accuracy["sd"] or 0.0 for _, accuracy in found]
    style = {"color": colour, "marker": marker, "ms": 4, "lw": 1.3, "capsize": 2, "label": label}
    axis.errorbar([x for x, _ in found], [accuracy["mean"] for _, accuracy in found], yerr=spread, **style)


def _reference(
    axis: Any, group: Rows, x_of: Callable[[Mapping[str, Any]], float], model: str, label: str, ls: str
) -> None:
    """A reference over x, the mean of all cells that have it there."""
    by_x: dict[float, list[float]] = {}
    for row in group:
        if model in row["accuracy"]:
            by_x.setdefault(x_of(row), []).append(row["accuracy"][model]["mean"])
    x = sorted(by_x)
    if x:
        axis.plot(x, [np.mean(by_x[at]) for at in x], color=COLOURS[model], lw=1.3, ls=ls, label=label)


def _panels(
    cells: Rows,
    without: Sequence[str],
    by_loss: bool,
    draw: Callable[[Any, Rows], None],
    words: str,
    data: tuple[Sequence[str], Sequence[Sequence[Any]]],
    label: str = "test accuracy",
    height: float = 2.6,
) -> Markup:
    """A panel for each setting but for the keys that the panel itself shows, `PANELS` beside each other.

    Args:
        without: keys that the panel shows. by_loss: whether losses have panels of their own.
    """

    def rest(row: Mapping[str, Any]) -> tuple:
        return tuple((k, str(v)) for k, v in row["values"].items() if k not in without), row["loss"] if by_loss else ""

    groups = list(dict.fromkeys(map(rest, cells)))
    settings = settings_in_words([dict(values) for values, _ in groups])
    drawn = []
    for start in range(0, len(groups), PANELS):
        part = groups[start : start + PANELS]
        figure, axes = new_figure(1.2 + 3.9 * len(part), 0.8 + height, len(part))
        for axis, group, setting in zip(np.atleast_1d(axes), part, settings[start:], strict=False):
            draw(axis, [row for row in cells if rest(row) == group])
            title = [setting] * bool(group[0]) + [group[1].replace("_", " ")] * by_loss
            axis.set_title(", ".join(title), fontsize=9)
        np.atleast_1d(axes)[0].set_ylabel(label, fontsize=9)
        if np.atleast_1d(axes)[0].get_legend_handles_labels()[0]:
            legend_below(figure, np.atleast_1d(axes)[0], 3)
        alt = words if start == 0 else f"{words.partition(':')[0]}, in more settings"
        drawn.append(svg(figure, alt, data if start + PANELS >= len(groups) else None))
    return Markup("\n").join(drawn)


def _accuracy(row: Mapping[str, Any], model: str = "student") -> tuple[str, str]:
    accuracy = row["accuracy"][model]
    return number(accuracy["mean"]), number(accuracy["sd"])


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['setting']}, {row['loss']}".replace("_", " ")


def _students(what: str, cells: Rows) -> str:
    """The words of a figure of students' accuracies."""
    return told(what, {_name(row): row["accuracy"]["student"]["mean"] for row in cells})


def _size(parameters: float) -> str:
    """As it is written on models: 124M, 1.3B.

    >>> _size(124439808), _size(1315758080)
    ('124M', '1.3B')
    """
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.{0 if parameters >= 1e7 else 1}f}M"
