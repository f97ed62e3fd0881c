"""Many finished decoders as one comparison: the same prompts, one judge, rewards beside what they cost."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.compare.runs import Finished, read, words
from w2sg.compare.table import write_summary
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.metrics.intervals import holm
from w2sg.reports.html import PALETTE, Raw, estimate, new_figure, number, p_value, page, points, stacked, svg, table
from w2sg.reports.sections.decoded import words_of
from w2sg.reports.sections.divergence import frontier_figure
from w2sg.reports.words import short
from w2sg.store.keys import flatten

PLAIN = "plain"


def collect(root: Path) -> list[dict[str, Any]]:
    """Groups of decoders that can be compared: one strong model, dataset, prompts, judge and seed each.

    Of two runs of one decoder the newer counts.
    """
    runs = [run for run in read(root)[0] if run.decodes]
    groups: dict[str, list[Finished]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.folder / "report.json").stat().st_mtime):
        config = run.content["config"]
        method = config["method"]
        # prompts, judge and strong model; what an older report does not know is as if it were not set
        same = {key: config[key] for key in ("strong", "dataset", "training", "seed")}
        same |= {"style": method["style"], "judge": method["judge"], "precision": config["trainer"]["precision"]}
        flat = {k: v for k, v in flatten(same).items() if v is not None}
        groups[json.dumps(flat, sort_keys=True)].append(run)
    return [_group(runs) for runs in groups.values()]


def _group(runs: list[Finished]) -> dict[str, Any]:
    runs = list({json.dumps(run.settings, sort_keys=True, default=str): run for run in runs}.values())
    names = _names(runs)
    rewards: dict[str, dict[str, float]] = {}
    plain_of: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, run in zip(names, runs, strict=True):
        systems, columns = run.content["decoding"]["systems"], _columns(run)
        kind = run.content["decoding"]["decoder"]["kind"]
        plain = f"plain, {_sampling(run)}"
        guide = f"guide alone, {_guide(run)}{_sampling(run)}"
        for system, own in ((PLAIN, plain), ("guide", guide), (kind, name)):
            if system in systems:
                rows[own], plain_of[own] = {"name": own, "kind": system, **systems[system]}, plain
                if f"reward_{system}" in columns:
                    rewards[own] = dict(zip(columns["id"], columns[f"reward_{system}"], strict=True))
    first = runs[0].content
    found: dict[str, Any] = {
        "strong": first["strong"],
        "dataset": first["dataset"],
        "seed": first["seed"],
        "judge": first["decoding"].get("judge", {}).get("model"),
        "rows": list(rows.values()),
    }
    common = sorted(set.intersection(*map(set, rewards.values()))) if rewards else []
    if len(rewards) > 1 and common:
        table_of = {name: np.array([own[i] for i in common]) for name, own in rewards.items()}
        bootstrap = Bootstrap(len(common))
        against = {name: table_of[plain_of[name]] for name in table_of if plain_of[name] != name}
        tests = {name: comparisons.paired_test(table_of[name], other) for name, other in against.items()}
        corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
        found["prompts"] = len(common)
        found["wins"] = comparisons.win_matrix(table_of, bootstrap)
        found["over_plain"] = {
            name: {
                "gap": comparisons.reward_gap(table_of[name], other, bootstrap).as_dict(),
                "p": tests[name],
                "p_holm": corrected[name],
            }
            for name, other in against.items()
        }
    elif judged := {
        row["name"]: row["against"]["plain"] for row in rows.values() if row.get("against", {}).get("plain")
    }:
        # by a judge that compares: each run's verdicts are of its own plain samples
        corrected = dict(zip(judged, holm([own["p"] for own in judged.values()]), strict=True))
        found["over_plain"] = {name: {"p": judged[name]["p"], "p_holm": p} for name, p in corrected.items()}
    return found


def _columns(run: Finished) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    with open(run.folder / "predictions.parquet", "rb") as file:  # pyarrow takes no path that is not UTF-8
        return pq.read_table(file).to_pydict()


def _sampling(run: Finished) -> str:
    decoder = run.content["decoding"]["decoder"]
    cut = f", top-k {decoder['top_k']}" * (decoder["top_k"] > 0) + f", top-p {decoder['top_p']:g}" * (
        decoder["top_p"] < 1
    )
    server = (decoder.get("server") or {}).get("model")
    by = f", by {server}" if server else ", by vLLM" if decoder.get("engine") == "vllm" else ""
    return f"temperature {decoder['temperature']:g}{cut}, {decoder['max_new_tokens']} tokens{by}"


def _guide(run: Finished) -> str:
    """The small model, where it is not the strong one itself, and the stage or model that aligned it."""
    stage = next((s["key"] for s in run.content["stages"] if s["name"] == "weak"), None)
    own = stage.rpartition("-")[2][:6] if stage else short(run.content["weak"])
    return f"{own}, "


def _names(runs: list[Finished]) -> list[str]:
    """Each decoder in words: its kind, and what sets it apart from others of its kind."""
    by_kind = defaultdict(list)
    for run in runs:
        by_kind[run.content["decoding"]["decoder"]["kind"]].append(run)
    names = []
    for run in runs:
        decoder = run.content["decoding"]["decoder"]
        group = by_kind[decoder["kind"]]
        flat = [_flat(r) for r in group]
        varying = {k: v for k, v in _flat(run).items() if len({json.dumps(f.get(k)) for f in flat}) > 1}
        names.append(words_of(run.content["decoding"])[0] + (f", {words(varying)}" if varying else ""))
    return names


def _flat(run: Finished) -> dict[str, Any]:
    decoder = run.content["decoding"]["decoder"]
    blocks = {f"{block} {k}": v for block in ("guide", "server") for k, v in (decoder.get(block) or {}).items()}
    own = {k: v for k, v in decoder.items() if k not in ("guide", "server", "kind", "batch_size")}
    return own | blocks | {"aligned as": _guide(run).rstrip(", "), "untuned": run.content["config"]["weak"]["untuned"]}


def show(groups: list[dict[str, Any]], console: Any) -> None:
    """Print the columns that say most; the page has them all."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Grid

    for group in groups:
        judge = f", judged by {short(group['judge'])}" if group["judge"] else ""
        title = f"Decoders of {short(group['strong'])} on {group['dataset']}, seed {group['seed']}{judge}"
        grid = Grid(title=title, title_justify="left", box=SIMPLE_HEAD)
        for column in (
            "",
            "judge's reward",
            "reward − plain",
            "wins over plain",
            "tokens",
            "strong / guide tokens per token",
        ):
            grid.add_column(column, justify="left" if not column else "right")
        for row in group["rows"]:
            gap = group.get("over_plain", {}).get(row["name"], {}).get("gap")
            grid.add_row(
                row["name"],
                estimate(row["reward"], 2) if "reward" in row else "–",
                estimate(gap, 2, True) if gap else "–",
                estimate(wins, 2) if (wins := row.get("against", {}).get("plain", {}).get("win_rate")) else "–",
                number(row["length"]["mean"], 0),
                f"{row['cost']['strong']:.1f} / {row['cost']['guide']:.1f}",
            )
        console.print(grid)


def write(groups: list[dict[str, Any]], root: Path) -> list[Path]:
    """Write summary_decoders.html, .csv and .json beside the runs.

    Raises:
        UserError: the folder cannot be written.
    """
    lines = [["strong", "dataset", "seed", "decoder", "reward", "low", "high", "tokens", "strong_read", "guide_read"]]
    for group in groups:
        for row in group["rows"]:
            reward = row.get("reward", {"value": "", "low": "", "high": ""})
            cost = row["cost"]["strong"], row["cost"]["guide"]
            own = [row["name"], reward["value"], reward["low"], reward["high"], row["length"]["mean"], *cost]
            lines.append([group["strong"], group["dataset"], group["seed"], *own])
    html = page("Decoders side by side", ["<h1>Decoders side by side</h1>", *(s for g in groups for s in _sections(g))])
    return write_summary(root, "summary_decoders", html, lines, groups)


def _sections(group: dict[str, Any]) -> list[str]:
    none = {"value": None, "low": None, "high": None}
    rows = []
    for row in group["rows"]:
        over = group.get("over_plain", {}).get(row["name"], {})
        rows.append(
            (
                row["name"],
                stacked(row.get("reward", none), 3, True),
                stacked(over.get("gap", none), 3, True),
                stacked(row.get("against", {}).get("plain", {}).get("win_rate", none)),
                p_value(over["p_holm"]) if "p_holm" in over else "–",
                stacked(row.get("surprise", none), 2),
                stacked(row.get("kl", none), 2),
                number(row["length"]["mean"], 1),
                f"{row['length']['truncated']:.0%}",
                number(row["cost"]["strong"], 1),
                number(row["cost"]["guide"], 1),
                number(1000 * row["cost"]["seconds"], 0),
            )
        )
    head = [
        "",
        "reward",
        "reward − plain",
        "wins over plain",
        Raw("p<br>(Holm)"),
        "surprise",
        Raw("KL, nats<br>per reply"),
        "tokens",
        "cut off",
    ]
    head += [Raw("strong tokens<br>read per token"), Raw("… by each<br>small model"), Raw("ms per<br>token")]
    who = f"{short(group['strong'])} on {group['dataset']}, seed {group['seed']}"
    sections = [
        f"<h2>{html.escape(who)}</h2>",
        _frontier(group["rows"]),
        _divergence(group["rows"]),
        table(head, rows, "dense"),
    ]
    if "wins" in group:
        wins = group["wins"]
        cells = [
            (name, *("–" if a == b else number(wins["value"][a][b], 2) for b in range(len(wins["names"]))))
            for a, name in enumerate(wins["names"])
        ]
        sections += [
            f"<h3>Win rates on the {group['prompts']:,} prompts that all answered (row over column)</h3>",
            table(("", *wins["names"]), cells, "dense"),
        ]
    sections.append(
        "<p class=note>Intervals at 95 % over prompts; p: exact sign test against the same run's plain samples, "
        f"corrected for their number. Judge: {group['judge'] or 'none'}. Tokens read are per token of the chosen "
        "reply, prompts included; what the prompts of a batch begin with is charged once.</p>"
    )
    return sections


def _divergence(rows: list[dict[str, Any]]) -> str:
    """Rewards over the divergence from the strong model, of those that have one."""
    known = [row for row in rows if "reward" in row and "kl" in row]
    if len(known) < 2:
        return ""
    shown = [(row["name"], PALETTE[k % len(PALETTE)], row) for k, row in enumerate(known)]
    left = [row["name"] for row in rows if "kl" not in row]
    note = (
        "<p class=note>Each decoder's divergence is from the strong model at that decoder's temperature; that of "
        f"best-of-n is a bound.{' Without one: ' + ', '.join(left) + '.' if left else ''}</p>"
    )
    return str(frontier_figure(shown)) + note


def _frontier(rows: list[dict[str, Any]]) -> str:
    known = [row for row in rows if "reward" in row]
    if len(known) < 2:
        return ""
    far = all("surprise" in row for row in known)
    figure, axes = new_figure(4.6 * (1 + far), 3.2, 1 + far)
    axes = np.atleast_1d(axes)
    for k, row in enumerate(known):
        style = {"fmt": "o", "color": PALETTE[k % len(PALETTE)], "label": row["name"]}
        points(axes[0], [row["cost"]["strong"] + row["cost"]["guide"]], [row["reward"]], **style)
        if far:
            points(axes[1], [row["surprise"]["value"]], [row["reward"]], **style)
    axes[0].set_xlabel("tokens read by the strong and a small model, per token", fontsize=8)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("judge's reward", fontsize=8)
    axes[0].legend(frameon=False, fontsize=6)
    if far:
        axes[1].set_xlabel("surprise of the strong model, per token", fontsize=8)
    return svg(figure, "the judge's reward over the cost of each decoder, and over the strong model's surprise")
