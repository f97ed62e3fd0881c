"""Every command of the README, and of docs/ after `<!-- tested -->`, runs; tiny stand-ins replace what needs a hub."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, compose, run_script

from w2sg.config.check import check

README = (ROOT / "README.md").read_text()
PAGES = {p.relative_to(ROOT / "docs").as_posix(): p.read_text() for p in sorted((ROOT / "docs").rglob("*.md"))}
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
for text in PAGES.values():
    BLOCKS += re.findall(r"<!-- tested -->\n```bash\n(.*?)```", text, re.S)
LINKED = [p.relative_to(ROOT) for p in (ROOT / "README.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/**/*.md"))]
LINES = list(dict.fromkeys(line for block in BLOCKS for line in block.splitlines() if line.strip()))  # once each
TRAIN = [line.partition("train.py")[2] for line in LINES if "train.py" in line]
EVALUATE = [line.partition("evaluate.py")[2] for line in LINES if "evaluate.py" in line]


def jobs(command: str) -> list[str]:
    """The overrides of a command; of a multirun, its last job's."""
    words = [w for w in shlex.split(command) if not w.startswith("hydra")]
    if "-m" not in words:
        return words
    return [
        w if "[" in w else f"{w.partition('=')[0]}={w.partition('=')[2].split(',')[-1]}" for w in words if w != "-m"
    ]


def labels(pairs_folder: Path, tiny_gpt2: Path, out: Path) -> list[str]:
    """Small stand-ins for the data and the models of a command whose models label."""
    small = ["weak=bow", "weak.epochs=1", "strong=hf", f"strong.name={tiny_gpt2}", "strong.max_length=64"]
    return [*small, "dataset=local", f"dataset.path={pairs_folder}", f"out={out}", "trainer=cpu"]


def texts(pairs_folder: Path, tiny_gpt2: Path, out: Path, sizes: str, most: int, *more: str) -> list[str]:
    """The same of one whose models write; sizes of the splits, and the most tokens that are read."""
    small = [w for role in ("weak", "strong") for w in (f"{role}=hf", f"{role}.name={tiny_gpt2}")]
    small += [f"{role}.max_length={most}" for role in ("weak", "strong")]
    data = ["dataset=local", f"dataset.path={pairs_folder}", f"dataset.sizes={sizes}"]
    return [*small, *data, *more, f"out={out}", "trainer=cpu"]


def run_kept(overrides: list[str], stand_ins: list[str], out: Path, name: str = "train") -> dict:
    """Run a command but for its models and data; its report."""
    from w2sg.experiment.run import run_method

    replaced = ("weak=", "strong=", "dataset=", "dataset.path=", "weak.before_alignment=")
    kept = [o for o in overrides if not o.startswith(replaced)]
    kept = ["method.links=[{keep_layers: 1}]" if o.startswith("method.links=") else o for o in kept]  # of two layers
    return run_method(check(compose(*kept, *stand_ins, name=name)), out / "run", kept).content


def test_readme_and_pages_have_commands():
    assert len(TRAIN) == 21
    assert len(EVALUATE) == 10


@pytest.mark.parametrize("page", LINKED, ids=str)
def test_every_link_to_a_file_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("command", TRAIN)
@pytest.mark.slow
def test_every_training_command_of_the_readme_runs(command, pairs_folder, tiny_gpt2, tmp_path):
    overrides = jobs(command)
    if "trainer=ddp" in overrides:  # no GPU here: as many processes, on the CPU, are test_run's
        overrides.remove("trainer=ddp")
    if "plan=true" in overrides:
        said = run_script("train.py", *overrides, *labels(pairs_folder, tiny_gpt2, tmp_path)[:-1]).stdout
        assert "student" in said
        assert "h100-80" in said
        assert not list(tmp_path.iterdir())
        return
    check(compose(*overrides))  # as it stands: nothing is looked up on the hub yet
    if any(o.startswith(("method=cong", "experiment=cong")) for o in overrides):
        content = contrastive(overrides, pairs_folder, tiny_gpt2, tmp_path)
        assert {"weak", "student", "cong_s"} <= set(content["metrics"])
        return
    if "method=refine" in overrides and "method.target=labels" not in overrides:
        content = refined(overrides, pairs_folder, tiny_gpt2, tmp_path)
        assert {"base", "weak", "naive", "ceiling"} <= set(content["refinement"]["systems"])
        return
    whole = ["strong.tune=full"] if "method=refine" in overrides else []
    content = run_kept(overrides, [*labels(pairs_folder, tiny_gpt2, tmp_path), *whole], tmp_path)
    assert (tmp_path / "run" / "report.html").exists()
    more = {"direct"} if any(o.startswith("method=") and o != "method=refine" for o in overrides) else set()
    assert set(content["metrics"]) >= {"weak", "student", "ceiling"} | more


def contrastive(overrides, pairs_folder, tiny_gpt2, out) -> dict:
    """A ConG command with stand-ins, small."""
    small = ["method.decoding.max_new_tokens=4", "method.judge.feature_layer=2", "method.judge.max_length=64"]
    sizes = "{weak_train: 16, transfer: 16, test: 8}"
    stand_ins = texts(pairs_folder, tiny_gpt2, out, sizes, 64, *small, "optim.head.epochs=1")
    return run_kept(overrides, stand_ins, out)


def refined(overrides, pairs_folder, tiny_gpt2, out) -> dict:
    """A command that refines answers, with stand-ins, small."""
    small = ["method.sampling.max_new_tokens=4", "refine.max_new_tokens=4", "method.sft.global_batch_size=4"]
    small += ["refine.concept_tokens=4"] if "refine=iar" in overrides else []
    sizes = "{weak_train: 8, transfer: 8, test: 4}"
    return run_kept(overrides, texts(pairs_folder, tiny_gpt2, out, sizes, 128, *small), out)


@pytest.mark.slow
def test_every_evaluation_command_of_the_readme_runs(pairs_folder, tiny_gpt2, tmp_path):
    run_kept([], labels(pairs_folder, tiny_gpt2, tmp_path), tmp_path)
    for command in EVALUATE:
        if "export=" in command or "harness=" in command:
            continue  # of a run whose models write: the next test
        if "decoder=" in command:
            continue  # the test after it
        words = [w.replace("key=student", "key=weak-on-test") for w in shlex.split(command)]
        words = [
            w.replace("known_answers=all", "known_answers=loss_values") for w in words
        ]  # each is test_known_answers'
        words = [f"runs={tmp_path}" if w.startswith("runs=") else w for w in words]
        assert run_script("evaluate.py", *words, f"out={tmp_path}").stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in EVALUATE if "decoder=" in c])
def test_every_decoding_command_of_the_readme_runs(command, pairs_folder, tiny_gpt2, tmp_path):
    overrides = jobs(command)
    check(compose(*overrides, name="decode"))
    small = ["decoder.max_new_tokens=6", "method.judge.max_length=64", "optim.head.epochs=1"]
    small += ["weak.before_alignment=null"] if "weak.before_alignment" in command else []
    stand_ins = texts(pairs_folder, tiny_gpt2, tmp_path, "{weak_train: 16, transfer: 16, test: 8}", 64, *small)
    content = run_kept(overrides, stand_ins, tmp_path, "decode")
    assert content["decoding"]["prompts"] == 8


@pytest.mark.slow
def test_the_export_and_the_harness_of_the_readme_run(pairs_folder, tiny_gpt2, tmp_path):
    pytest.importorskip("lm_eval")
    contrastive(["method=cong", "method.baselines=[]", "method.analysis.alphas=[]"], pairs_folder, tiny_gpt2, tmp_path)
    (tmp_path / "tasks").mkdir()
    rows = [{"question": f"{k} and {k}?", "choices": ["good", "bad"], "answer": k % 2} for k in range(4)]
    (tmp_path / "tasks/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks/mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'tasks/rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    commands = [shlex.split(c) for c in EVALUATE if "export=" in c or "harness=" in c]
    assert [c[0].partition("=")[0] for c in commands] == ["export", "harness"]
    here = {"export": tmp_path / "run", "to": tmp_path / "model", "harness": tmp_path / "model", "tasks": "[mine]"}
    for words in commands:
        keys = [w.partition("=")[0] for w in words]
        typed = [f"{k}={here[k]}" if k in here else w for k, w in zip(keys, words, strict=True)]
        more = [f"include={tmp_path / 'tasks'}"] if "harness" in keys else []
        assert run_script("evaluate.py", *typed, *more, f"out={tmp_path}", f"root={tmp_path}/store").stdout.strip()
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("group", ["method", "judge", "loss", "dataset", "trainer", "logger"])
def test_the_table_of_choices_is_complete(group):
    row = next(line for line in PAGES["running.md"].splitlines() if line.startswith(f"| `{group}`"))
    listed = set(re.findall(r"[a-z_0-9]+", row.split("|")[2].split("(")[0]))
    assert listed == {p.stem for p in (ROOT / "conf" / group).glob("[!_]*.yaml")}


def test_every_experiment_is_on_the_page_of_papers():
    table = PAGES["papers.md"].partition("## A paper's figure")[2].partition("##")[0]
    for file in (ROOT / "conf" / "experiment").glob("[!_]*.yaml"):
        assert f"`{file.stem}`" in table
