"""Questions with answered ones in their context, and what the strong model writes to them; each step is a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from w2sg.config.options import PlainSampling
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Prompts, Replies, prompt_id
from w2sg.experiment.run import Run
from w2sg.methods.refine import exemplars
from w2sg.methods.refine.options import Iar, Improve, Refine, Unrefined
from w2sg.methods.refine.prompts import dialogue, first_sentence, fitting, flat, in_context, inference, question_of
from w2sg.models.trained import Trained


@dataclass(frozen=True)
class ContextPrompt:
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
        prompt: what it answers. text, tokens, finished: the answer. sample: which one to that prompt.
        log_probability: the model's own, of all its tokens.
    """

    prompt: ContextPrompt
    text: str
    tokens: np.ndarray
    finished: bool
    sample: int
    log_probability: float


class ContextWriter:
    """A strong model that answers questions with answered ones in their context.

    Args:
        run: the run.
        strong: the model as it was found.
        options: how contexts are made and how many answers are drawn.
        sampling: how many rows are written at once, and by what.
    """

    def __init__(self, run: Run, strong: Trained, options: Refine, sampling: PlainSampling):
        self.run, self.options = run, options
        self._stages: dict[str, str] = {}
        self.sampling = sampling if isinstance(options, Unrefined) else options.decoding(sampling)
        source = strong.source
        if not isinstance(options, Unrefined) and options.stop:
            source = replace(source)
            source.tokenizer = strong.source.tokenizer
            source.chat.stop_strings = (*source.chat.stop_strings, *options.stop)
        self.strong = replace(strong, source=source)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def ask(self, name: str, queries: Prompts, pool: Replies, shuffle: bool = False) -> list[ContextPrompt]:
        """The prompts for each question, by the options.

        Args:
            pool: answered questions, one answer each. shuffle: give each exemplar the answer of another one.
        """
        options = self.options
        if isinstance(options, Improve):
            return self._to_improve(queries, pool)
        exemplar = options.exemplar
        drafts = []
        contexts = self._contexts(queries, pool)
        for q, rows in enumerate(contexts):
            for j, row in enumerate(rows):
                answers = [pool.texts[k] for k in (row[1:] + row[:1] if shuffle else row)]
                shown = [(pool.prompts[k], answer) for k, answer in zip(row, answers, strict=True)]
                drafts.append((q, j, [pool.ids[k] for k in row], shown))

        def make(q: int) -> Callable[[Sequence[tuple[Dialogue, str]]], Dialogue]:
            if isinstance(options, Iar):
                return lambda part: inference(part, exemplar, options.infer)
            prompt = queries.texts[q]
            return lambda part: in_context(prompt, part, exemplar, options.query, options.placement)

        room = options.concept_tokens if isinstance(options, Iar) else options.max_new_tokens
        texts = self._fitted(name, [(make(q), shown) for q, _, _, shown in drafts], room)
        prompts = []
        for (q, j, ids, shown), (prompt, kept) in zip(drafts, texts, strict=True):
            prompts.append(ContextPrompt(q, j, prompt, tuple(ids[:kept]), tuple(answer for _, answer in shown[:kept])))
        return self._inferred(name, queries, prompts) if isinstance(options, Iar) else prompts

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
        fitted = []
        for text, length, (make, shown) in zip(whole, lengths, wanted, strict=True):
            fits = lambda part: len(chat.prompts([part])[0]) <= most  # noqa: E731
            fitted.append((text, len(shown)) if length <= most else fitting(shown, make, fits))
        lost = [len(shown) - kept for (_, kept), (_, shown) in zip(fitted, wanted, strict=True)]
        if any(lost):
            bare = sum(kept == 0 for _, kept in fitted)
            counts = {"exemplars left out of contexts that are too long (kept)": sum(lost)}
            counts["contexts that lost some (kept)"] = sum(n > 0 for n in lost)
            self.run.dropped[f"{name}-contexts"] = counts | ({"contexts left without any (kept)": bare} if bare else {})
        return fitted

    def _inferred(self, name: str, queries: Prompts, prompts: list[ContextPrompt]) -> list[ContextPrompt]:
        """Each context's concept in one sentence, which then stands in its place."""
        options = self.options
        greedy = self.sampling.model_copy(update={"temperature": 0.0, "max_new_tokens": options.concept_tokens})
        sentences = self._write(f"{name}-concepts", prompts, greedy, 1)
        inferred = []
        for one in prompts:
            concept = first_sentence(sentences[one.id][0].text) if one.id in sentences else ""
            system = options.system.format(concept=concept) if concept else ""
            text = dialogue(system, options.query.format(question=question_of(queries.texts[one.query])))
            inferred.append(replace(one, text=text, concept=concept, concept_from=one.id))
        if blank := sum(not one.concept for one in inferred):
            self.run.dropped[f"{name}-concepts"] = {"contexts without a concept (kept)": blank}
        return inferred

    def _to_improve(self, queries: Prompts, pool: Replies) -> list[ContextPrompt]:
        answers = dict(zip(pool.ids, pool.texts, strict=True))
        prompts = []
        for q, (i, prompt) in enumerate(zip(queries.ids, queries.texts, strict=True)):
            if i in answers:
                text = self.options.improve.format(question=question_of(prompt), answer=flat(answers[i]))
                prompts.append(ContextPrompt(q, 0, dialogue("", text), shown=(answers[i],)))
        return prompts

    def _bare(self, prompt: Dialogue, instruction: str | None = None) -> Dialogue:
        """A question as the strong model is asked it, with nothing before it."""
        return dialogue(instruction or "", self.options.query.format(question=question_of(prompt)))

    # -- answers -----------------------------------------------------------------------------------------------------

    def _write(
        self, name: str, prompts: Sequence[ContextPrompt], sampling: PlainSampling, samples: int
    ) -> dict[str, list]:
        """Answers to different prompts, by the prompt's hash."""
        texts = {one.id: one.text for one in prompts}
        distinct = Prompts(name, list(texts), list(texts.values()))
        replies = self.run.generate(name, self.strong, distinct, sampling, samples=samples)
        first = {one.id: one for one in prompts}
        answers: dict[str, list[Candidate]] = {}
        for k, i in enumerate(replies.ids):
            log_p = float(replies.log_probabilities[k][:, 0].sum())
            text, _ = self.strong.source.chat.until_stop(replies.texts[k])  # a token may reach into what ends it
            ended, number = bool(replies.finished[k]), int(replies.sample[k])
            answers.setdefault(i, []).append(Candidate(first[i], text, replies.tokens[k], ended, number, log_p))
        self._stages[name] = replies.key["stage"]
        return answers

    def candidates(
        self, name: str, prompts: Sequence[ContextPrompt], sampling: PlainSampling, samples: int
    ) -> dict[int, list]:
        """All answers to each question, by its place; those of its first context first."""
        written = self._write(name, prompts, sampling, samples)
        candidates: dict[int, list[Candidate]] = {}
        for one in sorted(prompts, key=lambda a: (a.query, a.context)):
            for candidate in written.get(one.id, ()):
                candidates.setdefault(one.query, []).append(replace(candidate, prompt=one))
        return candidates
