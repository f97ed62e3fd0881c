"""Weak labels refined in context: a strong model re-labels each row after others with their weak labels' words.

Shapes: N rows, C labels, m contexts. The refined label is the law of the next word over the label words; both orders of
a pair are read and averaged, so no place in the prompt is favoured.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2sg.data.labels import Labels
from w2sg.data.table import Table, digest
from w2sg.errors import UserError
from w2sg.experiment.next_words import next_words, split_words
from w2sg.experiment.run import Run
from w2sg.methods.refine import exemplars
from w2sg.methods.refine.options import InContext, LabelWords, Refine, RefineBaseline
from w2sg.methods.refine.provenance import revision_of, write_refined
from w2sg.metrics import labels as metrics
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.reports.assemble import Report
from w2sg.store.files import read_json
from w2sg.store.soundness import KEY

log = logging.getLogger(__name__)
PAIR_WORDS = [" A", " B"]
PAIR_QUESTION = "\n\nThe better one is"


def refine_labels(
    run: Run,
    refine: Refine,
    baselines: Sequence[RefineBaseline],
    words: LabelWords,
    rows: int | None,
    at_once: int,
) -> Report:
    """Train weak on truth, label, re-label in context, train strong on the refined soft labels with the run's loss.

    Args:
        refine: icl, or none for the weak labels themselves. rows: of the transfer split. at_once: contexts in a batch.
    """
    data = run.data
    transfer = data.transfer if rows is None else data.transfer.take(range(min(rows, len(data.transfer))))
    wording = Wording.of(run, transfer, words)
    strong = Trained("strong", run.strong)
    split_words(run.strong, wording.words, "method.labels.words")

    weak = run.fit("weak", run.weak, data.ground_truth, run.gold(data.ground_truth))
    labels = run.noisy(run.predict(weak, transfer))
    relabeller = Relabeller(run, strong, refine, wording, at_once, labels)
    in_context = isinstance(refine, InContext)
    refined = relabeller.label("refined-labels", transfer) if in_context else labels
    learned = {"student": refined, "ceiling": run.gold(transfer)}
    left_out = [] if in_context else sorted({"naive", "icl", "shuffled"} & set(baselines))  # the student is naive
    if in_context and "naive" in baselines:
        learned["naive"] = labels
    if "self" in baselines:
        learned["self_labels"] = relabeller.label("self-labels", transfer, alone=True)
    if in_context and "shuffled" in baselines:
        learned["shuffled"] = relabeller.label("shuffled-labels", transfer, shuffle=True)
    models = {
        name: run.fit(name, run.strong, transfer, taught, loss=None if name == "ceiling" else run.loss)
        for name, taught in learned.items()
        if name != "ceiling" or "ceiling" in baselines
    }
    predictions = {"weak": run.predict(weak, data.test)}
    predictions |= {name: run.predict(model, data.test) for name, model in models.items()}
    if in_context and "icl" in baselines:
        predictions["in_context"] = relabeller.label("labels-in-context", data.test)
    if in_context and run.devices.main:
        weak_laws = labels.logits.softmax(-1).tolist()
        who = {"model": run.strong.spec.name, "revision": revision_of(run.strong.identity)}
        rows = zip(relabeller.rows["refined-labels"], weak_laws, strict=True)
        write_refined(run.out, [row | {"weak": law, "words": wording.words, **who} for row, law in rows])
    return run.report(
        **predictions,
        taught=(refined, run.predict(models["student"], transfer)),
        notes={
            "refined_labels": _quality(labels, refined) | relabeller.counts,
            **({"baselines_left_out": f"{', '.join(left_out)}: nothing is refined"} if left_out else {}),
            "refiner": {"model": run.strong.spec.name, "revision": revision_of(run.strong.identity)},
            "trained_from_the_refiner": {name: _started_from(model, run.strong) for name, model in models.items()},
        },
    )


def _started_from(model: Trained, source: Source) -> bool:
    """Whether a model was trained from these weights, by the key of the stage that trained it."""
    start = read_json(model.folder / KEY)["model"]
    return all(start.get(key) == value for key, value in json.loads(json.dumps(source.identity)).items())


def _quality(weak: Labels, refined: Labels) -> dict[str, Any]:
    """How right labels are before any training, and how much refinement changed."""
    gold = torch.as_tensor(weak.table.labels)
    bootstrap = Bootstrap(len(gold), clusters=weak.table.clusters)
    right = {name: metrics.correct(x.logits, gold).numpy() for name, x in (("weak", weak), ("refined", refined))}
    quality: dict[str, Any] = {f"{name}_accuracy": float(hits.mean()) for name, hits in right.items()}
    gap = bootstrap.mean(right["refined"] - right["weak"].astype(np.float64))
    same = (weak.logits.argmax(-1) == refined.logits.argmax(-1)).double().mean()
    return quality | {"change": gap.value, "change_low": gap.low, "change_high": gap.high, "agreement": float(same)}


@dataclass(frozen=True)
class Wording:
    """How a text, or two, are shown and asked about.

    Attributes:
        question: comes last. words: one for each label. pairs: whether two texts are compared.
        cut: a text to the last so many tokens of it.
    """

    question: str
    words: list[str]
    pairs: bool
    cut: Callable[[str], str]

    @staticmethod
    def of(run: Any, table: Table, options: LabelWords) -> Wording:
        """From the options, or what the dataset asks for zero-shot scores.

        Raises:
            UserError: neither says how, or there are not as many words as labels.
        """
        if table.kind == "answers":
            raise UserError("method.target: this dataset has answers and no labels; use method.target=answers")
        pairs, zero_shot = table.kind == "pairs", run.config.dataset.zero_shot
        question, words = options.question, options.words
        if pairs:
            question, words = question or PAIR_QUESTION, words or PAIR_WORDS
        elif zero_shot is not None:
            question, words = question or zero_shot.question, words or zero_shot.answers
        if question is None or words is None:
            raise UserError(
                "method.labels: the dataset does not say how its labels are asked for; set method.labels.question and "
                "method.labels.words, a word for each label"
            )
        if len(words) != table.classes:
            raise UserError(f"method.labels.words: {len(words)} words for {table.classes} labels; give one for each")
        tokenizer, most = run.strong.tokenizer, options.exemplar_tokens

        def cut(text: str) -> str:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return text.strip() if len(ids) <= most else tokenizer.decode(ids[-most:]).strip()

        return Wording(question, list(words), pairs, cut)

    def shown(self, table: Table, row: int, swapped: bool) -> str:
        """One row up to where its label's word comes; ``swapped`` puts the second reply of a pair in front."""
        texts = table.texts[row]
        if not self.pairs:
            return f"{self.cut(texts[0])}{self.question}"
        first = int(table.first[row])
        a, b = (texts[1 - first], texts[first]) if swapped else (texts[first], texts[1 - first])
        prompt = table.prompts[row].text
        a, b = (self.cut(text[len(prompt) :]) for text in (a, b))
        before = f"{self.cut(prompt)}\n\n" if prompt.strip() else ""
        return f"{before}A: {a}\n\nB: {b}{self.question}"


class Relabeller:
    """Labels rows in the context of others with their weak labels.

    Args:
        labels: the weak ones, of the rows that exemplars are taken from.

    Attributes:
        counts: what had to be left out of contexts.
        rows: of refined.parquet, by stage; exemplars and hashes of each prompt, by context, then by order of the pair.
    """

    def __init__(self, run: Run, strong: Trained, options: Refine, wording: Wording, at_once: int, labels: Labels):
        self.run, self.strong, self.options, self.wording = run, strong, options, wording
        self.at_once, self.weak = at_once, labels
        self.counts: dict[str, int] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def label(self, name: str, table: Table, alone: bool = False, shuffle: bool = False) -> Labels:
        """Soft labels of a table's rows, logits [N, C].

        Args:
            alone: without exemplars. shuffle: exemplars have each other's labels.
        """
        contexts = [[[]] for _ in table.ids] if alone else self._contexts(table)
        orders = (False, True) if self.wording.pairs else (False,)
        prompts, shown = [], []
        lost, cut = 0, 0
        for row, each in enumerate(contexts):
            # a context without exemplars is the last of each row's, as `product_of_contexts` has it
            for context in [*each, []] if len(each) > 1 else each:
                for swapped in orders:
                    prompt, left, too_long = self._prompt(table, row, context, swapped, shuffle)
                    prompts.append(prompt)
                    shown.append((row, context[: len(context) - left]))
                    lost, cut = lost + left, cut + too_long
        if lost:
            shown_at_most = sum(len(context) for each in contexts for context in each) * len(orders)
            self.counts[f"{name}: exemplars left out of contexts that are too long"] = f"{lost} of {shown_at_most}"
        if cut:
            self.counts[f"{name}: contexts that lost the start of what is asked"] = cut
        if lost or cut:
            log.warning(
                "%s: %d exemplars were left out and %d contexts lost the start of what is asked, for want of room in "
                "strong.max_length=%d; raise it, or lower refine.context_size or method.labels.exemplar_tokens",
                name,
                lost,
                cut,
                self.strong.source.spec.max_length,
            )
        logs = next_words(self.run, name, self.strong, prompts, self.wording.words, "method.labels.words", self.at_once)
        logs = logs.double().log_softmax(-1).view(len(table), -1, len(orders), len(self.wording.words))
        if self.wording.pairs:
            # in the swapped order word A is the second reply; probabilities are averaged, so a pair has one label
            both = torch.stack([logs[:, :, 0], logs[:, :, 1].flip(-1)], 2)
            logs = both.logsumexp(2) - np.log(2.0)
        else:
            logs = logs[:, :, 0]
        logits = combined(logs)
        rows: list[dict[str, Any]] = [
            {"id": i, "refined": law, "exemplar_ids": [], "prompt_hashes": [], "stage": self._stage(name)}
            for i, law in zip(table.ids, logits.softmax(-1).tolist(), strict=True)
        ]
        for (row, context), prompt in zip(shown, prompts, strict=True):
            rows[row]["exemplar_ids"].append([self.weak.table.ids[k] for k in context])
            rows[row]["prompt_hashes"].append(digest("prompt", prompt))
        self.rows[name] = rows
        # the stage says what was read, weak labels' words included, and nothing else decides these labels
        return Labels(table, logits.float(), {"stage": self._stage(name), "contexts": digest(*map(str, contexts))})

    def _stage(self, name: str) -> str:
        return next(record.key for record in reversed(self.run.stages.records) if record.name == name)

    def _contexts(self, table: Table) -> exemplars.Contexts:
        pool = self.weak.table
        return exemplars.contexts(
            self.options,
            pool.ids,
            table.ids,
            lambda: tuple([" ".join(t) for t in part.texts] for part in (pool, table)),
            lambda: self.weak.logits.double().softmax(-1).max(-1).values.numpy(),
            self.run.seed,
        )

    def _prompt(
        self, table: Table, row: int, context: list[int], swapped: bool, shuffle: bool
    ) -> tuple[str, int, bool]:
        """A context that fits, how many exemplars it lacks, and whether what is asked is too long by itself; exemplars
        of a pair alternate in their order.
        """
        chosen = self.weak.logits.argmax(-1)
        given = context[1:] + context[:1] if shuffle else context
        shown = []
        for place, (k, other) in enumerate(zip(context, given, strict=True)):
            turned = self.wording.pairs and place % 2 == 1
            label = int(chosen[other])
            word = self.wording.words[1 - label if turned else label]
            shown.append(f"{self.wording.shown(self.weak.table, k, turned)}{word}\n\n")
        query = self.wording.shown(table, row, swapped)
        tokenizer, most = self.strong.source.tokenizer, self.strong.source.spec.max_length
        for count in range(len(shown), -1, -1):
            prompt = "".join([*shown[:count], query])
            fits = len(tokenizer(prompt, verbose=False)["input_ids"]) <= most - 2
            if count == 0 or fits:
                return prompt, len(shown) - count, not fits
        raise AssertionError("unreachable")


def combined(logs: Tensor) -> Tensor:
    """The product of contexts over labels, normalised: [N, m (+ 1), C] log-probabilities to [N, C].

    With more than one context the last has no exemplars: sum_j log p(y | ctx_j, x) - (m - 1) log p(y | x).
    """
    if logs.shape[1] == 1:
        return logs[:, 0].log_softmax(-1)
    return (logs[:, :-1].sum(1) - (logs.shape[1] - 2) * logs[:, -1]).log_softmax(-1)
