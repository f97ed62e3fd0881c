"""A loader from outside that fails: one line names it, and the place in the user's file."""

import json

import pytest

from w2sg.data.good_rows import read_rows
from w2sg.errors import OutsideError, UserError

CODE = """from w2sg.data.examples import labelled
from w2sg.data.sources import Source


def rows(path):
    yield "row 1", {"text": "good", "label": 1}
    yield "row 2", {"text": "bad", "label": 0}


def parse(row):
    return labelled(row["text"], row["label"])


def right(path):
    return Source(path, {"train": rows(path)}, parse, "a text")


def nothing(path):
    Source(path, {"train": rows(path)}, parse, "a text")


def broken(path):
    return Source(path, {"train": rows(path)}, parse, "a text", path.notes)


def late(path):
    def one_by_one():
        yield from rows(path)
        yield 1 / 0

    return Source(path, {"train": one_by_one()}, parse, "a text")
"""


def read(name, tmp_path, monkeypatch):
    module = f"loaders_of_{name}"
    (tmp_path / f"{module}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": f"{module}.{name}", "path": "rows", "strict": False, "max_chars": None}
    return read_rows(json.dumps(node))


def test_a_right_one_is_read(tmp_path, monkeypatch):
    pools, kind, *_ = read("right", tmp_path, monkeypatch)
    assert (len(pools["train"]), kind) == (2, "classes")


def test_one_that_returns_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^loaders_of_nothing\.nothing: returned NoneType; return a w2sg.data.sources"):
        read("nothing", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("name", "said"),
    [("broken", "AttributeError: 'str' object has no attribute 'notes'"), ("late", "ZeroDivisionError")],
)
def test_one_that_fails(name, said, tmp_path, monkeypatch):
    with pytest.raises(OutsideError) as error:
        read(name, tmp_path, monkeypatch)
    line = str(error.value)
    number = 1 + CODE.splitlines().index({"broken": CODE.splitlines()[22], "late": "        yield 1 / 0"}[name])
    assert line.startswith(f"loaders_of_{name}.{name}: {said}")
    assert line.endswith(f"(loaders_of_{name}.py, line {number})")
