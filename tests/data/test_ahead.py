"""Batches are made beside the step that reads the one before, and nothing is left at work."""

import threading
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
from fits import examples, job, stages

from w2sg.data.ahead import Ahead
from w2sg.data.loading import Examples, Features, make_batch
from w2sg.memory import Budget

WAIT = 60  # seconds that nothing here takes


class Counted:
    """Rows that say when the laying out of each batch begins."""

    def __init__(self, inputs, fails=None):
        self.inputs, self.fails = inputs, fails
        self.begun, self.threads = [threading.Event() for _ in range(40)], []

    def __getattr__(self, name):
        return getattr(self.inputs, name)

    def __len__(self):
        return len(self.inputs)

    def collate(self, index):
        place = len(self.threads)
        self.threads.append(threading.current_thread().name)
        self.begun[place].set()
        if place == self.fails:
            raise ZeroDivisionError(f"at {place}")
        return self.inputs.collate(index)


def at_work() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "w2sg-ahead"]


def counted_job(at, fails=None):
    made = job(at=at, selecting=False)
    rows = Counted(made.train.inputs, fails)
    return replace(made, train=replace(made.train, inputs=rows)), rows


def test_a_batch_is_begun_before_the_step_over_the_one_before_ends(tmp_path):
    """Three epochs of four steps: within an epoch the next batch is being made while a step is at work."""
    seen = []

    def at(step):
        if step % 4 != 3:
            seen.append(rows.begun[step + 1].wait(WAIT))

    made, rows = counted_job(at)
    stages(tmp_path).fit("fit", {}, lambda: made)
    assert seen == [True] * 9
    assert rows.threads == ["w2sg-ahead"] * 12
    assert not at_work()


def test_nothing_is_left_of_a_fit_that_ends_in_the_middle_and_errors_keep_their_traceback(tmp_path):
    class Killed(BaseException):
        pass

    def at(step):
        if step == 1:
            raise Killed

    with pytest.raises(Killed):
        stages(tmp_path).fit("killed", {}, lambda: counted_job(at)[0])
    assert not at_work()
    with pytest.raises(ZeroDivisionError, match="at 6") as caught:
        stages(tmp_path).fit("broken", {}, lambda: counted_job(None, fails=6)[0])
    assert "collate" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not at_work()


def test_order_depth_and_an_early_end():
    made = []
    batches = iter(Ahead(lambda k: made.append(k) or k * k, range(100), depth=2))
    assert [next(batches) for _ in range(5)] == [0, 1, 4, 9, 16]
    batches.close()
    assert made == list(range(len(made)))
    assert 5 <= len(made) <= 7  # no further ahead than it may be
    assert not at_work()
    assert list(Ahead(str, [])) == []


def test_looking_a_few_rows_up_is_not_worth_a_thread():
    states = Examples(Features(torch.zeros(6, 2, 3)), list("abcdef"), torch.zeros(6, dtype=torch.long))
    assert states.take(np.arange(4)).take(np.arange(2)).looked_up
    assert not examples().take(np.arange(4)).looked_up


def test_a_batch_is_pinned_and_moved_whole(monkeypatch):
    """Every tensor of it, so that no copy waits; what is no tensor stays."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = make_batch(examples(), np.arange(8), 0, 1, Budget(rows=3))
    pinned = batch.pinned().to(torch.device("cpu"))
    assert [len(m["ends"]) for m in pinned.micro] == [3, 3, 2]
    for ours, theirs in zip(batch.micro, pinned.micro, strict=True):
        assert all(torch.equal(theirs[name], tensor + 1) for name, tensor in ours.items())
    assert all(torch.equal(getattr(pinned, n), getattr(batch, n) + 1) for n in ("index", "first", "weight", "targets"))
    assert (pinned.ids, pinned.total, pinned.useful) == (batch.ids, batch.total, batch.useful)
