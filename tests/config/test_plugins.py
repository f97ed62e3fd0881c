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
from w2sg.config.unread import unread
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


def checked(*arguments: str, name: str = "train") -> list:
    """The configurations that a command line asks for, as train.py checks them before it runs any."""
    configs = []
    command = typed(arguments)
    register(users=command.folder)
    settle(name, command, lambda cfg, choices: configs.append(check(cfg, choices)))
    return configs


def problems(*arguments: str, name: str = "train") -> list[str]:
    with pytest.raises(ConfigError) as error:
        checked(*arguments, name=name)
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
        (["loss=first", "+loss.base=2"], "loss.base: no such key; loss has power"),
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


@pytest.mark.slow
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


OPEN_CODE = """
from typing import Literal
from w2sg.config import option
from w2sg.decoding.decoders import Decoder
from w2sg.judges import Judge

class Mine(Decoder):
    kind: Literal["of_a_simple_file"] = "of_a_simple_file"
    words = "a sample"
    samples: int = option(4, "how many", gt=0)
    def write(self, engines, prompts): ...

class Brief(Judge):
    def __init__(self, run, words: int = 5): ...
    def rewards(self, name, replies): ...

def method(run, power: float = 2.0): ...
def with_decoder(run, decoder: str = "x"): ...
def with_judge(run, judge: str = "x"): ...
def cong(run): ...
def loss(logits, weak_logits, progress, *, scale: float = 1.0): ...
def needing(logits, weak_logits, progress, *, must: float): ...
def rows(path: str, subset=None, revision=None, mark: str = "+"): ...
def strict_rows(path: str, subset=None, revision=None, strict: bool = True): ...
"""


@pytest.fixture
def open_code(users):
    """The user's folder, beside a module with one thing of each group and a file of two lines for each."""
    write(users.parent / "plugin_open.py", OPEN_CODE)
    simple = {"method": "method", "loss": "loss", "dataset": "rows", "decoder": "Mine", "judge": "Brief"}
    for group, name in simple.items():
        write(users / group / "simple.yaml", f"_target_: plugin_open.{name}\n")
    return users


@pytest.mark.parametrize(
    ("name", "typed_so", "section", "expected"),
    [
        ("train", ["method=simple", "method.power=3.0"], "method", {"power": 3.0}),
        ("train", ["loss=simple", "loss.scale=3.0"], "loss", {"scale": 3.0}),
        ("decode", ["decoder=simple", "decoder.max_new_tokens=8"], "decoder", {"max_new_tokens": 8, "samples": 4}),
        ("decode", ["judge=simple", "judge.words=3"], "method.judge", {"words": 3, "_target_": "plugin_open.Brief"}),
        (
            "train",
            ["dataset=simple", "dataset.path=x", "dataset.mark=y", "dataset.sizes.test=3"],
            "dataset",
            {"mark": "y", "name": "simple", "path": "x", "subset": None},
        ),
    ],
)
def test_a_file_with_a_target_alone_has_the_defaults_of_what_it_names(name, typed_so, section, expected, open_code):
    (config,) = checked("--config-dir", str(open_code), *typed_so, "trainer=cpu", name=name)
    node = config.model_dump(by_alias=True)
    for part in section.split("."):
        node = node[part]
    assert {key: node[key] for key in expected} == expected


@pytest.mark.parametrize("group", ["method", "loss", "dataset", "decoder", "judge"])
def test_a_file_whose_target_is_not_there_gets_one_line(group, open_code):
    write(open_code / group / "gone.yaml", "_target_: plugin_gone.thing\n" + "path: x\n" * (group == "dataset"))
    name = "decode" if group in ("decoder", "judge") else "train"
    (line,) = problems("--config-dir", str(open_code), f"{group}=gone", "trainer=cpu", name=name)
    assert line.startswith(f"{'method.judge' if group == 'judge' else group}._target_: there is no plugin_gone.thing (")


def test_a_misspelled_option_in_a_decoders_file_gets_one_line(open_code):
    write(open_code / "decoder" / "typo.yaml", "_target_: plugin_open.Mine\nsampels: 3\n")
    (line,) = problems("--config-dir", str(open_code), "decoder=typo", "trainer=cpu", name="decode")
    assert line.startswith("decoder.sampels: no such key")
    assert "did you mean decoder.samples?" in line


def test_options_that_are_called_like_a_group_are_the_methods_own(open_code):
    (config,) = checked("method=plugin_open.with_decoder", "method.decoder=y", "trainer=cpu")
    assert config.method["decoder"] == "y"
    (config,) = checked("method=plugin_open.with_judge", "method.judge=y", "trainer=cpu")
    assert config.method["judge"] == "y"
    (line,) = problems("method=plugin_open.with_judge", "judge=llm", "trainer=cpu")
    assert line.startswith("judge: plugin_open.with_judge has an option judge of its own and does not read judge=llm")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("plugin_open.cong", []),
        ("cong", ["optim.full.epochs: not read by method=cong, whose own stages have their options in method.*"]),
    ],
)
def test_methods_from_outside_are_told_from_ours_of_the_same_name(method, said, open_code):
    models = [f"{role}{key}" for role in ("weak", "strong") for key in ("=gpt2", ".tune=full")]
    (config,) = checked(f"method={method}", *models, "dataset=review_prompts", "optim.full.epochs=1", "trainer=cpu")
    assert unread(config, ["optim.full.epochs=1"]) == said


@pytest.mark.parametrize(
    ("typed_so", "line"),
    [
        (["dataset=plugin_open.rows", "dataset.path=x", "dataset.mark=3"], "dataset.mark: 3 is not text; "),
        (
            ["dataset=plugin_open.strict_rows", "dataset.path=x"],
            "dataset._target_: plugin_open.strict_rows has a parameter strict, which w2sg keeps for itself; rename it",
        ),
        (["loss=plugin_open.needing"], "loss.must: needs a value"),
        (["loss=plugin_open.needing", "loss.must=x"], "loss.must: input should be a valid number (got 'x')"),
    ],
)
def test_parameters_are_checked_once_and_by_their_types(typed_so, line, open_code):
    (said,) = problems(*typed_so, "trainer=cpu")
    assert said.startswith(line)


def test_what_is_no_decoder_is_no_decoder(open_code):
    for name, kind in (("Brief", "a kind of Judge"), ("loss", "a function")):
        (line,) = problems(f"decoder=plugin_open.{name}", "trainer=cpu", name="decode")
        assert line.startswith(f"decoder: plugin_open.{name} is {kind}, so no decoder is named; name a class that")


def test_a_module_inside_a_package_says_what_it_could_not_import(users):
    package = users.parent / "plugin_package"
    write(package / "__init__.py", "")
    write(package / "method.py", "\nimport plugin_helper_missing\ndef distil(run): ...\n")
    write(users.parent / "plugin_broken" / "__init__.py", "import plugin_helper_missing\n")
    write(users.parent / "plugin_broken" / "method.py", "def distil(run): ...\n")
    for target, said in {
        "plugin_package.method.distil": "plugin_package.method cannot be imported: No module named "
        "'plugin_helper_missing' (plugin_package/method.py, line 2)",
        "plugin_broken.method.distil": "plugin_broken cannot be imported: No module named 'plugin_helper_missing' "
        "(plugin_broken/__init__.py, line 1)",
    }.items():
        assert problems(f"method={target}", "trainer=cpu") == [f"method: {said}"]
    (line,) = problems("method=plugin_package.gone.distil", "trainer=cpu")
    assert line.startswith("method: there is no plugin_package.gone.distil (module 'plugin_package' has no attribute")


def test_a_folder_that_is_not_there_and_names_that_are_taken(users, capsys):
    (line,) = problems("--config-dir", str(users / "no"), "loss=first")
    assert line == f"--config-dir: there is no folder {users / 'no'}"
    (users / "model" / "gpt2.yaml").write_bytes((plugins.CONF / "model" / "gpt2.yaml").read_bytes())
    checked("--config-dir", str(users), "weak=gpt2", "trainer=cpu")  # the same file is no clash
    write(users / "loss" / "rkl.yaml", "_target_: plugin_losses.student_first\n_partial_: true\n")
    (config,) = checked("--config-dir", str(users), "loss=rkl", "trainer=cpu")
    assert config.loss["_target_"] == "plugin_losses.student_first"
    said = capsys.readouterr().err
    assert said == "note: mine/loss/rkl.yaml is read in place of w2sg's\n"


def test_conf_of_the_working_folder_is_read_first(users, capsys):
    conf = users.rename(users.parent / "conf")
    write(conf / "model" / "gpt2.yaml", "# Mine\nname: mine/gpt2\n")  # no defaults list: those of all models
    shipped = (plugins.CONF / "dataset" / "reviews.yaml").read_text(encoding="utf-8")
    write(conf / "dataset" / "reviews.yaml", shipped.replace("rotten_tomatoes", "imdb"))
    (config,) = checked("weak=gpt2", "dataset=reviews", "strong=tiny", "loss=first", "weak.lr=1", "trainer=cpu")
    assert (config.weak.name, config.weak.lr, config.strong.name) == ("mine/gpt2", 1, "gpt2")
    assert config.dataset.subset == "imdb"
    read = "conf/dataset/reviews.yaml, conf/model/gpt2.yaml are read in place of w2sg's of those names"
    assert capsys.readouterr().err == f"note: {read}\n"
    checked("weak=gpt2", "dataset=reviews", "trainer=cpu")
    assert capsys.readouterr().err == ""  # said once
    with plugins.shipped_alone():
        (config,) = checked("weak=gpt2", "dataset=reviews", "trainer=cpu")
    assert config.weak.name == "openai-community/gpt2"


def test_the_repositorys_own_conf_is_nobodys_but_its(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert plugins.own() == []
    checked("weak=gpt2", "trainer=cpu")
    assert capsys.readouterr().err == ""


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


@pytest.mark.slow
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
