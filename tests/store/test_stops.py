"""Signals: each of them, to each rank, wherever a run is; it ends, and the same command goes on to the same bits.

Run as a script, this file is a rank that lives through all signals in turn: starting Python costs more than they do.
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, start_ranks
from fits import devices, examples, found, job, same, stages
from runs import DDP, FSDP, QUICK, label_arguments

from w2sg import stops
from w2sg.cli.launch import readable_errors
from w2sg.models.heads import BagOfWords
from w2sg.store import digests
from w2sg.training.stage_values import load_values
from w2sg.training.stages import ReadJob

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 138}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed fit gives, with held-out rows and without."""
    folder = tmp_path_factory.mktemp("whole")
    return {s: found(stages(folder).fit("m", {"s": s}, lambda s=s: job(selecting=s))) for s in (True, False)}


def send(number):
    os.kill(os.getpid(), number)


def once(moment, number):
    """What sends the signal when it is called with ``moment``, the first time."""
    seen = []

    def at(*now):
        seen.append(now)
        if now == moment and seen.count(now) == 1:
            send(number)

    return at, seen


# -- one device -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGUSR2, signal.SIGXCPU])
def test_a_fit_keeps_the_step_that_it_is_in(number, tmp_path, whole):
    at, seen = once((5,), number)
    with pytest.raises(stops.Stopped) as caught:
        stages(tmp_path).fit("m", {}, lambda: job(at, selecting=False))
    assert caught.value.code == 128 + number == CODES.get(number, 128 + number)
    assert seen[-1] == (5,)
    seen.clear()
    assert same(found(stages(tmp_path).fit("m", {}, lambda: job(at, selecting=False))), whole[False])
    assert seen[0] == (6,)


@pytest.mark.parametrize("step", [0, 3, 4, 7, 10, 11])
@pytest.mark.parametrize("selecting", [True, False])
def test_a_fit_stopped_at_any_step_ends_as_if_it_had_not_been(step, selecting, tmp_path, whole):
    """The last step of an epoch, its first, the last of all."""
    at, seen = once((step,), signal.SIGTERM)
    with pytest.raises(stops.Stopped):
        stages(tmp_path).fit("m", {}, lambda: job(at, selecting=selecting))
    seen.clear()
    assert same(found(stages(tmp_path).fit("m", {}, lambda: job(at, selecting=selecting))), whole[selecting])
    assert [now for (now,) in seen] == list(range(step + 1, 12))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_signal_among_held_out_rows_does_not_wait_for_them(epoch, batch, tmp_path, whole):
    at, seen = once((epoch, batch), signal.SIGTERM)
    with pytest.raises(stops.Stopped):
        stages(tmp_path).fit("m", {}, lambda: job(None, at))
    assert seen[-1] == (epoch, batch)
    steps = []
    assert same(found(stages(tmp_path).fit("m", {}, lambda: job(steps.append))), whole[True])
    assert steps == list(range(4 * epoch + 4, 12))  # none is repeated


@pytest.mark.parametrize("number", SIGNALS)
def test_reading_ends_in_the_batch_and_keeps_the_others(number, tmp_path):
    torch.manual_seed(0)
    data, model, seen = examples(50), BagOfWords(64, True, 2), []

    def read(batch):
        seen.append(len(batch["ends"]))
        if len(seen) == 3:
            send(number)
            time.sleep(60)  # the rest of the batch is not waited for
        return model(batch)

    began = time.monotonic()
    with pytest.raises(stops.Stopped) as caught:
        stages(tmp_path).read("m", {}, lambda: ReadJob(model, read, data))
    assert time.monotonic() - began < 10
    assert caught.value.code == CODES[number]
    before = sum(seen[:2])
    seen[:] = [0] * 9
    _, values = load_values(stages(tmp_path).read("m", {}, lambda: ReadJob(model, read, data)))
    assert sum(seen) == 50 - before
    assert torch.equal(
        values, load_values(stages(tmp_path / "b").read("m", {}, lambda: ReadJob(model, model, data)))[1]
    )


def test_a_signal_where_nothing_is_to_be_kept_ends_in_place(tmp_path):
    """Before the first step, and in whatever is no fit."""
    work = stages(tmp_path)

    def slow(*_):
        send(signal.SIGTERM)
        time.sleep(60)

    for act in (work.fit, work.read, work.compute):
        with pytest.raises(stops.Stopped):
            act("m", {}, slow)
    assert not work.store.peek("m", {}).path.exists()


def test_a_signal_while_a_stage_is_sealed_waits_for_that(tmp_path, monkeypatch):
    work, hashed = stages(tmp_path), digests.hash_file
    monkeypatch.setattr(digests, "hash_file", lambda file: send(signal.SIGTERM) or hashed(file))
    with pytest.raises(stops.Stopped):
        work.compute("m", {}, lambda part: {})
    assert work.store.peek("m", {}).cached


def test_a_run_that_waits_for_another_says_so_and_hears_signals(tmp_path, caplog):
    caplog.set_level("INFO")
    work = stages(tmp_path)
    file = work.store.root / ".locks" / f"{work.store.peek('m', {}).path.name}.lock"
    file.parent.mkdir(parents=True)
    with open(file, "w", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as another process would hold it
        threading.Timer(0.5, send, (signal.SIGTERM,)).start()
        began = time.monotonic()
        with pytest.raises(stops.Stopped):
            work.compute("m", {}, lambda part: {})
    assert time.monotonic() - began < 5
    assert "waiting for another process, which has been making" in caplog.text


def test_what_is_ignored_stays_ignored_and_a_launcher_keeps_its_own_handler(capsys):
    """nohup ignores SIGHUP; submitit heeds SIGUSR2 and bypasses SIGTERM."""
    calls = []
    handlers = {
        signal.SIGHUP: signal.SIG_IGN,
        signal.SIGTERM: lambda *_: calls.append("bypassed"),
        signal.SIGUSR2: lambda *_: calls.append("queued again"),
    }

    def run():
        with readable_errors():
            send(signal.SIGHUP)
            send(signal.SIGTERM)
            calls.append(stops.requested())
            with stops.deferred():
                send(signal.SIGUSR2)
                calls.append("kept")

    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with pytest.raises(stops.Stopped) as caught:
            run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert calls == ["bypassed", None, "kept", "queued again"]
    assert caught.value.code == 140
    assert capsys.readouterr().err.startswith("ended by SIGUSR2; the same command resumes from here\n")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in stops.SIGNALS]
    with stops.heard(), stops.heard():
        assert all(signal.getsignal(number) is stops._handle for number in stops.SIGNALS)
    assert [signal.getsignal(number) for number in stops.SIGNALS] == before
    assert stops.requested() is None


DEAF = """
    lock = ctypes.create_string_buffer(64)
    print("ready", flush=True)
    for _ in range(2):  # the second waits for ever, in native code, as for another rank inside of a collective
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""
HOLDING = """
    with stops.deferred():
        print("ready", flush=True)
        while True:
            time.sleep(0.1)
"""


def alone(code):
    """A process that runs code as a command, once that is ready."""
    head = "import ctypes, time\nfrom w2sg import stops\nfrom w2sg.cli.launch import readable_errors\n"
    code = f"{head}with readable_errors():{code}"
    command, known = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=known)
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.mark.slow
def test_a_main_thread_that_hears_nothing_is_ended():
    process, began = alone(DEAF), time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 10
    assert process.returncode == 143
    assert said == "ended by SIGTERM; the same command resumes from here\n"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once():
    process = alone(HOLDING)
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends at once, without it" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 130
    assert said == "ended by SIGINT; the same command resumes from here\n"


# -- two ranks --------------------------------------------------------------------------------------------------------

MOMENTS = {"step": (5,), "last of an epoch": (7,), "held-out": (1, 0), "reading": (1,)}
FIRST = {"step": 6, "last of an epoch": 8, "held-out": 8}  # the step that the next one goes on with


class Ranks:
    """One rank's view of a pair that lives through signals."""

    def __init__(self, strategy: str, folder: str):
        self.on, self.folder = devices(devices=2, strategy=strategy), folder
        torch.manual_seed(0)
        self.data, self.model = examples(80), BagOfWords(64, True, 2)
        self.whole = self.fit("whole", lambda: job()), self.read("whole", self.model)

    def fit(self, place, make):
        self.on.wait()
        stops.join(self.on._peers())  # a word that came late is of the last case
        return found(stages(f"{self.folder}/{place}", self.on).fit("m", {}, make))

    def read(self, place, model):
        self.on.wait()
        stops.join(self.on._peers())
        work = stages(f"{self.folder}/{place}", self.on)
        return load_values(work.read("r", {}, lambda: ReadJob(self.model, model, self.data)))[1]

    def stopped(self, place, number, ranks, moment):
        at, calls = once(MOMENTS[moment] if self.on.rank in ranks else None, number)[0], []

        def reading(batch):
            at(len(calls))
            calls.append(1)
            return self.model(batch)

        held, began = moment == "held-out", time.monotonic()
        with pytest.raises(stops.Stopped) as caught:
            self.read(place, reading) if moment == "reading" else self.fit(
                place, lambda: job(None if held else at, at if held else None)
            )
        assert caught.value.code == CODES[number]
        assert time.monotonic() - began < 10

    def go_on(self, place, moment):
        if moment == "reading":
            assert torch.equal(self.read(place, self.model), self.whole[1])
            return
        steps = []
        assert same(self.fit(place, lambda: job(steps.append)), self.whole[0])
        assert steps == list(range(FIRST[moment], 12))


def live_through(strategy: str, folder: str) -> None:
    """Every signal to one rank, the other and both; each stage is stopped, then finished, and compared."""
    pair, both = Ranks(strategy, folder), ((0,), (1,), (0, 1))
    cases = [(number, ranks, "step") for number in SIGNALS for ranks in both]
    cases += [(signal.SIGTERM, ranks, moment) for ranks in both for moment in ("last of an epoch", "held-out")]
    cases += [(signal.SIGTERM, (0, 1), "reading")]
    for k, case in enumerate(cases):
        pair.stopped(k, *case)
        pair.go_on(k, case[2])
    if pair.on.main:
        print("lived through", len(cases))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_signal_to_each_rank_and_to_both(strategy, tmp_path):
    assert "lived through 19" in start_ranks("tests/store/test_stops.py", strategy, str(tmp_path), folder=tmp_path)()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "rank", "number"), [("ddp", 1, signal.SIGTERM), ("fsdp", 0, signal.SIGUSR1)])
def test_a_run_of_two_ends_in_one_line(how, rank, number, pairs_folder, tiny_llama, tmp_path):
    """A signal during the student to one process of two, as torchrun starts them."""
    on = {"ddp": DDP, "fsdp": FSDP}[how]
    more = ["strong.epochs=60", "trainer.checkpoint_minutes=0.001", *on]
    typed = label_arguments(pairs_folder, tiny_llama, tmp_path, *more, **QUICK, trainer=None)
    finish, store = start_ranks("train.py", *typed, folder=tmp_path), tmp_path / "store"
    while not list(store.glob("student-*.part/scratch/fit-*.ckpt")) and all(p.is_alive() for p in finish.processes):
        time.sleep(0.05)
    os.kill(finish.processes[rank].pid, number)
    began = time.monotonic()
    said = finish(30, code=128 + number)
    assert time.monotonic() - began < 10
    line = f"ended by {signal.Signals(number).name}; the same command resumes from here\n"
    assert said.count(line) == 1
    assert "Traceback" not in said
    assert list(store.glob("student-*.part/scratch/fit-*.ckpt"))


if __name__ == "__main__":
    live_through(*sys.argv[1:])
