"""The page of a run whose models write: contrastive decoding, the trained models, and what they said."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import numpy as np

from w2sg.reports.html import (
    COLOURS,
    Raw,
    band,
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
from w2sg.reports.pages.labels import (
    ROLES,
    accuracy_figure,
    metrics_table,
    opening,
    pgr_sentence,
    provenance,
    short,
    tests_table,
)

KINDS = {"implicit_per_token": "implicit reward per token", "explicit": "explicit reward"}
DIGITS = {"implicit_per_token": 4, "explicit": 3}
INK = {"implicit_per_token": COLOURS["implicit_per_token"], "explicit": COLOURS["explicit"]}
NONE = {"value": None, "low": None, "high": None}


def text_page(content: dict[str, Any], curves: dict[str, list[dict[str, float]]]) -> str:
    """The whole page, from what report.json holds and the loss curves."""
    text = content["text"]
    return page(
        title(content),
        [
            *opening(content, title(content), verdict(content)),
            *(_decoding(text["alphas"]) if "alphas" in text else ()),
            "<h2>Trained models</h2>",
            systems_figure(text["systems"]),
            _systems_table(content),
            "<h2>Held-out preferences</h2>",
            *_preferences(content),
            "<h2>Training</h2>",
            *training_figures(curves),
            _training_table(text["training"]),
            _dropped(text),
            "<h2>Samples</h2>",
            *_samples(text["examples"]),
            "<h2>Data</h2>",
            _data(content),
            *provenance(content),
        ],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def title(content: dict[str, Any]) -> str:
    """What was run, in one line."""
    method = content["config"]["method"]
    decoding, own = method["decoding"], method["self_alignment"]
    how = f"alpha {decoding['alpha']:g}" if decoding["gamma"] is None else f"gamma {decoding['gamma']:g}"
    what = f"ConG{' in self-alignment' if own else ''}, {how}, seed {content['seed']}"
    whom = "itself" if own else short(content["strong"])
    return f"{short(content['weak'])} aligns {whom} on {content['dataset']}: {what}"


def verdict(content: dict[str, Any]) -> str:
    """The finding in two or three sentences."""
    text, lines = content["text"], []
    if sweep := text.get("alphas"):
        gaps = [
            f"{KINDS[kind]} {_judged(sweep[kind]['over_plain'][sweep['chosen']]['gap'], 0.0, DIGITS[kind], True)}"
            for kind in _kinds(sweep)
        ]
        lines.append(
            f"Contrastive samples at alpha {sweep['chosen']} over plain ones of the aligned weak model, on "
            f"{sweep['prompts']:,} test prompts: {', '.join(gaps)}."
        )
    against = text["systems"].get("cong", {}).get("against")
    if against and "base" in against:
        raw, controlled = against["base"]["win_rate"], against["base"]["length_controlled"]
        others = [
            f"against {words} {_judged(against[other]['win_rate'], 0.5)}"
            for other, words in (("weak_sft", "weak SFT"), ("ceiling", "the ceiling"))
            if other in against
        ]
        lines.append(
            f"The student's win rate over the untrained strong model is {_judged(raw, 0.5)}, with length controlled "
            f"{_judged(controlled, 0.5)}{'; ' if others else ''}{', '.join(others)}."
        )
    else:
        lines.append("No judge was given: rewards and win rates of the trained models are unknown.")
    lines.append(
        "95 % intervals over test prompts, of one run: other seeds and training rows add to them. “Not resolved”: "
        "the interval includes no difference."
    )
    return " ".join(lines)


def _judged(found: dict[str, Any], null: float, digits: int = 3, sign: bool = False) -> str:
    """An estimate, and whether its interval keeps clear of ``null``."""
    if found["value"] is None:
        return "not estimable"
    resolved = found["low"] is not None and (found["low"] > null or found["high"] < null)
    return estimate(found, digits, sign) + ("" if resolved else " (not resolved)")


def _kinds(sweep: dict[str, Any]) -> list[str]:
    return [kind for kind in KINDS if kind in sweep]


def _order(sweep: dict[str, Any]) -> list[str]:
    """Plain sampling, then by alpha."""
    alphas = dict(zip(sweep["names"], sweep["alphas"], strict=True))
    return sorted(alphas, key=lambda name: (alphas[name] is not None, alphas[name] or 0.0, name))


def _share(rate: float, count: int) -> dict[str, float]:
    """A share of ``count`` with Wilson's 95 % interval."""
    from scipy.stats import binomtest

    ends = binomtest(round(rate * count), count).proportion_ci(method="wilson")
    return {"value": rate, "low": ends.low, "high": ends.high}


def _lengths(found: dict[str, Any], count: int) -> tuple[Raw, Raw]:
    """Cells of a table: tokens, and the share cut off."""
    tokens = Raw(f"{found['mean']:,.1f}<br><small>median {found['median']:,.0f}</small>")
    return tokens, stacked(_share(found["truncated"], count), 1, kind="%")


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive decoding
# ---------------------------------------------------------------------------------------------------------------------


def _decoding(sweep: dict[str, Any]) -> Iterable[str]:
    yield "<h2>Contrastive decoding</h2>" + reward_figure(sweep)
    test = ", so the explicit one is the test" * ("explicit" in sweep)
    yield (
        "<p class=note>Left: each prompt's rewards scaled to 0 (worst setting) and 1 (best), then averaged; bands: "
        "plain sampling of the aligned weak model. Right: unscaled rewards minus those of plain sampling. The implicit "
        f"reward, log π_r − log π_0 (without β), is what the decoding seeks{test}. Alpha = 1 differs from plain "
        "sampling by the plausibility mask and the repetition penalty.</p>"
    )
    yield matrix_figure(sweep) + length_figure(sweep)
    for kind in _kinds(sweep):
        yield f"<h3>{KINDS[kind].capitalize()}</h3>" + _sweep_table(sweep, kind)
    yield (
        f"<p class=note>Means over {sweep['prompts']:,} test prompts with 95 % bootstrap intervals. p: exact sign test "
        "against plain sampling, not corrected for the number of settings. Cut off: Wilson's interval. Correlation: "
        "Spearman's, of reward and length.</p>"
    )


def _sweep_table(sweep: dict[str, Any], kind: str) -> str:
    found, digits, plain, rows = sweep[kind], DIGITS[kind], sweep["names"][0], []
    wins, controlled = found["wins"], found.get("length_controlled")
    for name in _order(sweep):
        over = found["over_plain"].get(name, {"gap": NONE, "standardised": NONE})
        row, column = wins["names"].index(name), wins["names"].index(plain)
        cells = [
            f"{name} (used)" if name == sweep["chosen"] else name,
            stacked(found["mean"][name], digits, True),
            stacked(over["gap"], digits, True),
            stacked(over["standardised"], 2, True),
            stacked({key: wins[key][row][column] for key in NONE}),
            p_value(over["p"]) if "p" in over else "–",
            *([] if controlled is None else [stacked(controlled.get(name, NONE))]),
            stacked(found["length_correlation"][name], 2, True),
        ]
        rows.append((*cells, *_lengths(sweep["length"][name], sweep["prompts"])))
    head = ["alpha", "reward", "reward − plain", "standardised", Raw("wins over<br>plain"), "p"]
    head += [] if controlled is None else [Raw("… length<br>controlled")]
    return table((*head, "correlation", "tokens", "cut off"), rows, "dense")


def reward_figure(sweep: dict[str, Any]) -> str:
    """Rewards over alpha, scaled per prompt, and their gaps over plain sampling."""
    kinds, plain = _kinds(sweep), sweep["names"][0]
    figure, axes = new_figure(3.7 * (1 + len(kinds)), 3.1, 1 + len(kinds))
    for kind in kinds:
        found = sweep[kind]["scaled"]
        _over_alpha(axes[0], sweep, found, INK[kind], KINDS[kind])
        band(axes[0], found[plain], INK[kind])
    axes[0].set_title("scaled per prompt", fontsize=9)
    for axis, kind in zip(axes[1:], kinds, strict=True):
        _over_alpha(axis, sweep, {n: over["gap"] for n, over in sweep[kind]["over_plain"].items()}, INK[kind])
        axis.axhline(0, color=INK[kind], ls="--", lw=1)
        axis.set_title(f"{KINDS[kind]}, minus plain", fontsize=9)
    _finish(figure, axes, sweep)
    shown = " and ".join(KINDS[kind] for kind in kinds)
    return svg(figure, f"{shown} over alpha, scaled per prompt, and gaps over plain sampling")


def length_figure(sweep: dict[str, Any]) -> str:
    """Reply length and the share of replies that were cut off, over alpha."""
    figure, axes = new_figure(5.0, 2.9, 2)
    lengths, plain, ink = sweep["length"], sweep["names"][0], COLOURS["student"]
    for key, colour in (("mean", ink), ("median", "#94a3b8")):
        _over_alpha(axes[0], sweep, {n: {**NONE, "value": v[key]} for n, v in lengths.items()}, colour, key)
        axes[0].axhline(lengths[plain][key], color=colour, ls="--", lw=1)
    axes[0].set_title("tokens per reply", fontsize=9)
    axes[0].set_ylim(0, 1 + 1.1 * max(v[key] for v in lengths.values() for key in ("mean", "median")))
    cut = {n: _share(v["truncated"], sweep["prompts"]) for n, v in lengths.items()}
    _over_alpha(axes[1], sweep, cut, ink)
    band(axes[1], cut[plain], ink)
    axes[1].set_title("share cut off", fontsize=9)
    axes[1].set_ylim(-0.03, 1.03)
    _finish(figure, axes, sweep)
    return svg(figure, "reply length and share of replies cut off over alpha")


def matrix_figure(sweep: dict[str, Any]) -> str:
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
    axis.imshow(value, cmap="RdBu", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(~np.isnan(value)), strict=True):
        clear, shade = low[i, j] > 0.5 or high[i, j] < 0.5, "white" if abs(value[i, j] - 0.5) > 0.35 else "black"
        ink = {"color": shade, "weight": "bold"} if clear else {"color": "#64748b"}
        words = f"{value[i, j]:.2f}".removeprefix("0")
        axis.text(j, i, words, ha="center", va="center", fontsize=8, **ink)
    axis.set_xticks(range(len(order)), order, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(order)), order)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        labels[order.index(sweep["chosen"])].set_weight("bold")
    axis.spines[:].set_visible(False)
    axis.set_title(f"win rate of row over column,\nby {KINDS[kind]}", fontsize=9)
    axis.set_xlabel("grey: interval includes .5; bold setting: used", fontsize=8)
    return svg(figure, f"win rates between settings by {KINDS[kind]}")


def _over_alpha(
    axis: Any, sweep: dict[str, Any], found: dict[str, dict[str, Any]], colour: str, label: str | None = None
) -> None:
    """Estimates over alpha with intervals; a setting of another temperature (gamma) stands beside the line."""
    alphas = dict(zip(sweep["names"], sweep["alphas"], strict=True))
    for style, size, tilted in (("-o", 4, False), ("D", 6, True)):
        names = [n for n in _order(sweep) if alphas[n] is not None and ("gamma" in n) == tilted]
        if names:
            x, y = [alphas[n] for n in names], [found[n] for n in names]
            points(axis, x, y, fmt=style, ms=size, color=colour, label=None if tilted else label)


def _finish(figure: Any, axes: Any, sweep: dict[str, Any]) -> None:
    """Mark the alpha used, and say what the lines are."""
    used = sweep["alphas"][sweep["names"].index(sweep["chosen"])]
    for axis in axes:
        axis.axvline(used, color="#475569", ls=":", lw=1, label="alpha used" if axis is axes[0] else None)
        axis.set_xlabel("alpha", fontsize=8)
    axes[0].plot([], [], color="#475569", ls="--", lw=1, label="plain sampling")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)


# ---------------------------------------------------------------------------------------------------------------------
# Trained models
# ---------------------------------------------------------------------------------------------------------------------


def systems_figure(systems: dict[str, dict[str, Any]]) -> str:
    """Reward of each system's replies, and how often they beat the untrained strong model's."""
    names = [name for name in systems if "reward" in systems[name]]
    if not names:
        return ""
    figure, axes = new_figure(9.6, 0.95 + 0.36 * len(names), 2)
    for row, name in enumerate(names):
        style = {"fmt": "o", "color": COLOURS.get(name, "#777"), "across": True}
        points(axes[0], [row], [systems[name]["reward"]], **style)
        if against := systems[name].get("against", {}).get("base"):
            points(axes[1], [row - 0.13], [against["win_rate"]], **style)
            points(axes[1], [row + 0.17], [against["length_controlled"]], mfc="white", **style)
    for axis in axes:
        axis.set_ylim(len(names) - 0.4, -0.6)
    axes[0].set_yticks(range(len(names)), [ROLES.get(n, n) for n in names])
    axes[1].set_yticks(range(len(names)), [])
    axes[0].set_xlabel("explicit reward", fontsize=8)
    axes[1].axvline(0.5, color="#94a3b8", ls="--", lw=1)
    axes[1].set_xlabel("win rate over the untrained strong model (hollow: length controlled)", fontsize=8)
    return svg(figure, "explicit reward and win rate of each system with intervals")


def _systems_table(content: dict[str, Any]) -> str:
    systems = content["text"]["systems"]
    judged = any("reward" in found for found in systems.values())
    others = [o for o in ("weak_sft", "ceiling") if o in systems] if judged else []
    kl, perplexity = (any(key in found for found in systems.values()) for key in ("kl_per_token", "perplexity"))
    rows = []
    for name, found in systems.items():
        cells: list[Any] = [ROLES.get(name, name)]
        against = found.get("against", {})
        if judged:
            cells.append(stacked(found.get("reward", NONE)))
            cells += [stacked(against.get("base", {}).get(key, NONE)) for key in ("win_rate", "length_controlled")]
            cells += [stacked(against.get(other, {}).get("win_rate", NONE)) for other in others]
        cells += [stacked(found.get("kl_per_token", NONE), 4)] if kl else []
        cells += [stacked(found.get("perplexity", NONE), 2)] if perplexity else []
        cells += _lengths(found["length"], found["replies"])
        measured = content["metrics"].get("student" if name == "cong" else name)
        pairs = (measured["accuracy"], *measured["intervals"]["accuracy"]) if measured else (None, None, None)
        rows.append((*cells, stacked(dict(zip(NONE, pairs, strict=True)))))
    head: list[str] = [""]
    head += ["reward", Raw("wins over<br>untrained"), Raw("… length<br>controlled")] if judged else []
    head += [Raw(f"wins over<br>{ROLES[other]}") for other in others]
    head += ([Raw("KL per<br>token")] if kl else []) + (["perplexity"] if perplexity else [])
    note = (
        "<p class=note>KL: of the model from itself before its training, on its own replies. Perplexity: of the test "
        "split's preferred replies; compare with the untrained model's, and only within one tokenizer. Pairs: accuracy "
        "of the implicit reward on the test split's pairs.</p>"
    )
    return table((*head, "tokens", "cut off", "pairs"), rows, "dense") + note


def _preferences(content: dict[str, Any]) -> Iterable[str]:
    yield "<p class=note>Which of the test split's two replies a model's implicit reward β log(π / π_0) prefers.</p>"
    yield accuracy_figure(content)
    if "pgr" in content:
        yield f"<p>{html.escape(pgr_sentence(content['pgr']))}</p>"
    if judge := content["text"].get("judge"):
        how = "a reward head trained on the transfer split's pairs" if judge["trained"] else "used as it is"
        yield (
            f"<p>The judge ({html.escape(short(judge['model']))}, {how}) prefers the preferred reply in "
            f"{estimate(judge['accuracy'])} of the test pairs; its rewards correlate with length by "
            f"{estimate(judge['length_correlation'], 2, sign=True)} (Spearman).</p>"
        )
    yield metrics_table(content) + tests_table(content["tests"])


# ---------------------------------------------------------------------------------------------------------------------
# Training, samples, data
# ---------------------------------------------------------------------------------------------------------------------


def _training_table(training: dict[str, dict[str, Any]]) -> str:
    rewards = ("rewards/chosen", "rewards/rejected", "rewards/margins")
    last = ("loss", "grad_norm", *rewards, "rewards/accuracies")
    rows = []
    for name, fit in training.items():
        counts = ["–" if fit[key] is None else f"{fit[key]:,}" for key in ("examples", "steps", "best_epoch")]
        packed = {None: "–", True: "yes", False: "no"}[fit["packed"]]
        rows.append((name, *counts, packed, *(number(fit["last"].get(key), 3, key in rewards) for key in last)))
    note = "<p class=note>Losses and rewards are those of the last logged batches, without intervals.</p>"
    words = (key.rpartition("/")[2].replace("_", " ") for key in last)
    return table(("fit", "examples", "steps", "best epoch", "packed", *words), rows) + note


def _dropped(text: dict[str, Any]) -> str:
    lost = {name: counts for name, counts in text["dropped"].items() if counts}
    words = f"<p>{text['pairs']:,} pairs of contrastive and own samples for the last stage (DPO). "
    return words + ("Dropped:</p>" + facts(lost) if lost else "Nothing was dropped.</p>")


def _samples(examples: list[dict[str, Any]]) -> Iterable[str]:
    yield "<p class=note>The first test prompts in the order of their hashes; not chosen by content.</p>"
    for number_of, example in enumerate(examples, 1):
        yield f"<h3>Prompt {number_of}</h3><div class=said>{html.escape(example['prompt'].strip())}</div>"
        swept = [r for r in example["replies"] if r["system"].startswith("alpha ")]
        yield _replies([r for r in example["replies"] if not r["system"].startswith("alpha ")])
        if swept:
            yield f"<details><summary>The settings of the sweep</summary>{_replies(swept)}</details>"


def _replies(replies: list[dict[str, Any]]) -> str:
    columns = {"explicit": "reward", "implicit_per_token": "implicit per token"}
    columns = {key: words for key, words in columns.items() if any(key in r for r in replies)}
    rows = []
    for reply in replies:
        tokens = "–" if reply["tokens"] is None else f"{reply['tokens']:,}"
        cut = Raw(f"{tokens}{'' if reply['finished'] else '<br><small>cut off</small>'}")
        said = Raw(f"<div class=said>{html.escape(reply['reply'].strip())}</div>")
        rewards = (number(reply.get(key), 3, True) for key in columns)
        rows.append((ROLES.get(reply["system"], reply["system"]), *rewards, cut, said))
    return table(("", *columns.values(), "tokens", "reply"), rows, "replies")


def _data(content: dict[str, Any]) -> str:
    """Which split is for what, and where it came from."""
    config, data = content["config"], content["data"]
    own = "pairs of its own samples" if config["method"]["alignment"]["pairs"] == "on_policy" else "its pairs"
    uses = {
        "ground_truth": "not trained on" if config["weak"].get("untuned") else f"the weak model is aligned on {own}",
        "transfer": "prompts: contrastive and plain samples, ConG-S, ConG; pairs: ceiling and a trained judge",
        "test": "prompts: the sweep over alpha and the trained models' replies; pairs: held-out preferences",
    }
    splits = {name: f"{size:,} rows; {uses[name]}" for name, size in data["sizes"].items()}
    return facts(splits | {k: v for k, v in data.items() if k != "sizes"})
