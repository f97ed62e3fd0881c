"""What may stand in conf/refine and in conf/method/refine.yaml; defaults live there, each with a comment."""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from w2sg.config.options import PlainSampling
from w2sg.config.schema import Strict

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
        there = fields(template)
    except ValueError as error:
        return [f"{name}: {error}; write braces of your own twice"]
    if there != needs:
        wanted = " and ".join(f"{{{field}}}" for field in sorted(needs))
        return [
            f"{name}: it must have {wanted}, and has {', '.join(sorted(there)) or 'none'}; write other braces twice"
        ]
    return []


class Acceptance(Strict):
    """What a refined answer must pass, and what becomes of a question whose answer does not."""

    concept: float | None
    consistency: PositiveInt | None
    fallback: Literal["drop", "weak", "resample"]
    resamples: PositiveInt
    temperature: float = Field(gt=0.0)

    def rules(self) -> list[str]:
        if self.fallback != "drop" and not self.tests:
            return ["fallback: no answer is tested, so none falls back; set accept.concept or accept.consistency"]
        return []

    @property
    def tests(self) -> bool:
        """Whether anything is tested."""
        return self.concept is not None or self.consistency is not None


class Rewriting(Strict):
    """How the strong model rewrites answers, whatever stands in its context."""

    samples: PositiveInt
    temperature: float = Field(ge=0.0)
    top_k: NonNegativeInt
    top_p: float = Field(gt=0.0, le=1.0)
    max_new_tokens: PositiveInt
    query: str
    stop: list[str]
    accept: Acceptance

    def decoding(self, sampling: PlainSampling) -> PlainSampling:
        """The run's way of sampling, with what is decided here."""
        own = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
        return sampling.model_copy(update=own)

    def rules(self) -> list[str]:
        found = template_problems("query", self.query, {"question"})
        if self.temperature == 0 and self.samples > 1:
            found.append("temperature: at 0 all samples are the same; raise it, or ask for one")
        if any(not string.strip() for string in self.stop):
            found.append("stop: a string of blanks ends every answer; name what follows an answer")
        most = self.samples * getattr(self, "contexts", 1)
        if self.accept.consistency is not None and self.accept.consistency > most:
            resampled = self.accept.fallback == "resample"
            if not resampled or self.accept.consistency > most + self.accept.resamples:
                found.append(
                    f"accept.consistency: {self.accept.consistency} answers cannot agree among {most}; lower it, or "
                    "raise samples"
                )
        return found


class InContext(Rewriting):
    """A context of exemplars."""

    batch_size: int = Field(ge=2)
    exemplars: Rule
    fixed: list[str] | None
    include_self: bool
    contexts: PositiveInt
    combine: Literal["none", "vote", "product"]
    exemplar: str

    @property
    def count(self) -> int:
        """n: exemplars in a context."""
        return self.batch_size - (not self.include_self)

    def rules(self) -> list[str]:
        found = super().rules() + template_problems("exemplar", self.exemplar, {"question", "answer"})
        if self.fixed is not None and self.exemplars != "fixed":
            found.append("fixed: read only by exemplars=fixed; set it to null")
        chosen = self.fixed or []
        if len(set(chosen)) < len(chosen) or len(chosen) > self.batch_size:
            found.append(
                f"fixed: {len(chosen)} ids for contexts of {self.count}; name each once, and no more than batch_size"
            )
        if self.exemplars == "fixed" and self.contexts > 1:
            found.append("contexts: fixed exemplars make one context; use contexts=1, or another choice of exemplars")
        if self.combine == "none" and self.contexts > 1:
            found.append("combine: several contexts need a rule that combines them; use vote or product")
        if self.combine != "none" and self.contexts * self.samples < 2:
            found.append("combine: there is one answer only, and nothing to choose from; raise contexts or samples")
        return found


class Icl(InContext):
    """Exemplars, then the question: posterior sampling of the concept (Algorithm 1)."""

    kind: Literal["icl"]
    placement: Literal["system", "user"]


class Iar(InContext):
    """Exemplars, the concept in one sentence, then the question with that sentence alone (Algorithm 2)."""

    kind: Literal["iar"]
    infer: str
    system: str
    concept_tokens: PositiveInt

    def rules(self) -> list[str]:
        found = template_problems("infer", self.infer, {"exemplars"})
        return super().rules() + found + template_problems("system", self.system, {"concept"})


class Improve(Rewriting):
    """The strong model is asked to improve a question's own weak answer; no exemplars."""

    kind: Literal["improve"]
    improve: str

    def rules(self) -> list[str]:
        return super().rules() + template_problems("improve", self.improve, {"question", "answer"})


class Unrefined(Strict):
    """The weak answers as they are."""

    kind: Literal["none"]


Refine = Annotated[Icl | Iar | Improve | Unrefined, Field(discriminator="kind")]


class Axis(Strict):
    """How one property of an answer is measured."""

    kind: Literal["none", "exact", "number", "choice", "f1", "regex", "reward", "llm"]
    pattern: str | None
    unit: Literal["reply", "sentence", "word"]
    model: str | None
    ask: str
    max_length: PositiveInt

    @property
    def needs_gold(self) -> bool:
        """Whether answers are held against the right ones."""
        return self.kind in ("exact", "number", "choice", "f1") or (self.kind == "llm" and "gold" in fields(self.ask))

    def rules(self) -> list[str]:
        found = []
        if (self.kind == "regex") != (self.pattern is not None):
            found.append("pattern: kind=regex and a pattern go together; set both, or null for the pattern")
        if (self.kind == "llm") != (self.model is not None):
            found.append("model: kind=llm and a model go together; set both, or null for the model")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                found.append(f"pattern: {error} in {self.pattern!r}")
        if self.kind == "llm" and not {"question", "answer"} <= (there := fields(self.ask)) <= {
            "question",
            "answer",
            "gold",
        }:
            found.append(
                f"ask: it must have {{question}} and {{answer}}, and may have {{gold}}; it has {sorted(there)}"
            )
        return found


class RefineEvaluation(Strict):
    """What is measured, on the test split."""

    prompts: PositiveInt
    examples: NonNegativeInt


class LabelWords(Strict):
    """How the strong model is asked for the label of a text, or of two."""

    question: str | None
    words: list[str] | None
    exemplar_tokens: PositiveInt

    def rules(self) -> list[str]:
        if self.words is not None and len(set(self.words)) < max(2, len(self.words)):
            return ["words: at least two different ones, one for each label"]
        return []


RefineBaseline = Literal["naive", "self", "self_cot", "icl", "shuffled", "gold_exemplars", "ceiling"]
