"""What a decoder wrote, measured beside plain samples: rewards, wins, lengths, distance, and what it cost."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.data import audit
from w2sg.decoding.decoders import Decoder
from w2sg.decoding.options import DecodeEvaluation
from w2sg.evaluation import alpaca_eval as alpaca
from w2sg.evaluation.alignment_tax import lost
from w2sg.evaluation.comparisons import Comparisons
from w2sg.losses.preferences import displacement
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports import report
from w2sg.reports.pages.decoders import decode_page, title
from w2sg.reports.sections.training import last_numbers as training_of
from w2sg.reports.words import position_warning

if TYPE_CHECKING:
    from w2sg.data.replies import Prompts, Replies
    from w2sg.experiment.decode import Steered
    from w2sg.experiment.text import TextRun, Writer
    from w2sg.judges.base import Judge

SHOWN = 6  # prompts whose replies stand on the page


class Comparison:
    """Systems that answered the same prompts.

    Args:
        judge: what measures replies; None leaves that out.
        strong: the frozen model, whose surprise at the replies is a distance from it.
        systems: by name; ``plain`` is what the others are compared with, ``guide`` the small aligned model alone.
    """

    def __init__(
        self,
        text: TextRun,
        judge: Judge | None,
        strong: Writer,
        systems: dict[str, Steered],
        decoder: Decoder,
    ):
        self.text, self.run, self.judge, self.strong = text, text.run, judge, strong
        self.decoder = decoder
        # the same prompts for all: one that a system had no room for is left out everywhere
        common = set.intersection(*(set(s.replies.ids) for s in systems.values()))
        self.systems = systems
        self.rows = {name: [k for k, i in enumerate(s.replies.ids) if i in common] for name, s in systems.items()}
        order = {i: k for k, i in enumerate(sorted(common))}
        for name, rows in self.rows.items():
            rows.sort(key=lambda k, ids=systems[name].replies.ids: order[ids[k]])
        self.replies: dict[str, Replies] = {name: s.replies.take(self.rows[name]) for name, s in systems.items()}

    def report(
        self,
        prompts: Prompts,
        traces: list[dict[str, Any]],
        evaluation: DecodeEvaluation,
        tax: dict[str, Any] | None = None,
        kl: tuple[dict[str, dict[str, Any]], dict[str, str]] | None = None,
    ) -> report.Report:
        """Measure, and write report.json, samples.parquet and the page.

        Args:
            tax: what `w2sg.evaluation.alignment_tax.alignment_tax` found.
            kl: what `w2sg.evaluation.divergence.frontier` did.
        """
        run = self.run
        measured, rewards, preferred = self._systems(evaluation)
        rows = []
        for name, replies in self.replies.items():
            facts = [self.systems[name].facts[k] for k in self.rows[name]]
            if name == "guide":  # it stands where the strong model otherwise does
                facts = [{"strong_read": 0.0, "guide_read": fact["strong_read"]} for fact in facts]
            for k in range(len(replies)):
                rows.append(
                    {
                        "system": name,
                        "prompt_id": replies.ids[k],
                        "prompt": replies.prompts[k].text,
                        "reply": replies.texts[k],
                        "finished": bool(replies.finished[k]),
                        "tokens": int(replies.lengths[k]),
                        **({"reward": float(rewards[name][k])} if rewards else {}),
                        **{
                            f"over_{other}": None if np.isnan(v[k]) else float(v[k])
                            for (own, other), v in preferred.items()
                            if own == name
                        },
                        **facts[k],
                    }
                )
        content = report.heading(run.config, run.typed, "none") | {
            "command": " ".join(["python evaluate.py", *run.typed])
        }
        content["decoding"] = {
            "decoder": self.decoder.model_dump(),
            "words": {"name": self.decoder.words, "setting": self.decoder.setting()},
            "prompts": len(next(iter(self.replies.values()))),
            "systems": measured,
            "dropped": self.text.dropped,
            "traces": traces,
            "examples": self._examples(rows),
            "training": training_of(run.stages),
        }
        if self.judge is not None:
            content["decoding"]["judge"] = self.judge.accuracy()
        if rewards and self.decoder.independent_samples:
            content["decoding"]["best_of_n"] = self._best_of_n()
        if self.decoder.drafts:
            content["decoding"]["switch"] = self._switch()
        if kl is not None:
            for name, own in kl[0].items():
                measured[name]["kl"] = own
            content["decoding"]["without_kl"] = kl[1]
        if tax is not None:
            content["decoding"]["tax"] = tax
        content["data"] = audit.summary(run.data)
        content["metrics"], content["diagnostics"] = {}, {}
        content["stages"] = [record.as_dict() for record in run.stages.records]
        content["versions"] = report.versions()
        content["config"] = run.config.model_dump(by_alias=True)
        content["warnings"] = [*report.said(run.stages), *self._warnings(content["decoding"])]
        content["warnings"] += content["data"].get("notes", [])
        run.reading.into(content)
        columns = {"id": self.replies["plain"].ids, **{f"reward_{k}": v.tolist() for k, v in rewards.items()}}
        columns |= {f"preferred_{own}_over_{other}": v.tolist() for (own, other), v in preferred.items()}
        found = report.Report(
            content,
            columns,
            report.curves(run.stages),
            page=decode_page,
            title=title,
            replies=rows,
            table=terminal_table,
        )
        if run.devices.main:
            files = found.write(run.out) + alpaca.export(run.out, self.replies, run.config.dataset.name)
            run.loggers.summarise(found.content, found.predictions, files, rows)
        run.devices.wait()
        return found

    # -- systems ------------------------------------------------------------------------------------------------------

    def _systems(
        self, evaluation: DecodeEvaluation
    ) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
        """What was measured of each system, its rewards [N], and how far one was preferred to another [N], by a judge
        that compares.
        """
        preferred: dict[tuple[str, str], np.ndarray] = {}
        compared, stage, rewards = None, self._stage, {}
        if self.judge is not None:
            compared = Comparisons(self.judge, "decoded", {stage(n): replies for n, replies in self.replies.items()})
            rewards = {n: compared.rewards[stage(n)] for n in self.replies if compared.rewards}
        surprise = {}
        if evaluation.surprise:
            surprise = {name: self._surprise(name, replies) for name, replies in self.replies.items()}
        seconds = {record.key: record.seconds for record in self.run.stages.records}
        found: dict[str, dict[str, Any]] = {}
        for name, own in self.replies.items():
            bootstrap, steered = Bootstrap(len(own)), self.systems[name]
            written = max(int(steered.replies.lengths.sum()), 1)
            reads = {key: sum(fact[f"{key}_read"] for fact in steered.facts) / written for key in ("strong", "guide")}
            if name == "guide":  # it stands where the strong model otherwise does
                reads = {"strong": 0.0, "guide": reads["strong"]}
            characters = np.array([len(text) for text in own.texts])
            found[name] = {
                "replies": len(own),
                "length": comparisons.length_summary(own.lengths, ~own.finished),
                "characters": float(characters.mean()),
                **comparisons.distinctness(own.texts),
                "cost": reads | {"seconds": seconds.get(steered.stage, 0.0) / written},
            }
            if surprise:
                known = surprise[name][~np.isnan(surprise[name])]
                found[name]["surprise"] = Bootstrap(len(known)).mean(known).as_dict()
            if rewards:
                found[name]["reward"] = bootstrap.mean(rewards[name]).as_dict()
                found[name]["length_correlation"] = comparisons.reward_length_correlation(
                    rewards[name], characters, bootstrap
                ).as_dict()
            others = [other for other in ("plain", "guide") if other in self.replies and other != name]
            if compared is None:
                continue
            # of two systems a judge that compares is asked once: "plain" over "guide" is the mirror image
            opponents = others if rewards or name != "plain" else []
            found[name]["against"] = {other: compared.over(stage(name), other) for other in opponents}
            if not rewards:
                preferred |= {(name, other): compared.preferred(stage(name), other) for other in opponents}
        return found, rewards, preferred

    def _stage(self, name: str) -> str:
        """What a system's stages are called in the store."""
        return self.decoder.stage if name == self.decoder.kind else name

    @cached_property
    def _reader(self) -> Writer:
        """The strong model with room for the longest prompt and reply, as far as it has positions."""
        source = replace(self.strong.source)
        source.tokenizer = self.strong.source.tokenizer
        most = source.spec.max_length + self.decoder.max_new_tokens
        positions = getattr(source.config, "max_position_embeddings", None) or most
        source.spec = source.spec.model_copy(update={"max_length": min(most, positions)})
        return replace(self.strong, source=source)

    def _surprise(self, name: str, replies: Replies) -> np.ndarray:
        """[N] minus the strong model's log-probability of each reply, per token; NaN where it has none."""
        strong = self._reader
        values, sizes, _ = self.text.token_values(f"{self._stage(name)}-by-strong", strong, replies, f"{name}-replies")
        rows = self.text.encode(strong.source, replies, f"{name}-replies")
        sums = np.array([float(part.double().sum()) for part in values.split(sizes.tolist())])
        found = np.full(len(replies), np.nan)
        found[rows.kept] = -sums / np.maximum(sizes.numpy(), 1)
        return found

    def _best_of_n(self) -> list[dict[str, Any]]:
        steered = self.systems[self.decoder.kind]
        rewards = self.judge.rewards("candidates", steered.candidates)
        count = self.decoder.independent_samples
        table = {}
        for k, i in enumerate(steered.candidates.ids):
            table.setdefault(i, []).append((steered.values[k], rewards[k]))
        whole = [np.array(rows) for rows in table.values() if len(rows) == count]
        stacked = np.stack(whole)
        return comparisons.best_of_n(stacked[..., 0], stacked[..., 1], Bootstrap(len(stacked)))

    def _switch(self) -> dict[str, Any]:
        name = self.decoder.kind
        facts = [self.systems[name].facts[k] for k in self.rows[name]]
        lengths = self.replies[name].lengths
        kept = np.array([fact["kept"] for fact in facts])
        return {
            "kept": kept.tolist(),
            "share": float(kept.sum() / max(lengths.sum(), 1)),
            "fates": {fate: sum(f["fate"] == fate for f in facts) for fate in ("reached", "complete", "longest")},
        }

    def _examples(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shown = []
        for i in self.replies["plain"].ids[:SHOWN]:
            own = [row for row in rows if row["prompt_id"] == i]
            replies = []
            for row in own:
                kept = {k: v for k, v in row.items() if k not in ("prompt", "prompt_id")}
                if self.decoder.drafts and row["system"] == self.decoder.kind:
                    steered = self.systems[self.decoder.kind]
                    place = steered.replies.ids.index(i)
                    chat, drafted = self.strong.source.chat, steered.drafted[place]
                    tokens = steered.replies.tokens[place]
                    kept["draft"] = chat.text(tokens[: int(drafted.sum())])
                replies.append(kept)
            shown.append({"prompt": own[0]["prompt"], "replies": replies})
        return shown

    def _warnings(self, found: dict[str, Any]) -> list[str]:
        lines, systems = [], found["systems"]
        own = systems.get(self.decoder.kind)
        if own and "against" in own:
            gap = own["against"]["plain"].get("gap")
            if gap and gap["high"] is not None and gap["high"] < 0:
                lines.append(
                    f"{self.decoder.kind} hurts: the judge's reward is lower than that of plain samples "
                    f"({gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]); try a smaller weight of the "
                    "guide, another guide, normalise=mean, or none"
                )
            raw, controlled = own["against"]["plain"]["win_rate"], own["against"]["plain"]["length_controlled"]
            if raw["low"] is not None and controlled["low"] is not None and raw["low"] > 0.5 >= controlled["low"]:
                lines.append("its wins over plain samples are not resolved once length is controlled")
        cut = {name: s["length"]["truncated"] for name, s in systems.items() if s["length"]["truncated"] > 0.2}
        if cut:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in cut.items())
            lines.append(f"replies cut off at max_new_tokens, so that rewards are of unfinished text: {shares}")
        judge = found.get("judge")
        lines += judge["notes"] if judge else []
        if judge and not self.judge.gives_rewards:
            if self.decoder.independent_samples:
                lines.append("the judge compares and gives no rewards, so there is no curve of the best of n")
            lines += position_warning(judge.get("on_test_pairs", {}) if own is None else own["against"]["plain"])
        if judge and judge["accuracy"]["low"] is not None and judge["accuracy"]["low"] <= 0.5:
            lines.append("the judge cannot be told from a coin on the test split's own pairs; its opinion says little")
        weak = found["training"].get("weak")
        if weak:
            tuning = self.run.config.method["alignment"]
            lines += displacement("the guide's alignment", tuning["loss"], weak["last"])
        lines += lost(found["tax"]) if "tax" in found else []
        for name, counts in found["dropped"].items():
            if out := [f"{n} {reason}" for reason, n in counts.items() if "(kept)" not in reason]:
                lines.append(f"{name}: left out {', '.join(out)}")
        return lines


def terminal_table(content: dict[str, Any]) -> Any:
    """The systems side by side, for the terminal."""
    from rich.table import Table as Grid

    from w2sg.reports.html import estimate

    grid = Grid(title=title(content), title_justify="left")
    for column in (
        "",
        "reward",
        "wins over plain",
        "length controlled",
        "tokens",
        "strong / guide tokens read per token",
    ):
        grid.add_column(column, justify="left" if not column else "right")
    for name, found in content["decoding"]["systems"].items():
        against = found.get("against", {}).get("plain")
        grid.add_row(
            name,
            estimate(found["reward"]) if "reward" in found else "-",
            estimate(against["win_rate"]) if against else "-",
            estimate(against["length_controlled"]) if against else "-",
            f"{found['length']['mean']:.0f}",
            f"{found['cost']['strong']:.1f} / {found['cost']['guide']:.1f}",
        )
    return grid
