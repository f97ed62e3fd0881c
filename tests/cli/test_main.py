"""The command w2sg: verbs, help and completion."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from w2sg.cli import completion, docs, main
from w2sg.cli.help import VERBS, about, page, shorten
from w2sg.config import plugins
from w2sg.config.evaluate_schema import EvaluateConfig
from w2sg.config.programs import STORE
from w2sg.errors import ConfigError, UserError

SCRIPT = r"""
t() { COMP_LINE="$1"; COMP_POINT=${#1}; COMP_WORDS=(w2sg); _w2sg; (IFS='|'; echo "${COMPREPLY[*]}"); }
source "$1"; t "w2sg tr"; t "w2sg train loss=rk"; t "w2sg train -m loss=ce,rk"; t "w2sg store l"
"""


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_fits_80_columns_and_has_two_examples(verb):
    lines = list(page(verb))
    assert max(map(len, lines)) <= 80
    place = lines.index("Examples:")
    assert [line.startswith(f"  w2sg {verb}") for line in lines[place + 1 : place + 3]] == [True, True]


def test_help_lists_what_is_done_first_and_names_no_page_that_a_wheel_lacks():
    lines = list(page("train"))
    groups = [line.partition("=")[0] for line in lines if not line.startswith((" ", "*")) and "= " in line]
    assert groups == [
        *(
            "method",
            "loss",
            "weak",
            "strong",
            "dataset",
            "judge",
            "refine",
            "trainer",
            "engine",
            "logger",
            "experiment",
            "pair",
        )
    ]
    assert "`w2sg docs options`" in "\n".join(lines)
    assert "out=" not in "\n".join(page("compare"))  # which does not read it


def test_pages_are_shown_with_the_commands_of_a_wheel():
    assert set(docs.pages()) >= {"index", "howto/loss", "howto/wandb_sweep.yaml", "notebook.ipynb"}
    assert "\nw2sg train method=mine.distil weak=" in docs.show("howto/text_method")
    stages = docs.show("concepts/stages")
    assert all(f"\nw2sg store {word}" in stages for word in ("list", "why student\n", "prune apply=true", "verify"))
    told = EvaluateConfig.model_fields["store"].description.split(" | ")
    assert tuple(line.partition(":")[0] for line in told) == STORE
    assert "\nw2sg decode -m decoder=sampling,eft" in docs.show("decoding")
    for name in docs.pages():
        blocks = "".join(re.findall(r"```bash\n.*?```", docs.show(name), re.S))
        assert "train.py " not in blocks.replace("srun --kill-on-bad-exit=1 python train.py", ""), name
        assert "evaluate.py" not in blocks, name
    assert all("strong.lr" in line for line in docs.show("options", "strong.lr").splitlines())
    with pytest.raises(UserError, match=r"did you mean `w2sg docs howto/loss`\?"):
        docs.show("howto/los")


def test_every_choice_has_a_line():
    for group in (
        "method",
        "loss",
        "model",
        "dataset",
        "decoder",
        "judge",
        "refine",
        "trainer",
        "engine",
        "logger",
        "experiment",
    ):
        for file, *_ in plugins.files(group).values():
            assert len(about(file)) > 10, file
    assert shorten("Ends early; not here (arXiv 1): never", 19) == "Ends early"


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys; from w2sg.cli.main import main; sys.argv[1:] = ['train', '-h']; main(); "
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "* finetune" in done.stdout
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean `w2sg train`?"),
        (["loss=rkl"], "a verb comes first, as `w2sg train loss=rkl`"),
        (["compare"], "needs one FOLDER of runs, as `w2sg compare outputs`"),
        (["store", "list", "more"], "more: w2sg store takes list, why, prune or verify"),
        (["export", "outputs/one", "folder"], "folder: w2sg export takes one RUN; did you mean to=folder?"),
        (["help", "trian"], "did you mean `w2sg train`?"),
    ],
)
def test_a_wrong_verb_is_one_line(words, said):
    with pytest.raises(ConfigError) as error:
        main._program(words)
    assert said in str(error.value)


def test_a_shell_without_completion_is_one_line(capsys):
    with pytest.raises(SystemExit):
        main._main(["--install-completion", "csh"])
    assert "csh is no shell here; give one of bash, zsh, fish" in capsys.readouterr().err


def test_the_tab_key_completes_in_bash(tmp_path):
    command = tmp_path / "bin" / "w2sg"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m w2sg "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    known = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path), "PATH": path}
    subprocess.run(["w2sg", "--install-completion", "bash"], env=known, check=True, capture_output=True)
    file = tmp_path / "bash-completion" / "completions" / "w2sg"
    done = subprocess.run(
        ["bash", "-c", SCRIPT, "bash", str(file)], env=known, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["train ", "rkl ", "ce,rkl ", "list "], done.stderr


def test_hydra_completes_keys_below_a_group():
    assert "dataset.sizes.test=" in completion.candidates(["train", "dataset.sizes.t"])
