"""Token ids of many texts: encoded in slices, once per store, by one process; what models read is the same."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from fits import stages
from model_folders import spec

from w2sg.data import ragged
from w2sg.data import tokens as data_tokens
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Replies, ReplyPairs
from w2sg.data.rows import pack
from w2sg.data.table import Table
from w2sg.experiment.replies import encode_replies
from w2sg.models.reading import Reading
from w2sg.models.source import find
from w2sg.planning.stages import ForeseenStages, Foresight
from w2sg.store.store import Store
from w2sg.training import tokens
from w2sg.training.inputs import InputMaker

TEXTS = [" ".join(f"w{k * j}" for j in range(k % 9)) for k in range(41)]


class Encoder:
    """Ids of words; notes how many texts it is given at a time."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.append(len(texts))
        return [[1000 + len(word) * 7 for word in text.split()] for text in texts]


@pytest.fixture
def slices(monkeypatch):
    monkeypatch.setattr(data_tokens, "SLICE", 16)


def test_many_texts_are_encoded_once_in_slices_and_mapped(tmp_path, slices, monkeypatch):
    monkeypatch.setattr(tokens, "MANY", 1)
    expected, encoder = Encoder()(TEXTS), Encoder()
    for _ in range(2):  # each with a process's own memory
        work = stages(tmp_path)
        found = tokens.encoded(work, "tokens-of-test", {"v": 1}, encoder, TEXTS)
        assert [row.tolist() for row in found] == expected
        assert isinstance(found.ids.base, np.memmap)
        assert type(found.ids) is np.ndarray  # whose views cost less
        assert found.ids.itemsize == 4
    assert encoder.asked == [16, 16, 9]
    assert work.records[0].cached
    assert work.records[0].info["tokens_written"] == sum(map(len, expected))
    other = SimpleNamespace(compute=lambda *_: work.store.peek("tokens-of-test", {"v": 1}).path)  # another rank
    assert [row.tolist() for row in tokens.encoded(other, "tokens-of-test", {"v": 1}, None, TEXTS)] == expected
    assert len(tokens.encoded(work, "tokens-of-none", {"v": 1}, encoder, ["", ""])) == 2  # no token at all


def test_a_plan_has_the_stage_of_many_texts_and_makes_none(tmp_path, slices, monkeypatch):
    monkeypatch.setattr(tokens, "MANY", 1)
    work = ForeseenStages(
        Store(tmp_path / "store"), SimpleNamespace(main=True, world=1), None, None, foresight := Foresight()
    )
    found = tokens.encoded(work, "tokens-of-test", {"v": 1}, Encoder(), TEXTS)
    assert [row.tolist() for row in found] == Encoder()(TEXTS)
    (stage,) = work.planned.values()
    assert stage.disk == 4 * len(found.ids)
    foresight.close()
    assert not (tmp_path / "store").exists()


def test_few_texts_need_no_folder_of_the_store(tmp_path, slices):
    encoder = Encoder()
    found = tokens.encoded(stages(tmp_path), "tokens-of-test", {"v": 1}, encoder, TEXTS)
    assert [row.tolist() for row in found] == Encoder()(TEXTS)
    assert encoder.asked == [16, 16, 9]
    assert not list(tmp_path.glob("store/tokens*"))
    assert len(ragged.encode(encoder, [])) == 0


def test_a_table_is_read_the_same_from_its_stage_as_from_memory(tmp_path, monkeypatch):
    """Rows, batches and what a report says of cut texts; texts over max_length among them."""
    words = find(spec(arch="bow", train="full", max_length=7), "weak")
    texts = [(f"a b c d {'e f ' * (k % 4)}", f"a b {'g h ' * (k % 5)}i") for k in range(12)]
    rows = Table("test", "pairs", 2, [*"abcdefghijkl"], [""] * 12, texts, np.zeros(12, int), np.zeros(12, int))
    seen = []
    for many in (10**9, 1):
        monkeypatch.setattr(tokens, "MANY", many)
        maker = InputMaker(stages(tmp_path), rows, "32-true", 0)
        made = maker.tokens(words, rows, None)
        batch = made.collate(np.array([3, 0, 11, 7]))
        seen.append((made, batch, maker.read(words, rows), maker.reading.cut))
    (one, first, *a), (two, second, *b) = seen
    assert a == b
    assert one.truncated == two.truncated > 0
    assert all(first[name].equal(second[name]) for name in first)
    assert list(tmp_path.glob("store/tokens-of-*"))


def test_prompts_with_replies_are_the_same_from_their_stages(tmp_path, tiny_gpt2, slices, monkeypatch):
    """Rows, batches and what was left out; blank, cut off and too long ones among them."""
    source = find(spec(name=str(tiny_gpt2), max_length=24), "strong")
    prompts = [Dialogue.of_text(f"\n\nHuman: {'why ' * (k % 7)}?\n\nAssistant:") for k in range(40)]
    zeros, ids = np.zeros(40, int), [f"id{k}" for k in range(40)]

    def replies(word):
        texts = [" ".join([word] * (k % 9)) or " " for k in range(40)]
        return Replies(ids, prompts, texts, np.arange(40) % 3 > 0, zeros, zeros, {"from": word})

    pairs, seen = ReplyPairs(ids, replies("good"), replies("bad"), {}), []
    for many in (10**9, 1):
        monkeypatch.setattr(tokens, "MANY", many)
        run = SimpleNamespace(encoded={}, dropped={}, reading=Reading(), stages=stages(tmp_path))
        found = encode_replies(run, source, pairs, "dpo")
        batch = found.completions.collate(range(len(found.kept)))
        seen.append((batch, found.completions.content, found.kept.tolist(), run.dropped, run.reading.examples))
    (one, *a), (two, *b) = seen
    assert a == b
    assert 0 < len(a[1]) < 40
    assert all(one[name].equal(two[name]) and one[name].dtype == two[name].dtype for name in one)
    assert {p.name.rpartition("-")[0] for p in tmp_path.glob("store/*-*")} == {"tokens-of-prompts", "tokens-of-replies"}


def test_tokens_are_held_once_in_four_bytes(slices):
    """A tokenizer's lists take 36 bytes a token and more; no more than a slice of them is alive at a time."""
    size, texts = 50, [str(k) for k in range(4000)]

    def encoder(part):
        return [list(range(1000, 1000 + size)) for _ in part]

    tracemalloc.start()
    ids = ragged.encode(encoder, texts)
    rows = pack([(text,) for text in texts], lambda _: ids, size)
    kept, peak = (x / (size * len(texts)) for x in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert len(rows) == 4000
    assert kept < 6
    assert peak < 14
