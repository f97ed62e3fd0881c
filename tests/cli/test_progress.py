"""What a run shows while it works: on a terminal of 80 columns, in a file, in a sweep, and when a signal ends it."""

import io
import logging
import os
import pty
import re
import shlex
import signal
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path

import commands
import pytest
from runs import QUICK, label_arguments

from w2sg import live, progress
from w2sg.config.check import check
from w2sg.config.composing import settle
from w2sg.config.hydra import register
from w2sg.config.typed import typed as taken_apart
from w2sg.reports import closing

LIVE = re.compile(r" left$|/s\b| so far$|: loading$|preparing$")


class Screen:
    """A terminal of 80 columns that knows what our line uses, and nothing else.

    Attributes:
        lines: what stands there. erased: lines that were taken away. wrapped: characters past the last column.
    """

    def __init__(self, text: str):
        self.lines, self.erased, self.wrapped, row, column = [""], [], [], 0, 0
        for escape, up, end, other in re.findall(r"(\x1b\[(?:(\d*)A|2?(K)|[\d;]*m))|([^\x1b]|\x1b)", text, re.S):
            if up:
                row -= int(up or 1)
            elif end:
                self.erased += [self.lines[row]] if self.lines[row].strip() else []
                self.lines[row] = ""
            elif other == "\r":
                column = 0
            elif other == "\n":
                row, column = row + 1, column
                self.lines += [""] * (row + 1 - len(self.lines))
            elif not escape:
                assert other != "\x1b", "an escape that the terminal does not know"
                if column >= 80:
                    self.wrapped.append(self.lines[row])
                    row, column = row + 1, 0
                    self.lines += [""] * (row + 1 - len(self.lines))
                self.lines[row] = self.lines[row][:column].ljust(column) + other + self.lines[row][column + 1 :]
                column += 1


class Terminal:
    """A process whose output and errors are a pseudo-terminal of 80 columns."""

    def __init__(self, script: str, *arguments: str, **environment: str):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        known = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(commands.ROOT), **environment}
        known.pop("COLUMNS", None)
        name = os.ttyname(slave)
        self.process = commands.start(script, arguments, known, name, name)
        self.text, self._slave = b"", slave
        os.set_blocking(self.master, False)

    def read(self) -> str:
        try:
            while chunk := os.read(self.master, 65536):
                self.text += chunk
        except BlockingIOError:
            time.sleep(0.01)
        return self.text.decode()

    def until(self, wanted: str) -> None:
        while not re.search(wanted, self.read()):
            assert self.process.is_alive(), self.text.decode()

    def end(self, code: int = 0) -> Screen:
        while self.process.is_alive():
            self.read()
        self.process.join()
        text = self.read()
        assert self.process.exitcode == code, text
        for descriptor in (self.master, self._slave):
            os.close(descriptor)
        return Screen(text)


def in_a_file(folder: Path, *arguments: str) -> str:
    known = {**os.environ, "PYTHONPATH": str(commands.ROOT)}
    process = commands.start("train.py", arguments, known, folder / "said", folder / "said")
    process.join()
    said = (folder / "said").read_text()
    assert process.exitcode == 0, said
    (folder / "said").unlink()
    return said


@pytest.mark.slow
def test_a_terminal_has_one_line_that_leaves_nothing_behind(pairs_folder, tiny_llama, tmp_path):
    arguments = label_arguments(pairs_folder, tiny_llama, tmp_path, "strong.epochs=8", **QUICK)
    screen = Terminal("train.py", *arguments).end()
    shown = [line for line in screen.erased if "student" in line]
    assert any(re.search(r"^stage \d+ · student: training \d+/\d+ · [\d.]+ it/s · 0:\d\d left", line) for line in shown)
    assert all(len(line) < 80 for line in screen.erased)
    assert not any(LIVE.search(line) or "│ 0:" in line for line in screen.lines)
    assert not any(line.startswith("stage") for line in screen.wrapped)
    assert any(re.fullmatch(r"stage \d+ · student: \d+ steps in [\d.:]+( s)?", line) for line in screen.lines)
    words = " ".join(screen.lines)
    assert re.search(r"\d+ stages in [\d.:]+( s)?, 0 of them found in the store", words)
    assert re.search(r"next: python \S*train\.py -m dataset=local", "".join(screen.lines))
    assert "report: " in words

    # a second run of the same form knows how many stages there are; in a file there are lines alone
    said = in_a_file(tmp_path, *arguments, "seed=1")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)
    (count,) = re.findall(r"^(\d+) stages in ", said, re.M)
    numbers = re.findall(rf"^stage (\d+) of {count} · .*(?: in |: working on )", said, re.M)
    assert sorted({int(number) for number in numbers}) == list(range(1, int(count) + 1))
    again = in_a_file(tmp_path, *arguments, "seed=1")
    assert re.search(rf"^{count} stages found in the store: weak, ", again, re.M)
    assert f"{count} of them found in the store" in again
    assert "working on" not in again

    # each run of a sweep has a line, and leaves one with its result
    screen = Terminal("train.py", "-m", *arguments, "seed=0,2", NO_COLOR="1").end()
    assert any(re.match(r"run 2 of 2 · seed=2 · stage \d+ of \d+ · student: tr", line) for line in screen.erased)
    finished = [line for line in screen.lines if line.startswith("run ")]
    result = r"run \d of 2 · seed=(\d) · accuracy [01]\.\d{3} · PGR .* · [\d.:]+( s)?"
    assert [re.sub(result, r"\1", line) for line in finished] == ["0", "2"]
    assert not any(line.startswith(("stage", "report:", "[20")) for line in screen.lines)
    assert re.search(r"next: python \S*evaluate\.py runs=", "".join(screen.lines))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_stop_says_what_is_kept_and_how_to_resume(number, pairs_folder, tiny_llama, tmp_path):
    arguments = label_arguments(pairs_folder, tiny_llama, tmp_path, "strong.epochs=400", **QUICK)
    terminal = Terminal("train.py", *arguments)
    terminal.until(r"student: training [1-9]")
    os.kill(terminal.process.pid, number)
    screen = terminal.end(128 + number)
    text = "".join(screen.lines)
    assert f"ended by {signal.Signals(number).name}; the same command resumes from here" in screen.lines
    kept = re.search(r"kept: (\d+) finished stages and student up to step (\d+) of ([\d,]+)resume: (.*)", text)
    assert len(list((tmp_path / "store").glob("[a-z]*[0-9a-f]"))) == int(kept[1])
    (checkpoint,) = (tmp_path / "store").glob("student-*.part/scratch/fit-*.ckpt")
    assert int(checkpoint.name[4:13]) == int(kept[2]) < int(kept[3].replace(",", ""))
    python, script, *typed = shlex.split(kept[4])
    assert (python, Path(script).name, typed) == ("python", "train.py", arguments)
    assert not any(LIVE.search(line) for line in screen.lines)


def test_a_line_fits_and_says_less_where_there_is_less_room():
    shown = progress.Shown("plain", progress.Sweep(3, 12, "loss=rkl seed=1"))
    shown.live, shown.total, shown.done = True, 11, 3
    now = progress.Stage("student", "training", "it", 500, 120, first=20)
    shown.stack.append(now)
    now.counted_since = time.monotonic() - 50
    whole = "run 3 of 12 · loss=rkl seed=1 · stage 4 of 11 · student: training 120/500 · 2.0 it/s · 3:10 left"
    assert shown.text() == whole
    assert shown.text(79) == "3/12 · loss=rkl seed=1 · 4/11 · student: training 120/500 · 3:10 left".replace(
        "loss=rkl seed=1", "loss=rkl see"
    )
    assert [len(shown.text(width)) <= width for width in range(1, 99)] == [True] * 98
    now.written = 50 * 1240
    assert "1,240 tok/s" in shown.text() or "1,239 tok/s" in shown.text()
    shown.done = 11  # the plan was too short: no wrong number is shown
    assert "stage 12 ·" in shown.text()


def test_lines_come_at_most_every_half_minute(monkeypatch, caplog):
    """Of a stage of half an hour, 0.2 s a step."""
    now, moments = [1000.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), progress.showing("plain"), progress.stage("student") as stage:
        stage.begin("student-1")
        progress.count("training", 9000, "it")
        for step in range(9000):
            now[0] += 0.2
            said = len(caplog.records)
            progress.at(step + 1)
            moments += [now[0]] * (len(caplog.records) - said)
        stage.finish(1, found=False)
    first, *shown, last = (record.message for record in caplog.records)
    assert 9 <= len(shown) <= 10
    assert min(b - a for a, b in pairwise(moments)) >= 30
    assert shown[0] == "stage 1 · student: training 900/9,000 · 5.0 it/s · 27:00 left"
    assert (first, last) == ("stage 1 · student: working on student-1", "stage 1 · student: 9,000 steps in 30:00")


@pytest.mark.parametrize(("mode", "main"), [("none", True), ("auto", False)])
def test_who_asked_for_none_and_other_ranks_print_nothing(mode, main, capfd, caplog):
    with caplog.at_level(logging.INFO), progress.showing(mode, main=main), progress.stage("weak") as now:
        now.begin("weak-1")
        progress.count("training", 2, "it")
        progress.at(2)
        now.finish(1, found=False)
    assert capfd.readouterr() == ("", "")
    assert all(getattr(record, "file_only", False) for record in caplog.records)


def test_what_is_printed_stands_above_and_other_bars_have_the_terminal(monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_shown", None)
    handler = logging.StreamHandler(out)
    logger = logging.getLogger("planted")
    logger.addHandler(handler)
    try:
        with progress.showing("auto"), progress.stage("weak"):
            print("printed " + "x" * 100)
            logger.warning("a warning \x1b[1m")
            sys.stderr.write("\r10 %")
            sys.stderr.write("\r100 %\n")
    finally:
        logger.removeHandler(handler)
    assert handler.stream is out
    assert sys.stdout is out
    assert ("printed " + "x" * 100 + "\n") in out.getvalue()  # whole, for the terminal to wrap
    screen = Screen(out.getvalue())
    assert "a warning" in " ".join(screen.lines)
    assert "100 %" in screen.lines
    assert not any("preparing" in line or "weak: loading" in line for line in screen.lines)


def test_streams_whose_terminal_is_gone_do_not_end_a_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    assert live._Unbroken(Gone()).write("line") == 4


@pytest.mark.parametrize(
    ("script", "words", "content"),
    [
        ("train", ["loss=rkl", "weak=gpt2", "seed=3", "optim.head.epochs=2"], {"method": "finetune"}),
        ("train", [], {"method": "finetune"}),
        ("train", ["method=two_stage"], {"method": "two_stage"}),
        ("decode", ["decoder=search", "decoder.beams=2", "seed=1"], {"decoding": {"decoder": {"kind": "search"}}}),
        ("decode", ["decoder=sampling"], {"decoding": {"decoder": {"kind": "sampling"}}}),
        ("decode", ["experiment=search_sentiment"], {"decoding": {"decoder": {"kind": "search"}}}),
    ],
)
def test_the_next_command_can_be_typed(script, words, content, tmp_path, monkeypatch):
    register()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    *tries, compare = closing.next_commands(content, tmp_path / "outputs" / "default", words)
    assert shlex.split(compare)[1:] == ["evaluate.py", f"runs={closing.relative(tmp_path / 'outputs')}"]
    for line in tries:
        program, *more = shlex.split(line)[1:]
        assert program == {"train": "train.py", "decode": "evaluate.py"}[script]
        jobs = settle(script, taken_apart(more), check).jobs
        assert len(jobs or [1]) == (1 if script == "decode" else 9 if content["method"] == "finetune" else 3)
    assert bool(tries) != ("experiment=search_sentiment" in words)
