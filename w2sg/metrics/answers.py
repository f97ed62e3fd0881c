"""How good an answer is, and how much of a concept it has: numbers of one reply each, in [0, 1] but for rewards."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)")
FINAL = re.compile(r"####\s*(-?\$?\.?\d.*)")  # and not a heading of Markdown
SENTENCE = re.compile(r"(?<=[.!?])\s+")
ANSWER = re.compile(r"answer\s*(?:is|:)?:?\s*(?:option|choice)?\s*\(?([A-Z])\b\)?", re.IGNORECASE)
OPTION = re.compile(r"(?:option|choice)\s*(?:is|:)?\s*\(?([A-Z])\b\)?", re.IGNORECASE)
ALONE = re.compile(r"\W*(?:([A-Z])(?:[).:,]|\s*$)|([B-HJ-Z])\s)", re.MULTILINE)  # "A" and "I" may begin a sentence
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def number_in(text: str) -> str | None:
    """The final number of an answer: that after "####" (GSM8K), else the last one; None where there is none.

    >>> number_in("She has 3 and buys 1,200. #### 1,203"), number_in("It costs $7.50."), number_in("none")
    ('1203', '7.5', None)
    """
    final = FINAL.findall(text)
    numbers = NUMBER.findall(final[-1]) if final else []
    numbers = numbers or NUMBER.findall(text)
    if not numbers:
        return None
    plain = numbers[-1].replace(",", "").replace("$", "")
    return f"{float(plain):.10g}"


def letter_in(text: str) -> str | None:
    """The letter of the choice that an answer names: after "answer is", else the one that it begins with.

    >>> letter_in("The answer is (B)."), letter_in("C) because A is wrong"), letter_in("Bees do.")
    ('B', 'C', None)
    """
    text = re.sub(r"[*_`]", "", text).strip()  # emphasis
    for pattern in (ANSWER, OPTION):
        named = [letter for letter in pattern.findall(text) if letter.isupper()]
        if named:
            return named[-1]
    alone = ALONE.match(text)
    return (alone[1] or alone[2]) if alone else None


def plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles, as in SQuAD's evaluation."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def f1(reply: str, gold: str) -> float:
    """Harmonic mean of the shares of words in common (Rajpurkar et al. 2016)."""
    a, b = plain_words(reply), plain_words(gold)
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def pattern_share(pattern: re.Pattern[str], reply: str, unit: str) -> float:
    """Share of a reply's units that a pattern is found in: the reply as a whole, its sentences, or its words."""
    parts = {"reply": lambda t: [t], "sentence": SENTENCE.split, "word": str.split}[unit](reply.strip())
    parts = [part for part in parts if part.strip()]
    return sum(bool(pattern.search(part)) for part in parts) / len(parts) if parts else 0.0


def scored(kind: str, replies: Sequence[str], golds: Sequence[str], pattern: str | None, unit: str) -> list[float]:
    """[N] by one of the rules that need nothing but texts.

    Args:
        golds: [N] right answers, which ``regex`` does not read.
    """
    if kind == "regex":
        compiled = re.compile(pattern, re.IGNORECASE)
        return [pattern_share(compiled, reply, unit) for reply in replies]
    rule = {
        "exact": lambda a, b: plain_words(a) == plain_words(b),
        "number": lambda a, b: number_in(a) is not None and number_in(a) == number_in(b),
        "choice": lambda a, b: letter_in(a) is not None and letter_in(a) == letter_in(b),
        "f1": f1,
    }[kind]
    return [float(rule(a, b)) for a, b in zip(replies, golds, strict=True)]


def answer_in(kind: str, text: str) -> str:
    """What two answers must have in common to agree: the number or the letter where these are scored, else all words.

    An answer without a number or letter agrees with none but its like.
    """
    extract = {"number": number_in, "choice": letter_in}.get(kind)
    answer = extract(text) if extract else None
    return answer if answer is not None else " ".join(plain_words(text))


def copied(text: str, other: str) -> float:
    """The copy rate of two texts: twice the words that they share in order, over the words of both (difflib)."""
    return SequenceMatcher(None, text.split(), other.split(), autojunk=False).ratio()
