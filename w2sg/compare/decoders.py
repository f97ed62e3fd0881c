"""Many finished decoders as one comparison: the same prompts, one judge, rewards beside what they cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from w2sg.compare.names import distinct, key_of, settings_in_words, shortest
from w2sg.compare.runs import LATER, Finished
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.metrics.intervals import holm
from w2sg.reports.colours import Look, looks
from w2sg.reports.figures import ends, keyed, legend_below, new_figure, svg, told
from w2sg.reports.section import Report, Section
from w2sg.reports.sections.decoded import words_of
from w2sg.reports.sections.divergence import frontier_figure
from w2sg.reports.words import NONE, estimate, number, p_value, stacked
from w2sg.store.keys import flatten

PLAIN = "plain"


HEAD = ("", "reward", "reward − plain", "wins over plain", "p\n(Holm)", "surprise", "KL, nats\nper reply", "tokens")
HEAD += ("cut off", "strong tokens\nread per token", "… by each\nsmall model", "ms per\ntoken")


class DecoderGroups(Section):
    """Decoders that answered the same prompts, by group (summary.json: ``decoders``)."""

    key, template = "decoders", "summary_decoders.html"

    @classmethod
    def measure(cls, runs: Sequence[Finished]) -> DecoderGroups:
        """Groups of decoders that can be compared: one strong model, dataset, prompts, judge and seed each.

        Of two runs of one decoder the newer counts.
        """
        groups: dict[str, list[Finished]] = defaultdict(list)
        for run in sorted(runs, key=lambda run: run.newest):
            config = run.content["config"]
            method = config["method"]
            # prompts, judge and strong model; what an older report does not know is as if it were not set
            same = {key: config[key] for key in ("strong", "dataset", "optim", "seed")}
            same |= {"style": method["style"], "judge": method["judge"], "precision": config["trainer"]["precision"]}
            same |= {"matmul": "high"} if config["trainer"].get("matmul") == "high" else {}
            flat = {k: v for k, v in flatten(same).items() if v is not None and (v or not k.endswith(LATER))}
            groups[key_of(flat)].append(run)
        return cls(content={"decoders": [_group(runs) for runs in groups.values()]})

    def show(self, report: Report) -> dict[str, Any]:
        """Figures and tables of each group."""
        groups, titles = report["decoders"], _titles(report["decoders"])
        look = looks(row["name"] for group in groups for row in group["rows"])  # a decoder has one on all of the page
        return {"groups": [_shown(group, look) | {"title": t} for group, t in zip(groups, titles, strict=True)]}

    def table(self, report: Report) -> Any:
        """The columns that say most; the page has them all."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table

        grids = []
        judges = shortest([group["judge"] for group in report["decoders"] if group["judge"]])
        for group, of in zip(report["decoders"], _titles(report["decoders"]), strict=True):
            judge = f", judged by {judges[group['judge']]}" if group["judge"] else ""
            grid = Table(title=of + judge, title_justify="left", box=SIMPLE_HEAD)
            head = (
                "",
                "judge's reward",
                "reward − plain",
                "wins over plain",
                "tokens",
                "strong / guide tokens per token",
            )
            lines = []
            for row in group["rows"]:
                gap = group.get("over_plain", {}).get(row["name"], {}).get("gap")
                wins = row.get("against", {}).get("plain", {}).get("win_rate")
                lines.append(
                    (
                        row["name"],
                        estimate(row["reward"], 2) if "reward" in row else "–",
                        estimate(gap, 2, True) if gap else "–",
                        estimate(wins, 2) if wins else "–",
                        number(row["length"]["mean"], 0),
                        f"{row['cost']['strong']:.1f} / {row['cost']['guide']:.1f}",
                    )
                )
            head, lines = _filled(head, lines)
            for column in head:
                grid.add_column(column, justify="left" if not column else "right")
            for line in lines:
                grid.add_row(*line)
            grids.append(grid)
        return Group(*grids)


def _group(runs: list[Finished]) -> dict[str, Any]:
    runs = list({key_of(run.settings): run for run in runs}.values())
    labels = _labels(runs)
    rewards: dict[str, dict[str, float]] = {}
    plain_of: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for run, (plain, guide, name) in zip(runs, labels, strict=True):
        systems, columns = run.content["decoding"]["systems"], _columns(run)
        kind = run.content["decoding"]["decoder"]["kind"]
        for system, label in ((PLAIN, plain), ("guide", guide), (kind, name)):
            if system in systems:
                rows[label], plain_of[label] = {"name": label, "kind": system, **systems[system]}, plain
                if f"reward_{system}" in columns:
                    rewards[label] = dict(zip(columns["id"], columns[f"reward_{system}"], strict=True))
    first = runs[0].content
    content: dict[str, Any] = {
        "strong": first["strong"],
        "dataset": first["dataset"],
        "seed": first["seed"],
        "judge": first["decoding"].get("judge", {}).get("model"),
        "rows": list(rows.values()),
    }
    common = sorted(set.intersection(*map(set, rewards.values()))) if rewards else []
    if len(rewards) > 1 and common:
        table_of = {name: np.array([of_id[i] for i in common]) for name, of_id in rewards.items()}
        bootstrap = Bootstrap(len(common))
        against = {name: table_of[plain_of[name]] for name in table_of if plain_of[name] != name}
        tests = {name: comparisons.paired_test(table_of[name], other) for name, other in against.items()}
        corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
        content["prompts"] = len(common)
        content["wins"] = comparisons.win_matrix(table_of, bootstrap)
        content["over_plain"] = {
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
        corrected = dict(zip(judged, holm([verdict["p"] for verdict in judged.values()]), strict=True))
        content["over_plain"] = {name: {"p": judged[name]["p"], "p_holm": p} for name, p in corrected.items()}
    return content


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
    """The stage that aligned the small model; the model itself, where it is used as it is."""
    return next((s["key"] for s in run.content["stages"] if s["name"] == "weak"), run.content["weak"])


def _guides(runs: list[Finished]) -> dict[str, str]:
    """Each small model in words: the first digits of its stage, or the name of the model."""
    staged = {s["key"] for run in runs for s in run.content["stages"]}
    models = shortest([guide for guide in map(_guide, runs) if guide not in staged])
    return {guide: models.get(guide, guide.rpartition("-")[2][:6]) for guide in map(_guide, runs)}


def _labels(runs: list[Finished]) -> list[tuple[str, str, str]]:
    """Of each run plain samples, the guide alone and the decoder, in words that are the same only where values are."""
    guides, names = _guides(runs), _names(runs)
    words, values = [], []
    for run, name in zip(runs, names, strict=True):
        decoder = run.content["decoding"]["decoder"]
        sampling = {k: decoder.get(k) for k in ("temperature", "top_k", "top_p", "max_new_tokens")}
        sampling |= {"server": (decoder.get("server") or {}).get("model"), "vllm": decoder.get("engine") == "vllm"}
        guide = _guide(run)
        words += [f"plain, {_sampling(run)}", f"guide alone, {guides[guide]}, {_sampling(run)}", name]
        # no stage says how a model is read that is used as it is
        reading = {k: v for k, v in run.settings.items() if k.startswith("weak.") and k != "weak.before_alignment"}
        values += [
            sampling,
            sampling | {"guide": guide} | (reading if guide == run.content["weak"] else {}),
            run.settings,
        ]
    labels = distinct(words, values)
    return list(zip(labels[::3], labels[1::3], labels[2::3], strict=True))


def _names(runs: list[Finished]) -> list[str]:
    """Each decoder in words: its kind, and what sets it apart from others of its kind."""
    guides = _guides(runs)
    by_kind: dict[str, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        by_kind[run.content["decoding"]["decoder"]["kind"]].append(place)
    names = [words_of(run.content["decoding"])[0] for run in runs]
    for places in by_kind.values():
        flat = [_flat(runs[place], guides) for place in places]
        varying = [{k: v for k, v in own.items() if len({key_of(f.get(k)) for f in flat}) > 1} for own in flat]
        for place, options, words in zip(places, varying, settings_in_words(varying), strict=True):
            names[place] += f", {words}" if options else ""
    return names


def _flat(run: Finished, guides: dict[str, str]) -> dict[str, Any]:
    decoder = run.content["decoding"]["decoder"]
    blocks = {f"{block} {k}": v for block in ("guide", "server") for k, v in (decoder.get(block) or {}).items()}
    options = {k: v for k, v in decoder.items() if k not in ("guide", "server", "kind", "batch_size")}
    before = run.content["config"]["weak"]["before_alignment"]
    return options | blocks | {"aligned as": guides[_guide(run)], "untuned": before}


def _titles(groups: Sequence[dict[str, Any]]) -> list[str]:
    strong = shortest([group["strong"] for group in groups])
    return [f"Decoders of {strong[g['strong']]} on {g['dataset']}, seed {g['seed']}" for g in groups]


def _filled(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[Any]]]:
    """A table without the columns that no row has, as rewards by a judge that only compares."""
    kept = [k for k in range(len(head)) if any(getattr(row[k], "text", row[k]) != "–" for row in rows)]
    return [head[k] for k in kept], [[row[k] for k in kept] for row in rows]


def _shown(group: dict[str, Any], look: Mapping[str, Look]) -> dict[str, Any]:
    """What the page shows of a group."""
    rows = []
    for row in group["rows"]:
        over = group.get("over_plain", {}).get(row["name"], {})
        rows.append(
            (
                row["name"],
                stacked(row.get("reward", NONE), 3, True),
                stacked(over.get("gap", NONE), 3, True),
                stacked(row.get("against", {}).get("plain", {}).get("win_rate", NONE)),
                p_value(over["p_holm"]) if "p_holm" in over else "–",
                stacked(row.get("surprise", NONE), 2),
                stacked(row.get("kl", NONE), 2),
                number(row["length"]["mean"], 1),
                f"{row['length']['truncated']:.0%}",
                number(row["cost"]["strong"], 1),
                number(row["cost"]["guide"], 1),
                number(1000 * row["cost"]["seconds"], 0),
            )
        )
    head, rows = _filled(HEAD, rows)
    wins = None
    if "wins" in group:
        wins = [
            (
                name,
                *(
                    "–" if a == b else number(group["wins"]["value"][a][b], 2)
                    for b in range(len(group["wins"]["names"]))
                ),
            )
            for a, name in enumerate(group["wins"]["names"])
        ]
    known = [row for row in group["rows"] if "reward" in row and "kl" in row]
    diverging = ""
    if len(known) > 1:
        diverging = frontier_figure({row["name"]: row for row in known}, look)
    return {
        "group": group,
        "figure": _frontier(group["rows"], look),
        "diverging": diverging,
        "without": ", ".join(row["name"] for row in group["rows"] if "kl" not in row),
        "head": head,
        "rows": rows,
        "wins": wins,
    }


def _frontier(rows: list[dict[str, Any]], look: Mapping[str, Look]) -> Markup | str:
    known = [row for row in rows if "reward" in row]
    if len(known) < 2:
        return ""
    from matplotlib.ticker import LogLocator, NullFormatter

    far = all("surprise" in row for row in known)
    figure, axes = new_figure(4.9 * (1 + far), 3.4 + 0.1 * len(known), 1 + far)
    axes = np.atleast_1d(axes)
    for row in known:
        keyed(axes[0], _read(row), row["reward"], row["name"], look[row["name"]])
        if far:
            keyed(axes[1], row["surprise"]["value"], row["reward"], row["name"], look[row["name"]])
    axes[0].set_xlabel("tokens read by the strong and a small model, per token", fontsize=8)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].xaxis.set_major_formatter("{x:g}")  # by default it is TeX, which names of models may look like
    axes[0].xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("judge's reward", fontsize=8)
    if far:
        axes[1].set_xlabel("surprise of the strong model, per token", fontsize=8)
    legend_below(figure, axes[0])
    head = ("", "tokens read", "reward", "low", "high", *(("surprise", "low", "high") if far else ()))
    data = [(r["name"], number(_read(r), 2), *ends(r["reward"]), *(ends(r["surprise"]) if far else ())) for r in known]
    rewards = told("judge's reward", {row["name"]: row["reward"] for row in known})
    costs = told("tokens read per token", {row["name"]: _read(row) for row in known}, 1)
    return svg(figure, f"{rewards}; {costs}", (head, data))


def _read(row: Mapping[str, Any]) -> float:
    return row["cost"]["strong"] + row["cost"]["guide"]
