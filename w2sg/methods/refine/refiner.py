"""Weak answers, and what a strong model makes of them in context; each step is a cached stage of the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.config.options import PlainSampling
from w2sg.data.loading import Examples
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Prompts, Replies, prompt_id
from w2sg.data.rows import ByPlace
from w2sg.data.table import digest
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.experiment.run import Run
from w2sg.methods.refine import exemplars
from w2sg.methods.refine.answers import answers_to, as_replies
from w2sg.methods.refine.axes import Axes
from w2sg.methods.refine.options import Iar, Improve, Refine, Unrefined
from w2sg.methods.refine.prompts import dialogue, first_sentence, fitting, flat, in_context, inference, question_of
from w2sg.methods.refine.select import agreement, log_likelihoods, product_of_contexts, vote
from w2sg.metrics.answers import copied
from w2sg.models.trained import Trained
from w2sg.store.shards import Found
from w2sg.training.inputs import VERSION
from w2sg.training.stages import ReadJob, load_found


@dataclass(frozen=True)
class Asked:
    """One prompt that the strong model answers for a question.

    Attributes:
        query: the question's place. context: which of its contexts. text: the whole prompt.
        exemplars: ids of the questions in it. shown: their answers.
        concept: the sentence that stands for them, in infer-and-respond.
        concept_from: hash of the prompt that the sentence answers.
    """

    query: int
    context: int
    text: Dialogue
    exemplars: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    concept: str | None = None
    concept_from: str | None = None

    @property
    def id(self) -> str:
        """The prompt's hash."""
        return prompt_id(self.text)


@dataclass(frozen=True)
class Candidate:
    """One answer of the strong model.

    Attributes:
        asked: to what. text, tokens, finished: the answer. sample: which one to that prompt.
        log_probability: the model's own, of all its tokens.
    """

    asked: Asked
    text: str
    tokens: np.ndarray
    finished: bool
    sample: int
    log_probability: float


@dataclass(frozen=True)
class Refined:
    """Refined answers, and where each came from.

    Attributes:
        replies: what a student is trained on.
        rows: of refined.parquet: one for each reply, and for each question that has none.
        counts: what was tested, kept, replaced and dropped.
    """

    replies: Replies
    rows: list[dict[str, Any]]
    counts: dict[str, int]


class Refiner:
    """Lets a strong model answer questions with weak answers in its context.

    Args:
        strong: the model as it was found.
        options: how. sampling: how many rows at once, and by what. axes: what answers are measured by.
    """

    def __init__(self, run: Run, strong: Trained, options: Refine, sampling: PlainSampling, axes: Axes):
        self.run, self.options, self.axes = run, options, axes
        self._stages: dict[str, str] = {}
        self.sampling = sampling if isinstance(options, Unrefined) else options.decoding(sampling)
        source = strong.source
        if not isinstance(options, Unrefined) and options.stop:
            source = replace(source)
            source.tokenizer = strong.source.tokenizer
            source.chat.stop_strings = (*source.chat.stop_strings, *options.stop)
        self.strong = replace(strong, source=source)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def ask(self, name: str, queries: Prompts, pool: Replies, shuffle: bool = False) -> list[Asked]:
        """The prompts for each question, by the options.

        Args:
            pool: answered questions, one answer each. shuffle: give each exemplar the answer of another one.
        """
        options = self.options
        if isinstance(options, Improve):
            return self._to_improve(queries, pool)
        exemplar = options.exemplar
        asked = []
        contexts = self._contexts(queries, pool)
        for q, rows in enumerate(contexts):
            for j, row in enumerate(rows):
                answers = [pool.texts[k] for k in (row[1:] + row[:1] if shuffle else row)]
                shown = [(pool.prompts[k], answer) for k, answer in zip(row, answers, strict=True)]
                asked.append((q, j, [pool.ids[k] for k in row], shown))

        def make(q: int) -> Callable[[Sequence[tuple[Dialogue, str]]], Dialogue]:
            if isinstance(options, Iar):
                return lambda part: inference(part, exemplar, options.infer)
            prompt = queries.texts[q]
            return lambda part: in_context(prompt, part, exemplar, options.query, options.placement)

        room = options.concept_tokens if isinstance(options, Iar) else options.max_new_tokens
        texts = self._fitted(name, [(make(q), shown) for q, _, _, shown in asked], room)
        found = []
        for (q, j, ids, shown), (prompt, kept) in zip(asked, texts, strict=True):
            found.append(Asked(q, j, prompt, tuple(ids[:kept]), tuple(answer for _, answer in shown[:kept])))
        return self._inferred(name, queries, found) if isinstance(options, Iar) else found

    def _contexts(self, queries: Prompts, pool: Replies) -> exemplars.Contexts:
        if len(set(pool.ids)) < len(pool):
            raise ValueError("a question of the pool has two answers, so which is its exemplar is not said")
        return exemplars.contexts(
            self.options,
            pool.ids,
            queries.ids,
            lambda: tuple([question_of(prompt) for prompt in part] for part in (pool.prompts, queries.texts)),
            lambda: np.array([float(part[:, 0].mean()) if len(part) else -np.inf for part in pool.log_probabilities]),
            self.run.seed,
        )

    def _fitted(
        self, name: str, wanted: Sequence[tuple[Callable[..., Dialogue], Sequence[tuple[Dialogue, str]]]], room: int
    ) -> list[tuple[Dialogue, int]]:
        """Contexts that leave room for an answer, and how many exemplars each has; what had to go is counted."""
        chat, most = self.strong.source.chat, self.strong.source.spec.max_length - room
        whole = [make(shown) for make, shown in wanted]
        lengths = [len(row) for row in chat.prompts(whole)]
        found = []
        for text, length, (make, shown) in zip(whole, lengths, wanted, strict=True):
            fits = lambda part: len(chat.prompts([part])[0]) <= most  # noqa: E731
            found.append((text, len(shown)) if length <= most else fitting(shown, make, fits))
        lost = [len(shown) - kept for (_, kept), (_, shown) in zip(found, wanted, strict=True)]
        if any(lost):
            bare = sum(kept == 0 for _, kept in found)
            counts = {"exemplars left out of contexts that are too long (kept)": sum(lost)}
            counts["contexts that lost some (kept)"] = sum(n > 0 for n in lost)
            self.run.dropped[f"{name}-contexts"] = counts | ({"contexts left without any (kept)": bare} if bare else {})
        return found

    def _inferred(self, name: str, queries: Prompts, asked: list[Asked]) -> list[Asked]:
        """Each context's concept in one sentence, which then stands in its place."""
        options = self.options
        greedy = self.sampling.model_copy(update={"temperature": 0.0, "max_new_tokens": options.concept_tokens})
        said = self._write(f"{name}-concepts", asked, greedy, 1)
        found = []
        for one in asked:
            concept = first_sentence(said[one.id][0].text) if one.id in said else ""
            system = options.system.format(concept=concept) if concept else ""
            text = dialogue(system, options.query.format(question=question_of(queries.texts[one.query])))
            found.append(replace(one, text=text, concept=concept, concept_from=one.id))
        if blank := sum(not one.concept for one in found):
            self.run.dropped[f"{name}-concepts"] = {"contexts without a concept (kept)": blank}
        return found

    def _to_improve(self, queries: Prompts, pool: Replies) -> list[Asked]:
        own = dict(zip(pool.ids, pool.texts, strict=True))
        found = []
        for q, (i, prompt) in enumerate(zip(queries.ids, queries.texts, strict=True)):
            if i in own:
                text = self.options.improve.format(question=question_of(prompt), answer=flat(own[i]))
                found.append(Asked(q, 0, dialogue("", text), shown=(own[i],)))
        return found

    # -- answers ------------------------------------------------------------------------------------------------------

    def _write(self, name: str, asked: Sequence[Asked], sampling: PlainSampling, samples: int) -> dict[str, list]:
        """Answers to different prompts, by the prompt's hash."""
        texts = {one.id: one.text for one in asked}
        prompts = Prompts(name, list(texts), list(texts.values()))
        replies = self.run.generate(name, self.strong, prompts, sampling, samples=samples)
        first = {one.id: one for one in asked}
        found: dict[str, list[Candidate]] = {}
        for k, i in enumerate(replies.ids):
            log_p = float(replies.log_probabilities[k][:, 0].sum())
            said, _ = self.strong.source.chat.until_stop(replies.texts[k])  # a token may reach into what ends it
            ended, number = bool(replies.finished[k]), int(replies.sample[k])
            found.setdefault(i, []).append(Candidate(first[i], said, replies.tokens[k], ended, number, log_p))
        self._stages[name] = replies.key["stage"]
        return found

    def candidates(self, name: str, asked: Sequence[Asked], sampling: PlainSampling, samples: int) -> dict[int, list]:
        """All answers to each question, by its place; those of its first context first."""
        written = self._write(name, asked, sampling, samples)
        found: dict[int, list[Candidate]] = {}
        for one in sorted(asked, key=lambda a: (a.query, a.context)):
            for candidate in written.get(one.id, ()):
                found.setdefault(one.query, []).append(replace(candidate, asked=one))
        return found

    def answer(self, name: str, queries: Prompts, pool: Replies) -> Replies:
        """One answer to each question in context, untested: in-context learning without any training."""
        found = self.candidates(name, self.ask(name, queries, pool), self.sampling, self.options.samples)
        # a blank answer is measured where there is no other
        found = {q: [c for c in rows if c.text.strip()] or rows for q, rows in found.items()}
        chosen, _ = self._choose(name, queries, found)
        return self._replies(queries, name, [(q, rows[0]) for q, rows in chosen.items()])

    def alone(self, name: str, queries: Prompts, instruction: str | None = None) -> Replies:
        """The strong model's own answers: the same question, template and decoding, without exemplars.

        As many are drawn as for a refined answer, and of these one is taken in the same way; without contexts their
        product is the likelihood. Only the tests of ``refine.accept`` are not asked of them.
        """
        options = self.options
        if isinstance(options, Unrefined):
            return answers_to(self.run, name, self.strong, queries, instruction, self.sampling)
        asked = [Asked(q, 0, self._bare(prompt, instruction)) for q, prompt in enumerate(queries.texts)]
        draws = options.samples * getattr(options, "contexts", 1) if options.temperature > 0 else 1
        found = self._spoken(name, self.candidates(name, asked, self.sampling, draws))
        combine = getattr(options, "combine", "none")
        if combine == "product":
            found = {q: [max(rows, key=lambda c: c.log_probability)] for q, rows in found.items()}
        elif combine == "vote":
            found, _ = self._choose(name, queries, found)
        return self._replies(queries, name, [(q, c) for q, rows in found.items() for c in rows])

    def _spoken(self, name: str, found: dict[int, list[Candidate]]) -> dict[int, list[Candidate]]:
        """The answers that say something: a blank one is the likeliest of all, and teaches nothing."""
        kept = {q: [c for c in rows if c.text.strip()] for q, rows in found.items()}
        if blank := sum(map(len, found.values())) - sum(map(len, kept.values())):
            self.run.dropped.setdefault(name, {})["blank answer"] = blank
        return {q: rows for q, rows in kept.items() if rows}

    def refine(self, name: str, weak: Replies, pool: Replies | None = None, shuffle: bool = False) -> Refined:
        """Refined answers to questions that have weak ones.

        Args:
            weak: the questions with their own answers. pool: the exemplars', where they are others.
            shuffle: as in `ask`.
        """
        queries = Prompts(name, weak.ids, weak.prompts)
        own = {i: _own(*row) for i, *row in zip(weak.ids, weak.prompts, weak.texts, weak.finished, strict=True)}
        if isinstance(self.options, Unrefined):
            rows = [{"id": i, **row} for i, row in own.items()]
            return Refined(weak, self._scored(name, queries, rows), {"questions": len(weak), "weak": len(weak)})
        asked = self.ask(name, queries, weak if pool is None else pool, shuffle)
        found = self._spoken(name, self.candidates(name, asked, self.sampling, self.options.samples))
        chosen, scores = self._choose(name, queries, found)
        rows = [self._row(name, queries, own, q, c, found[q], scores.get(q)) for q in chosen for c in chosen[q]]
        rows = self._accepted(name, self._scored(name, queries, rows))
        rows += self._instead(name, queries, own, asked, found, rows)
        used = [row for row in rows if row["used"]]
        sources = Counter(source for source, _ in {(row["source"], row["id"]) for row in used})
        counts = {"questions": len(queries), **sources, "dropped": len(queries) - len({row["id"] for row in used})}
        replies = _of_rows(queries, used, {"refined": self._stages[name]})
        return Refined(
            replace(replies, finished=np.array([row["finished"] for row in used], bool)),
            rows,
            counts,
        )

    # -- one of several -----------------------------------------------------------------------------------------------

    def _bare(self, prompt: Dialogue, instruction: str | None = None) -> Dialogue:
        """A question as the strong model is asked it, with nothing before it."""
        return dialogue(instruction or "", self.options.query.format(question=question_of(prompt)))

    def _choose(
        self, name: str, queries: Prompts, found: dict[int, list[Candidate]]
    ) -> tuple[dict[int, list[Candidate]], dict[int, float]]:
        """Of each question the answers that are kept, and the products of contexts that decided it."""
        combine = getattr(self.options, "combine", "none")
        if combine == "none":
            return found, {}
        products = self._products(f"{name}-product", queries, found) if combine == "product" else {}
        chosen = {}
        for q, rows in found.items():
            if combine == "vote":
                best = vote([self.axes.answer_in(c.text) for c in rows], [c.log_probability for c in rows])
            else:
                best = int(np.argmax(products[q]))
            chosen[q] = [rows[best]]
        return chosen, {q: float(values.max()) for q, values in products.items()}

    def _products(self, name: str, queries: Prompts, found: dict[int, list[Candidate]]) -> dict[int, np.ndarray]:
        """[K] of each question: its candidates' product of contexts."""
        chat, places = self.strong.source.chat, list(found)
        contexts = {q: list({c.asked.context: c.asked.text for c in found[q]}.values()) for q in places}
        prompts = {q: chat.prompts([*contexts[q], self._bare(queries.texts[q])]) for q in places}
        ids = [
            digest(*(context.identity for context in contexts[q]), *(str(c.tokens.tolist()) for c in found[q]))
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
                for row in rows:
                    q = places[row]
                    scores = log_likelihoods(engine, prompts[q], [c.tokens for c in found[q]])
                    values.append(torch.from_numpy(product_of_contexts(scores)))
                sizes = torch.tensor([len(v) for v in values])
                device = batch["row"].device
                return Found(torch.cat(values).float().to(device), sizes.to(device))

            lengths = [sum(map(len, prompts[q])) for q in places]
            examples = Examples(ByPlace(lengths, counted=True), ids, torch.zeros(len(ids), dtype=torch.long))
            return ReadJob(nn.ModuleList([policy]), read, examples, rows=self.sampling.batch_size, whole=True)

        folder = self.run.stages.read(name, key, make)
        self._stages[name] = folder.name
        there, values = load_found(folder)
        parts = np.split(values["values"].double().numpy(), np.cumsum(values["sizes"].numpy())[:-1])
        by_id = dict(zip(there, parts, strict=True))
        return {q: by_id[i] for q, i in zip(places, ids, strict=True)}

    # -- tests of what was written, and where it came from ------------------------------------------------------------

    def _row(
        self,
        name: str,
        queries: Prompts,
        own: dict[str, dict[str, Any]],
        q: int,
        candidate: Candidate,
        among: Sequence[Candidate],
        score: float | None = None,
        sampling: PlainSampling | None = None,
    ) -> dict[str, Any]:
        """Everything about one refined answer; what it agrees with is counted ``among`` all answers to its question."""
        i, asked, source = queries.ids[q], candidate.asked, self.strong.source
        answers = [self.axes.answer_in(c.text) for c in among]
        place = next(k for k, c in enumerate(among) if c is candidate)
        return {
            "id": i,
            "prompt": queries.texts[q].text,
            "weak_answer": own[i]["weak_answer"],
            "refined": candidate.text,
            "source": "strong",
            "used": True,
            "finished": candidate.finished,
            "prompt_hash": asked.id,
            "exemplar_ids": list(asked.exemplars),
            "context": asked.context,
            "concept": asked.concept,
            "concept_prompt_hash": asked.concept_from,
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
            "copy_rate": copied(candidate.text, own[i]["weak_answer"]),
            "exemplar_copy_rate": max((copied(candidate.text, other) for other in asked.shown), default=None),
        }

    def _scored(self, name: str, queries: Prompts, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with how much of the concept their answers have, and how right they are."""
        if not rows:
            return rows
        replies = _of_rows(queries, rows, {})
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
        own: dict[str, dict[str, Any]],
        asked: Sequence[Asked],
        found: dict[int, list[Candidate]],
        rows: list[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """What stands in for questions without an accepted answer."""
        accept = self.options.accept
        done = {row["id"] for row in rows if row["used"]}
        missing = [q for q, i in enumerate(queries.ids) if i not in done]  # those without any answer, too
        if accept.fallback == "weak":
            rows = [{"id": queries.ids[q], **own[queries.ids[q]]} for q in missing]
            return self._scored(f"{name}-fallback", queries, rows)
        if accept.fallback == "drop" or not missing:
            return []
        stage = f"{name}-resampled"
        hotter = self.sampling.model_copy(update={"temperature": accept.temperature})
        again = [one for one in asked if one.query in set(missing) and one.context == 0]
        more = self._spoken(stage, self.candidates(stage, again, hotter, accept.resamples))
        new = [
            self._row(stage, queries, own, q, c, [*found.get(q, ()), *more[q]], sampling=hotter)
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
        return replace(replies, finished=finished, sample=_number(ids))


def revision_of(identity: dict[str, Any]) -> str:
    """A model's commit on the hub, or a hash of what it was read from."""
    files = identity.get("files", identity)
    return str(identity.get("revision") or identity.get("gguf") or digest(json.dumps(files, sort_keys=True)))


def write_refined(out: Path, rows: list[dict[str, Any]]) -> Path:
    """Everything about each refined label, as refined.parquet beside the report.

    Raises:
        UserError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, file = dict.fromkeys(key for row in rows for key in row), out / "refined.parquet"
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".tmp"), "wb") as written:  # pyarrow takes no path that is not UTF-8
            pq.write_table(table, written)
        file.with_suffix(".tmp").replace(file)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror or error}); free space or choose another folder with out=, and "
            "run the same command: all stages are in the store"
        ) from error
    return file


def _own(prompt: Dialogue, answer: str, finished: bool) -> dict[str, Any]:
    """The row of a question whose own weak answer is taught."""
    known = {"prompt": prompt.text, "weak_answer": answer, "refined": answer, "source": "weak", "used": True}
    return known | {"finished": bool(finished), "exemplar_ids": [], "copy_rate": 1.0}


def _of_rows(queries: Prompts, rows: list[dict[str, Any]], key: dict[str, Any]) -> Replies:
    """The answers of rows of refined.parquet."""
    asked, ids = dict(zip(queries.ids, queries.texts, strict=True)), [row["id"] for row in rows]
    replies = as_replies(ids, [asked[i] for i in ids], [row["refined"] for row in rows], key)
    return replace(replies, sample=_number(ids))


def _number(ids: Sequence[str]) -> np.ndarray:
    """[N] which of its question's answers each is."""
    seen: Counter[str] = Counter()
    found = []
    for i in ids:
        found.append(seen[i])
        seen[i] += 1
    return np.array(found, np.int64)
