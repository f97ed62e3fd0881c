"""Weak answers, and what a strong model makes of them in context: chosen, tested, and with their provenance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg import progress
from w2sg.config.options import PlainSampling
from w2sg.data.loading import Examples
from w2sg.data.replies import Prompts, Replies
from w2sg.data.rows import ByPlace
from w2sg.data.table import digest
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.experiment.run import Run
from w2sg.methods.refine.answers import answers_to, as_replies
from w2sg.methods.refine.axes import Axes
from w2sg.methods.refine.contexts import Candidate, ContextPrompt, ContextWriter
from w2sg.methods.refine.options import Refine, Unrefined
from w2sg.methods.refine.provenance import Refined, answer_numbers, replies_of_rows, revision_of, weak_row
from w2sg.methods.refine.select import agreement, log_likelihoods, product_of_contexts, vote
from w2sg.metrics.answers import copied
from w2sg.models.trained import Trained
from w2sg.store.shards import Found
from w2sg.training import foreseen
from w2sg.training.inputs import VERSION
from w2sg.training.stage_values import load_parts
from w2sg.training.stages import ReadJob


class Refiner(ContextWriter):
    """Refines weak answers by a strong model that sees answered questions in its context.

    Args:
        run, strong, options, sampling: as of `ContextWriter`.
        axes: what answers are measured by.
    """

    def __init__(self, run: Run, strong: Trained, options: Refine, sampling: PlainSampling, axes: Axes):
        super().__init__(run, strong, options, sampling)
        self.axes = axes

    def answer(self, name: str, queries: Prompts, pool: Replies) -> Replies:
        """One answer to each question in context, untested: in-context learning without any training."""
        candidates = self.candidates(name, self.ask(name, queries, pool), self.sampling, self.options.samples)
        # a blank answer is measured where there is no other
        candidates = {q: [c for c in rows if c.text.strip()] or rows for q, rows in candidates.items()}
        chosen, _ = self._choose(name, queries, candidates)
        return self._replies(queries, name, [(q, rows[0]) for q, rows in chosen.items()])

    def alone(self, name: str, queries: Prompts, instruction: str | None = None) -> Replies:
        """The strong model's own answers: the same question, template and decoding, without exemplars.

        As many are drawn as for a refined answer, and of these one is taken in the same way; without contexts their
        product is the likelihood. Only the tests of ``refine.accept`` are not asked of them.
        """
        options = self.options
        if isinstance(options, Unrefined):
            return answers_to(self.run, name, self.strong, queries, instruction, self.sampling)
        bare = [ContextPrompt(q, 0, self._bare(prompt, instruction)) for q, prompt in enumerate(queries.texts)]
        draws = options.samples * getattr(options, "contexts", 1) if options.temperature > 0 else 1
        candidates = self._spoken(name, self.candidates(name, bare, self.sampling, draws))
        combine = getattr(options, "combine", "none")
        if combine == "product":
            candidates = {q: [max(rows, key=lambda c: c.log_probability)] for q, rows in candidates.items()}
        elif combine == "vote":
            candidates, _ = self._choose(name, queries, candidates)
        return self._replies(queries, name, [(q, c) for q, rows in candidates.items() for c in rows])

    def _spoken(self, name: str, candidates: dict[int, list[Candidate]]) -> dict[int, list[Candidate]]:
        """The answers that say something: a blank one is the likeliest of all, and teaches nothing."""
        kept = {q: [c for c in rows if c.text.strip()] for q, rows in candidates.items()}
        if blank := sum(map(len, candidates.values())) - sum(map(len, kept.values())):
            self.run.dropped.setdefault(name, {})["blank answer"] = blank
        return {q: rows for q, rows in kept.items() if rows}

    def refine(self, name: str, weak: Replies, pool: Replies | None = None, shuffle: bool = False) -> Refined:
        """Refined answers to questions that have weak ones.

        Args:
            weak: the questions with their own answers. pool: the exemplars', where they are others.
            shuffle: as in `ask`.
        """
        queries = Prompts(name, weak.ids, weak.prompts)
        weak_rows = {
            i: weak_row(*row) for i, *row in zip(weak.ids, weak.prompts, weak.texts, weak.finished, strict=True)
        }
        if isinstance(self.options, Unrefined):
            rows = [{"id": i, **row} for i, row in weak_rows.items()]
            return Refined(weak, self._scored(name, queries, rows), {"questions": len(weak), "weak": len(weak)})
        prompts = self.ask(name, queries, weak if pool is None else pool, shuffle)
        candidates = self._spoken(name, self.candidates(name, prompts, self.sampling, self.options.samples))
        chosen, scores = self._choose(name, queries, candidates)
        rows = [
            self._row(name, queries, weak_rows, q, c, candidates[q], scores.get(q)) for q in chosen for c in chosen[q]
        ]
        rows = self._accepted(name, self._scored(name, queries, rows))
        rows += self._instead(name, queries, weak_rows, prompts, candidates, rows)
        used = [row for row in rows if row["used"]]
        sources = Counter(source for source, _ in {(row["source"], row["id"]) for row in used})
        counts = {"questions": len(queries), **sources, "dropped": len(queries) - len({row["id"] for row in used})}
        replies = replies_of_rows(queries, used, {"refined": self._stages[name]})
        return Refined(
            replace(replies, finished=np.array([row["finished"] for row in used], bool)),
            rows,
            counts,
        )

    # -- one of several -----------------------------------------------------------------------------------------------

    def _choose(
        self, name: str, queries: Prompts, candidates: dict[int, list[Candidate]]
    ) -> tuple[dict[int, list[Candidate]], dict[int, float]]:
        """Of each question the answers that are kept, and the products of contexts that decided it."""
        combine = getattr(self.options, "combine", "none")
        if combine == "none":
            return candidates, {}
        products = self._products(f"{name}-product", queries, candidates) if combine == "product" else {}
        chosen = {}
        for q, rows in candidates.items():
            if combine == "vote":
                best = vote([self.axes.answer_in(c.text) for c in rows], [c.log_probability for c in rows])
            else:
                best = int(np.argmax(products[q]))
            chosen[q] = [rows[best]]
        return chosen, {q: float(values.max()) for q, values in products.items()}

    def _products(self, name: str, queries: Prompts, candidates: dict[int, list[Candidate]]) -> dict[int, np.ndarray]:
        """[K] of each question: its candidates' product of contexts."""
        chat, places = self.strong.source.chat, list(candidates)
        contexts = {q: list({c.prompt.context: c.prompt.text for c in candidates[q]}.values()) for q in places}
        prompts = {q: chat.prompts([*contexts[q], self._bare(queries.texts[q])]) for q in places}
        ids = [
            digest(*(context.identity for context in contexts[q]), *(str(c.tokens.tolist()) for c in candidates[q]))
            for q in places
        ]
        key = {
            "version": VERSION,
            "model": self.run.key_of(self.strong),
            "prompts": digest(*(str(row.tolist()) for q in places for row in prompts[q])),
            "rows": digest(*ids),
            "precision": self.run.precision,
        }

        def make() -> ReadJob:
            policy = self.run.load(self.strong)

            def read(batch: dict[str, Tensor]) -> Found:
                engine, values, rows = TransformersEngine(policy), [], batch["row"].tolist()
                for done, row in enumerate(rows):
                    progress.part(done / len(rows))
                    q = places[row]
                    scores = log_likelihoods(engine, prompts[q], [c.tokens for c in candidates[q]])
                    values.append(torch.from_numpy(product_of_contexts(scores)))
                sizes = torch.tensor([len(v) for v in values])
                device = batch["row"].device
                return Found(torch.cat(values).float().to(device), sizes.to(device))

            lengths = [sum(map(len, prompts[q])) for q in places]
            examples = Examples(ByPlace(lengths, counted=True), ids, torch.zeros(len(ids), dtype=torch.long))
            rows = self.sampling.batch_size
            found = partial(foreseen.per_token, np.array([len(candidates[q]) for q in places]))
            return ReadJob(nn.ModuleList([policy]), read, examples, rows=rows, written=1, foreseen=found)

        folder = self.run.stages.read(name, key, make, whole=True)
        self._stages[name] = folder.name
        by_id = load_parts(folder)
        return {q: by_id[i] for q, i in zip(places, ids, strict=True)}

    # -- tests of what was written, and where it came from ------------------------------------------------------------

    def _row(
        self,
        name: str,
        queries: Prompts,
        weak_rows: dict[str, dict[str, Any]],
        q: int,
        candidate: Candidate,
        among: Sequence[Candidate],
        score: float | None = None,
        sampling: PlainSampling | None = None,
    ) -> dict[str, Any]:
        """Everything about one refined answer; what it agrees with is counted ``among`` all answers to its question."""
        i, prompt, source = queries.ids[q], candidate.prompt, self.strong.source
        answers = [self.axes.answer_in(c.text) for c in among]
        place = next(k for k, c in enumerate(among) if c is candidate)
        return {
            "id": i,
            "prompt": queries.texts[q].text,
            "weak_answer": weak_rows[i]["weak_answer"],
            "refined": candidate.text,
            "source": "strong",
            "used": True,
            "finished": candidate.finished,
            "prompt_hash": prompt.id,
            "exemplar_ids": list(prompt.exemplars),
            "context": prompt.context,
            "concept": prompt.concept,
            "concept_prompt_hash": prompt.concept_from,
            "sample": candidate.sample,
            "model": source.spec.name,
            "revision": revision_of(source.identity),
            "stage": self._stages[name],
            "decoding": json.dumps((sampling or self.sampling).model_dump(exclude={"batch_size"})),
            "log_probability": candidate.log_probability,
            "tokens": len(candidate.tokens),
            "agreement": agreement(answers)[place],
            "candidates": len(among),
            "product_of_contexts": score,
            "copy_rate": copied(candidate.text, weak_rows[i]["weak_answer"]),
            "exemplar_copy_rate": max((copied(candidate.text, other) for other in prompt.shown), default=None),
        }

    def _scored(self, name: str, queries: Prompts, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with how much of the concept their answers have, and how right they are."""
        if not rows:
            return rows
        replies = replies_of_rows(queries, rows, {})
        for axis in ("concept", "content"):
            values = self.axes.score(axis, f"{name}-{axis}", replies)
            for row, value in zip(rows, values if values is not None else [None] * len(rows), strict=True):
                row[f"{axis}_score"] = None if value is None or np.isnan(value) else float(value)
        return rows

    def _accepted(self, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with ``used`` set to whether they pass the tests of ``accept``."""
        accept = self.options.accept
        for row in rows:
            score, least, agree = row["concept_score"], accept.concept, accept.consistency
            enough = least is None or (score is not None and score > least)
            row["used"] = enough and (agree is None or row["agreement"] >= agree)
        return rows

    def _instead(
        self,
        name: str,
        queries: Prompts,
        weak_rows: dict[str, dict[str, Any]],
        prompts: Sequence[ContextPrompt],
        candidates: dict[int, list[Candidate]],
        rows: list[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """What stands in for questions without an accepted answer."""
        accept = self.options.accept
        done = {row["id"] for row in rows if row["used"]}
        missing = [q for q, i in enumerate(queries.ids) if i not in done]  # those without any answer, too
        if accept.fallback == "weak":
            rows = [{"id": queries.ids[q], **weak_rows[queries.ids[q]]} for q in missing]
            return self._scored(f"{name}-fallback", queries, rows)
        if accept.fallback == "drop" or not missing:
            return []
        stage = f"{name}-resampled"
        hotter = self.sampling.model_copy(update={"temperature": accept.temperature})
        again = [one for one in prompts if one.query in set(missing) and one.context == 0]
        more = self._spoken(stage, self.candidates(stage, again, hotter, accept.resamples))
        new = [
            self._row(stage, queries, weak_rows, q, c, [*candidates.get(q, ()), *more[q]], sampling=hotter)
            for q in more
            for c in more[q]
        ]
        taken: set[str] = set()
        for row in self._accepted(stage, self._scored(stage, queries, new)):
            row["source"] = "resampled"
            row["used"] = row["used"] and row["id"] not in taken
            taken |= {row["id"]} if row["used"] else set()
        return new

    @staticmethod
    def _replies(queries: Prompts, name: str, chosen: Sequence[tuple[int, Candidate]]) -> Replies:
        ids, prompts = [queries.ids[q] for q, _ in chosen], [queries.texts[q] for q, _ in chosen]
        replies = as_replies(ids, prompts, [c.text for _, c in chosen], {"answers": name})
        finished = np.array([c.finished for _, c in chosen], bool)
        return replace(replies, finished=finished, sample=answer_numbers(ids))
