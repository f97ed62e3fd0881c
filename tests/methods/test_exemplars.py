"""Which exemplars stand in a context: full, distinct, never one's own answer, and decided by seeds and ids alone."""

import doctest
from functools import partial

import numpy as np
import pytest

from w2sg.errors import UserError
from w2sg.methods.refine import exemplars
from w2sg.methods.refine.exemplars import (
    at_random,
    batch_leave_one_out,
    batches,
    enough,
    fixed,
    most_confident,
    nearest,
    tf_idf,
)

POOL = [f"q{k:02d}" for k in range(23)]
TEXTS = [f"number {k} of {'cats' if k % 2 else 'ships'} word{k // 4}" for k in range(23)]
SURE = np.random.default_rng(0).normal(size=23)
RULES = {
    "batch_loo": lambda queries, m, own: batch_leave_one_out(POOL, queries, 4, m, own, seed=0),
    "random": lambda queries, m, own: at_random(POOL, queries, 4, m, own, seed=0),
    "knn": lambda queries, m, own: nearest(POOL, queries, TEXTS, TEXTS[: len(queries)], 4, m, own),
    "high_confidence": lambda queries, m, own: most_confident(POOL, queries, SURE, 4, m, own),
    "fixed": lambda queries, m, own: fixed(POOL, queries, 4, own, None),
}


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(exemplars).failed == 0
    assert doctest.testmod(exemplars).attempted > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("contexts", [1, 4])
def test_contexts_are_full_distinct_and_never_show_a_questions_own_answer(rule, contexts):
    found = RULES[rule](POOL, contexts, False)
    enough(found, 4)
    assert len(found) == len(POOL)
    for query, rows in zip(POOL, found, strict=True):
        assert len(rows) == (1 if rule == "fixed" else contexts)
        shown = [k for row in rows for k in row]
        assert len(set(shown)) == len(shown)  # no exemplar twice, within a context or between two
        assert all(len(row) == 4 for row in rows)
        assert query not in {POOL[k] for k in shown}


@pytest.mark.parametrize("rule", ["batch_loo", "random", "knn", "high_confidence"])
def test_questions_of_another_split_have_full_contexts_too(rule):
    found = RULES[rule](["other", "another"], 2, False)
    enough(found, 4)
    assert all(len({k for row in rows for k in row}) == 8 for rows in found)


def test_a_batch_is_the_papers_consecutive_one_and_the_last_is_filled():
    found = batch_leave_one_out(POOL, POOL, 4, 1, False, seed=0)
    assert found[0] == [[1, 2, 3, 4]]
    assert found[7] == [[5, 6, 8, 9]]
    assert found[22] == [[18, 19, 20, 21]]  # 23 = 4 * 5 + 3: the last batch begins two earlier
    assert batches(10, 5) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    whole = batch_leave_one_out(POOL, POOL, 5, 1, True, seed=0)
    assert {tuple(rows[0]) for rows in whole[:5]} == {(0, 1, 2, 3, 4)}  # one concept for a batch of infer-and-respond


def test_one_may_ask_for_the_own_answer():
    for rule in ("batch_loo", "random", "knn", "high_confidence", "fixed"):
        found = RULES[rule](POOL, 1, True)
        assert any(POOL[k] == query for query, rows in zip(POOL, found, strict=True) for k in rows[0]), rule
    assert all(POOL[rows[0][0]] == query for query, rows in zip(POOL, RULES["knn"](POOL, 1, True), strict=True))


def test_random_draws_hang_on_seed_and_ids_and_not_on_the_order_of_the_pool():
    draw = partial(at_random, count=4, contexts=2, include_self=False)
    one, two = draw(POOL, POOL, seed=0), draw(POOL, POOL, seed=1)
    assert one != two
    turned = POOL[::-1]
    names = [[[turned[k] for k in row] for row in rows] for rows in draw(turned, POOL, seed=0)]
    assert names == [[[POOL[k] for k in row] for row in rows] for rows in one]


def test_the_nearest_have_the_most_words_in_common():
    pool = ["a", "b", "c"]
    texts = ["how do ships float on water", "what do cats eat", "why do ships sink in water"]
    assert nearest(pool, ["x"], texts, ["do ships sink"], 2, 1, False) == [[[2, 0]]]
    assert nearest(pool, ["x"], texts, ["zebra"], 3, 1, False) == [[[0, 1, 2]]]  # no word in common: by id
    table = tf_idf(texts, texts).toarray()
    assert np.allclose((table**2).sum(1), 1.0)
    # "ships" stands in two of three texts, "cats" in one: log(4 / 3) + 1 against log(4 / 2) + 1
    words = ["how", "do", "ships", "float", "on", "water"]
    raw = np.array([np.log(4 / (1 + sum(w in t.split() for t in texts))) + 1 for w in words])
    assert sorted(table[0][table[0] > 0]) == pytest.approx(sorted(raw / np.linalg.norm(raw)))


def test_the_surest_answers_come_first():
    found = most_confident(POOL, ["other"], SURE, 3, 2, False)
    assert found == [np.argsort(-SURE)[:6].reshape(2, 3).tolist()]


def test_fixed_ones_are_named_by_id():
    found = fixed(POOL, ["q02", "q09"], 2, False, ["q02", "q00"])
    assert found == [[[0, 1]], [[2, 0]]]  # q02 is not its own exemplar: the next one stands in
    with pytest.raises(UserError, match=r"refine\.fixed: q99 is the id of no answered question"):
        fixed(POOL, POOL, 2, False, ["q99"])


def test_a_pool_that_is_too_small_is_said():
    for contexts in (1, 3):
        with pytest.raises(UserError, match=r"a context of 9 exemplars was asked for.*suffice for"):
            enough(batch_leave_one_out(POOL[:9], POOL[:9], 9, contexts, False, 0), 9)
    with pytest.raises(UserError, match=r"suffice for 2; lower refine\.context_size or refine\.contexts"):
        enough(at_random(POOL, POOL, 5, 5, False, 0), 5)
