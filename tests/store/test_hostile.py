"""A hostile cluster: kills and signals at random moments, damage to every file, full disks, broken locks, two sweeps.

After each, the same command ends as if nothing had been. A small part runs with the tests; the whole for any time:
``python tests/store/test_hostile.py --minutes 10``.
"""

import argparse
import contextlib
import errno
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from w2sg.cli import store as inventory
from w2sg.config import outputs
from w2sg.config.check import check
from w2sg.config.composing import settle
from w2sg.config.hydra import register
from w2sg.config.typed import typed
from w2sg.console import Plain as Terminal
from w2sg.errors import ConfigError, UserError
from w2sg.store import sealed, soundness
from w2sg.store.files import read_json, write_json
from w2sg.store.store import Store
from w2sg.training.devices import started_by

KEY = {"seed": 0}
CONTENT = {
    "model/weights.bin": b"weights" * 40,
    "model/config.json": b"{}",
    "values.bin": b"values",
    "ids.json": b"[1]",
}


def make(root, remade=None) -> Path:
    """A stage of several files, made unless it is there and sound."""
    with Store(root).claim("weak", KEY) as claim:
        if not claim.cached:
            if remade is not None:
                remade.append(1)
            for name, content in CONTENT.items():
                (claim.part / name).parent.mkdir(exist_ok=True)
                (claim.part / name).write_bytes(content)
            claim.seal({"seconds": 1.5})
    return claim.path


def is_whole(path) -> bool:
    return all((path / name).read_bytes() == content for name, content in CONTENT.items())


# -- damage to sealed stages ------------------------------------------------------------------------------------------


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def flip_and_set_the_time_back(file):
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def to_fifo(file):
    file.unlink()
    os.mkfifo(file)


def to_link(file):
    copy = file.parents[3 if file.parent.name == "model" else 2] / f"copy-{file.name}"
    file.rename(copy)
    file.symlink_to(copy)


DAMAGE = {
    "flipped": flip,
    "flipped, its time set back": flip_and_set_the_time_back,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "gone": Path.unlink,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": to_fifo,
    "a link": to_link,
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "deep JSON": lambda file: file.write_text("[" * 200_000),
    "binary": lambda file: file.write_bytes(os.urandom(64)),
}


@pytest.mark.parametrize("verified", [True, False], ids=["in the process that made it", "in another"])
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [*CONTENT, "key.json", "manifest.json"])
def test_damage_to_any_file_of_a_stage_is_noticed_and_mended(name, kind, verified, tmp_path, caplog):
    path, remade = make(tmp_path), []
    if not verified:
        soundness.verified.clear()
    DAMAGE[kind](path / name)
    harmless = name == "manifest.json" and kind == "longer"  # the same JSON
    inventory.print_list(tmp_path, Terminal(quiet=True))
    assert is_whole(make(tmp_path, remade))
    assert bool(remade) != harmless
    assert ("is damaged: " in caplog.text) != harmless


def test_any_flipped_bit_of_a_manifest_or_key_is_noticed_or_changes_nothing(tmp_path):
    path = make(tmp_path)
    soundness.verified.clear()
    for name in ("manifest.json", "key.json"):
        data = (path / name).read_bytes()
        for place in range(0, len(data), 3):
            changed = bytearray(data)
            changed[place] ^= 1 << (place % 8)
            (path / name).write_bytes(changed)
            if soundness.problem(path) is None:  # between two words of JSON
                assert json.loads(changed) == json.loads(data)
        (path / name).write_bytes(data)


def forge(path, change):
    manifest = read_json(path / "manifest.json")
    manifest.pop("check")
    change(manifest)
    write_json(path / "manifest.json", {**manifest, "check": soundness.digest(manifest)})


FORGED = {
    "no files": lambda m: m.update(files={}),
    "no key among its files": lambda m: m["files"].pop("key.json"),
    "a file left out": lambda m: m["files"].pop("values.bin"),
    "another size": lambda m: m["files"]["values.bin"].update(size=1),
    "another hash": lambda m: m["files"]["values.bin"].update(sha256="0" * 64),
    "a file elsewhere": lambda m: m["files"].update({"../outside": {"size": 0, "sha256": ""}}),
    "files are a list": lambda m: m.update(files=list(m["files"])),
    "files are numbers": lambda m: m.update(files=dict.fromkeys(m["files"], 1)),
    "no files at all": lambda m: m.pop("files"),
    "no info": lambda m: m.pop("info"),
    "info is a list": lambda m: m.update(info=[]),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_manifest_is_not_believed(kind, tmp_path):
    path, remade = make(tmp_path), []
    soundness.verified.clear()
    forge(path, FORGED[kind])
    inventory.print_list(tmp_path, Terminal(quiet=True))
    assert is_whole(make(tmp_path, remade))
    assert remade


def test_a_file_that_was_put_into_a_stage_is_noticed(tmp_path):
    """What loads a model may read it: adapter_config.json makes another model of a folder."""
    path, remade = make(tmp_path), []
    (path / "model" / ".DS_Store").write_text("of an operating system")
    make(tmp_path, remade)
    assert not remade
    (path / "model" / "adapter_config.json").write_text("{}")
    make(tmp_path, remade)
    assert remade


# -- sealed files of unfinished stages --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in DAMAGE if not k.startswith("a link") and k != "gone"])
def test_damage_to_a_sealed_file_is_noticed(kind, tmp_path):
    file = sealed.seal(tmp_path / "a" / "b", "fit-1", ".ckpt", lambda f: f.write(b"content" * 9))
    assert sealed.unsound(file) is None
    DAMAGE[kind](file)
    assert sealed.unsound(file) is not None


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_file_before_it_and_nothing_else(call, error, tmp_path, monkeypatch):
    """Nor does it touch $TMPDIR."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    before = sealed.seal(tmp_path / "x", "fit-1", ".ckpt", lambda f: f.write(b"one"))

    def fail(*_):
        raise error

    monkeypatch.setattr(sealed.os, call, fail)
    with pytest.raises(type(error)):
        sealed.seal(tmp_path / "x", "fit-2", ".ckpt", lambda f: f.write(b"two"))
    assert list((tmp_path / "x").iterdir()) == [before]
    assert sealed.unsound(before) is None
    assert not (tmp_path / "elsewhere").exists()


# -- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch):
    import fcntl

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"The store .* cannot be locked .*Set `store=` to a folder on a local disk"):
        make(tmp_path)


def test_a_folder_in_place_of_a_lock_is_named(tmp_path):
    path = make(tmp_path)
    (path / "values.bin").unlink()
    lock = tmp_path / ".locks" / f"{path.name}.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with pytest.raises(UserError, match=r"should be an empty file, the lock of a stage.* remove it"):
        make(tmp_path)


# -- what prune leaves alone ------------------------------------------------------------------------------------------


def test_prune_leaves_what_only_looks_like_a_stage(tmp_path):
    root, said = tmp_path / "store", []
    path = make(root)
    names = [f"experiment-{'0' * 16}", f"weak-{'1' * 16}.part", f"model-{'2' * 16}.damaged"]
    for name in names:
        (root / name).mkdir()
        (root / name / "thesis.tex").write_text("three years of work")
    write_json(root / names[0] / "key.json", {"mine": True})
    (root / f"link-{'3' * 16}").symlink_to(tmp_path)
    console = Terminal(quiet=True)
    console.say = lambda line, *_: said.append(line)
    inventory.prune(root, set(), True, console)
    assert not path.exists()
    assert sorted(p.name for p in root.iterdir() if p.name != ".locks") == sorted([*names, f"link-{'3' * 16}"])
    assert sum("has a stage's name and is none" in line for line in said) == 4


def test_a_report_names_the_stages_that_a_cached_one_was_made_from(tmp_path):
    """So that prune knows them to be in use, whoever made the one that stands between."""
    from fits import stages

    def ask(work, *, anew):
        def make(part):
            work.compute("features", {"of": "data"}, lambda _: {})
            return {}

        if anew:
            work.compute("middle", {}, make)
            return work.compute("top", {}, lambda _: work.compute("middle", {}, make) and {})
        return work.compute("top", {}, lambda _: {})

    for anew in (True, False):
        work = stages(tmp_path)
        ask(work, anew=anew)
        names = [record.name for record in work.records]
        assert sorted(names) == ["features", "middle", "top"]
    assert all(record.cached for record in work.records)
    used = {record.key for record in work.records}
    inventory.prune(tmp_path / "store", used, True, Terminal(quiet=True))
    assert {row.stage for row in inventory.rows(tmp_path / "store")} == used


# -- out= -------------------------------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    assert outputs.unwritable(tmp_path) is None
    assert outputs.unwritable(tmp_path / "a" / "b") is None
    (tmp_path / "file").touch()
    assert "file is not a folder" in outputs.unwritable(tmp_path / "file" / "run")
    assert "more than 255 bytes" in outputs.unwritable(tmp_path / ("x" * 256) / "run")
    (tmp_path / "loop").symlink_to("loop")
    assert outputs.unwritable(tmp_path / "loop") == os.strerror(errno.ELOOP)
    (tmp_path / "train.log").mkdir()
    assert "train.log is not a file" in outputs.unwritable(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not yours to write" in outputs.unwritable(tmp_path / "run")


def test_a_run_into_a_file_is_refused(tmp_path):
    register()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^out: nothing can be written to {tmp_path}/file/.*is not a folder"):
        settle("train", typed([f"out={tmp_path / 'file'}"]), check)


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.FileHandler, "handleError", logging.FileHandler.handleError)
    outputs.one_notice_per_log()
    handler = logging.FileHandler(tmp_path / "train.log", delay=True)
    handler.stream = Full()
    for _ in range(3):
        handler.handle(logging.LogRecord("w2sg", logging.INFO, "", 0, "text", (), None))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "train.log cannot be written (No space left on device); the run goes on without" in said


# -- SLURM ------------------------------------------------------------------------------------------------------------

JOB = {"SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def test_sbatch_without_srun_runs_on_what_was_asked_for(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    for name, value in {**JOB, "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost"}.items():
        monkeypatch.setenv(name, value)
    from fits import devices

    assert devices().world == 1
    with pytest.raises(UserError, match="begin the command with srun"):
        devices(num_nodes=2)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match=r"SLURM started 2 tasks, and the run asks for trainer.devices=4"):
        devices(devices=4, strategy="ddp")
    assert isinstance(started_by(1)[0], SLURMEnvironment)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    assert isinstance(started_by(1)[0], TorchElasticEnvironment)


# -- deaths at any write ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@contextlib.contextmanager
def dying_at(count: int, error: BaseException):
    """A call that brings something to the disk raises: of an odd ``count`` before it does, of an even one after."""
    calls = [0]

    def counted(function):
        def call(*args):
            calls[0] += 1
            if calls[0] == count:
                raise error
            result = function(*args)
            calls[0] += 1
            if calls[0] == count:
                raise error
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "fsync"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def work(folder) -> tuple:
    """A fit that chooses its best epoch and a reading; a checkpoint after every step."""
    from fits import examples, found, job, stages

    from w2sg.models.heads import BagOfWords
    from w2sg.training.stage_values import load_values
    from w2sg.training.stages import ReadJob

    made = stages(folder, checkpoint_minutes=0.0)
    fitted = found(made.fit("m", {}, job))
    torch.manual_seed(1)
    model, data = BagOfWords(64, True, 2), examples(50)
    return fitted, load_values(made.read("r", {}, lambda: ReadJob(model, model, data)))[1]


def equal(one, two) -> bool:
    from fits import same

    return same(one[0], two[0]) and torch.equal(one[1], two[1])


def disturb(folder: Path, draw: random.Random, whole: tuple) -> None:
    """Kill, fill the disk, damage what is there; then the same work must give the same."""
    for _ in range(draw.randint(1, 3)):
        error = draw.choice([Killed(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EIO, "broken")])
        with contextlib.suppress(Killed, OSError, UserError), dying_at(draw.randint(1, 150), error):
            work(folder)
        files = [file for file in folder.rglob("*") if file.is_file() and ".locks" not in file.parts]
        if files and draw.random() < 0.7:
            kind = draw.choice([k for k in DAMAGE if not k.startswith("a link") or k == "a link to nothing"])
            DAMAGE[kind](draw.choice(sorted(files)))
    assert equal(work(folder), whole)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return work(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 10, 11, 12, 41, 66, 93, 110])
def test_a_run_that_dies_at_any_write_ends_as_if_it_had_not(count, undisturbed, tmp_path):
    with contextlib.suppress(Killed), dying_at(count, Killed()):
        work(tmp_path)
    assert equal(work(tmp_path), undisturbed)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_among_deaths_full_disks_and_damage_ends_as_if_nothing_had_been(seed, undisturbed, tmp_path):
    disturb(tmp_path, random.Random(seed), undisturbed)


@pytest.mark.parametrize("damaged", ["newest", "both", "best"])
def test_a_damaged_checkpoint_costs_what_was_done_since_the_one_before(damaged, undisturbed, tmp_path, caplog):
    with contextlib.suppress(Killed), dying_at(61, Killed()):
        work(tmp_path)
    scratch = next(tmp_path.rglob("scratch"))
    fits = sorted(scratch.glob("fit-*.ckpt"))
    assert len(fits) == 2
    chosen = {"newest": fits[1:], "both": fits, "best": list(scratch.glob("best-*.ckpt"))}[damaged]
    for file in chosen:
        flip(file)
    caplog.set_level("INFO")
    assert equal(work(tmp_path), undisturbed)
    steps = [int(file.name[4:13]) for file in fits]
    expected = {"newest": f"resumes at step {steps[0]},"}.get(damaged, "starts afresh")
    assert expected in caplog.text
    assert "is damaged and removed" in caplog.text


# -- the whole: python tests/store/test_hostile.py --minutes 10 -------------------------------------------------------


def command(out: Path, data: Path, model: Path, *more: str) -> list[str]:
    from runs import QUICK, label_arguments

    words = label_arguments(data, model, out, "optim.full.validation_fraction=0.2", "strong.epochs=4", *more, **QUICK)
    return [sys.executable, str(ROOT / "train.py"), *words]


def result(out: Path) -> dict:
    """What a run's predictions are, and which stages it rests on."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(file).to_pydict() for file in sorted(out.glob("*/predictions.parquet"))]
    keys = [sorted(s["key"] for s in json.loads(file.read_text())["stages"]) for file in sorted(out.glob("*/*.json"))]
    return {"predictions": tables, "stages": keys}


def sweep(out: Path, data: Path, model: Path, draw: random.Random, whole: dict) -> None:
    """Two sweeps on one store at a time, killed and asked to end over and over, until both have ended."""
    commands = [command(out / f"{k}", data, model, f"store={out / 'store'}", "-m", "loss=ce,rkl") for k in range(2)]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"}
    left, deaths = set(range(2)), 0
    while left:
        files = {k: (out / f"said-{k}").open("w") for k in left}
        running = {k: subprocess.Popen(commands[k], stdout=files[k], stderr=files[k], env=known) for k in left}
        for k, process in running.items():
            sent = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(3, 9) if deaths < 12 else 600)
            if process.poll() is None:
                sent = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
                process.send_signal(sent)
                process.wait(15)
                deaths += 1
            files[k].close()
            said = (out / f"said-{k}").read_text()
            expected = {None: 0, signal.SIGKILL: -9}.get(sent, 128 + (sent or 0))
            assert process.returncode in (0, expected, -(sent or 0)), said
            assert "Traceback" not in said, said
            if process.returncode == 0:
                left.discard(k)
        parts = [file for file in out.rglob("*") if file.is_file() and "scratch" in file.parts]
        if parts and draw.random() < 0.5:
            flip(draw.choice(sorted(parts)))
    for k in range(2):
        assert result(out / f"{k}") == whole, (out, k)
    print(f"two sweeps, {deaths} deaths: as if nothing had been", flush=True)


def main() -> None:
    """Disturb runs in every way that is here for some minutes, from a seed that is printed."""
    from conftest import make_pairs, save_tiny_model, write_jsonl

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    draw, end, rounds = random.Random(asked.seed), time.monotonic() + 60 * asked.minutes, 0
    print("seed", asked.seed, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, (split, count) in enumerate({"ground_truth": 96, "transfer": 96, "test": 64}.items()):
            write_jsonl(folder / "pairs" / f"{split}.jsonl", make_pairs(count, seed))
        model = save_tiny_model(folder / "model")
        whole = work(folder / "whole")
        subprocess.run(
            command(folder / "sweep", folder / "pairs", model, "-m", "loss=ce,rkl"), check=True, capture_output=True
        )
        swept = result(folder / "sweep")
        while time.monotonic() < end:
            for _ in range(10):
                (place := folder / f"disturbed-{rounds}").mkdir()
                disturb(place, draw, whole)
                rounds += 1
            print(f"{rounds} disturbed stages: as if nothing had been", flush=True)
            (place := folder / f"sweeps-{rounds}").mkdir()
            sweep(place, folder / "pairs", model, draw, swept)


if __name__ == "__main__":
    main()
