"""Every page of docs/howto does what it says: its files are written, its commands run, on tiny models.

A page names a file in backquotes before the block that it holds. Its commands run in a folder of the user's, with
tiny stand-ins for models and data.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, WORDS, run_script

HOWTO = ROOT / "docs" / "howto"
SHOWN = {  # what the summary of the page's runs names
    "loss": ["brier", "reverse", "reverse kl"],
    "label_method": ["sharpened", "finetune"],
    "dataset": ["sentences", "local"],
    "text_method": ["distil", "cong"],
    "judge": ["Brief", "Shorter"],
    "section": ["watched", "finetune", "agreem"],
    "decoder": ["shortest", "contrastive"],
}
# models and data of a page's commands, in whose place tiny ones run
REAL = {"weak=smollm2-135m-gguf", "strong=smollm2-135m-gguf", "dataset=review_prompts"}
OF_LABELS = {"loss", "label_method", "dataset", "section"}
PAGES = sorted(page.stem for page in HOWTO.glob("*.md") if page.stem != "index")
BLOCK = re.compile(r"(?:^`(?P<file>[^`\n]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Page:
    """What a page has its reader write and type."""

    files: dict[str, str]
    commands: list[tuple[str, list[str]]]

    @staticmethod
    def of(name: str) -> "Page":
        files, commands = {}, []
        for block in BLOCK.finditer((HOWTO / f"{name}.md").read_text(encoding="utf-8")):
            if block["file"]:
                files[block["file"]] = block["text"]
            else:
                assert block["kind"] == "bash", f"{name}: a block of {block['kind']} without the name of its file"
                commands += [block_command(line) for line in block["text"].splitlines() if line.strip()]
        return Page(files, commands)

    def write(self, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def block_command(line: str) -> tuple[str, list[str]]:
    python, script, *typed = shlex.split(line)
    assert python == "python"
    return script, typed


def stand_ins(typed: list[str], model: Path, pairs: Path, labels: bool) -> list[str]:
    """Tiny models and data for a command that is to run something, where it names none of its own."""
    if any(word.startswith("runs=") for word in typed):
        return []
    chosen = {word.partition("=")[0] for word in typed}
    more = ["trainer=cpu", "logger=none", "seed=0"]
    for role in ("weak", "strong"):
        if role not in chosen:
            more += [f"{role}=hf", f"{role}.name={model}", f"{role}.max_length=96"]
    if "method=cong" in typed:
        more += ["method.decoding.max_new_tokens=8", "method.sampling.max_new_tokens=8", "method.analysis.alphas=[]"]
        more += ["method.baselines=[]"]
    if labels:
        more += ["weak.tune=head", "strong.tune=head", "optim.head.epochs=1"]
    if "dataset" not in chosen:
        more += ["dataset=local", f"dataset.path={pairs}", "dataset.sizes={weak_train: 24, transfer: 24, test: 16}"]
    return more


class Desk:
    """The user's folder: a page's files, and its commands as they are typed there."""

    def __init__(self, folder: Path, name: str, model: Path, pairs: Path):
        self.folder, self.name, self.page, self.model, self.pairs = folder, name, Page.of(name), model, pairs
        self.page.write(folder)
        lines = [("+" if k % 3 else "-") + f"sentence {k} is {WORDS[k % len(WORDS)]}" for k in range(120)]
        (folder / "sentences.txt").write_text("\n".join(lines), encoding="utf-8")
        (folder / "pairs").symlink_to(pairs)

    def run(self, script: str, *typed: str, check: bool = True):
        typed = tuple(word for word in typed if word not in REAL)
        more = stand_ins(list(typed), self.model, self.pairs, self.name in OF_LABELS)
        return run_script(script, *typed, *more, check=check, folder=self.folder)

    def refused(self, script: str, *typed: str) -> str:
        """What is said of a mistake: one line."""
        result = self.run(script, *typed, check=False)
        lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("Writing model shards")]
        assert result.returncode == 1, result.stdout + result.stderr
        assert len(lines) == 1, result.stderr
        return lines[0].removeprefix("error: ")

    def reports(self) -> dict[str, dict]:
        return {
            str(file.parent.relative_to(self.folder / "outputs")): json.loads(file.read_text(encoding="utf-8"))
            for file in self.folder.glob("outputs/**/report.json")
        }


@pytest.fixture
def desk(request, tmp_path, tiny_gpt2, pairs_folder):
    return Desk(tmp_path, request.param, tiny_gpt2, pairs_folder)


def at(page: str):
    return pytest.mark.parametrize("desk", [page], indirect=True, ids=[page])


@pytest.mark.slow
@pytest.mark.parametrize("desk", PAGES, indirect=True, ids=PAGES)
def test_every_command_of_a_page_runs_and_shows_beside_shipped_runs(desk):
    for script, typed in desk.page.commands:
        said = desk.run(script, *typed).stdout
    assert script == "evaluate.py"  # the last one gathers the runs
    assert "left out" not in said
    for name in SHOWN[desk.name]:
        assert re.search(rf"\b{re.escape(name)}", said), said


@pytest.mark.parametrize("name", [*PAGES, "index"])
def test_pages_are_short_and_plain(name):
    text = (HOWTO / f"{name}.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (20 if name == "index" else 42)
    prose = re.sub(r"^\s*[-|#].*$|`[^`\n]+`:$", "", BLOCK.sub("", text), flags=re.M)
    sentences = [s.split() for s in re.split(r"(?<=[.?!])\s+", prose) if s.strip()]
    assert sum(map(len, sentences)) / len(sentences) < 20


def test_the_index_names_every_page():
    index = (HOWTO / "index.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\w+)\.md\)", index) == [*dict.fromkeys(re.findall(r"\]\((\w+)\.md\)", index))]
    assert sorted(re.findall(r"\]\((\w+)\.md\)", index)) == PAGES


# -- mistakes ---------------------------------------------------------------------------------------------------------


@at("label_method")
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            ["method=mine.sharpenned"],
            "method: there is no mine.sharpenned (module 'mine' has no attribute 'sharp",
        ),
        (["method=mine.sharpened", "method.powr=3"], "method.powr: no such key; did you mean method.power?"),
        (["method=mine.sharpened", "method.power=high"], "method.power: input should be a valid number (got 'high')"),
        (["method=mine.sharpened", "+method.pwr=1"], "method.pwr: no such key; did you mean method.power?"),
    ],
)
@pytest.mark.slow
def test_mistakes_with_the_options_of_a_method(desk, typed, said):
    assert desk.refused("train.py", *typed).startswith(said)


@at("label_method")
@pytest.mark.slow
def test_a_method_that_returns_nothing_or_fails_harms_no_other_run(desk):
    code = desk.page.files["mine.py"]
    mistakes = "def silent(run):\n    sharpened(run)\n\n\ndef broken(run):\n    return 1 / 0\n"
    (desk.folder / "mine.py").write_text(f"{code}\n\n{mistakes}", encoding="utf-8")
    silent = desk.run("train.py", "method=mine.silent", check=False)
    said = "error: mine.silent returned NoneType and no report; let it return what run.report gives"
    assert silent.stderr.strip().splitlines()[-1] == said
    failed = desk.run("train.py", "method=mine.broken", check=False)
    assert failed.returncode == 1
    assert "mine.py" in failed.stderr  # the place in the user's own code
    assert "ZeroDivisionError: division by zero" in failed.stderr
    desk.run("train.py", "method=finetune")
    assert "finetune" in desk.run("evaluate.py", "runs=outputs").stdout


GIVEN = 'Agreement(content={"agreement": share})'
SECTION_MISTAKES = [  # what stands in mine.py, what stands there instead, and what is said
    (GIVEN, f"{GIVEN}, {GIVEN}", "sections: two have the key 'agreement'; give one of them another"),
    (GIVEN, "share", "sections: .* is none; make it a w2sg.reports.section.Section"),
    (GIVEN, "Agreement()", r"section 'agreement' \(mine.Agreement\): its warnings or summary .*KeyError: 'agreement'"),
    ('{"agreement": share}', '{"metrics": share}', "section 'agreement': metrics is in the report already; give it"),
    (
        '{"agreement": share}',
        '{"agreement": same}',
        "section 'agreement': report.json cannot hold its .*ndarray",
    ),
    (
        "{{ agreement|estimate }}",
        "{{ agremnt }}",
        "section 'agreement' .*its page cannot .*'agremnt' is undefined",
    ),
    ('return {"agreement": report["agreement"]}', "return 1 / 0", "section 'agreement' .*ZeroDivisionError"),
    ("else []", 'else ""', r"section 'agreement' .*warnings\(\) returned no list of texts"),
    ("**says)", "weak=run.predict(weak, transfer))", "run.report: weak is of transfer; give run.predict"),
]


@at("section")
@pytest.mark.slow
def test_mistakes_in_a_section_are_said_in_one_line_and_harm_no_other_run(desk):
    desk.run("train.py", "method=finetune")
    code = desk.page.files["mine.py"]
    for right, wrong, said in SECTION_MISTAKES:
        assert right in code
        (desk.folder / "mine.py").write_text(code.replace(right, wrong), encoding="utf-8")
        assert re.match(said, desk.refused("train.py", "method=mine.watched")), said
    assert "finetune" in desk.run("evaluate.py", "runs=outputs").stdout


DECODER_MISTAKES = [
    (
        '    words = "the shortest sample"\n',
        "",
        ".*Shortest: say in `words` what a page calls it",
    ),
    ("def write(", "def writes(", r".*Shortest: write\(engines, prompts\) is missing"),
    (
        "    words =",
        '    needs = {"best"}\n    words =',
        ".*Shortest: needs 'best'; choose among strong, tuned,",
    ),
    (
        '"shortest"] = "shortest"',
        '"eft"] = "eft"',
        ".*Shortest: another system is called 'eft'; give it",
    ),
    (
        "(Decoder)",
        "",
        "decoder: mine.Shortest is a kind of object, so no decoder is named; name a class that inherits from",
    ),
    (
        "        return [Written",
        "        [Written",
        "decoder=shortest: write returned NoneType; return a list",
    ),
    ("Written.of(result)", "result.best.text", "decoder=shortest: write returned a list of str; return a list"),
    ("for result in results]", "for result in results[1:]]", "decoder=shortest: it wrote 15 replies to 16 prompts"),
]


@at("decoder")
@pytest.mark.slow
def test_mistakes_in_a_decoder_are_said_in_one_line(desk):
    code = desk.page.files["mine.py"]
    for right, wrong, said in DECODER_MISTAKES:
        assert right in code
        (desk.folder / "mine.py").write_text(code.replace(right, wrong), encoding="utf-8")
        assert re.match(said, desk.refused("evaluate.py", "decoder=mine.Shortest")), said


@at("text_method")
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["method.sft.epochs=two"], "method.sft.epochs: input should be a valid integer"),
        (["method.sftt.lr=0.1"], "method.sftt.lr: no such key; did you mean method.sft.lr?"),
        (["method.judge.kind=best"], "method.judge: there is no such kind; choose judge=reward, implicit, llm"),
        (["weak=bow"], "weak, strong: a bag of words cannot write"),
    ],
)
@pytest.mark.slow
def test_mistakes_with_a_text_method(desk, typed, said):
    assert desk.refused("train.py", "method=mine.distil", *typed).startswith(said)


@at("text_method")
def test_nothing_is_said_of_the_options_of_a_method_that_cannot_be_imported(desk):
    code = desk.page.files["mine.py"]
    (desk.folder / "mine.py").write_text(code.replace("AnyJudge, ", "AnyJugde, "), encoding="utf-8")
    said = desk.refused("train.py", "method=mine.distil", "method.sft.epochs=3", "judge=llm")
    assert said.startswith("method: mine.distil: ImportError: cannot import name 'AnyJugde'")
