"""Texts as token ids, alone and as they go on another text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

SLICE = 1024  # texts that are encoded at once: a tokenizer's own lists take 57 bytes a token


def sliced(count: int) -> Iterator[slice]:
    """Places of so many texts, a slice of them at a time."""
    return (slice(start, start + SLICE) for start in range(0, count, SLICE))


def ids_of(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Token ids of texts, ``special`` with those that the tokenizer puts around every text."""
    if not len(texts):
        return []
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), **options)["input_ids"]


def ids_after(tokenizer: Any, before: str, texts: Sequence[str]) -> list[list[int]]:
    """Token ids by which texts go on another one.

    A tokenizer of SentencePiece's kind puts a space before whatever it is given, so a text that goes on another is not
    the tokens that it is alone. Where a token would reach from one text into the other, the two are taken apart there,
    since a model that writes the second text has read the first.

    Args:
        before: what the texts follow.
    """
    (first,) = ids_of(tokenizer, [before]) if before else ([],)
    rows = ids_of(tokenizer, [before + text for text in texts])
    return [
        row[len(first) :] if row[: len(first)] == first else _apart(tokenizer, first, row, text)
        for row, text in zip(rows, texts, strict=True)
    ]


def _apart(tokenizer: Any, first: list[int], whole: list[int], text: str) -> list[int]:
    """Tokens of a text by itself, less the space that it did not bring where there is one."""
    (alone,) = ids_of(tokenizer, [text])
    wanted = _said(tokenizer, whole)
    for skipped in (0, 1):
        if _said(tokenizer, [*first, *alone[skipped:]]) == wanted:
            return alone[skipped:]
    return alone


def _said(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def beginning(tokenizer: Any) -> list[int]:
    """Token ids that the tokenizer puts in front of every text (one that begins a text, mostly)."""
    (bare,), (whole,) = (ids_of(tokenizer, ["a"], special) for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []
