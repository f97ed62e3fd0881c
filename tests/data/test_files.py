"""Files as people have them: spreadsheets, packed ones, tables, folders of other tools, and damaged ones."""

import bz2
import datetime
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from conftest import make_pairs, write_jsonl
from data_rows import each, load, one, texts

from w2sg.errors import UserError

HEAD = "prompt,chosen,rejected\n"
ROWS = [f"q {k},good {k},bad {k}\n" for k in range(12)]


def csv_of(tmp_path, text: str, name: str = "rows.csv", encoding: str = "utf-8", **changes):
    file = tmp_path / name
    file.write_bytes(text.encode(encoding))
    return load(file, **changes)


def pairs(count: int = 12) -> list[dict]:
    return [{"prompt": f"q {k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(count)]


# -- CSV ---------------------------------------------------------------------------------------------------------------


def test_rows_with_a_field_too_many_or_too_few_are_malformed_with_their_lines(tmp_path):
    rows = [*ROWS]
    rows[3], rows[5] = "q 3,good, but more,bad 3\n", "q 5,good 5\n"
    tables = csv_of(tmp_path, HEAD + "".join(rows))
    assert tables.report["dropped"]["malformed"].startswith("2, first at rows.csv:5: 4 fields, more than the 3 columns")
    assert sum(map(len, each(tables))) == 10
    assert not any("but more" in text for text in texts(tables))
    with pytest.raises(UserError, match=r"rows\.csv:5: malformed \(4 fields, more than the 3 columns"):
        csv_of(tmp_path, HEAD + "".join(rows), strict=True)
    with pytest.raises(UserError, match=r"10 rows to split.*Dropped while reading: malformed: 2, first at rows\.csv:5"):
        csv_of(tmp_path, HEAD + "".join(rows), sizes={"ground_truth": 6, "transfer": 4, "test": 2})


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (
            ['q,"He said \\"warm, wise\\" twice",no\n'],
            r"rows\.csv:2 is not CSV .*more fields than columns; quotes .*doubled",
        ),
        ([*ROWS[:5], 'q,"fine,no\n', *ROWS[6:]], r"rows\.csv:7: a quote that opens here is not closed"),
        (['q 1,"two\nlines",no\n', 'q 2,"fine,no\n', *ROWS], r"rows\.csv:4: a quote that opens here is not closed"),
        (['q 1,"fine,no\n', 'q 2,"yes",no\n', *ROWS], r"rows\.csv:2 is not CSV"),
    ],
)
def test_quotes_that_shift_or_swallow_rows_refuse_the_file(tmp_path, rows, why):
    with pytest.raises(UserError, match=why):
        csv_of(tmp_path, HEAD + "".join(rows))


def test_quotes_as_they_should_be(tmp_path):
    tables = csv_of(tmp_path, HEAD + 'q 1,"a ""good"", one\nof two lines",a 5" pipe\n' + "\n".join(ROWS))
    assert '\n\nHuman: q 1\n\nAssistant: a "good", one\nof two lines' in texts(tables)
    assert '\n\nHuman: q 1\n\nAssistant: a 5" pipe' in texts(tables)
    assert tables.report["dropped"] == {}


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_delimiters_are_found_and_said(tmp_path, mark):
    tables = csv_of(tmp_path, (HEAD + "".join(ROWS)).replace(",", mark))
    assert "\n\nHuman: q 1\n\nAssistant: good 1" in texts(tables)
    assert "its columns are told apart by" in tables.report["notes"][0]
    assert csv_of(tmp_path, (HEAD + "".join(ROWS)).replace(",", "\t"), "rows.tsv").report["notes"] == []


def test_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"rows\.csv has 3 columns, of which two are named 'chosen'; rename one"):
        csv_of(tmp_path, "prompt,chosen,chosen\nq,a,b\n")
    table = pa.table([["q"], ["a"], ["b"]], names=["prompt", "chosen", "chosen"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet has two columns named 'chosen'"):
        load(tmp_path / "rows.parquet")


def test_encodings_of_spreadsheets(tmp_path):
    text = HEAD + "".join(ROWS)
    assert csv_of(tmp_path, "\ufeff" + text, "mark.csv").report["dropped"] == {}
    for name, content in (("rows.csv", text), ("rows.jsonl", json.dumps(pairs()[0])), ("rows.json", "[]")):
        with pytest.raises(UserError, match=r"is UTF-16 text; save it as UTF-8"):
            csv_of(tmp_path, content, name, "utf-16")
    with pytest.raises(UserError, match=r"13 of 13 rows .*latin\.csv:2: .*not valid UTF-8.*save the file as UTF-8"):
        csv_of(tmp_path, HEAD + "".join(f"é {k},good,bad\n" for k in range(13)), "latin.csv", "latin-1")


def test_the_index_that_pandas_writes_is_a_column_that_is_not_read(tmp_path):
    tables = csv_of(tmp_path, "," + HEAD + "".join(f"{k},{row}" for k, row in enumerate(ROWS)))
    assert sum(map(len, each(tables))) == 12


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}', "the key 'chosen' stands in it twice"),
        ('{"prompt": "q", "chosen": "a", "rejected": "c", "score": NaN}', "NaN is no JSON; write null"),
        ('{"prompt": "q", "chosen": "a", "rejected": "c", "score": -Infinity}', "-Infinity is no JSON"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('["prompt", "chosen"]', "the row is not an object"),
    ],
)
def test_lines_that_are_not_sure_are_malformed(tmp_path, line, why):
    lines = [json.dumps(row) for row in pairs()]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:4], line, *lines[4:]]))
    assert load(tmp_path / "rows.jsonl").report["dropped"]["malformed"].startswith(f"1, first at rows.jsonl:5: {why}")
    with pytest.raises(UserError, match=r"rows\.jsonl:5: malformed"):
        load(tmp_path / "rows.jsonl", strict=True)


def test_json_is_read_as_lines_and_lines_as_json_whatever_the_ending(tmp_path):
    write_jsonl(tmp_path / "lines.json", pairs())
    (tmp_path / "list.jsonl").write_text(json.dumps(pairs()))
    (tmp_path / "long.jsonl").write_text(json.dumps(pairs(), indent=1))
    for name in ("lines.json", "list.jsonl", "long.jsonl"):
        assert sum(map(len, each(load(tmp_path / name)))) == 12


def test_json_of_columns_says_how_to_write_rows(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"prompt": {"0": "q"}, "chosen": {"0": "a"}}))
    with pytest.raises(UserError, match=r"its keys are prompt, chosen.*orient='records'"):
        load(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"rows\.json is not JSON \(nested too deep"):
        load(tmp_path / "rows.json")


# -- packed files, tables and folders ----------------------------------------------------------------------------------


def test_packed_files(tmp_path):
    lines, comma = "".join(json.dumps(row) + "\n" for row in pairs()).encode(), (HEAD + "".join(ROWS)).encode()
    zst = pa.BufferOutputStream()
    with pa.CompressedOutputStream(zst, "zstd") as out:
        out.write(lines)
    files = {
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "b.jsonl.bz2": bz2.compress(lines),
        "c.jsonl.xz": lzma.compress(lines),
        "d.jsonl.zst": zst.getvalue().to_pybytes(),
        "e.csv.gz": gzip.compress(comma, mtime=0),
        "f.ndjson": lines,
        "G.JSONL": lines,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert sum(map(len, each(load(tmp_path / name)))) == 12, name
    (tmp_path / "cut.jsonl.xz").write_bytes(files["c.jsonl.xz"][:60])
    with pytest.raises(UserError, match=r"cut\.jsonl\.xz (breaks off|cannot be read)"):
        load(tmp_path / "cut.jsonl.xz")


def test_tables_of_arrow(tmp_path):
    table = pa.Table.from_pylist(pairs())
    large = table.cast(pa.schema([(name, pa.large_string()) for name in table.column_names]))
    pq.write_table(large, tmp_path / "a.parquet")
    pa.feather.write_feather(table, tmp_path / "b.feather")
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    for name in ("a.parquet", "b.feather", "c.arrow"):
        assert sum(map(len, each(load(tmp_path / name)))) == 12, name
    (tmp_path / "d.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(UserError, match=r"d\.arrow is not a readable Arrow file"):
        load(tmp_path / "d.arrow")


def test_dates_out_of_range_in_any_column_are_no_hindrance(tmp_path):
    far = pa.array([2**62] * 12, pa.timestamp("us"))
    nested = pa.StructArray.from_arrays([far], ["when"])
    table = pa.Table.from_pylist(pairs()).append_column("at", far).append_column("more", nested)
    pq.write_table(table, tmp_path / "rows.parquet")
    tables = load(tmp_path / "rows.parquet")
    assert sum(map(len, each(tables))) == 12
    assert "the column at holds values that cannot be read" in " ".join(tables.report["notes"])
    assert datetime.date.max.year == 9999  # the last that Python knows


def test_what_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(pairs(30))
    rows.save_to_disk(str(tmp_path / "one"))
    assert sum(map(len, each(load(tmp_path / "one")))) == 30
    parts = {"train": rows.select(range(20)), "test": rows.select(range(20, 30))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    tables = load(tmp_path / "two")
    assert {p.text for p in tables.test.prompts} == {f"\n\nHuman: q {k}\n\nAssistant:" for k in range(20, 30)}
    (tmp_path / "one").rename(tmp_path / "rot")
    (tmp_path / "rot" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(UserError, match=r"written by save_to_disk and cannot be read .*to_parquet"):
        load(tmp_path / "rot")


def test_splits_that_datasets_saved_are_those_of_the_hub(tmp_path):
    import datasets

    parts = {name: make_pairs(8, k) for k, name in enumerate(("train_prefs", "test_prefs", "train_sft"))}
    datasets.DatasetDict({k: datasets.Dataset.from_list(rows) for k, rows in parts.items()}).save_to_disk(tmp_path)
    tables = load(tmp_path, "ultrafeedback")
    assert {text for pair in tables.test.texts for text in pair} == {t for r in parts["test_prefs"] for t in r.values()}
    assert tables.report["notes"] == ["splits that are not read: train_sft"]
    (note,) = load(tmp_path).report["notes"]
    assert note.startswith("test_prefs: read with the others and split by prompt")


def test_a_copy_of_the_hub_with_its_own_files_beside(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(pairs()), tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (tmp_path / "README.md").write_text("# A dataset")
    assert sum(map(len, each(load(tmp_path)))) == 12


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl is neither a file nor a folder"):
        load(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"holds no \.jsonl"):
        load(tmp_path)  # the pipe in it is none
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / ("x" * 300), tmp_path / "a" / "rows.jsonl"):
        with pytest.raises(UserError, match=r"dataset\.path: "):
            load(path)


def test_replies_without_a_visible_character_are_empty(tmp_path):
    signs = ["\0\0", "\u200b\u200d", "\ufeff", "\u2060 \u00ad", "\u3164", "\u2800", " \n"]
    rows = [{"prompt": f"q {k}", "chosen": sign, "rejected": "b"} for k, sign in enumerate(signs)] + pairs()
    tables = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert tables.report["dropped"] == {"empty": "7, first at rows.jsonl:1"}


# -- labels ------------------------------------------------------------------------------------------------------------


def labels(tmp_path, values, **changes):
    rows = [{"text": f"t {k}", "label": value} for k, value in enumerate(values)]
    return load(write_jsonl(tmp_path / "rows.jsonl", rows), **changes)


def test_labels_are_numbers_whatever_they_are_written_as(tmp_path):
    for yes, no in ((1, 0), (1.0, 0.0), ("1", "0"), ("1.0", "0.0"), (True, False), ("True", "FALSE"), ("true", 0)):
        tables = labels(tmp_path, [yes, no] * 20)
        assert sum(int(t.labels.sum()) for t in each(tables)) == 20
        assert tables.report["dropped"] == {}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([1, 1, -1] * 10, "labels are -1 and 1; write them 0 and 1"),
        (["1", "-1"] * 10, "labels are -1 and 1; write them 0 and 1"),
        (["positive", "negative"] * 10, r"labels are words \('negative', 'positive'\); write numbers from 0"),
        (["yes", "no"] * 10, "labels are words"),
        ([-1] * 20, "all labels are -1, as in tests"),
        ([-1, 0, 1, 2] * 10, r"10 of 40 labels are numbers, but no classes \(-1\)"),
        ([1] * 30, "all rows left of rows.jsonl are class 1, one class only"),
        ([0.5, 0.7] * 10, r"20 of 20 labels are numbers, but no classes \(0\.5, 0\.7\)"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, values, why):
    with pytest.raises(UserError, match=why):
        labels(tmp_path, values)


def test_a_split_of_one_class_is_refused_or_said(tmp_path):
    for name, value in (("ground_truth", 0), ("transfer", 1), ("test", 0)):
        own = [value if name == "transfer" else k % 2 for k in range(40)]
        write_jsonl(tmp_path / "d" / f"{name}.jsonl", [{"text": f"{name} {k}", "label": y} for k, y in enumerate(own)])
    with pytest.raises(UserError, match=r"dataset\.sizes\.transfer: all 40 rows of transfer are of class 1"):
        load(tmp_path / "d")
    few = load(tmp_path / "d", sizes={"ground_truth": 30, "transfer": 6, "test": 30})
    assert few.report["notes"] == ["all 6 rows of transfer are of class 1, so that accuracies on them say nothing"]


def test_files_of_several_forms_in_one_folder(tmp_path):
    write_jsonl(tmp_path / "d" / "a.jsonl", pairs())
    write_jsonl(tmp_path / "d" / "b.jsonl", make_pairs(6))
    (tmp_path / "d" / "c.csv").write_text(HEAD + "".join(row.replace("q", "p") for row in ROWS))
    tables = load(tmp_path / "d")
    assert sum(map(len, each(tables))) == 30
    assert len(tables.report["read_as"]) == 3
    assert one("a", "b")["chosen"] not in texts(tables)


# -- what spreadsheets and downloads add -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sep=;\n" + (HEAD + "".join(ROWS)).replace(",", ";"), "rows.csv"),
        ("prompt;chosen;rejected;note, more\n" + "".join(ROWS).replace(",", ";").replace("\n", ";\n"), "rows.csv"),
        ("prompt\tchosen\trejected\ta,b,c,d,e\n" + "".join(ROWS).replace(",", "\t").replace("\n", "\t\n"), "rows.TSV"),
    ],
)
def test_delimiters_of_other_locales(tmp_path, text, name):
    tables = csv_of(tmp_path, text, name)
    assert "\n\nHuman: q 1\n\nAssistant: good 1" in texts(tables)
    assert tables.report["dropped"] == {}


def test_lines_are_counted_from_the_line_of_the_delimiter(tmp_path):
    tables = csv_of(tmp_path, "sep=,\r\n" + HEAD + "".join(ROWS[:4]) + "q,good\n" + "".join(ROWS[4:]))
    assert tables.report["dropped"]["malformed"].startswith("1, first at rows.csv:7: 2 fields, fewer than")


@pytest.mark.parametrize(
    ("content", "name", "why"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "rows.jsonl", r"Git LFS .*`git lfs pull`"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "rows.parquet", r"Git LFS .*`git lfs pull`"),
        (b"PK\x03\x04\x14\x00", "rows.csv", "a zip archive or a spreadsheet"),
        (b"\n<!doctype html>\n<html>", "rows.json", "a web page; download the file itself"),
        (b"<html>", "rows.csv", "a web page"),
        (gzip.compress(b"text,label\n", mtime=0), "rows.csv", r"is packed by gzip; name it rows\.csv\.gz"),
        (b"\x28\xb5\x2f\xfd\0\0", "rows.jsonl", r"is packed by zstandard; name it rows\.jsonl\.zst"),
        (b"PAR1\x15\x04", "rows.jsonl", r"is a parquet file; its name should end in \.parquet"),
        (b"SQLite format 3\0", "rows.csv", "a database"),
        ("prompt,chosen,rejected\n".encode("utf-16-le"), "rows.csv", "UTF-16 text"),
        ('{"prompt": "q"}\n'.encode("utf-16-be"), "rows.jsonl", "UTF-16 text"),
        (b"Text, Label\nwarm, 1\n", "rows.csv", "rename ' Label' to 'label', and so on"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, content, name, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=why):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "note"),
    [
        (["a.jsonl", "more.xlsx", "sub/b.jsonl"], "files that are not read: sub/b.jsonl, more.xlsx"),
        (["ground_truth.jsonl", "transfer.jsonl", "test.jsonl", "x.jsonl"], "files that are not read: x.jsonl"),
        (["train.jsonl", "dev.jsonl"], "dev.jsonl: read with the others and split by prompt; only what is named"),
        (["train/a.jsonl", "test/b.jsonl"], "test/b.jsonl: read with the others and split by prompt; only what is"),
        (["t-00000-of-00003.jsonl", "t-00002-of-00003.jsonl"], "of t-00000-of-00003.jsonl there are 2 of 3 parts"),
    ],
)
def test_files_of_a_folder_that_are_not_read_or_pooled_are_named(tmp_path, files, note):
    for number, name in enumerate(files):
        write_jsonl(tmp_path / name, make_pairs(6, number))
    (tmp_path / "README.md").write_text("x")
    (found,) = load(tmp_path).report["notes"]
    assert found.startswith(note)


def test_names_of_test_files_are_read_whatever_their_letters(tmp_path):
    write_jsonl(tmp_path / "Train.jsonl", make_pairs(8))
    write_jsonl(tmp_path / "Test.jsonl", make_pairs(5, 1))
    tables = load(tmp_path)
    assert len(tables.test) == 5
    assert tables.report["notes"] == []
