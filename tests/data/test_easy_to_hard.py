"""Easy to hard: rows are told apart by a number that comes with them, and never by their split's labels."""

import json

import pytest
from conftest import compose, conf_node, make_pairs, write_jsonl

from w2sg.config.check import ConfigError, check
from w2sg.data.splits import load_tables
from w2sg.errors import UserError
from w2sg.experiment.run import run_method

SPLITS = ("ground_truth", "transfer", "test")
LEVEL = {"column": "level", "most": 3.0, "easy": ["ground_truth", "transfer"]}


def rows(count: int = 60, **changes) -> list[dict]:
    """Pairs whose level is 1 to 5 in turn."""
    return [{**row, "level": k % 5 + 1, **changes} for k, row in enumerate(make_pairs(count))]


def load(path, sizes=None, **difficulty):
    options = conf_node("dataset/local")
    options |= {"path": str(path), "sizes": sizes or dict.fromkeys(SPLITS), "difficulty": LEVEL | difficulty}
    return load_tables(options, 0)


def levels(tables, written) -> dict[str, set]:
    """The levels in each split, looked up by the texts of its pairs."""
    of = {frozenset((row["chosen"], row["rejected"])): row["level"] for row in written}
    return {name: {of[frozenset(pair)] for pair in getattr(tables, name).texts} for name in SPLITS}


def test_the_easy_splits_have_the_easy_rows_and_all_of_them(tmp_path):
    written = rows()
    tables = load(write_jsonl(tmp_path / "rows.jsonl", written))
    assert levels(tables, written) == {"ground_truth": {1, 2, 3}, "transfer": {1, 2, 3}, "test": {4, 5}}
    assert (len(tables.ground_truth) + len(tables.transfer), len(tables.test)) == (36, 24)
    assert abs(len(tables.ground_truth) - len(tables.transfer)) <= 1
    assert tables.report["split"].endswith(
        "; level at most 3 in ground_truth and transfer, above it in test (easy to hard)"
    )


def test_transfer_may_be_hard_too_and_sizes_hold(tmp_path):
    written = rows()
    file = write_jsonl(tmp_path / "rows.jsonl", written)
    tables = load(file, {"ground_truth": 10, "transfer": 8, "test": None}, easy=["ground_truth"])
    assert levels(tables, written) == {"ground_truth": {1, 2, 3}, "transfer": {4, 5}, "test": {4, 5}}
    assert [len(getattr(tables, name)) for name in SPLITS] == [10, 8, 16]
    with pytest.raises(UserError, match=r"transfer 20, test 20 .* there are 24 rows to split \(level above 3"):
        load(file, {"ground_truth": None, "transfer": 20, "test": 20}, easy=["ground_truth"])


def test_a_text_with_one_number_is_a_level_and_anything_else_is_malformed(tmp_path):
    written = [{**row, "level": f"Level {row['level']}"} for row in rows()]
    for k, value in enumerate((None, True, "hard", "3 of 5", [3], float("inf"))):
        written[k * 7]["level"] = value
    del written[50]["level"]
    tables = load(write_jsonl(tmp_path / "rows.jsonl", written))
    assert sum(len(getattr(tables, name)) for name in SPLITS) == 60 - 7
    assert tables.report["dropped"]["malformed"].startswith("7, first at")
    assert "level is None, and not one number" in tables.report["dropped"]["malformed"]
    with pytest.raises(UserError, match=r"60 of 60 rows of .* are malformed.* no column 'grade'"):
        load(write_jsonl(tmp_path / "rows.jsonl", written), column="grade")


def test_a_prompt_that_is_both_easy_and_hard_is_in_neither(tmp_path):
    written = rows()
    both = {**written[0], "chosen": written[0]["chosen"] + " indeed", "level": 5}
    tables = load(write_jsonl(tmp_path / "rows.jsonl", [*written, both]))
    assert written[0]["level"] == 1
    assert tables.report["rows dropped because their prompt is easy in one and hard in another"] == 2
    assert sum(len(getattr(tables, name)) for name in SPLITS) == 59


def test_one_row_with_two_levels_is_nowhere_and_a_hyphen_is_no_minus(tmp_path):
    written = rows()
    again = [{**written[0], "level": 5}, {**written[1]}]
    for k, order in enumerate((written + again, again + written)):
        tables = load(write_jsonl(tmp_path / f"{k}.jsonl", order))
        assert sum(len(getattr(tables, name)) for name in SPLITS) == 59
        assert tables.report["dropped"]["duplicate with another difficulty"].startswith("2, first at")
        assert tables.report["dropped"]["duplicate"].startswith("1, first at")
    hyphened = [{**row, "level": f"grade-{row['level']}"} for row in written]
    assert len(load(write_jsonl(tmp_path / "hyphens.jsonl", hyphened)).test) == 24
    below = [{**row, "level": row["level"] - 5} for row in written]
    assert len(load(write_jsonl(tmp_path / "below.jsonl", below), most=-2.0).test) == 24


def test_files_that_come_split_keep_to_it(tmp_path):
    written = rows()
    whole, easy = tmp_path / "whole", tmp_path / "easy"
    for k, name in enumerate(SPLITS):
        part = written[k * 20 : k * 20 + 20]
        write_jsonl(whole / f"{name}.jsonl", part)
        write_jsonl(easy / f"{name}.jsonl", [row for row in part if row["level"] <= 3])
    tables = load(whole)
    assert [len(getattr(tables, name)) for name in SPLITS] == [12, 12, 8]
    assert levels(tables, written) == {"ground_truth": {1, 2, 3}, "transfer": {1, 2, 3}, "test": {4, 5}}
    with pytest.raises(UserError, match=r"no usable row for test \(level above 3, dataset.difficulty\)"):
        load(easy)


def test_a_run_says_what_is_easy(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", rows(200))
    typed = [
        "dataset=local",
        f"dataset.path={file}",
        "dataset.difficulty={column: level, most: 3, easy: [ground_truth, transfer]}",
        "weak=bow",
        "strong=bow",
        "weak.epochs=2",
        "strong.epochs=2",
        "trainer=cpu",
        "logger=none",
        f"out={tmp_path}",
    ]
    run_method(check(compose(*typed)), tmp_path / "run", typed)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "level at most 3 in ground_truth and transfer" in report["data"]["split"]
    assert report["data"]["sizes"]["test"] == 80


@pytest.mark.parametrize(
    ("difficulty", "said"),
    [
        ("{column: level, easy: [test]}", "dataset.difficulty.most: needs a value"),
        ("{column: level, most: hard, easy: [test]}", "dataset.difficulty.most"),
        ("{column: level, most: 3, easy: [test], least: 1}", "dataset.difficulty.least: no such key"),
        ("{column: level, most: 3, easy: []}", "dataset.difficulty.easy"),
        ("{column: level, most: 3, easy: [train]}", "dataset.difficulty.easy.0"),
        ("{column: level, most: 3, easy: [ground_truth, transfer, test]}", "one must be left for the hard ones"),
    ],
)
def test_what_cannot_be_is_refused(difficulty, said):
    with pytest.raises(ConfigError) as error:
        check(compose(f"dataset.difficulty={difficulty}"))
    assert said in str(error.value)
