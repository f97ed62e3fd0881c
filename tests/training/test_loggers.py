"""Weights & Biases: names, groups and ids; its environment variables count unless the option is typed; what it refuses
ends no run; runs that are written offline are read back.
"""

import logging
from pathlib import Path

import pytest
import wandb_files
from conftest import compose
from runs import run_labels

from w2sg.config.check import check
from w2sg.errors import ConfigError
from w2sg.store.files import read_json
from w2sg.training.ledger import Ledger
from w2sg.training.loggers import Curves, Events, Loggers

NAMES = ("PROJECT", "ENTITY", "MODE", "RUN_GROUP", "NAME", "RUN_ID", "DIR", "RESUME", "TAGS", "JOB_TYPE", "SWEEP_ID")


class Quiet:
    """A run of W&B's that takes everything, or nothing."""

    id, resumed = "0", False

    def __init__(self, refuses=False):
        self.points, self.summary, self.refuses = [], {}, refuses

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        if self.refuses:
            raise ConnectionError("the service is gone")
        self.points.append(values)

    def finish(self, exit_code):
        if self.refuses:
            raise OSError("no network")


@pytest.fixture
def asked(monkeypatch):
    """What `wandb.init` is asked for."""
    import wandb

    found = {}
    monkeypatch.setattr(wandb, "init", lambda **options: found.update(options) or Quiet())
    for name in NAMES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return found


def start(*typed, out=Path("outputs/seed=0")):
    return Loggers(check(compose("weak=bow", "strong=bow", "logger=wandb", "trainer=cpu", *typed)), out, True, typed)


def test_without_environment_our_defaults_count(asked):
    start()
    assert asked["project"] == "w2sg"
    words = "finetune cross_entropy bag-of-words→bag-of-words critics"
    assert asked["name"] == f"{words} seed 0"
    assert asked["group"][:-6] == f"{words} "
    assert (asked["dir"], asked["resume"], asked["job_type"]) == ("outputs/seed=0", "allow", "train")
    assert (asked["mode"], asked["entity"], len(asked["id"])) == (None, None, 16)


@pytest.mark.parametrize(
    ("variable", "option", "key"),
    [
        ("WANDB_PROJECT", "logger.project=mine", "project"),
        ("WANDB_ENTITY", "logger.entity=mine", "entity"),
        ("WANDB_MODE", "logger.mode=online", "mode"),
        ("WANDB_RUN_GROUP", "logger.group=mine", "group"),
        ("WANDB_NAME", None, "name"),
        ("WANDB_RUN_ID", None, "id"),
        ("WANDB_DIR", None, "dir"),
        ("WANDB_RESUME", None, "resume"),
        ("WANDB_JOB_TYPE", None, "job_type"),
    ],
)
def test_the_environment_wins_unless_the_option_is_typed(variable, option, key, asked, monkeypatch):
    monkeypatch.setenv(variable, "offline" if key == "mode" else "theirs")
    start()
    assert asked[key] is None  # wandb reads the variable itself
    if option:
        start(option)
        assert asked[key] == option.partition("=")[2]


def test_offline_runs_are_not_resumed_but_share_an_id(asked, monkeypatch):
    start("logger.mode=offline")
    first = dict(asked)
    monkeypatch.setenv("WANDB_MODE", "offline")
    start()
    assert asked["resume"] is first["resume"] is None
    assert asked["id"] == first["id"]


def test_tags_of_both_are_given(asked, monkeypatch):
    monkeypatch.setenv("WANDB_TAGS", "a,b,critics")
    start("logger.tags=[mine]")
    assert asked["tags"] == ["finetune", "critics", "cross_entropy", "mine", "a", "b"]


def test_names_say_the_setting_and_groups_join_its_seeds(asked):
    start("loss=rkl", "dataset.noise.rate=0.3", "dataset.noise.kind=flip", "strong.lr=0.1", "seed=1")
    first = dict(asked)
    assert first["name"] == (
        "finetune reverse_kl bag-of-words→bag-of-words critics rate=0.3 kind=flip strong.lr=0.1 seed 1"
    )
    start("loss=rkl", "dataset.noise.rate=0.3", "dataset.noise.kind=flip", "strong.lr=0.1", "seed=2")
    assert asked["group"] == first["group"]
    assert asked["id"] != first["id"]
    start("loss=rkl", "dataset.noise.rate=0.3", "dataset.noise.kind=flip", "strong.lr=0.2", "seed=1")
    assert asked["group"] != first["group"]
    start("dataset.zero_shot.question=" + "x" * 200)
    assert len(asked["group"]) <= 128
    assert asked["name"] == "finetune cross_entropy bag-of-words→bag-of-words critics … seed 0"


def test_one_setting_seed_and_folder_are_one_run_whatever_the_devices(asked):
    ids = []
    for more in ((), ("logger.every=3",), ("trainer.devices=2",), ("loss=rkl",), ("seed=1",)):
        start(*more)
        ids.append(asked["id"])
    assert ids[0] == ids[1] == ids[2]
    assert len(set(ids)) == 3
    start(out=Path("outputs/elsewhere"))
    assert asked["id"] not in ids


def test_an_agent_of_a_sweep_gives_its_runs_their_ids(asked, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    start("strong.lr=0.1")
    assert asked["id"] is None  # wandb reads the variable itself
    assert asked["resume"] is None
    assert asked["config"]["strong.lr"] == 0.1  # the parameter's own key, which the sweep has locked
    assert "strong" not in asked["config"]


def test_where_wandb_cannot_be_reached_the_run_is_recorded_offline(monkeypatch, caplog, tmp_path):
    import wandb

    modes = []

    def refuse(**options):
        modes.append(options["mode"])
        if options["mode"] != "offline":
            raise wandb.errors.CommError("no route to host\x1b[31m")
        return Quiet()

    monkeypatch.setattr(wandb, "init", refuse)
    found = start("logger.mode=online", out=tmp_path)
    assert modes == ["online", "offline"]
    assert found.wandb.offline
    (line,) = (line for line in caplog.messages if line.startswith("Weights"))
    assert line.startswith("Weights & Biases could not start (no route to host\\x1b[31m); the run is recorded offline.")


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_leaves_an_offline_run(monkeypatch, caplog, tmp_path):
    """The real client, and an address where nobody listens."""
    import wandb

    for name in NAMES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    with caplog.at_level(logging.WARNING, logger="w2sg.training.wandb_run"):
        found = start("logger.mode=online", out=tmp_path)
    found.stage("weak").log_metrics({"loss": 0.5}, 1)
    found.finish(failed=False)
    wandb.teardown()  # the service has written everything
    said = [line for line in caplog.messages if line.startswith("Weights & Biases")]
    assert len(said) == 1
    assert "the run is recorded offline" in said[0]
    (run,) = offline_runs(tmp_path)
    assert run.curve("weak", "loss") == [(1, 0.5)]


def test_where_wandb_cannot_start_at_all_curves_are_csv(monkeypatch, caplog, tmp_path):
    import wandb

    def refuse(**_):
        raise wandb.errors.Error("the service did not start")

    monkeypatch.setattr(wandb, "init", refuse)
    found = start(out=tmp_path)
    assert isinstance(found.stage("student"), Curves)
    said = [line for line in caplog.messages if line.startswith("Weights")]  # other lines are W&B's own
    assert [line.partition(" (")[0] for line in said] == ["Weights & Biases could not start"]
    assert str(tmp_path / "csv") in caplog.text


def test_a_service_that_dies_ends_no_run_and_is_said_once(asked, monkeypatch, caplog, tmp_path):
    import wandb

    run = Quiet(refuses=True)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    found = start(out=tmp_path)
    with caplog.at_level(logging.WARNING, logger="w2sg.training.wandb_run"):
        for step in range(3):
            found.stage("student").log_metrics({"loss": 1.0}, step)
        found.summarise({"metrics": {"student": {"accuracy": 0.5}}, "diagnostics": {}}, {}, [])
        found.finish(failed=False)
    assert [line.split(" (")[0] for line in caplog.messages] == [
        "Weights & Biases takes no more curves",
        "Weights & Biases did not take the report",
        "Weights & Biases could not close its run",
    ]


def test_processes_that_do_not_write_start_no_run(asked, tmp_path):
    config = check(compose("weak=bow", "strong=bow", "logger=wandb", "trainer=cpu"))
    assert Loggers(config, tmp_path, main=False).stage("student") is None
    assert not asked


def test_a_ledger_takes_each_step_of_a_curve_once(tmp_path):
    file = tmp_path / "a.json"
    ledger = Ledger([], file)
    assert ledger.new("student", {"loss": 1.0, "lr": 2.0}, 10) == {"loss": 1.0, "lr": 2.0}
    assert ledger.new("student", {"loss": 1.0, "test_nll": 3.0}, 10) == {"test_nll": 3.0}
    assert ledger.new("student", {"loss": 0.5}, 5) == {}
    (tmp_path / "b.json").write_text("{damaged")
    later = Ledger([file, tmp_path / "b.json"], tmp_path / "c.json")
    assert later.new("student", {"loss": 1.0}, 10) == {}
    assert later.new("student", {"loss": 0.9}, 20) == {"loss": 0.9}
    assert later.new("weak", {"loss": 0.9}, 20) == {"loss": 0.9}
    assert read_json(tmp_path / "c.json")["student"]["test_nll"] == 10


def test_a_run_that_is_joined_from_elsewhere_continues_after_its_last_step(asked, monkeypatch, tmp_path):
    import wandb

    run = Quiet()
    run.resumed, run.summary = True, {"student/step": 20, "student/loss": 0.5}
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    student = start(out=tmp_path).stage("student")
    for step in (10, 20, 30):
        student.log_metrics({"loss": 1.0}, step)
    assert run.points == [{"student/loss": 1.0, "student/step": 30}]


def test_tensorboard_has_each_point_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((2, 4), (2, 4, 6)):  # killed after 4, then replayed and continued
        events = Events(tmp_path, "student")
        for step in steps:
            events.log_metrics({"loss": 1.0 / step}, step)
        events.finalize("success")
    shown = EventAccumulator(str(tmp_path / "tensorboard" / "student")).Reload()
    assert [point.step for point in shown.Scalars("loss")] == [2, 4, 6]


def offline_runs(folder):
    return [wandb_files.read(path) for path in sorted(folder.glob("wandb/offline-run-*"))]


@pytest.mark.slow
def test_reruns_join_one_run_and_cached_stages_replay_their_curves(pairs_folder, tiny_gpt2, tmp_path, monkeypatch):
    """The first run trains; the same again adds no point; another folder replays every curve from the store."""
    for name in NAMES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    typed = ["logger=wandb", "logger.mode=offline", "logger.every=2", "logger.eval_every=2", "optim.full.epochs=1"]
    store = [f"store={tmp_path / 'store'}"]
    content = run_labels(pairs_folder, tiny_gpt2, tmp_path / "a", *typed, *store)
    assert run_labels(pairs_folder, tiny_gpt2, tmp_path / "a", *typed, *store)["metrics"] == content["metrics"]
    run_labels(pairs_folder, tiny_gpt2, tmp_path / "b", *typed, *store)
    first, again = offline_runs(tmp_path / "a" / "run")
    (other,) = offline_runs(tmp_path / "b" / "run")
    assert first.run.run_id == again.run.run_id != other.run.run_id
    assert first.run.run_group == other.run.run_group
    assert first.run.job_type == "train"
    assert (first.ended, again.ended, other.ended) == (0, 0, 0)
    for stage in ("weak", "student", "ceiling"):
        points = content["accuracy_over_steps"]["fits"][stage]["points"]
        curve = [(point["step"], point["test_accuracy"]) for point in points]
        assert first.curve(stage, "test_accuracy") == other.curve(stage, "test_accuracy") == curve
        assert first.curve(stage, "loss") == other.curve(stage, "loss")
        steps = [step for step, _ in first.curve(stage, "loss")]
        assert steps == sorted(set(steps))
        assert again.curve(stage, "loss") == again.curve(stage, "test_accuracy") == []
        assert other.summary[f"{stage}/cached"] is True
        assert f"{stage}/cached" not in first.summary
    assert again.summary["student/accuracy"] == content["metrics"]["student"]["accuracy"]


@pytest.mark.parametrize(
    ("kind", "remedy"), [("tensorboard", "pip install tensorboard"), ("wandb", "pip install wandb")]
)
def test_a_logger_that_is_not_installed_is_said_before_any_work(kind, remedy, monkeypatch):
    import importlib.util

    usual = importlib.util.find_spec
    lost = (kind, f"{kind}X")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in lost else usual(name, *a))
    with pytest.raises(ConfigError, match="use logger=csv") as caught:
        check(compose(f"logger={kind}"))
    assert remedy in str(caught.value)
