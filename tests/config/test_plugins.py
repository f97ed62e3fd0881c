"""Conf files and code from outside the tree: --config-dir, packages with an entry point, the current folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from w2sg.config import plugins
from w2sg.config.build import function_identity
from w2sg.config.check import check
from w2sg.config.composing import settle
from w2sg.config.hydra import register
from w2sg.config.typed import typed
from w2sg.errors import ConfigError, UserError

LOSS = """
from w2sg.losses import needs_soft_labels

@needs_soft_labels
def student_first(logits, weak_logits, progress, *, power: float = 1.0): ...
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A folder of the user's, with conf files and a module beside them."""
    folder = tmp_path / "mine"
    write(folder / "loss" / "first.yaml", "_target_: plugin_losses.student_first\n_partial_: true\npower: 1.0\n")
    write(folder / "model" / "tiny.yaml", "defaults: [_base, _self_]\nname: gpt2\n")
    experiment = "# @package _global_\ndefaults:\n  - override /loss: first\n  - override /weak: tiny\nseed: 3\n"
    write(folder / "experiment" / "mine.yaml", experiment)
    write(tmp_path / "plugin_losses.py", LOSS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    plugins.packaged.cache_clear()
    plugins.use(None)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def checked(*arguments: str) -> list:
    """The configurations that a command line asks for, as train.py checks them before it runs any."""
    configs = []
    command = typed(arguments)
    register(users=command.folder)
    settle("train", command, lambda cfg, choices: configs.append(check(cfg, choices)))
    return configs


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        checked(*arguments)
    return error.value.problems


def test_the_users_files_are_chosen_like_shipped_ones(users):
    (config,) = checked("--config-dir", str(users), "experiment=mine", "strong=tiny", "loss.power=2.0", "trainer=cpu")
    assert config.loss == {"_target_": "plugin_losses.student_first", "_partial_": True, "power": 2.0}
    assert (config.weak.name, config.strong.name, config.seed) == ("gpt2", "gpt2", 3)
    assert len(checked(f"--config-dir={users}", "-m", "loss=first,rkl", "weak=bow,tiny", "trainer=cpu")) == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["loss=frist"],
            "loss: there is no frist; did you mean loss=first? The choices: cace, ce, ",
        ),
        (["weak=tinny"], "weak: there is no tinny; did you mean weak=tiny?"),
        (["experiment=mien"], "experiment: there is no mien; did you mean experiment=mine?"),
        (["loss=first", "loss.powr=2"], "loss.powr: no such key; did you mean loss.power?"),
        (["loss=first", "loss.power=much"], "loss.power: input should be a valid number (got 'much')"),
        (["loss=first", "+loss.base=2"], "loss.base: plugin_losses.student_first takes power; remove it"),
    ],
)
def test_mistakes_with_the_users_files_name_them(arguments, line, users):
    (said,) = problems("-cd", str(users), *arguments)
    assert said.startswith(line)


CODE = """
from w2sg.config import Options, option

class Mine(Options):
    rounds: int = option(2, "how often", gt=0)
    name: str = option(..., "what for")

def distil(run, options: Mine): ...
def plain(run, power: float = 2.0): ...
def loss(logits, weak_logits, progress, *, scale: float = 1.0): ...
def rows(path: str, subset=None, revision=None, mark: str = "+"): ...
"""


def test_code_is_chosen_by_its_dotted_path_with_no_file(users):
    write(users.parent / "plugin_code.py", CODE)
    methods = ["method=plugin_code.plain", "loss=plugin_code.loss", "dataset=plugin_code.rows"]
    (config,) = checked(*methods, "method.power=3.0", "loss.scale=2.0", "dataset.path=x", "trainer=cpu")
    assert config.method == {"_target_": "plugin_code.plain", "_partial_": True, "power": 3.0}
    assert config.loss == {"_target_": "plugin_code.loss", "_partial_": True, "scale": 2.0}
    assert (config.dataset.name, config.dataset.mark, config.dataset.sizes.test) == ("rows", "+", None)
    (config,) = checked("method=plugin_code.distil", "method.name=it", "method.rounds=3", "trainer=cpu")
    assert config.method["rounds"] == 3
    for typed_so, line in {
        ("method=plugin_code.plian",): "method: there is no plugin_code.plian (module 'plugin_code' has no attribute",
        ("method=plugin_cod.plain",): "method: there is no plugin_cod.plain (No module named 'plugin_cod')",
        ("method=plugin_code.CONST",): "method: there is no plugin_code.CONST",
        ("loss=math.pi",): "loss: math.pi is not callable; name a function or a class",
        ("method=plugin_code.distil",): "method.name: needs a value",
        ("method=plugin_code.distil", "method.nme=x"): "method.nme: no such key; did you mean method.name?",
        ("method=plugin_code.distil", "method.name=x", "method.rounds=0"): "method.rounds: input should be greater",
        ("method=plugin_code.distil", "method.name=x", "method.rounds=a"): "method.rounds: input should be a valid int",
    }.items():
        assert problems(*typed_so, "trainer=cpu")[0].startswith(line)


def test_a_folder_that_is_not_there_and_names_that_are_taken(users):
    (line,) = problems("--config-dir", str(users / "no"), "loss=first")
    assert line == f"--config-dir: there is no folder {users / 'no'}"
    (users / "model" / "gpt2.yaml").write_bytes((plugins.CONF / "model" / "gpt2.yaml").read_bytes())
    checked("--config-dir", str(users), "weak=gpt2", "trainer=cpu")  # the same file is no clash
    write(users / "loss" / "rkl.yaml", "_target_: plugin_losses.student_first\n_partial_: true\n")
    (line,) = problems("--config-dir", str(users), "loss=first")
    assert line.startswith(f"--config-dir: {users} has loss/rkl.yaml, as w2sg has, which would be read instead; rename")


def package(root: Path, name: str, value: str, **files: str) -> None:
    """An installed package, as pip leaves it: its files, and its entry points in the folder of its metadata."""
    write(root / name / "__init__.py", "")
    for file, text in files.items():
        write(root / name / "conf" / "loss" / f"{file}.yaml", text)
    write(root / f"{name}-1.0.dist-info" / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    write(root / f"{name}-1.0.dist-info" / "entry_points.txt", f"[w2sg.plugins]\n{name} = {value}\n")


def test_an_installed_package_is_found_with_nothing_typed(users, tmp_path, monkeypatch, caplog):
    node = "_target_: packaged_losses.ours.loss\n_partial_: true\n"
    package(tmp_path / "site", "packaged_losses", "packaged_losses.conf", ours=node, twice=node)
    write(tmp_path / "site" / "packaged_losses" / "ours.py", "def loss(logits, weak_logits, progress): ...\n")
    package(tmp_path / "site", "other_losses", "other_losses.conf", twice=node + "# other\n")
    package(tmp_path / "site", "empty_losses", "empty_losses.no_such_folder")
    monkeypatch.syspath_prepend(tmp_path / "site")
    plugins.packaged.cache_clear()
    (config,) = checked("loss=ours", "trainer=cpu")
    assert config.loss["_target_"] == "packaged_losses.ours.loss"
    assert "the plugin empty_losses = empty_losses.no_such_folder is left out: there is no such folder" in caplog.text
    (line,) = problems("loss=twice", "trainer=cpu")
    assert line.startswith("loss: twice is a file of ")
    assert line.endswith("rename all but one of them")
    checked("--config-dir", str(users), "loss=first", "trainer=cpu")  # what is not chosen is in nobody's way


@pytest.mark.parametrize(
    ("name", "text", "target", "said"),
    [
        (
            "users_one",
            "def soft(): ...",
            "users_one.sfot",
            r"there is no users_one\.sfot .*; did you mean users_one\.soft\?",
        ),
        ("users_one", "def f(x:", "users_one.f", r"users_one\.f: SyntaxError: .*\(users_one\.py, line 1\)"),
        (
            "users_one",
            "\nX = nothing + 1",
            "users_one.f",
            r"users_one\.f: NameError: name 'nothing' is not defined \(users_one\.py, line 2\)",
        ),
        ("users_one", "import no_such", "users_one.f", "users_one cannot be imported: No module named 'no_such'"),
        ("random", "def f(): ...", "random.f", r"there is no random\.f: random is .*, which hides .*; rename yours"),
        ("users_one", "", "users_two.f", "there is no users_two.f .*; put your module into .* or on PYTHONPATH"),
        ("users_one", "", "no function", "there is no no function; a function is named module.function"),
    ],
)
def test_what_is_wrong_with_a_module_of_the_users(name, text, target, said, tmp_path, monkeypatch):
    write(tmp_path / f"{name}.py", text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "users_one", raising=False)
    with pytest.raises(UserError, match=said):
        plugins.resolve(target)


def test_a_module_of_the_current_folder_is_imported_by_the_script(users):
    known = {**os.environ, "PYTHONPATH": str(ROOT)}
    for typed_so in (["--config-dir", "mine", "loss=first"], ["loss._target_=plugin_losses.student_first"]):
        command = [sys.executable, str(ROOT / "train.py"), *typed_so, "trainer=cpu", "weak.lr=-1"]
        result = subprocess.run(command, cwd=users.parent, env=known, capture_output=True, text=True, check=False)
        assert result.stderr == "error: weak.lr: input should be greater than 0 (got -1)\n"


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("UNUSED = 1\n", "UNUSED = 2\n", True),
        ("def other(x): return x\n", "def other(x): return 2 * x\n", True),
        ("def helper(x): return x\n", "def helper(x): return 2 * x\n", False),
        ("SCALE = 1\n", "SCALE = 2\n", False),
    ],
)
def test_what_a_function_from_outside_uses_of_its_file_counts_for_the_store(before, after, same, tmp_path, monkeypatch):
    function = "import torch\n\n\ndef loss(logits, weak_logits, progress):\n    return torch.mean({uses})\n"
    uses = {"SCALE": "SCALE * logits", "def helper": "helper(logits)"}
    keys = []
    for place, text in enumerate((before, after)):
        body = next((expression for start, expression in uses.items() if text.startswith(start)), "logits")
        folder = tmp_path / str(place)
        write(folder / "users_keyed.py", text + function.format(uses=body))
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            patch.delitem(sys.modules, "users_keyed", raising=False)
            keys.append(function_identity({"_target_": "users_keyed.loss", "_partial_": True}))
    assert (keys[0] == keys[1]) is same
