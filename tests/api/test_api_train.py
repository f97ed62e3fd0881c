"""Runs from Python: those of the command line, several in one process, which is left as it was found."""

import json
import logging
import os
import signal
import threading

import pytest
from conftest import run_script
from runs import QUICK, decode_arguments, label_arguments

import w2sg


def settings(pairs_folder, model, *more, **options):
    """What `label_arguments` types, without its folder of runs."""
    return [o for o in label_arguments(pairs_folder, model, "", *more, **QUICK | options) if not o.startswith("out=")]


@pytest.fixture
def undisturbed(monkeypatch):
    """That this process is as it was: signals, logging, Hydra."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    def state():
        loggers = [logging.getLogger(name) for name in (None, "w2sg")]
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [(list(one.handlers), one.level) for one in loggers], handlers, os.getcwd()

    before = state()
    yield
    assert state() == before
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()
    assert [thread for thread in threading.enumerate() if thread.name == "w2sg-signals"] == []


@pytest.mark.slow
def test_a_run_is_that_of_the_command_line_and_the_same_again(pairs_folder, tiny_gpt2, tmp_path, undisturbed):
    typed = settings(pairs_folder, tiny_gpt2)
    report = w2sg.train(typed, out=tmp_path / "here")
    again = w2sg.train(typed, out=tmp_path / "here")
    other = w2sg.train([*typed, "loss=rkl"], out=tmp_path / "here")
    script = run_script("train.py", *typed, f"out={tmp_path / 'there'}")
    assert script.returncode == 0, script.stderr
    (folder,) = (file.parent for file in (tmp_path / "there").rglob("report.json"))
    theirs = w2sg.read_report(folder)
    assert report.metrics == again.metrics == theirs.metrics
    assert report.folder.name == theirs.folder.name
    assert [stage["key"] for stage in report.stages] == [stage["key"] for stage in theirs.stages]
    assert {file.name for file in report.folder.iterdir()} == {file.name for file in folder.iterdir()}
    assert all(stage["cached"] for stage in again.stages)
    assert other.loss == "reverse_kl"
    assert other.folder != report.folder
    assert {stage["name"] for stage in other.stages if not stage["cached"]} >= {"student"}
    assert len(w2sg.runs(tmp_path / "here")) == 2
    log = (report.folder / "train.log").read_text(encoding="utf-8")
    assert "student: working on" in log
    assert (folder / "train.log").is_file()


@pytest.mark.slow
def test_a_decoder_is_measured(pairs_folder, models, tmp_path, undisturbed):
    typed = decode_arguments(pairs_folder, models)(tmp_path, "sampling", "logger=none")
    report = w2sg.decode(typed)
    assert report.pgr is None
    assert report.samples is not None
    assert report.content["decoding"]["decoder"]["kind"] == "sampling"
    assert "<td>" in report._repr_html_()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss=rkll"], "loss: there is no rkll; did you mean loss=rkl"),
        (["sede=1"], "sede: no such key"),
        (["seed=one", "strong.lr=-1"], r"(?s)strong\.lr.*seed"),
        (["loss=ce,rkl"], r"loss=ce,rkl is several runs; call train once for each"),
        (["seed=range(3)"], r"seed=range\(3\) is several runs; call train once for each"),
        (["experiment=rkl_noise"], "several runs"),
        (["-m", "seed=1,2"], "-m is of the command line; call train once for each run"),
        ("seed=1", r"overrides is a text; give a list of settings, as \['seed=1'\]"),
    ],
)
def test_bad_settings_are_an_error_and_not_an_exit(overrides, said, tmp_path, undisturbed):
    with pytest.raises(w2sg.UserError, match=said):
        w2sg.train(overrides, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_ones_own_are_found_and_forgotten(tmp_path, undisturbed):
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "mine.yaml").write_text("_target_: nowhere.loss\n", encoding="utf-8")
    with pytest.raises(w2sg.UserError, match="nowhere"):
        w2sg.train(["loss=mine"], out=tmp_path / "out", config_dir=tmp_path / "conf")
    with pytest.raises(w2sg.UserError, match="there is no mine"):
        w2sg.train(["loss=mine"], out=tmp_path / "out")


@pytest.mark.slow
def test_an_interrupt_is_one_and_what_is_done_is_kept(pairs_folder, tiny_gpt2, tmp_path, undisturbed, monkeypatch):
    from w2sg.reports import assemble

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    typed = settings(pairs_folder, tiny_gpt2)
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "compose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            w2sg.train(typed, out=tmp_path)
    report = w2sg.train(typed, out=tmp_path)
    assert all(stage["cached"] for stage in report.stages)


@pytest.mark.slow
def test_errors_inside_of_a_run_are_raised(pairs_folder, tiny_gpt2, tmp_path, undisturbed):
    typed = settings(pairs_folder, tiny_gpt2, "strong.lr=1e30")
    with pytest.raises(w2sg.UserError, match="not finite"):
        w2sg.train(typed, out=tmp_path)


@pytest.mark.slow
def test_two_processes_of_a_run_from_python(pairs_folder, tiny_gpt2, tmp_path, undisturbed):
    typed = settings(pairs_folder, tiny_gpt2, trainer=None)
    one = w2sg.train([*typed, "trainer=cpu"], out=tmp_path / "one")
    two = w2sg.train([*typed, "trainer=cpu", "trainer.devices=2", "trainer.strategy=ddp"], out=tmp_path / "two")
    assert "LOCAL_RANK" not in os.environ
    found, expected = (report.metrics["student"]["nll"] for report in (two, one))
    assert found == pytest.approx(expected, abs=1e-5)
    assert json.loads((two.folder / "report.json").read_text(encoding="utf-8"))["pgr"] == two.pgr.as_dict()
