"""What language models wrote, measured: rewards, win rates, lengths, preferences, damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.config.schema import OWN_CHAT, ModelConfig
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Prompts, Replies, gold_pairs, prompts_of
from w2sg.data.rows import pack, token_plan
from w2sg.errors import UserError
from w2sg.evaluation import alpaca_eval as alpaca
from w2sg.experiment.run import Model
from w2sg.experiment.text import TextRun, Writer, single_texts
from w2sg.metrics import replies as comparisons
from w2sg.metrics.intervals import Bootstrap
from w2sg.models.heads import load_head
from w2sg.models.loading import Source, find, load_language_model, load_scorer, same

if TYPE_CHECKING:
    from w2sg.config.options import Analysis, Contrast, Evaluation, Judge, PlainSampling
    from w2sg.data.replies import ReplyPairs
    from w2sg.reports.report import Report


@dataclass(frozen=True)
class Sweep:
    """Replies of each alpha to the same prompts.

    Attributes:
        names: of the settings, "plain" first. alphas: None for plain.
        replies: of each setting.
        chosen: which setting the samples for training were written with.
    """

    names: list[str]
    alphas: list[float | None]
    replies: list[Replies]
    chosen: int


class Bench:
    """Measures what the models of a run wrote.

    Args:
        judge: the reward model, trained here or given.
        name: of its stages. split: whose pairs it is trained on.
        asked_for: the option that names it.
    """

    def __init__(
        self,
        text: TextRun,
        judge: Judge,
        name: str = "judge",
        split: Literal["transfer", "ground_truth"] = "transfer",
        asked_for: str = "method.judge",
    ):
        self.text, self.run, self.judge = text, text.run, judge
        self.name, self.split, self.asked_for = name, split, asked_for
        self._reward_model: Model | None = None
        self._as_it_is = judge.model not in (None, "strong", "weak")
        self.notes: list[str] = []
        self.source = self._find() if judge.model is not None else None

    def _find(self) -> Source:
        """Looked for before any work is done; it reads no more than it has positions for."""
        source = self._found()
        self.run.stages.said += source.notes
        positions = getattr(source.config, "max_position_embeddings", None)
        if positions is not None and positions < source.spec.max_length:
            source.spec = source.spec.model_copy(update={"max_length": positions})
        return source

    def _found(self) -> Source:
        role = self.judge.model if not self._as_it_is else "strong"
        spec: ModelConfig = getattr(self.run.config, role)
        shared = {"max_length": self.judge.max_length, "lr": None, "epochs": None, "head": "linear"}
        if self._as_it_is:
            own = {"name": self.judge.model, "revision": None, "layers": None, "random_init": False, "train": "full"}
            own |= {"quantise": None, **OWN_CHAT}
            found = find(spec.model_copy(update={**shared, **own}), self.asked_for)
            return replace(found, templated=found.chat.template)
        own = {"train": "head", "layer": self.judge.layer, "candidates": self.judge.candidates}
        return find(spec.model_copy(update={**shared, **own}), role)

    def independent_of(self, guide: Mapping[str, Source], writers: Mapping[str, Source]) -> None:
        """Refuse a reward model that guides; a head trained here judges what its frozen model writes as any text.

        Raises:
            UserError: judge and guide are one, whatever they are called.
        """
        for words, source in guide.items():
            if self.source is not None and self._as_it_is and same(source, self.source):
                raise itself("model", words)

    # -- rewards ------------------------------------------------------------------------------------------------------

    def rewards(self, name: str, replies: Replies) -> tuple[np.ndarray, dict[str, Any]]:
        """The judge's reward of each reply, [N], and where it came from.

        Raises:
            UserError: there is no judge.
        """
        if self.source is None:
            raise UserError("method.judge.model: rewards are needed here; name a judge")
        texts = self.texts(replies.prompts, replies.texts)
        ids = [f"{i}:{s}:{g}" for i, s, g in zip(replies.ids, replies.sample, replies.group, strict=True)]
        labels = self.run.predict(self._model(), single_texts(name, texts, ids))
        return labels.logits[:, 0].double().numpy(), labels.key

    def texts(self, prompts: Sequence[Dialogue], replies: Sequence[str]) -> list[str]:
        """Whole dialogues as the judge reads them."""
        pairs = zip(prompts, replies, strict=True)
        if self._as_it_is:
            return [self.source.chat.dialogue(prompt, reply) for prompt, reply in pairs]
        return [f"{prompt.text} {reply}" for prompt, reply in pairs]

    def _model(self) -> Model:
        if self._reward_model is None:
            if self._as_it_is:
                self._reward_model = Model(self.name, None, self.source, None)
            else:
                table = getattr(self.run.data, self.split)
                self._reward_model = self.run.fit(self.name, self.source, table, self.run.gold(table))
        return self._reward_model

    def key(self) -> dict[str, Any]:
        """The judge as part of a cache key."""
        model = self._model()
        first = {"beginning": "kept"} if self.source.first else {}  # where what it reads has to be cut
        if model.folder is not None:
            return {"stage": model.folder.name, **first}
        spec = self.source.spec
        return {**self.source.identity, "max_length": spec.max_length, "dtype": spec.dtype, **first}

    def scorer(self) -> tuple[nn.Module, Rewards]:
        """The judge held in memory, for decoders that ask it again and again: its module, and what reads with it
        wherever that module is. It reads what there is of a reply as if it were whole.
        """
        model, source = self._model(), self.source
        saved = None if model.folder is None else model.folder / "model"
        if model.layer is None:
            module = load_scorer(source, True, 2, saved, as_it_is=saved is None)
            score = module
        else:
            body = load_language_model(source, True, 2, depth=model.layer)
            module = nn.ModuleList([body, load_head(saved)])

            def score(batch: dict[str, Tensor]) -> Tensor:
                return module[1]({"features": body.features(batch, [model.layer])[:, :, 0]})

        return module.requires_grad_(False), Rewards(self, module, score)

    # -- the sweep over alpha -----------------------------------------------------------------------------------------

    def alphas(
        self, weak: Writer, untuned: Writer, decoding: Contrast, sampling: PlainSampling, analysis: Analysis
    ) -> Sweep | None:
        """Let the pair answer the same test prompts with every alpha, and plainly, all in one batch."""
        if not analysis.alphas:
            return None
        settings: dict[str, tuple[float | None, list[float]]] = {"plain": (None, sampling.columns())}
        own = decoding.columns()
        for alpha in sorted(set(analysis.alphas)):
            settings[f"{alpha:g}"] = alpha, decoding.columns(alpha)
        chosen = next((name for name, (_, columns) in settings.items() if columns == own), None)
        if chosen is None:
            chosen = f"{own[0]:.3g}" + ("" if decoding.gamma is None else f" (gamma {decoding.gamma:g})")
            settings[chosen] = own[0], own
        prompts = prompts_of(self.run.data.test).first(analysis.prompts)
        columns = [columns for _, columns in settings.values()]
        replies = self.text.write("alphas", weak, prompts, decoding, columns, reference=untuned)
        return Sweep(
            list(settings),
            [alpha for alpha, _ in settings.values()],
            [replies.of_group(g) for g in range(len(settings))],
            list(settings).index(chosen),
        )

    def measure_sweep(self, sweep: Sweep) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Rewards, lengths and wins of every setting, and the replies themselves as rows of a table."""
        count = len(sweep.replies[0])
        bootstrap = Bootstrap(count)
        implicit = {n: r.implicit_rewards() for n, r in zip(sweep.names, sweep.replies, strict=True)}
        lengths = {n: r.lengths for n, r in zip(sweep.names, sweep.replies, strict=True)}
        per_token = {n: implicit[n] / np.maximum(lengths[n], 1) for n in sweep.names}
        measures = {"implicit": implicit, "implicit_per_token": per_token}
        if self.source is not None:
            whole = concatenate(sweep.replies)
            rewards, _ = self.rewards("alphas", whole)
            measures["explicit"] = dict(zip(sweep.names, np.split(rewards, len(sweep.names)), strict=True))
        plain = sweep.names[0]
        found: dict[str, Any] = {
            "names": sweep.names,
            "alphas": sweep.alphas,
            "chosen": sweep.names[sweep.chosen],
            "prompts": count,
            "length": {
                n: comparisons.length_summary(lengths[n], ~r.finished)
                for n, r in zip(sweep.names, sweep.replies, strict=True)
            },
        }
        for name, values in measures.items():
            scaled = comparisons.min_max_per_prompt(values)
            found[name] = {
                "mean": {n: bootstrap.mean(values[n]).as_dict() for n in sweep.names},
                "scaled": {n: bootstrap.mean(scaled[n]).as_dict() for n in sweep.names},
                "over_plain": {
                    n: {
                        "gap": comparisons.reward_gap(values[n], values[plain], bootstrap).as_dict(),
                        "standardised": comparisons.standardised_gap(values[n], values[plain], bootstrap).as_dict(),
                        "p": comparisons.paired_test(values[n], values[plain]),
                    }
                    for n in sweep.names[1:]
                },
                "wins": comparisons.win_matrix(values, bootstrap),
                "length_correlation": {
                    n: comparisons.reward_length_correlation(values[n], lengths[n], bootstrap).as_dict()
                    for n in sweep.names
                },
            }
        if "explicit" in measures:
            judged = measures["explicit"]
            found["explicit"]["length_controlled"] = {
                n: comparisons.length_controlled_win_rate(
                    judged[n], judged[plain], lengths[n], lengths[plain], bootstrap
                ).as_dict()
                for n in sweep.names[1:]
            }
        rows = []
        for name, replies in zip(sweep.names, sweep.replies, strict=True):
            columns = {key: values[name] for key, values in measures.items()}
            rows += _sample_rows(f"alpha {name}" if name != plain else "alpha plain", replies, columns)
        return found, rows

    # -- trained models -----------------------------------------------------------------------------------------------

    def preferences(self, name: str, writer: Writer, base: Writer, beta: float) -> tuple[Tensor, dict[str, np.ndarray]]:
        """A model's implicit rewards of the test split's pairs: logits [N, 2], the first reply in front.

        The implicit reward is beta log(model / base), in which both read the pair as the model writes it, template and
        length, as they do in decoding. Rows that do not fit into ``max_length`` have logits of 0, which is a tie.

        Returns:
            The logits, and sums of log-probabilities and tokens of the preferred replies, [N], NaN where dropped.
        """
        table = self.run.data.test
        pairs, rows = gold_pairs(table), f"{name}-on-test-pairs"
        sums = []
        for role, model in ((name, writer), (base.name, reading_as(base, writer))):
            values, _ = self.text.read_replies(f"{role}-on-test-pairs", model, pairs, rows)
            sums.append(values.double())
        rows = self.text.encode(writer.source, pairs, rows)
        rewards = torch.zeros(len(table), 2, dtype=torch.float64)
        rewards[torch.from_numpy(rows.kept)] = beta * (sums[0] - sums[1])
        labels = torch.as_tensor(table.labels)
        logits = rewards.gather(1, torch.stack([labels, 1 - labels], 1))  # chosen is in front where the label is 0
        chosen = {key: np.full(len(table), np.nan) for key in ("log_probability", "tokens")}
        chosen["prompt"] = np.array(table.clusters)
        chosen["log_probability"][rows.kept] = sums[0][:, 0].numpy()
        chosen["tokens"][rows.kept] = rows.completions.sizes[:, 0]
        return logits, chosen

    def report(
        self,
        systems: dict[str, Writer],
        untuned: Writer,
        betas: dict[str, float],
        sweep: Sweep | None,
        pairs: ReplyPairs,
        sampling: PlainSampling,
        evaluation: Evaluation,
    ) -> Report:
        """Measure the models of a run on the test split and write the report.

        Args:
            systems: by name; ``base`` is the strong model as it was found, ``weak`` the aligned weak one.
            untuned: the weak model before its alignment.
            betas: of implicit rewards, by system; those of ``cong`` hold for all others.
            sweep: over alpha.
            pairs: what the last stage was trained on.
        """
        from w2sg.evaluation.text_report import write_report

        base = systems["base"]
        prompts = prompts_of(self.run.data.test).first(evaluation.prompts)
        replies = {
            name: self.text.sample(f"{writer.name}-on-test", writer, prompts, sampling)
            for name, writer in systems.items()
        }
        measured, rows = self._systems(systems, untuned, replies, evaluation)
        logits: dict[str, Tensor] = {}
        for name, writer in systems.items():
            if name == "base":
                continue
            before = untuned if name == "weak" else base
            logits[name], chosen = self.preferences(writer.name, writer, before, betas.get(name, betas["cong"]))
            if evaluation.perplexity:
                measured[name]["perplexity"] = _perplexity(chosen)
                if "perplexity" not in measured["base"]:
                    _, of_base = self.preferences(base.name, base, base, 1.0)
                    measured["base"]["perplexity"] = _perplexity(of_base)
        content: dict[str, Any] = {"systems": measured, "dropped": self.text.dropped, "pairs": len(pairs)}
        if self.source is not None:
            content["judge"] = self.accuracy()
        if sweep is not None:
            content["alphas"], more = self.measure_sweep(sweep)
            rows = more + rows
        found = write_report(self.run, logits, content, rows, prompts)
        if self.run.devices.main:
            alpaca.export(self.run.out, replies, self.run.config.dataset.name)
        return found

    def _systems(
        self,
        systems: dict[str, Writer],
        untuned: Writer,
        replies: dict[str, Replies],
        evaluation: Evaluation,
    ) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        rewards: dict[str, np.ndarray] = {}
        if self.source is not None:
            # all at once: states of frozen judges are read batch by batch
            everything, _ = self.rewards("replies-on-test", concatenate(list(replies.values())))
            ends = np.cumsum([len(r) for r in replies.values()])
            rewards = dict(zip(replies, np.split(everything, ends[:-1]), strict=True))
        found: dict[str, dict[str, Any]] = {}
        rows: list[dict[str, Any]] = []
        for name, own in replies.items():
            found[name] = {"length": comparisons.length_summary(own.lengths, ~own.finished), "replies": len(own)}
            if evaluation.kl and name != "base":
                before = untuned if name == "weak" else systems["base"]
                kl = self.text.divergence(f"{systems[name].name}-divergence", systems[name], before, own)
                found[name]["kl_per_token"] = Bootstrap(len(kl)).mean(kl).as_dict()
            rows += _sample_rows(name, own, {"explicit": rewards[name]} if rewards else {})
        for name, own in rewards.items():
            bootstrap = Bootstrap(len(own))
            found[name]["reward"] = bootstrap.mean(own).as_dict()
            found[name]["length_correlation"] = comparisons.reward_length_correlation(
                own, replies[name].lengths, bootstrap
            ).as_dict()
        for name in rewards:
            against = {}
            for other in ("base", "weak", "weak_sft", "cong_s", "ceiling"):
                if other in rewards and other != name:
                    against[other] = self._against(replies, rewards, name, other)
            found[name]["against"] = against
        return found, rows

    @staticmethod
    def _against(replies: dict[str, Replies], rewards: dict[str, np.ndarray], name: str, other: str) -> dict[str, Any]:
        place = {i: row for row, i in enumerate(replies[other].ids)}
        mine = [row for row, i in enumerate(replies[name].ids) if i in place]
        theirs = [place[replies[name].ids[row]] for row in mine]
        a, b = rewards[name][mine], rewards[other][theirs]
        lengths = replies[name].lengths[mine], replies[other].lengths[theirs]
        if replies[name].fingerprint != replies[other].fingerprint:  # tokens of two tokenizers are two units
            lengths = tuple(
                np.array([len(r.texts[k]) for k in rows])
                for r, rows in ((replies[name], mine), (replies[other], theirs))
            )
        bootstrap = Bootstrap(len(a))
        return {
            "prompts": len(a),
            "win_rate": comparisons.win_rate(a, b, bootstrap).as_dict(),
            "length_controlled": comparisons.length_controlled_win_rate(a, b, *lengths, bootstrap).as_dict(),
            "gap": comparisons.reward_gap(a, b, bootstrap).as_dict(),
            "standardised": comparisons.standardised_gap(a, b, bootstrap).as_dict(),
            "p": comparisons.paired_test(a, b),
        }

    @property
    def judges(self) -> bool:
        """Whether there is a judge."""
        return self.source is not None

    @property
    def scores(self) -> bool:
        """Whether it gives rewards."""
        return self.judges

    def accuracy(self) -> dict[str, Any]:
        """How often the judge prefers what people preferred, on the test split."""
        pairs = gold_pairs(self.run.data.test)
        both = concatenate([pairs.chosen, pairs.rejected])
        sides = np.repeat([0, 1], len(pairs))
        rows = np.tile(np.arange(len(pairs)), 2)  # a prompt may have several pairs
        rewards, _ = self.rewards("test-pairs", replace(both, sample=rows, group=sides))
        chosen, rejected = np.split(rewards, 2)
        known = ~np.isnan(chosen - rejected)
        chosen, rejected = chosen[known], rejected[known]
        right = (chosen > rejected) + 0.5 * (chosen == rejected)
        bootstrap = Bootstrap(len(right), clusters=np.array(self.run.data.test.clusters)[known])
        return {
            "kind": "reward",
            "model": self.source.spec.name,
            "trained": not self._as_it_is,
            "accuracy": bootstrap.share(right).as_dict(),
            "length_correlation": comparisons.reward_length_correlation(
                chosen, np.array([len(t) for t in pairs.chosen.texts])[known], bootstrap
            ).as_dict(),
        }


class Rewards:
    """Rewards of prompts and replies, a few at a time.

    Attributes:
        read: tokens read so far.
    """

    def __init__(self, bench: Bench, module: nn.Module, score: Callable[[dict[str, Tensor]], Tensor]):
        self.bench, self.module, self.score = bench, module, score
        self.read = 0

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[B]."""
        bench = self.bench
        spec = bench.source.spec
        rows = pack(
            [(text,) for text in bench.texts(prompts, replies)],
            bench.source.encode,
            spec.max_length,
            first=bench.source.first,
        )
        device, found = next(self.module.parameters()).device, np.zeros(len(prompts))
        for part in token_plan(rows.lengths, bench.run.devices.eval_tokens):
            batch = {k: v.to(device) for k, v in rows.collate(part).items()}
            found[part] = self.score(batch)[:, 0].double().cpu().numpy()
        self.read += int(rows.lengths.sum())
        return found


def reading_as(base: Writer, writer: Writer) -> Writer:
    """A model that reads with another's template and length; of one vocabulary."""
    own, other = base.source, writer.source
    if own.chat.fingerprint == other.chat.fingerprint and own.spec.max_length == other.spec.max_length:
        return base
    source = replace(own, spec=own.spec.model_copy(update={"max_length": other.spec.max_length}))
    source.chat = other.chat
    return replace(base, source=source)


def _perplexity(chosen: dict[str, np.ndarray]) -> dict[str, float | None]:
    """exp of the mean negative log-likelihood per token, with its interval over prompts."""
    there = ~np.isnan(chosen["tokens"])
    nll, tokens = -chosen["log_probability"][there], chosen["tokens"][there]
    ratio = Bootstrap(len(nll), clusters=chosen["prompt"][there]).ratio(nll, tokens)
    return {k: None if v is None else float(np.exp(v)) for k, v in ratio.as_dict().items()}


def concatenate(parts: Sequence[Replies]) -> Replies:
    """Replies one after another, the part as their group."""
    joined = {name: [x for part in parts for x in getattr(part, name)] for name in ("ids", "prompts", "texts")}
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("finished", "sample")}
    group = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Replies(**joined, **arrays, group=group, key={"parts": [part.key for part in parts]})


def _sample_rows(system: str, replies: Replies, columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {
            "system": system,
            "prompt_id": replies.ids[k],
            "prompt": replies.prompts[k].text,
            "reply": replies.texts[k],
            "finished": bool(replies.finished[k]),
            "tokens": int(replies.lengths[k]) if replies.tokens is not None else None,
            **{name: float(values[k]) for name, values in columns.items()},
        }
        for k in range(len(replies))
    ]


__all__ = ["Bench", "Prompts", "Sweep", "concatenate"]


def itself(key: str, words: str) -> UserError:
    """That a judge is the guide."""
    return UserError(
        f"method.judge.{key}: {words} would be guide and judge at once, and every gain its own opinion; choose another"
    )
