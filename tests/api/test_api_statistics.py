"""`w2sg.pgr` and its like on anybody's predictions: what they take, what they refuse, and whose numbers they give."""

import doctest
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import w2sg
from w2sg.api import statistics
from w2sg.metrics import intervals, predictions

DRAW = np.random.default_rng(0)
LABELS = DRAW.integers(0, 2, 300)
IDS = [f"row {k}" for k in range(300)]


def logits(accuracy: float) -> np.ndarray:
    """[300] logits of class 0 that are right on about this share of rows."""
    right = DRAW.random(300) < accuracy
    return np.where((LABELS == 0) == right, 1.0, -1.0) * (0.1 + DRAW.random(300))


WEAK, STUDENT, CEILING = logits(0.6), logits(0.75), logits(0.9)


def series(values: np.ndarray) -> pd.Series:
    return pd.Series(values, IDS)


def test_every_form_of_the_same_rows_gives_the_same_number():
    right = [(values < 0) == (LABELS == 1) for values in (WEAK, STUDENT, CEILING)]
    expected = w2sg.pgr(*right)
    assert expected.resolved
    assert 0 < expected.low < expected.value < expected.high
    two = [np.stack([values, np.zeros(300)], 1) for values in (WEAK, STUDENT, CEILING)]
    classes = [(values < 0).astype(int) for values in (WEAK, STUDENT, CEILING)]
    shuffled = DRAW.permutation(300)
    ids = [series(values).iloc[DRAW.permutation(300)] for values in (STUDENT, CEILING)]
    table = pd.DataFrame({"id": IDS, "label": LABELS, "weak": WEAK, "student": STUDENT, "ceiling": CEILING})
    forms = [
        w2sg.pgr(*(hits.astype(int).tolist() for hits in right)),
        w2sg.pgr(WEAK, STUDENT, CEILING, labels=LABELS),
        w2sg.pgr(*two, labels=LABELS),
        w2sg.pgr(*classes, labels=LABELS),
        w2sg.pgr(*(torch.tensor(values, requires_grad=True) for values in (WEAK, STUDENT, CEILING)), labels=LABELS),
        w2sg.pgr(series(WEAK), *ids, labels=series(LABELS).iloc[shuffled]),
        w2sg.pgr(data=table),
        w2sg.pgr(data=table.assign(weak=[np.array(row) for row in two[0]])),
    ]
    assert all(form == expected for form in forms)
    assert w2sg.pgr(*(iter(hits.tolist()) for hits in right)) == expected


def test_rows_of_one_prompt_count_as_one_draw():
    right = [(values < 0) == (LABELS == 1) for values in (WEAK, STUDENT, CEILING)]
    prompts = [f"prompt {k // 3}" for k in range(300)]
    alone, together = w2sg.pgr(*right), w2sg.pgr(*right, clusters=prompts)
    assert (alone.over, together.over) == ("test rows", "test prompts")
    assert alone.value == together.value
    assert w2sg.paired_test(*right[:2], clusters=prompts).test == "exact sign flips over prompts"
    table = pd.DataFrame({"weak": right[0], "student": right[1], "ceiling": right[2], "prompt": prompts})
    assert w2sg.pgr(data=table) == together
    assert w2sg.pgr(*right, clusters=[(k // 3, "of a file") for k in range(300)]) == together


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: w2sg.pgr([1, 0], [1, 0, 1], [1, 1]), r"different numbers of rows \(weak 2, student 3, ceiling 2\)"),
        (lambda: w2sg.pgr([], [], []), "there are no rows"),
        (lambda: w2sg.pgr([0.2, 1.0], [1, 1], [1, 1]), "weak holds 0.2; give whether each row was right"),
        (lambda: w2sg.pgr(np.eye(3), np.eye(3), np.eye(3)), r"weak is \[3, 3\].*with logits \[N, C\] give labels="),
        (lambda: w2sg.pgr(np.zeros((2, 2, 2)), [1, 1], [1, 1]), r"weak is \[2, 2, 2\]; give one row per example"),
        (lambda: w2sg.pgr([np.nan, 1], [1, 1], [1, 1]), r"weak has no number \(NaN\) in 1 of 2 rows"),
        (lambda: w2sg.pgr(["yes"], ["no"], ["no"]), "weak holds 'yes', which is no number"),
        (lambda: w2sg.pgr(), "weak is 'weak', a column's name; give its table as data="),
        (lambda: w2sg.pgr([1.0], [1.0], [1.0], labels=[2]), r"a label 2, and \[N\] logits are of class 0 against"),
        (lambda: w2sg.pgr([1.0], [1.0], [1.0], labels=[0.5]), "give the gold class of each row"),
        (lambda: w2sg.pgr(*[v < 0 for v in (WEAK, STUDENT, CEILING)], labels=LABELS), "weak holds True and False, and"),
        (lambda: w2sg.pgr([0.3, 0.9], [0.2, 0.8], [0.0, 1.0], labels=[0, 1]), "weak lies between 0 and 1 everywhere"),
        (lambda: w2sg.pgr([-1, 1], [1, 1], [-1, 1], labels=[0, 1]), "weak holds the class -1"),
        (lambda: w2sg.pgr([1, 1, 1], [1, 1, 0], [np.nan] * 3), r"ceiling has no number \(NaN\) in 3 of 3 rows"),
        (lambda: w2sg.paired_test([1, 0], [0, 1], clusters=[np.nan, "a"]), "clusters has no name in 1 of 2 rows"),
        (lambda: w2sg.paired_test({"a": 1}, {"a": 1}), "a is a dict; give a list"),
        (lambda: w2sg.holm({"a": 0.1}), "p values between 0 and 1"),
        (lambda: w2sg.pgr(series(WEAK), STUDENT, CEILING), "student has no ids and weak does"),
        (
            lambda: w2sg.pgr(series(WEAK), series(STUDENT)[1:], series(CEILING), labels=series(LABELS)),
            "the ids of weak and student do not join: 1 stand in one of them alone, first 'row 0'",
        ),
        (
            lambda: w2sg.paired_test(pd.Series([1, 0], ["a", "a"]), pd.Series([1, 0], ["a", "b"])),
            r"a has ids more than once \(1, first 'a'\)",
        ),
        (lambda: w2sg.pgr(data=pd.DataFrame({"weak": [1]})), "no column 'student' for student; it has weak"),
        (lambda: w2sg.pgr(data="nowhere.parquet"), "there is no file nowhere.parquet"),
        (lambda: w2sg.pgr(data=3), "data is int; give a pandas DataFrame"),
        (lambda: w2sg.holm([0.1, float("nan")]), "p values between 0 and 1"),
    ],
)
def test_wrong_use_is_one_clear_error(call, said):
    with pytest.raises(w2sg.UserError, match=said):
        call()


def test_the_examples_of_the_docstrings_hold():
    for module in (statistics, intervals, predictions):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_names_are_imported_when_used_and_nothing_large_with_them():
    code = (
        "import sys, time; start = time.perf_counter(); import w2sg; seconds = time.perf_counter() - start\n"
        "assert set(w2sg.__all__) <= set(dir(w2sg))\n"
        "from w2sg import pgr\n"
        "loaded = [name for name in ('torch', 'lightning', 'transformers', 'pandas') if name in sys.modules]\n"
        "print(seconds, loaded)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, _, loaded = said.partition(" ")
    assert float(seconds) < 0.1
    assert loaded.strip() == "[]"


def test_what_type_checkers_see_is_what_is_there():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(w2sg.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == set(w2sg.__all__) == {*w2sg._MODULES, "losses"}
    assert all(getattr(w2sg, name) for name in w2sg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        w2sg.nothing  # noqa: B018
