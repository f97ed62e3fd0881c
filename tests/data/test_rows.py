"""Packing, batching and sharing out rows."""

import numpy as np
import pytest
import torch
from data_rows import mask_of

from w2sg.data.rows import epoch_plan, pack, split_by_rank, token_plan

TOKENS = {"a": [5, 6, 7, 1, 2], "b": [5, 6, 7, 3], "c": [9, 9], "d": [9, 9, 4], "e": [1, 2, 3], "f": [4, 5]}


def encode(texts):
    return [TOKENS[t] for t in texts]


def test_a_pair_becomes_one_row_with_its_common_start_once():
    rows = pack([("a", "b"), ("c", "d"), ("e", "f")], encode, 16)
    assert [r.tolist() for r in rows.tokens] == [[5, 6, 7, 1, 2, 3], [9, 9, 4], [1, 2, 3, 4, 5]]
    assert rows.shared.tolist() == [3, 2, 0]
    assert rows.sizes.tolist() == [[2, 1], [0, 1], [3, 2]]
    assert rows.lengths.tolist() == rows.useful.tolist() == [6, 3, 5]
    batch = rows.collate([0, 1])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 0, 0]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 2, -1, -1, -1]]
    assert batch["ends"].tolist() == [[4, 5], [1, 2]]  # text c is no more than the shared start


def test_the_mask_keeps_replies_apart_and_shows_both_the_prompt():
    batch = pack([("a", "b")], encode, 16).collate([0])
    mask = mask_of(batch["segments"])[0]
    assert mask[4].tolist() == [True, True, True, True, True, False]
    assert mask[5].tolist() == [True, True, True, False, False, True]
    assert mask.diagonal().all()  # no query without a key, not even in the filling


def test_left_truncation_is_of_texts_not_of_rows():
    rows = pack([("a", "b")], encode, 4)
    assert rows.truncated == 1
    assert rows.tokens[0].tolist() == [6, 7, 1, 2, 5, 6, 7, 3]  # the starts differ now, so nothing is shared
    assert rows.shared[0] == 0


def test_a_row_per_text_where_packing_is_off():
    rows = pack([("a", "b"), ("c", "d")], encode, 16, packed=False)
    batch = rows.collate([0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2], [5, 6, 7, 3, 0], [9, 9, 0, 0, 0], [9, 9, 4, 0, 0]]
    assert batch["ends"].tolist() == [[4, 3], [1, 2]]
    assert rows.useful.tolist() == [9, 5]
    assert rows.lengths.tolist() == [10, 6]


def test_every_epoch_reads_every_row_once_in_an_order_of_its_own():
    lengths = np.random.default_rng(0).integers(5, 200, 333)
    plans = [epoch_plan(lengths, 32, seed=1, epoch=e) for e in range(2)]
    for plan in plans:
        assert sorted(np.concatenate(plan).tolist()) == list(range(333))
        assert sum(len(b) != 32 for b in plan) == 1
    assert [b.tolist() for b in plans[0]] != [b.tolist() for b in plans[1]]
    again = epoch_plan(lengths, 32, seed=1, epoch=0)
    assert all((a == b).all() for a, b in zip(plans[0], again, strict=True))


def test_length_grouping_leaves_little_filling():
    lengths = (np.random.default_rng(0).lognormal(4, 0.6, 4000)).astype(int) + 1
    useful = [lengths[b].sum() / (lengths[b].max() * len(b)) for b in epoch_plan(lengths, 32, 0, 0)]
    random_order = [lengths[i : i + 32] for i in range(0, 4000, 32)]
    assert np.mean(useful) > 0.9
    assert np.mean([b.sum() / (b.max() * len(b)) for b in random_order]) < 0.5


def test_reading_batches_stay_within_their_tokens():
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    plan = token_plan(lengths, 1024)
    assert sorted(np.concatenate(plan).tolist()) == list(range(500))
    assert all(len(b) == 1 or lengths[b].max() * len(b) <= 1024 for b in plan)
    assert len(token_plan(np.array([5000, 3]), 1024)[0]) == 1  # a row over the limit goes alone


@pytest.mark.parametrize(("size", "world"), [(32, 2), (7, 2), (1, 4), (5, 3)])
def test_devices_share_a_batch_and_repeats_weigh_nothing(size, world):
    batch = np.arange(10, 10 + size)
    shares = [split_by_rank(batch, rank, world) for rank in range(world)]
    assert len({len(rows) for rows, _ in shares}) == 1
    real = np.concatenate([rows[weight > 0] for rows, weight in shares])
    assert sorted(real.tolist()) == batch.tolist()
    assert torch.tensor([w.sum() for _, w in shares]).sum() == size
