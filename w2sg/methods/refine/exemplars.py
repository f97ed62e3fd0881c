"""Which answered questions stand before a question in its context: pure functions of ids, texts and a seed.

Shapes: P answered questions (the pool), Q questions, n exemplars in a context, m contexts of one question. Every rule
gives [Q] of [m] of [n] places in the pool. An exemplar stands in one context of a question only, and a question's own
answer stands in none of them unless ``include_self`` says so.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from w2sg.data.table import uniform
from w2sg.errors import UserError

if TYPE_CHECKING:
    from w2sg.methods.refine.options import Iar, InContext

Contexts = list[list[list[int]]]
WORD = re.compile(r"\w+")


def contexts(
    options: InContext | Iar,
    pool: Sequence[str],
    queries: Sequence[str],
    texts: Callable[[], tuple[Sequence[str], Sequence[str]]],
    confidence: Callable[[], np.ndarray],
    seed: int,
) -> Contexts:
    """The contexts of each question as ``refine.exemplars`` has it.

    Args:
        pool, queries: ids. texts: of both, where similarity is asked for. confidence: [P], of the weak answers.

    Raises:
        UserError: the pool is too small, or ``refine.fixed`` names an answer that is not in it.
    """
    who, count, m, include_self = (pool, queries), options.count, options.contexts, options.include_self
    match options.exemplars:
        case "batch_loo":
            rows = batch_leave_one_out(*who, count, m, include_self, seed)
        case "fixed":
            rows = fixed(*who, count, include_self, options.fixed)
        case "random":
            rows = at_random(*who, count, m, include_self, seed)
        case "knn":
            rows = nearest(*who, *texts(), count, m, include_self)
        case "high_confidence":
            rows = most_confident(*who, confidence(), count, m, include_self)
    enough(rows, count)
    return rows


def batches(count: int, size: int) -> list[list[int]]:
    """Batches of consecutive places; a last one that is short begins earlier, so that all are of one size.

    >>> batches(7, 3)
    [[0, 1, 2], [3, 4, 5], [4, 5, 6]]
    """
    size = min(size, count)
    starts = [min(start, count - size) for start in range(0, count, size)]
    return [list(range(start, start + size)) for start in starts]


def batch_leave_one_out(
    pool: Sequence[str], queries: Sequence[str], count: int, contexts: int, include_self: bool, seed: int
) -> Contexts:
    """The other members of a question's batch (arXiv 2405.16236, Algorithm 1); then those that follow.

    A question that is not in the pool stands before a batch that its id and the seed decide.

    Args:
        count: n; the batches have one member more, or as many where a question's own answer is included.
    """
    cut = batches(len(pool), count if include_self else count + 1)
    place = {i: row for row, i in enumerate(pool)}
    rows = []
    for query in queries:
        position = place.get(query)
        home = cut[int(uniform("batch", seed, query) * len(cut)) if position is None else position // len(cut[0])]
        after = [k % len(pool) for k in range(home[-1] + 1, home[-1] + 1 + len(pool))]
        order = [k for k in dict.fromkeys([*home, *after]) if include_self or k != position]
        if position is None:  # the batch has a member too many
            order = [k for k in order if include_self or k != home[-1]]
        rows.append(_cut(order, count, contexts))
    return rows


def _cut(order: Sequence[int], count: int, contexts: int) -> list[list[int]]:
    return [list(map(int, order[start : start + count])) for start in range(0, count * contexts, count)]


def _ranked(
    pool: Sequence[str],
    queries: Sequence[str],
    count: int,
    contexts: int,
    include_self: bool,
    order: Callable[[int], Sequence[int]],
) -> Contexts:
    """The first of an order that is each question's own, cut into contexts."""
    return [
        _cut([k for k in order(row) if include_self or pool[k] != query], count, contexts)
        for row, query in enumerate(queries)
    ]


def fixed(
    pool: Sequence[str], queries: Sequence[str], count: int, include_self: bool, chosen: Sequence[str] | None
) -> Contexts:
    """The same for all: those named, or the first of the pool; whoever is among them gets the next one instead.

    Args:
        chosen: their ids; None takes the first.

    Raises:
        UserError: an id that is not in the pool.
    """
    place = {i: row for row, i in enumerate(pool)}
    if unknown := [i for i in chosen or () if i not in place]:
        raise UserError(f"refine.fixed: {unknown[0]} is the id of no answered question; refined.parquet lists them")
    first = [place[i] for i in chosen or ()]
    order = first + [k for k in range(len(pool)) if k not in set(first)]
    return _ranked(pool, queries, count, 1, include_self, lambda _: order)


def at_random(
    pool: Sequence[str], queries: Sequence[str], count: int, contexts: int, include_self: bool, seed: int
) -> Contexts:
    """Draws without replacement, decided by the seed, a question's id and the pool's ids, not by their order."""
    by_id = np.array(sorted(range(len(pool)), key=lambda k: pool[k]))

    def order(row: int) -> np.ndarray:
        key = hashlib.sha256(f"exemplars:{seed}:{queries[row]}".encode()).digest()[:16]
        return by_id[np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).permutation(len(pool))]

    return _ranked(pool, queries, count, contexts, include_self, order)


def nearest(
    pool: Sequence[str],
    queries: Sequence[str],
    pool_texts: Sequence[str],
    query_texts: Sequence[str],
    count: int,
    contexts: int,
    include_self: bool,
) -> Contexts:
    """The most similar questions first: the cosine of their words' tf-idf; ties go by id."""
    similar = (tf_idf(pool_texts, query_texts) @ tf_idf(pool_texts, pool_texts).T).toarray()
    by_id = np.argsort(np.argsort(np.array(pool, dtype=object)))
    return _ranked(
        pool, queries, count, contexts, include_self, lambda row: np.lexsort((by_id, -np.round(similar[row], 9)))
    )


def tf_idf(corpus: Sequence[str], texts: Sequence[str]):
    """Sparse rows of unit length, [T, W]: counts times 1 + log((1 + P) / (1 + texts of the corpus with the word))."""
    from scipy.sparse import csr_matrix, diags

    having = Counter(word for text in corpus for word in set(_words(text)))
    place = {word: k for k, word in enumerate(having)}
    rows = [Counter(word for word in _words(text) if word in place) for text in texts]
    ends = np.cumsum([0, *map(len, rows)])
    columns = [place[word] for row in rows for word in row]
    values = [n * (np.log((1 + len(corpus)) / (1 + having[word])) + 1) for row in rows for word, n in row.items()]
    table = csr_matrix((np.array(values, float), np.array(columns, np.int64), ends), (len(texts), max(len(place), 1)))
    norms = np.sqrt(np.asarray(table.multiply(table).sum(1)).ravel())
    return diags(1 / np.where(norms > 0, norms, 1.0)) @ table


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def most_confident(
    pool: Sequence[str],
    queries: Sequence[str],
    confidence: np.ndarray,
    count: int,
    contexts: int,
    include_self: bool,
) -> Contexts:
    """The answers that the weak model was surest of, for every question the same.

    Args:
        confidence: [P].
    """
    order = sorted(range(len(pool)), key=lambda k: (-confidence[k], pool[k]))
    return _ranked(pool, queries, count, contexts, include_self, lambda _: order)


def enough(rows_of_each: Contexts, count: int) -> None:
    """Every context is full.

    Raises:
        UserError: the pool is too small for the contexts asked for.
    """
    least = min((len(rows) for each in rows_of_each for rows in each), default=0)
    if least < count:
        raise UserError(
            f"refine.context_size: a context of {count} exemplars was asked for, and the answered questions suffice "
            f"for {least}; lower refine.context_size or refine.contexts, or answer more prompts"
        )
