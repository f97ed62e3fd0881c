"""Weights & Biases: its environment variables count unless the option is typed; what it refuses ends no run."""

import logging
from pathlib import Path

import pytest
from conftest import compose

from w2sg.config.check import check
from w2sg.errors import ConfigError, UserError
from w2sg.training import loggers
from w2sg.training.loggers import Loggers

NAMES = ("PROJECT", "ENTITY", "MODE", "RUN_GROUP", "NAME", "RUN_ID", "DIR", "RESUME", "TAGS")


@pytest.fixture
def asked(monkeypatch):
    """What `wandb.init` is asked for."""
    import wandb

    found = {}
    monkeypatch.setattr(wandb, "init", lambda **options: found.update(options) or found)
    for name in NAMES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return found


def start(*typed, out=Path("outputs/seed=0")):
    return Loggers(check(compose("weak=bow", "strong=bow", "logger=wandb", "trainer=cpu", *typed)), out, main=True)


def test_without_environment_our_defaults_count(asked):
    start()
    assert asked["project"] == "w2sg"
    assert asked["group"] == "reviews: bag-of-words -> bag-of-words"
    assert (asked["name"], asked["dir"], asked["resume"]) == ("seed=0", "outputs/seed=0", "allow")
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
    monkeypatch.setenv("WANDB_TAGS", "a,b,reviews")
    start("logger.tags=[mine]")
    assert asked["tags"] == ["finetune", "reviews", "cross_entropy", "mine", "a", "b"]


def test_what_wandb_refuses_at_the_start_is_one_line(monkeypatch):
    import wandb

    def refuse(**_):
        raise ValueError("1 validation error\n  mode\n    bogus\x1b[31m")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError) as caught:
        start()
    assert str(caught.value).startswith(
        "logger: Weights & Biases could not start (1 validation error mode bogus\\x1b[31m)"
    )
    assert "logger.mode=offline, or logger=csv" in str(caught.value)


def test_what_wandb_refuses_at_the_end_leaves_the_run(asked, monkeypatch, caplog, tmp_path):
    found = start(out=tmp_path)

    class Lost:
        id = "x"

        def finish(self, exit_code):
            raise OSError("no network")

    found.wandb = Lost()
    with caplog.at_level(logging.WARNING, logger="w2sg.training.loggers"):
        found.summarise({"metrics": {"student": {"accuracy": 0.5}}, "diagnostics": {}}, {}, [])
        found.finish(failed=False)
    assert [line.split(" (")[0] for line in caplog.messages] == [
        "Weights & Biases did not take the report",
        "Weights & Biases could not close its run",
    ]


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
    assert loggers.log.name == "w2sg.training.loggers"
