"""The workspace of W&B, the sweep files and the table of keys, against what runs write."""

import itertools
import json
import re

import pytest
import wandb_files
import yaml
from conftest import ROOT, compose
from runs import run_labels

from w2sg.cli import wandb_report
from w2sg.config.check import check
from w2sg.config.typed import typed
from w2sg.console import Plain
from w2sg.errors import UserError


@pytest.fixture(scope="module")
def recorded(pairs_folder, tiny_gpt2, tmp_path_factory):
    """A folder with a run that W&B recorded offline, and what it recorded."""
    folder = tmp_path_factory.mktemp("recorded")
    more = ["logger=wandb", "logger.mode=offline", "strong.tune=head", "optim.head.epochs=2"]
    run_labels(pairs_folder, tiny_gpt2, folder, *more, "optim.head.validation_fraction=0.2")
    (run,) = (folder / "run" / "wandb").glob("offline-run-*")
    return folder, wandb_files.read(run)


@pytest.mark.slow
def test_every_panel_shows_a_key_that_runs_write(recorded, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    folder, written = recorded
    monkeypatch.setenv("WANDB_MODE", "offline")
    file = wandb_report.write_report(folder, None, "team", Plain(width=200))
    said = capsys.readouterr().out
    assert "not saved in W&B: WANDB_MODE=offline; unset it" in said
    content = json.loads(file.read_text())
    assert (content["project"], content["entity"]) == ("w2sg", "team")
    logged = {key for point in written.points for key in point}
    for panel in content["panels"]:
        assert set(panel["keys"]) <= (logged if panel["x"] else written.summary.keys()), panel["title"]
        assert panel["x"] is None or panel["x"] in logged
    section = content["workspace"]["spec"]["section"]
    assert section["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]
    shown = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    assert [panel["config"]["metrics"] for panel in shown] == [panel["keys"] for panel in content["panels"]]
    titles = {panel["title"] for panel in content["panels"]}
    assert {"Accuracy", "Performance gap recovered (PGR)", "student: test accuracy", "student: loss"} <= titles


@pytest.mark.slow
def test_what_is_missing_is_said_and_nothing_is_lost(recorded, monkeypatch, capsys):
    folder, _ = recorded
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)

    class Workspace:
        entity = "team"

        def save(self):
            raise ConnectionError("no route\nto host")

    assert "no route to host; `wandb login` first" in wandb_report._save(Workspace())

    def absent(*_):
        raise ImportError

    monkeypatch.setattr(wandb_report, "workspace_of", absent)
    file = wandb_report.write_report(folder, "mine", "team", Plain(width=200))
    assert "pip install wandb-workspaces. The same command saves it then." in capsys.readouterr().out
    assert json.loads(file.read_text())["project"] == "mine"
    with pytest.raises(UserError, match="no finished run"):
        wandb_report.write_report(folder / "store", None, None, Plain())


@pytest.mark.slow
def test_the_table_of_keys_is_what_is_written(recorded):
    _, written = recorded
    table = re.findall(r"`([\w/.]+)`", (ROOT / "docs" / "wandb.md").read_text().partition("## What is written")[2])
    forms = [re.sub("SYSTEM|FIT|OTHER", r"[\\w-]+", name.replace("...", "[\\w/]+")) for name in table]
    keys = {key for point in written.points for key in point} | written.summary.keys()
    own = {key for key in keys if not key.startswith("_")}
    unknown = [
        key
        for key in own
        if not any(re.fullmatch(form, key) for form in [*forms, r"\w+/step", r"(predictions|report)\..*"])
    ]
    assert not unknown
    for key in ("student/accuracy", "pgr/estimate", "test/gain", "transfer/gain", "student/test_accuracy"):
        assert key in own
    for key in ("student/held_out_nll", "student/held_out_loss", "weak/lr"):
        assert key in own


@pytest.mark.parametrize("name", ["wandb_sweep.yaml", "wandb_search.yaml"])
def test_an_agent_runs_every_command_of_a_sweep_file(name):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "docs" / "howto" / name).read_text())
    choices = {
        key: parameter.get("values") or [parameter.get("value", parameter.get("min"))]
        for key, parameter in sweep["parameters"].items()
    }
    commands = []
    for values in itertools.product(*choices.values()):
        args = {key: {"value": value} for key, value in zip(choices, values, strict=True)}
        parts = create_sweep_command_args({"args": args}) | {"program": [sweep["program"]], "env": ["/usr/bin/env"]}
        words = []
        for word in create_sweep_command(sweep["command"]):
            words += parts[word[2:-1]] if word.startswith("${") else [word]
        assert words[:3] == ["/usr/bin/env", "w2sg", "train"]
        config = check(compose(*typed(words[3:], sweeps=True).arguments))
        assert config.logger.kind == "wandb"
        commands.append((config.loss["_target_"], config.seed, config.strong.lr, config.training.head.weight_decay))
    assert len(set(commands)) == len(commands) == {"grid": 12, "bayes": 3}[sweep["method"]]
    system, _, metric = sweep["metric"]["name"].partition("/")
    assert system == "student"
    table = (ROOT / "docs" / "wandb.md").read_text()
    assert f"`SYSTEM/{metric}`" in table or f"`FIT/{metric}`" in table
