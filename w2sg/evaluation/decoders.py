"""What a decoder wrote, measured beside plain samples: rewards, wins, lengths, distance, and what it cost."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.decoding.decoders import Decoder
from w2sg.errors import UserError
from w2sg.evaluation import alpaca_eval as alpaca
from w2sg.evaluation.comparisons import Comparisons
from w2sg.evaluation.rows import sample_rows
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports.section import Section, Story
from w2sg.reports.sections.alignment_tax import AlignmentTax
from w2sg.reports.sections.best_of_n import BestOfN
from w2sg.reports.sections.decoded import Cost, Decoded
from w2sg.reports.sections.divergence import Divergence
from w2sg.reports.sections.draft import Draft
from w2sg.reports.sections.judge import JudgeFacts
from w2sg.reports.sections.replies import RepliesShown
from w2sg.reports.sections.search_rounds import SearchRounds
from w2sg.reports.sections.training import FitTraining
from w2sg.reports.sections.won_and_lost import WonAndLost
from w2sg.reports.words import SHOWN, short

if TYPE_CHECKING:
    from w2sg.data.replies import Replies
    from w2sg.experiment.decode import Steered
    from w2sg.experiment.run import Run
    from w2sg.judges.base import Judge
    from w2sg.models.trained import Trained
    from w2sg.reports.assemble import Report

NAMES = {"plain": "strong model, plain", "guide": "small aligned model alone"}


class Comparison:
    """Systems that answered the same prompts.

    Args:
        judge: what measures replies; None leaves that out.
        strong: the frozen model, whose surprise at the replies is a distance from it.
        systems: by name; ``plain`` is what the others are compared with, ``guide`` the small aligned model alone.
    """

    def __init__(
        self,
        run: Run,
        judge: Judge | None,
        strong: Trained,
        systems: dict[str, Steered],
        decoder: Decoder,
    ):
        self.run, self.judge, self.strong = run, judge, strong
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
        traces: list[dict[str, Any]],
        surprise: bool,
        tax: dict[str, Any] | None = None,
        kl: tuple[dict[str, dict[str, Any]], dict[str, str]] | None = None,
    ) -> Report:
        """Measure, and write the report.

        Args:
            traces: of a few searches.
            surprise: whether the strong model's surprise at the replies is measured.
            tax: what `w2sg.evaluation.alignment_tax.alignment_tax` found.
            kl: what `w2sg.evaluation.divergence.frontier` did.
        """
        run, decoder = self.run, self.decoder
        compared = self._compared()
        rewards = {} if compared is None else compared.rewards
        measured = self._systems(surprise, compared)
        preferred = (
            {}
            if rewards or compared is None
            else {
                (name, other): compared.preferred(name, other)
                for name, system in measured.items()
                for other in system["against"]
            }
        )
        rows = self._sample_rows(rewards, preferred)
        plain = self.replies["plain"]
        content = {
            "decoder": decoder.model_dump(),
            "words": {"name": decoder.words, "setting": decoder.setting()},
            "prompts": len(plain),
            "systems": measured,
        }
        on_replies = None
        if compared is not None and not rewards and decoder.kind in measured:
            on_replies = measured[decoder.kind]["against"]["plain"]
        judge = None if self.judge is None else self.judge.accuracy()
        sections: list[Section] = [Decoded(content={"decoding": content}), Cost()]
        if decoder.independent_samples:
            sections.append(BestOfN(self._best_of_n() if rewards else None))
        if decoder.drafts:
            sections.append(self._draft())
        texts = zip(plain.ids, (prompt.text for prompt in plain.prompts), strict=True)
        losses = {"weak": run.config.method["alignment"]["loss"]}
        sections += [
            SearchRounds(traces),
            Divergence(*(kl or ())),
            AlignmentTax(tax),
            *self._won_and_lost(compared),
            RepliesShown("decoding", rows, texts, self._drafts()),
            FitTraining("decoding", run.stages, run.dropped, losses),
            JudgeFacts("decoding", judge, on_replies),
        ]
        columns = {"id": plain.ids, **{f"reward_{k}": v.tolist() for k, v in rewards.items()}}
        columns |= {f"preferred_{name}_over_{other}": v.tolist() for (name, other), v in preferred.items()}
        files = [lambda out: alpaca.export_replies(out, self.replies, run.config.dataset.name)]
        return run.report(self._story(), sections, columns=columns, samples=rows, files=files)

    def _story(self) -> Story:
        """Title and names of systems."""
        decoder, config = self.decoder, self.run.config
        name = f"{decoder.words[0].upper()}{decoder.words[1:]}"
        guide = f", guided by {short(config.weak.name)}" if "guide" in self.systems else ""
        whom = f"{short(config.strong.name)} on {config.dataset.name}{guide}"
        return Story(
            f"{name} ({decoder.setting()}) of {whom}, seed {config.seed}",
            names=NAMES | {decoder.kind: decoder.words},
            uses_of_splits={"test": "prompts that all systems answered"},
            verb="decode",
        )

    # -- systems ------------------------------------------------------------------------------------------------------

    def _compared(self) -> Comparisons | None:
        """Rewards of all replies, or verdicts on every two systems."""
        if self.judge is None:
            return None
        stages = {self.decoder.kind: self.decoder.stage}
        return Comparisons(self.judge, "decoded", self.replies, stages=stages)

    def _systems(self, surprise: bool, compared: Comparisons | None) -> dict[str, dict[str, Any]]:
        """What was measured of each system."""
        seconds = {record.key: record.seconds for record in self.run.stages.records}
        measured: dict[str, dict[str, Any]] = {}
        for name, replies in self.replies.items():
            steered, bootstrap = self.systems[name], Bootstrap(len(replies))
            written = max(int(steered.replies.lengths.sum()), 1)
            reads = {key: sum(fact[f"{key}_read"] for fact in steered.facts) / written for key in ("strong", "guide")}
            if name == "guide":  # it stands where the strong model otherwise does
                reads = {"strong": 0.0, "guide": reads["strong"]}
            characters = np.array([len(text) for text in replies.texts])
            measured[name] = {
                "replies": len(replies),
                "length": comparisons.length_summary(replies.lengths, ~replies.finished),
                "characters": float(characters.mean()),
                **comparisons.distinctness(replies.texts),
                "cost": reads | {"seconds": seconds.get(steered.stage, 0.0) / written},
            }
            if surprise and not self.run.all_empty(name, replies, "surprise"):
                values = self._surprise(name, replies)
                known = values[~np.isnan(values)]
                measured[name]["surprise"] = Bootstrap(len(known)).mean(known).as_dict()
            if compared is None:
                continue
            if rewards := compared.rewards:
                correlation = comparisons.reward_length_correlation(rewards[name], characters, bootstrap)
                measured[name]["reward"] = bootstrap.mean(rewards[name]).as_dict()
                measured[name]["length_correlation"] = correlation.as_dict()
            others = [other for other in ("plain", "guide") if other in self.replies and other != name]
            # of two systems a judge that compares is asked once: "plain" over "guide" is the mirror image
            measured[name]["against"] = {o: compared.over(name, o) for o in others if rewards or name != "plain"}
        return measured

    def _sample_rows(
        self, rewards: dict[str, np.ndarray], preferred: dict[tuple[str, str], np.ndarray]
    ) -> list[dict[str, Any]]:
        """Replies as rows of samples.parquet, with what each cost."""
        rows = []
        for name, replies in self.replies.items():
            facts = [self.systems[name].facts[k] for k in self.rows[name]]
            if name == "guide":  # it stands where the strong model otherwise does
                facts = [{"strong_read": 0.0, "guide_read": fact["strong_read"]} for fact in facts]
            columns = {"reward": rewards[name]} if rewards else {}
            columns |= {f"over_{other}": v for (who, other), v in preferred.items() if who == name}
            measured = sample_rows(name, replies, columns)
            rows += [row | fact for row, fact in zip(measured, facts, strict=True)]
        return rows

    def _stage(self, name: str) -> str:
        """What a system's stages are called in the store."""
        return self.decoder.stage if name == self.decoder.kind else name

    @cached_property
    def _reader(self) -> Trained:
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
        values, sizes, _ = self.run.token_values(f"{self._stage(name)}-by-strong", strong, replies, f"{name}-replies")
        rows = self.run.encode(strong.source, replies, f"{name}-replies")
        sums = np.array([float(part.double().sum()) for part in values.split(sizes.tolist())])
        surprise = np.full(len(replies), np.nan)
        surprise[rows.kept] = -sums / np.maximum(sizes.numpy(), 1)
        return surprise

    def _best_of_n(self) -> list[dict[str, Any]]:
        steered = self.systems[self.decoder.kind]
        rewards = self.judge.checked_rewards("candidates", steered.candidates)
        count = self.decoder.independent_samples
        table = {}
        for k, i in enumerate(steered.candidates.ids):
            table.setdefault(i, []).append((steered.values[k], rewards[k]))
        whole = [np.array(rows) for rows in table.values() if len(rows) == count]
        read = [rows for rows in whole if not np.isnan(rows).any()]
        if not read:
            raise UserError(
                f"{self.judge.called}.rewards: gave NaN for samples of every prompt, so there is no curve of the best "
                "of n; give each a number (all replies are in the store)"
            )
        if lost := len(whole) - len(read):
            self.run.reading.say(
                f"the curve of the best of n leaves out {lost:,} of {len(whole):,} prompts, of which the judge cannot "
                "read a sample"
            )
        stacked = np.stack(read)
        return comparisons.best_of_n(stacked[..., 0], stacked[..., 1], Bootstrap(len(stacked)))

    def _won_and_lost(self, compared: Comparisons | None) -> list[Section]:
        kind = self.decoder.kind
        if compared is None or kind not in self.replies or kind == "plain":
            return []
        preferred = compared.preferred(kind, "plain")
        return [WonAndLost.measure((kind, "plain"), preferred, self.replies[kind], self.replies["plain"])]

    def _draft(self) -> Draft:
        facts = [self.systems[self.decoder.kind].facts[k] for k in self.rows[self.decoder.kind]]
        kept, fates = np.array([fact["kept"] for fact in facts]), [fact["fate"] for fact in facts]
        return Draft.measure(kept, self.replies[self.decoder.kind].lengths, fates)

    def _drafts(self) -> dict[tuple[str, str], str]:
        """The drafted part of each reply that is shown, by system and prompt."""
        kind, texts = self.decoder.kind, {}
        for prompt_id in self.replies["plain"].ids[:SHOWN] if self.decoder.drafts else ():
            steered = self.systems[kind]
            place = steered.replies.ids.index(prompt_id)
            drafted = int(steered.drafted[place].sum())
            texts[kind, prompt_id] = self.strong.source.chat.text(steered.replies.tokens[place][:drafted])
        return texts
