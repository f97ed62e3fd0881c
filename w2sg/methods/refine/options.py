"""Options of method=refine: the kinds of refinement (conf/refine), and what belongs to all of them."""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from w2sg.config.option import Options, option
from w2sg.config.options import SFT, PlainSampling
from w2sg.judges import AnyJudge, RewardJudge

Rule = Literal["batch_loo", "fixed", "random", "knn", "high_confidence"]


def fields(template: str) -> set[str]:
    """What a template is to be filled in with.

    Raises:
        ValueError: a brace that is not closed.
    """
    return {field for _, field, _, _ in Formatter().parse(template) if field is not None}


def template_problems(name: str, template: str, needs: set[str]) -> list[str]:
    """What keeps a template from being filled in with these fields."""
    try:
        names = fields(template)
    except ValueError as error:
        return [f"{name}: {error}; write braces of your own twice"]
    if names != needs:
        wanted = " and ".join(f"{{{field}}}" for field in sorted(needs))
        return [
            f"{name}: it must have {wanted}, and has {', '.join(sorted(names)) or 'none'}; write other braces twice"
        ]
    return []


class Acceptance(Options):
    """What a refined answer must pass, and what becomes of a question whose answer does not."""

    concept: float | None = option(None, "its concept score must be above this (method.concept); null does not ask")
    consistency: PositiveInt | None = option(
        None, "so many of the answers to the question must agree with it (self-consistency); null does not ask"
    )
    fallback: Literal["drop", "weak", "resample"] = option(
        "drop",
        "a question without an accepted answer: drop leaves it out | weak teaches its weak answer | resample draws "
        "again, and leaves it out if that fails, too",
    )
    resamples: PositiveInt = option(4, "fallback=resample: how often")
    temperature: float = option(1.0, "fallback=resample: at this temperature", gt=0.0)

    def rules(self) -> list[str]:
        if self.fallback != "drop" and not self.tests:
            return ["fallback: no answer is tested, so none falls back; set accept.concept or accept.consistency"]
        return []

    @property
    def tests(self) -> bool:
        """Whether anything is tested."""
        return self.concept is not None or self.consistency is not None


class Rewriting(Options):
    """How the strong model rewrites answers, whatever stands in its context."""

    samples: PositiveInt = option(1, "answers to each context; with combine=none a student is trained on all of them")
    temperature: float = option(0.0, "sampling temperature; 0 is greedy, as in the authors' code", ge=0.0)
    top_k: NonNegativeInt = option(0, "tokens to choose from; 0 is all")
    top_p: float = option(
        1.0, "nucleus sampling: probability that the tokens to choose from have together", gt=0.0, le=1.0
    )
    max_new_tokens: PositiveInt = option(
        256, "an answer that reaches this is cut off, and nobody is taught to end there; contexts leave room for it"
    )
    query: str = option("Question: {question}\nAnswer:", "the question that is asked")
    stop: list[str] = option(
        ["\n\nQuestion:", "\nQuestion:"],
        "texts that end an answer where they appear: a base model goes on with the next question",
    )
    accept: Acceptance = option(Acceptance(), "what an answer must pass before it is taught")

    def decoding(self, sampling: PlainSampling) -> PlainSampling:
        """The run's way of sampling, with what is decided here."""
        settings = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
        return sampling.model_copy(update=settings)

    def rules(self) -> list[str]:
        problems = template_problems("query", self.query, {"question"})
        if self.temperature == 0 and self.samples > 1:
            problems.append("temperature: at 0 all samples are the same; raise it, or ask for one")
        if any(not string.strip() for string in self.stop):
            problems.append("stop: a string of blanks ends every answer; name what follows an answer")
        most = self.samples * getattr(self, "contexts", 1)
        if self.accept.consistency is not None and self.accept.consistency > most:
            resampled = self.accept.fallback == "resample"
            if not resampled or self.accept.consistency > most + self.accept.resamples:
                problems.append(
                    f"accept.consistency: {self.accept.consistency} answers cannot agree among {most}; lower it, or "
                    "raise samples"
                )
        return problems


class InContext(Rewriting):
    """A context of exemplars."""

    batch_size: int = option(
        5,
        "exemplars + 1: questions of a batch, as in the paper; each is answered after the n = context_size - 1 others",
        ge=2,
        alias="context_size",
    )
    exemplars: Rule = option(
        "batch_loo",
        "batch_loo: the others of the batch | fixed: the same for all | random: drawn for each question | knn: the "
        "most similar questions (tf-idf) | high_confidence: the answers that the weak model was surest of",
    )
    fixed: list[str] | None = option(
        None, "exemplars=fixed: ids of questions as refined.parquet has them; null takes the first"
    )
    include_self: bool = option(False, "true shows the question's own weak answer among the exemplars")
    contexts: PositiveInt = option(
        1, "m: contexts of n exemplars each, disjoint; more than one need a rule that combines their answers"
    )
    combine: Literal["none", "vote", "product"] = option(
        "none",
        "none | vote: the most common answer | product: the answer with the highest sum_j log p(y | context_j, x) - "
        "(m - 1) log p(y | x), so that m contexts of n count as one of m n; both choose among contexts x samples",
    )
    exemplar: str = option("Question: {question}\nAnswer: {answer}\n\n", "an exemplar in a context")

    @property
    def count(self) -> int:
        """n: exemplars in a context."""
        return self.batch_size - (not self.include_self)

    def rules(self) -> list[str]:
        problems = super().rules() + template_problems("exemplar", self.exemplar, {"question", "answer"})
        if self.fixed is not None and self.exemplars != "fixed":
            problems.append("fixed: read only by exemplars=fixed; set it to null")
        chosen = self.fixed or []
        if len(set(chosen)) < len(chosen) or len(chosen) > self.batch_size:
            problems.append(
                f"fixed: {len(chosen)} ids for contexts of {self.count}; name each once, and no more than context_size"
            )
        if self.exemplars == "fixed" and self.contexts > 1:
            problems.append(
                "contexts: fixed exemplars make one context; use contexts=1, or another choice of exemplars"
            )
        if self.combine == "none" and self.contexts > 1:
            problems.append("combine: several contexts need a rule that combines them; use vote or product")
        if self.combine != "none" and self.contexts * self.samples < 2:
            problems.append("combine: there is one answer only, and nothing to choose from; raise contexts or samples")
        return problems


class Icl(InContext):
    """Exemplars, then the question: posterior sampling of the concept (Algorithm 1)."""

    kind: Literal["icl"] = "icl"
    placement: Literal["system", "user"] = option(
        "system", "where the exemplars stand: system | user; a model without a chat template reads both as text"
    )


class Iar(InContext):
    """Exemplars, the concept in one sentence, then the question with that sentence alone (Algorithm 2)."""

    kind: Literal["iar"] = "iar"
    include_self: bool = option(
        True,
        "true shows the whole batch, as the authors do: one sentence for all its questions; false leaves each "
        "question's own weak answer out of what its sentence is inferred from",
    )
    infer: str = option(
        "{exemplars}\n\nAll these answers are given in one style. Name it in one sentence. The used style is:",
        "what is asked about the exemplars",
    )
    system: str = option("Answer in this style: {concept}", "the system message that the sentence becomes")
    concept_tokens: PositiveInt = option(64, "tokens of the sentence, which is always the likeliest")

    def rules(self) -> list[str]:
        templates = template_problems("infer", self.infer, {"exemplars"})
        return super().rules() + templates + template_problems("system", self.system, {"concept"})


class Improve(Rewriting):
    """The strong model is asked to improve a question's own weak answer; no exemplars."""

    kind: Literal["improve"] = "improve"
    samples: PositiveInt = option(1, "improved answers to each question; a student is trained on all of them")
    improve: str = option(
        "Question: {question}\nAnswer: {answer}\n\nWrite a better answer in the same style. Better answer:",
        "what is asked",
    )
    query: str = option(
        "Question: {question}\nAnswer:",
        "the question where there is no answer to improve: for the strong model's own labels",
    )

    def rules(self) -> list[str]:
        return super().rules() + template_problems("improve", self.improve, {"question", "answer"})


class Unrefined(Options):
    """The weak answers as they are."""

    kind: Literal["none"] = "none"


Refine = Annotated[Icl | Iar | Improve | Unrefined, Field(discriminator="kind")]


class Axis(Options):
    """How one property of an answer is measured."""

    kind: Literal["none", "exact", "number", "choice", "f1", "regex", "reward", "llm"] = option(
        "none",
        "none | exact (all words) | number (the last, or that after ####) | choice (the letter) | f1 (words in common "
        "with the right answer) | regex | reward (the judge) | llm (a language model rates it)",
    )
    pattern: str | None = option(None, "kind=regex: what is looked for; letters match in both cases")
    unit: Literal["reply", "sentence", "word"] = option(
        "reply", "kind=regex: the share of what that has it: reply | sentence | word"
    )
    model: str | None = option(None, "kind=llm: a hub id or folder of the language model that rates")
    ask: str = option(
        "Question: {question}\nAnswer: {answer}\n\nRated from 1 (not at all) to 5 (entirely), its style is a",
        "kind=llm: what it is asked; {question}, {answer} and {gold} are filled in, and the number comes next",
    )
    max_length: PositiveInt = option(2048, "kind=llm: tokens of what it is asked")

    @property
    def needs_gold(self) -> bool:
        """Whether answers are held against the right ones."""
        return self.kind in ("exact", "number", "choice", "f1") or (self.kind == "llm" and "gold" in fields(self.ask))

    def rules(self) -> list[str]:
        problems = []
        if (self.kind == "regex") != (self.pattern is not None):
            problems.append("pattern: kind=regex and a pattern go together; set both, or null for the pattern")
        if (self.kind == "llm") != (self.model is not None):
            problems.append("model: kind=llm and a model go together; set both, or null for the model")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                problems.append(f"pattern: {error} in {self.pattern!r}")
        needs = {"question", "answer"}
        if self.kind == "llm" and not needs <= (names := fields(self.ask)) <= {*needs, "gold"}:
            problems.append(
                f"ask: it must have {{question}} and {{answer}}, and may have {{gold}}; it has {sorted(names)}"
            )
        return problems


class RefineEvaluation(Options):
    """What is measured, on the test split."""

    prompts: PositiveInt = option(500, "test prompts that each system answers")
    examples: NonNegativeInt = option(6, "prompts whose answers stand on the page")


class LabelWords(Options):
    """How the strong model is asked for the label of a text, or of two."""

    question: str | None = option(
        None,
        "comes after a text: dataset.zero_shot.question where it is null; pairs are shown as A and B, and asked this",
    )
    words: list[str] | None = option(
        None, 'one word for each label: dataset.zero_shot.answers where it is null; for pairs " A" and " B"'
    )
    exemplar_tokens: PositiveInt = option(256, "tokens that a text may have in a context; longer ones lose their start")

    def rules(self) -> list[str]:
        if self.words is not None and len(set(self.words)) < max(2, len(self.words)):
            return ["words: at least two different ones, one for each label"]
        return []


RefineBaseline = Literal["naive", "self", "self_cot", "icl", "shuffled", "gold_exemplars", "ceiling"]


class Refinement(Options):
    """Options of method=refine; how answers are refined is said in conf/refine."""

    refine: Refine = option(Icl(), "how weak answers are refined: a file of conf/refine")
    target: Literal["answers", "labels"] = option(
        "answers",
        "answers: texts are refined, and the student is fine-tuned on them | labels: the strong model re-labels pairs "
        "or classes in context, and the student is trained on soft refined labels with loss=",
    )
    prompts: PositiveInt | None = option(
        None, "prompts of the transfer split that are answered and trained on; null takes them all"
    )
    weak_instruction: str | None = option(
        None, "system message of the weak model alone, before each prompt: Answer as a pirate."
    )
    train_weak: bool = option(
        False, "true fine-tunes the weak model on the answers of the split that trains it first, as sft says"
    )
    answers: str | None = option(
        None, "a .jsonl file with rows {prompt, answer} in place of the weak model's own; joined by the prompt's hash"
    )
    sampling: PlainSampling = option(
        PlainSampling(temperature=0.0),
        "of the weak answers, and of every model that is measured; refine= has its own for what is refined",
    )
    sft: SFT = option(
        SFT(),
        "supervised fine-tuning of the strong model (and of the weak one, with train_weak) on answers alone: the "
        "prompt as it is in the data, no exemplars",
    )
    baselines: list[RefineBaseline] = option(
        ["naive", "self", "icl", "shuffled", "ceiling"],
        "what the student is compared with, beside the weak and the untrained strong model. naive: fine-tuning on the "
        "weak answers | self: on the strong model's own, without exemplars | self_cot: the same, told "
        "cot_instruction | icl: the strong model with exemplars, without any training | shuffled: exemplars with "
        "each other's answers | gold_exemplars: exemplars with the right answers | ceiling: fine-tuning on the right "
        "answers. Of target=labels all but self_cot and gold_exemplars",
    )
    cot_instruction: str = option("Think step by step, then answer.", "what the strong model is told for self_cot")
    content: Axis = option(
        Axis(
            kind="f1",
            ask="Question: {question}\nReference: {gold}\nAnswer: {answer}\n\nRated from 1 (wrong) to 5 (right), the "
            "answer is a",
        ),
        "how right an answer is",
    )
    concept: Axis = option(Axis(), "how much an answer is as the weak model was told")
    judge: AnyJudge = option(
        RewardJudge(),
        "what measures replies, where an axis needs rewards or it is no reward model: a file of conf/judge",
    )
    labels: LabelWords = option(LabelWords(), "of target=labels: how the strong model is asked")
    evaluation: RefineEvaluation = option(RefineEvaluation(), "what is measured, on the test split")
