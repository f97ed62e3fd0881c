"""Names, paths and texts are text wherever they are shown: no markup, no control characters, no formula, any locale."""

import csv
import io
import json
import logging
import re
import sys

import pytest
from conftest import compose, run_script
from rich.table import Table
from rich.text import Text

from w2sg.cli.compare import gather
from w2sg.compare.table import write_summary
from w2sg.config.check import check
from w2sg.console import LogFormatter, Plain, any_terminal
from w2sg.errors import ConfigError
from w2sg.printable import printable
from w2sg.reports.figures import new_figure, svg
from w2sg.reports.render import page, table
from w2sg.store.files import read_json, write_json

NAME = "[red]x[/] [/x] :smile: \x1b[31m\x1b]0;title\x07 \u202e $a_$ <b>&\udcff"


@pytest.fixture
def terminal():
    file = io.StringIO()
    return Plain(file=file, width=200, force_terminal=True), file


def test_a_name_is_printed_as_it_is(terminal):
    console, file = terminal
    grid = Table(title=NAME)
    grid.add_column(NAME)
    grid.add_row(NAME)
    grid.add_row(Text(NAME))
    console.print(NAME)
    console.say(NAME, "note: ", "yellow")
    console.print(grid)
    said = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())  # colours and styles of ours
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", said)
    assert "\x1b[31m" not in file.getvalue()
    assert said.count(r"[red]x[/] [/x] :smile: \x1b[31m\x1b]0;title") == 6


def test_a_log_line_moves_no_cursor():
    record = logging.LogRecord("w2sg", logging.INFO, "", 0, "column %s\nnext", ("a\x1b[2Jb\r",), None)
    assert LogFormatter("%(message)s").format(record) == "column a\\x1b[2Jb\\x0d\nnext"
    assert printable("a\tb\nc é 数") == "a\tb\nc é 数"


def test_every_run_logs_through_it():
    import hydra

    from w2sg.config.hydra import register
    from w2sg.config.plugins import CONF

    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for name in ("train", "decode"):
            log = hydra.compose(name, return_hydra_config=True).hydra.job_logging
            assert log.formatters.simple["class"] == "w2sg.console.LogFormatter"
            assert log.handlers.file.encoding == "utf-8"


def test_a_terminal_without_the_characters_has_others(monkeypatch):
    for encoding in ("ascii", "latin-1", "utf-8"):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        any_terminal()
        print("0.5 ± 0.1 – a → b ≤ 数 \udcff")
        streams[0].flush()
        said = streams[0].buffer.getvalue().decode(encoding)
        shown = {"ascii": r"0.5 +- 0.1 - a -> b <= \u6570 \xff", "latin-1": r"0.5 ± 0.1 - a -> b <= \u6570 \xff"}
        assert said.strip() == shown.get(encoding, r"0.5 ± 0.1 – a → b ≤ 数 \xff")


# -- pages ------------------------------------------------------------------------------------------------------------


def test_a_page_shows_what_it_is_given():
    text = page(NAME, [table((NAME,), [(NAME,)]), "<p>ours</p>"])
    assert text.count("&lt;b&gt;&amp;") == 3
    assert "<b>" not in text.partition("<style>")[2].partition("</style>")[2]
    assert "\x1b" not in text
    text.encode()  # what is no UTF-8 is written out


def test_a_figure_is_the_same_each_time_and_takes_any_name():
    def drawn():
        figure, axes = new_figure(3, 2)
        axes.plot([0, 1], [0, 1], marker="o", label="$a_$ \x1b\udcff")
        axes.set_title("$\\frac{$")
        axes.legend()
        return svg(figure, "<x>")

    first = drawn()
    assert drawn() == first
    assert 'aria-label="&lt;x&gt;"' in first


def test_a_json_file_keeps_a_path_that_is_no_utf8(tmp_path):
    write_json(tmp_path / "x.json", {"out": "a\udcff é"})
    assert read_json(tmp_path / "x.json") == {"out": "a\udcff é"}


def test_no_cell_of_a_csv_is_a_formula(tmp_path):
    row = ["=1+1", "+x", "-x", "@SUM(A1)", "\tx", "\rx", "＝1", -0.5, "-0.5", 1, "rkl", "", None, "a=b", "-"]
    write_summary(tmp_path, "summary", "", [["a"], row], {})
    with open(tmp_path / "summary.csv", newline="", encoding="utf-8") as file:
        (_, read) = csv.reader(file)
    assert read[:7] == ["'=1+1", "'+x", "'-x", "'@SUM(A1)", "'\tx", "'\rx", "'＝1"]
    assert read[7:] == ["-0.5", "-0.5", "1", "rkl", "", "", "a=b", "'-"]


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """A finished run whose folder and dataset have names of every kind."""
    from w2sg.experiment.run import run_method

    out = tmp_path_factory.mktemp("runs") / "x[/x] é 数 [red]"
    sizes = "dataset.sizes={weak_train: 16, transfer: 16, test: 10}"
    cfg = compose("weak=bow", "strong=bow", sizes, "trainer=cpu", "logger=none", "weak.epochs=1", "strong.epochs=1")
    cfg.out, cfg.store, cfg.dataset.name = str(out), str(out / "store"), "[/x]$_$<script>\x1b[31m"
    run_method(check(cfg), out / "run", ["seed=0"])
    return out


def test_a_run_of_odd_names_is_reported(odd_run, capsys):
    page = (odd_run / "run" / "report.html").read_text(encoding="utf-8")
    assert "[/x]$_$&lt;script&gt;\\x1b[31m" in page
    assert "_$<script>" not in page
    assert json.loads((odd_run / "run" / "report.json").read_text(encoding="utf-8"))["dataset"].startswith("[/x]$_$")


def test_a_folder_that_no_library_opens_is_refused_before_any_work():
    cfg = compose("weak=bow", "strong=bow", "trainer=cpu")
    cfg.out = "runs/a\udcff"
    with pytest.raises(ConfigError) as caught:
        check(cfg)
    words = "has bytes in it that are no UTF-8; rename it"
    assert caught.value.problems == [f"out: runs/a\\xff {words}", f"store: runs/a\\xff/store {words}"]


def test_a_summary_is_the_same_at_each_call(odd_run, capsys):
    console = Plain(width=80)
    written = []
    for _ in range(2):
        gather(odd_run, console)
        written.append({f.name: f.read_bytes() for f in odd_run.glob("summary*")})
    assert written[0] == written[1]
    assert set(written[0]) == {"summary.html", "summary.csv", "summary.json"}
    said = capsys.readouterr().out
    assert "[/x]$_$<script>\\x1b[31m" in said.replace("\n", "")
    assert "x[/x] é 数 [red]/summary.html" in said


FORGED = {  # what a report.json may hold that is none of ours
    "deep": lambda report: "[" * 100_000,
    "list": lambda report: "[]",
    "binary": lambda report: "\x00\x01",
    "strings": lambda report: json.dumps(report | {"metrics": {m: "good" for m in report["metrics"]}}),
    "infinite": lambda report: json.dumps(report | {"pgr": {k: float("inf") for k in report["pgr"]}}),
    "no_pgr": lambda report: json.dumps({k: v for k, v in report.items() if k != "pgr"}),
    "config": lambda report: json.dumps(report | {"config": {"seed": []}}),
    "stages": lambda report: json.dumps(report | {"stages": [None]}),
    "diagnostics": lambda report: json.dumps(report | {"diagnostics": 7}),
}


def test_forged_reports_are_listed_with_the_reason_and_the_others_count(odd_run, tmp_path, capsys):
    import os
    import shutil

    report = read_json(odd_run / "run" / "report.json")
    shutil.copytree(odd_run / "run", tmp_path / "good")
    for name, forge in FORGED.items():
        shutil.copytree(odd_run / "run", tmp_path / name)
        (tmp_path / name / "report.json").write_text(forge(report), encoding="utf-8")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "report.json")
    gather(tmp_path, Plain(width=80))
    summary = read_json(tmp_path / "summary.json")
    assert summary["runs"] == 1
    assert {line.partition(":")[0] for line in summary["left_out"]} == {*FORGED, "pipe"}
    assert all(len(line) < 400 for line in summary["left_out"])
    assert "left out: deep: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "words"),
    [("runs=OUT", "bag-of-words -> bag-of-words"), ("store=prune", "would free"), ("store=list", "finished")],
)
def test_an_ascii_locale_reads_and_prints(asked, words, odd_run):
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": ""}
    typed = [asked.replace("OUT", str(odd_run)), f"out={odd_run}"]
    done = run_script("evaluate.py", *typed, fresh=True, **ascii_only)
    assert done.stdout.isascii()
    assert words in done.stdout
