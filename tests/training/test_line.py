"""Ranks wait for each other as long as it takes, whatever limit their process group has, and end together.

Run as a script, this file is one of two ranks that live through all of it.
"""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import compose, start_ranks
from fits import devices, found, job, stages
from torch.nn.parallel import DistributedDataParallel

from w2sg import stops
from w2sg.config.check import check
from w2sg.errors import UserError
from w2sg.experiment import run as experiment
from w2sg.store import files
from w2sg.store.keys import folder_name
from w2sg.store.store import Store
from w2sg.training import line
from w2sg.training.line import Elsewhere, Line
from w2sg.training.shared import see

LIMIT, LONGER = 3.0, 7.0  # seconds of the process group, and seconds that ranks wait
HELD = {"of": "another run"}


def together(*turns):
    """What each rank's function of its line gives, each in a thread of its own."""
    store = dist.HashStore()
    with ThreadPoolExecutor(len(turns)) as pool:
        return [pool.submit(turn, Line(store, rank, len(turns))) for rank, turn in enumerate(turns)]


def test_ranks_learn_what_the_first_finds_and_what_each_has_to_say():
    def turn(at):
        found = [at.first(lambda: ("of", at.rank)) for _ in range(3)]
        return found, at.everyone(), at.everyone(at.rank or None), at.everyone([at.rank]), at.store.num_keys()

    for told in together(turn, turn, turn):
        found, none, some, each, kept = told.result()
        assert found == [("of", 0)] * 3
        assert (none, some, each) == ({}, {1: 1, 2: 2}, {0: [0], 1: [1], 2: [2]})
        assert kept < 12  # what all have read is forgotten


def test_ranks_end_with_one_that_fails_or_leaves(monkeypatch):
    monkeypatch.setattr(line, "ASIDE", 0.0)
    first, other = together(lambda at: at.first(lambda: 1 / 0), lambda at: at.first(lambda: 1 / 0))
    assert isinstance(first.exception(), ZeroDivisionError)
    assert isinstance(other.exception(), Elsewhere)
    first, _ = together(lambda at: at.first(at.everyone), lambda at: at.first(at.everyone))
    assert "rank 0 asks the others to take part in what it does alone" in str(first.exception())
    first, _ = together(lambda at: at.everyone(), lambda at: at.part(wait=False))
    assert "another process of this run has failed" in str(first.exception())
    (first, _) = together(lambda at: at.everyone(limit=timedelta(seconds=0.1)), lambda at: None)
    assert "not all 2 processes of this run have started within" in str(first.exception())


def test_an_error_of_all_ranks_is_said_by_the_first(monkeypatch):
    first, same, other = (
        told.result()
        for told in together(
            lambda at: at.echoes(UserError("no rows")),
            lambda at: at.echoes(UserError("no rows")),
            lambda at: at.echoes(UserError("no such file")),
        )
    )
    assert (first, same, other) == (False, True, False)

    def fails(run):
        raise UserError("no rows")

    told = SimpleNamespace(devices=SimpleNamespace(main=False, echoes=lambda error: str(error) == "no rows"))
    told.loggers = SimpleNamespace(finish=lambda failed: None)
    told.text_engines = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(experiment, "Run", lambda *_: told)
    monkeypatch.setattr(experiment, "build", lambda node: fails)
    with pytest.raises(Elsewhere):
        experiment.run_method(check(compose("trainer.progress=none")), Path(), [])


def test_what_another_machine_has_made_is_waited_for(tmp_path, monkeypatch):
    late = tmp_path / "stage"
    threading.Timer(0.05, late.touch).start()
    assert files.seen(late, 30)
    monkeypatch.setattr(files, "SEEN", 0.02)
    see(late, SimpleNamespace(main=False))
    see(tmp_path / "never", SimpleNamespace(main=True))  # which makes it
    with pytest.raises(UserError, match=r"never, made on another machine, is not seen on .*set `store=`"):
        see(tmp_path / "never", SimpleNamespace(main=False))


# -- one rank of a pair -----------------------------------------------------------------------------------------------


def waits_for_a_lock(on, folder):
    """Another process holds the lock of a stage for more than twice as long as a collective may take."""
    (folder / "waiting").touch()
    began = time.monotonic()
    path = stages(folder, on).compute("held", HELD, lambda part: {"seconds": 0.0})
    assert time.monotonic() - began > LONGER - 1
    assert (path / "manifest.json").exists()


def waits_for_rank_0(on, folder):
    """Rank 0 works alone for longer than a collective may take; what it found, and then its error, reach the other."""

    def work(part):
        time.sleep(LIMIT + 1)
        return {"found": 7}

    work_done = stages(folder, on)
    work_done.compute("alone", {}, work)
    assert work_done.records[-1].info["found"] == 7

    def fails(part):
        raise RuntimeError("the server is gone")

    with pytest.raises(RuntimeError if on.main else Elsewhere) as caught:
        stages(folder, on).compute("fails", {}, fails)
    assert on.main or caught.value.code == 1


def trains_without_waiting(on, folder):
    """Nobody is asked at each step whether a signal has come, and gradients are kept once."""
    options, met, asked = [], [], mock.Mock(side_effect=AssertionError("ranks wait for rank 0 in a collective"))
    wrap, meet = DistributedDataParallel.__init__, dist.barrier

    def wrapping(self, *args, **given):
        options.append(given)
        return wrap(self, *args, **given)

    def meeting(*args, **given):
        met.append(1)
        return meet(*args, **given)

    with (
        mock.patch.object(DistributedDataParallel, "__init__", wrapping),
        mock.patch.object(dist, "barrier", meeting),
        mock.patch.object(dist, "broadcast", asked),
        mock.patch.object(dist, "broadcast_object_list", asked),
    ):
        learned = found(stages(folder, on).fit("m", {}, job))
    assert options[0]["gradient_as_bucket_view"]
    assert len(met) < 12  # steps
    return learned


def stores_apart(on, folder):
    """A store on the disk of one machine is told before any work is done, and names both."""
    with mock.patch.object(files, "SEEN", 0.5), pytest.raises(UserError if on.main else Elsewhere) as caught:
        stages(folder / f"disk{on.rank}", on)
    if on.main:
        assert "is not seen in" in str(caught.value)
        assert "set `store=`" in str(caught.value)
        assert str(folder / "disk1" / "store") in str(caught.value)
        assert not list(folder.glob("disk*/store/.locks/*.seen"))


def live(folder: Path) -> None:
    on = devices(devices=2, strategy="ddp", timeout_minutes=LIMIT / 60)
    waits_for_a_lock(on, folder)
    waits_for_rank_0(on, folder)
    learned = trains_without_waiting(on, folder / "two")
    stores_apart(on, folder)
    assert on.everyone(on.rank) == [0, 1]
    assert on.total(on.rank + 0.5) == 2.0
    torch.save(learned, folder / f"learned{on.rank}.pt")
    with stops.heard():
        if not on.main:
            os._exit(1)  # dies without a word
        with pytest.raises(UserError, match="another process of this run has failed"):
            on.wait()
    print("lived through it")
    sys.exit(1)


@pytest.mark.slow
def test_ranks_wait_as_long_as_it_takes(tmp_path):
    store = Store(tmp_path / "store")

    def hold():
        with store.lock(folder_name("held", HELD)):
            held.set()
            while not (tmp_path / "waiting").exists():
                time.sleep(0.05)
            time.sleep(LONGER)

    held = threading.Event()
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    said = start_ranks("tests/training/test_line.py", str(tmp_path), folder=tmp_path)(code=1)
    assert "lived through it" in said, said
    assert "Traceback" not in said, said
    one = found(stages(tmp_path / "one").fit("m", {}, job))
    for rank in range(2):
        weights, curve, info = torch.load(tmp_path / f"learned{rank}.pt", weights_only=False)
        torch.testing.assert_close(weights, one[0], atol=1e-6, rtol=1e-5)
        assert [point["step"] for point in curve] == [point["step"] for point in one[1]]
        assert {k: v for k, v in info.items() if k != "padded_tokens"} == {
            k: v for k, v in one[2].items() if k != "padded_tokens"
        }


if __name__ == "__main__":
    live(Path(sys.argv[1]))
