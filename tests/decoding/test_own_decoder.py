"""A decoder from outside the tree: one class in one file, named by its path, and nothing else edited."""

import json
import sys

import pyarrow.parquet as pq
import pytest
from conftest import compose, run_script
from runs import decode_arguments
from runs import run_decoder as run

from w2sg.config.check import check
from w2sg.decoding.decoders import base, decoder_in
from w2sg.errors import ConfigError, UserError
from w2sg.experiment.run import run_method

CODE = '''"""The shortest of several samples."""

from typing import Literal

from w2sg.config import option
from w2sg.decoding.decoders import Decoder, Written


class Brevity:
    def start(self, prompts):
        pass

    def extend(self, grown):
        return [-float(len(h.text)) for h in grown]

    def select(self, rows):
        pass


class Shortest(Decoder):
    """The shortest of several samples of the strong model."""

    kind: Literal["shortest"] = "shortest"
    samples: int = option(4, "samples of each prompt", gt=0)
    words = "the shortest sample"

    def setting(self):
        return f"of {self.samples}"

    def write(self, engines, prompts):
        results = engines.search(self, prompts, Brevity(), self.samples, distinct=False)
        return [Written.of(result) for result in results]
'''


@pytest.fixture(scope="module")
def arguments(pairs_folder, models):
    return decode_arguments(pairs_folder, models)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the user's file, anew where it is changed; a decoder of a test is not there in the next one."""
    monkeypatch.setattr(base, "KINDS", dict(base.KINDS))
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str = CODE) -> None:
        (tmp_path / "my_decoders.py").write_text(code)
        sys.modules.pop("my_decoders", None)

    yield write
    sys.modules.pop("my_decoders", None)


@pytest.mark.slow
def test_it_is_run_measured_and_shown_beside_the_others(own, arguments, tmp_path):
    out = tmp_path / "out"
    own()
    typed = arguments(out, "my_decoders.Shortest", "decoder.samples=3")
    report = out / "own" / "report.json"
    result = run_script("evaluate.py", *typed, f"hydra.run.dir={out / 'own'}", folder=tmp_path)
    content = json.loads(report.read_text())
    decoding = content["decoding"]
    assert decoding["decoder"] == {
        "kind": "shortest",
        "samples": 3,
        **{"temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 10, "batch_size": 32},
    }
    # three samples are written to each prompt and read by the strong model alone
    cost = {name: system["cost"] for name, system in decoding["systems"].items()}
    assert 1.5 * cost["plain"]["strong"] < cost["shortest"]["strong"]
    assert cost["shortest"]["guide"] == 0
    assert set(decoding["systems"]) == {"plain", "shortest"}
    rows = pq.read_table(out / "own" / "samples.parquet").to_pylist()
    length = {name: sum(len(r["reply"]) for r in rows if r["system"] == name) for name in ("plain", "shortest")}
    assert length["shortest"] < length["plain"]
    title = "The shortest sample (of 3) of strong on local, seed 0"
    assert title in (out / "own" / "report.html").read_text()
    assert title in result.stdout
    assert decoding["without_kl"] == {"shortest": "nothing is known of its law"}
    run(arguments, out, "eft")
    run_script("evaluate.py", f"runs={out}")  # its class is not there any more
    (group,) = json.loads((out / "summary.json").read_text())["decoders"]
    assert {"the shortest sample", "emulated fine-tuning"} <= {row["name"] for row in group["rows"]}


def test_its_source_text_is_part_of_the_key(own, arguments, tmp_path):
    def stage(code: str) -> str:
        own(code)
        typed = arguments(tmp_path, "my_decoders.Shortest", "decoder.samples=3")
        typed += ["method.judge.model=null", "method.evaluation.surprise=false", "method.evaluation.prompts=2"]
        config = check(compose(*typed, name="decode"))
        stages = run_method(config, tmp_path / "run", typed).content["stages"]
        return next(s["key"] for s in stages if s["name"] == "shortest")

    first = stage(CODE)
    assert stage(CODE) == first
    assert stage(CODE.replace("-float", "float")) != first


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["decoder.samples=0"], "decoder.samples: input should be greater than 0"),
        (["+decoder.sampels=3"], "decoder.sampels: no such key"),
        (["decoder._target_=my_decoders.Longest"], "decoder._target_: there is no my_decoders.Longest"),
        (["decoder._target_=my_decoders.Brevity"], "decoder._target_: my_decoders.Brevity is no decoder"),
        (["+decoder.server.url=http://localhost/v1"], "decoder.server: this decoder is not written for one"),
        (["strong.tune=head"], "strong.tune: a head cannot write"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(own, arguments, tmp_path, typed, said):
    own()
    with pytest.raises(ConfigError, match=said):
        check(compose(*arguments(tmp_path, "my_decoders.Shortest", *typed), name="decode"))


def test_a_kind_has_one_class(own):
    own(CODE.replace('"shortest"', '"search"'))
    with pytest.raises(TypeError, match="Shortest: another system is called 'search'"):
        __import__("my_decoders")
    assert decoder_in({"kind": "shortest"}) is None


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            '    kind: Literal["shortest"] = "shortest"\n',
            "",
            'decoder._target_: my_decoders.Shortest: give it kind: Literal["shortest"] = "shortest"',
        ),
        (
            '"shortest"] = "shortest"',
            '"my kind/x"] = "my kind/x"',
            "Shortest: its kind 'my kind/x' names files; use letters",
        ),
        (
            "    words =",
            '    needs = frozenset({"strong", "reward"})\n    words =',
            "Shortest: needs 'reward', the reward model of its option guide; give it guide",
        ),
    ],
)
def test_what_is_wrong_with_the_class_is_said_before_any_work(own, arguments, tmp_path, right, wrong, said):
    assert right in CODE
    own(CODE.replace(right, wrong))
    typed = arguments(tmp_path, "my_decoders.Shortest")
    result = run_script("evaluate.py", *typed, check=False, folder=tmp_path)
    (line,) = (line for line in result.stderr.strip().splitlines() if not line.startswith("note: "))
    assert said in line
    assert "base.py" not in line


EXTEND, WRITE = "return [-float(len(h.text)) for h in grown]", "results = engines.search"
LINE = r" \(my_decoders.py, line \d+\)$"


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (EXTEND, "return [0.0]", r"^my_decoders.Brevity.extend: gave 1 values for \d+ hypotheses"),
        (EXTEND, "return 0.0", r"^my_decoders.Brevity.extend: TypeError: 'float' object is not iterable"),
        (EXTEND, "return [float('nan') for h in grown]", r"^my_decoders.Brevity.extend: gave NaN for (\d+) of \1 hyp"),
        (EXTEND, "return [h.length for h in grown]", f"^my_decoders.Brevity.extend: AttributeError: .*'length'{LINE}"),
        (WRITE, "1 / 0; " + WRITE, f"^my_decoders.Shortest.write: ZeroDivisionError: division by zero{LINE}"),
        (
            WRITE,
            "engines.tuned; " + WRITE,
            r"^engines.tuned: the decoder does not say that it needs it; write needs = ",
        ),
        (
            WRITE,
            "engines.pair; " + WRITE,
            r"^engines.pair: .* needs = frozenset\({\"strong\", \"tuned\", \"untuned\"}\)",
        ),
        (
            "    def setting(self):",
            '    @property\n    def stage(self):\n        return "a/b"\n\n    def setting(self):',
            "a/b",
        ),
    ],
)
def test_an_error_in_its_hooks_names_the_class_the_hook_and_the_line(own, arguments, tmp_path, right, wrong, said):
    assert right in CODE
    own(CODE.replace(right, wrong))
    typed = [*arguments(tmp_path, "my_decoders.Shortest"), "method.judge.model=null"]
    with pytest.raises(UserError, match=said):
        run_method(check(compose(*typed, name="decode")), tmp_path / "run", typed)


@pytest.mark.parametrize("full", ["0", "1"])
def test_the_traceback_is_shown_where_it_is_asked_for(own, arguments, tmp_path, full):
    own(CODE.replace(WRITE, "1 / 0; " + WRITE))
    typed = [*arguments(tmp_path / "out", "my_decoders.Shortest"), "method.judge.model=null"]
    result = run_script("evaluate.py", *typed, check=False, folder=tmp_path, HYDRA_FULL_ERROR=full)
    assert result.returncode == 1
    assert "my_decoders.Shortest.write: ZeroDivisionError: division by zero (my_decoders.py, line" in result.stderr
    assert ("Traceback" in result.stderr) == (full == "1")


def test_a_decoder_that_forgets_a_prompt_is_told(own, arguments, tmp_path):
    own(CODE.replace("for result in results]", "for result in results[1:]]"))
    typed = arguments(tmp_path, "my_decoders.Shortest")
    with pytest.raises(UserError, match="decoder=shortest: it wrote 3 replies to 4 prompts"):
        run_method(check(compose(*typed, "decoder.batch_size=4", name="decode")), tmp_path / "run", typed)
