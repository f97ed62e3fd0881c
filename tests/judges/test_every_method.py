"""Every judge with every method that judges: the same protocol, the same words, and its numbers worked out by hand."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import compose, save_tiny_model

from w2sg.config.check import check
from w2sg.config.typed import of_judges
from w2sg.errors import ConfigError, UserError
from w2sg.experiment.run import run_method
from w2sg.judges import Verdicts
from w2sg.judges.language_model import LabelVerdicts
from w2sg.metrics import replies as comparisons
from w2sg.metrics.intervals import Bootstrap

SIZES = {"ground_truth": 12, "transfer": 12, "test": 8}
QUESTION = "'{conversation}|{first}|{second}|A or B?'"
OWN = '''
import numpy as np

from w2sg.judges import Judge, Verdicts


class Letters(Judge):
    """Rewards every letter of a kind."""

    def __init__(self, run, letter: str = "e"):
        super().__init__(run)
        self.letter = letter

    def rewards(self, name, replies):
        return np.array([float(text.count(self.letter)) for text in replies.texts])


class Longer(Judge):
    """Prefers the longer reply, and compares alone."""

    def compare(self, name, a, b):
        longer = [np.sign(len(x) - len(y)) for x, y in zip(a.texts, b.texts, strict=True)]
        return Verdicts((1 + np.array(longer)) / 2)


class Silent(Judge):
    """Does nothing."""


class Halves(Judge):
    """Gives fewer rewards than there are replies."""

    def rewards(self, name, replies):
        return np.zeros(len(replies) // 2)


class Percent(Judge):
    """Verdicts out of range."""

    def compare(self, name, a, b):
        return Verdicts(np.full(len(a), 50.0))


class NoStart(Judge):
    """Does not call the constructor of all judges."""

    def __init__(self, run): ...

    def rewards(self, name, replies):
        return np.zeros(len(replies))


class EarlyUse(Judge):
    """Fails in its constructor."""

    def __init__(self, run):
        self.models["mine"] = 1

    def rewards(self, name, replies):
        return np.zeros(len(replies))


class NanJudge(Judge):
    """Rewards few replies."""

    def rewards(self, name, replies):
        return np.where(np.arange(len(replies)) < 2, 1.0, np.nan)


class Infinite(Judge):
    """Rewards without end."""

    def rewards(self, name, replies):
        return np.full(len(replies), np.inf)


class InfiniteVerdicts(Judge):
    """Verdicts with rewards without end."""

    def compare(self, name, a, b):
        return Verdicts(np.full(len(a), 0.5), (np.full(len(a), np.inf), np.zeros(len(a))))


class NoVerdicts(Judge):
    """No verdict, on anything."""

    def compare(self, name, a, b):
        return Verdicts(np.full(len(a), np.nan))


class NoTestVerdicts(Judge):
    """No verdict on the pairs of the dataset."""

    def compare(self, name, a, b):
        return Verdicts(np.full(len(a), np.nan if name == "test-pairs" else 0.5))


class Fails(Judge):
    """Fails in its own code."""

    def rewards(self, name, replies):
        return np.array([1 / 0 for _ in replies.texts])


class FailsToCompare(Judge):
    """Fails in its own code."""

    def compare(self, name, a, b):
        return Verdicts(a.texts[0].scores)


class Listed(Judge):
    """Verdicts as a list."""

    def compare(self, name, a, b):
        return Verdicts([0.75] * len(a))


def no_judge(run): ...
'''
METHODS = ("cong", "decode", "refine")
JUDGES = ("reward", "implicit", "llm", "rewards of one's own", "comparisons of one's own")
REWARDS = ("reward", "implicit", "rewards of one's own")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged-models")
    kinds = {"weak": "gpt2", "untuned": "gpt2", "strong": "llama", "judge": "llama", "tuned": "gpt2", "before": "gpt2"}
    return {
        name: save_tiny_model(folder / name, kind, seed=seed, width=16)
        for seed, (name, kind) in enumerate(kinds.items())
    }


@pytest.fixture(scope="module")
def own_judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own-judges")
    (folder / "own_judges.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def typed(pairs_folder, models, own_judges):
    def make(method, out, *more):
        common = ["dataset=local", f"dataset.path={pairs_folder}", "trainer=cpu", "logger=none", f"out={out}"]
        common += [f"dataset.sizes.{name}={size}" for name, size in SIZES.items()]
        for role in ("weak", "strong"):
            common += [f"{role}=hf", f"{role}.name={models[role]}", f"{role}.max_length=96"]
        common += ["weak.tune=full", "strong.tune=full", "optim.head.epochs=1"]
        own = {
            "cong": [
                "method=cong",
                f"weak.before_alignment={models['untuned']}",
                *(f"method.{stage}.global_batch_size=8" for stage in ("sft", "dpo")),
                "method.sft.lr.full=0.002",
                "method.sft.epochs=1",
                "method.dpo.lr.full=0.002",
                "method.decoding.max_new_tokens=8",
                "method.analysis.alphas=[1.0]",
                "method.baselines=[]",
                "method.evaluation.kl=false",
                "method.evaluation.perplexity=false",
            ],
            "decode": [
                "decoder=eft",
                "decoder.max_new_tokens=8",
                f"weak.before_alignment={models['untuned']}",
                "strong.name=" + str(models["before"]),
                "method.evaluation.surprise=false",
                "method.evaluation.frontier=false",
            ],
            "refine": [
                "method=refine",
                "refine.max_new_tokens=4",
                "refine.context_size=2",
                "refine.exemplar='{question} {answer}; '",
                "refine.query='{question} so'",
                "method.sampling.max_new_tokens=4",
                "method.sft.lr.full=0.002",
                "method.sft.global_batch_size=4",
                "method.sft.epochs=1",
                "method.baselines=[naive]",
            ],
        }[method]
        return [*common, *own, *more]

    return make


@pytest.fixture(scope="module")
def judged(models):
    """What is typed for each judge, by its name in `JUDGES`."""
    return {
        "reward": ["judge=reward", "method.judge.max_length=96"],
        "implicit": [
            "judge=implicit",
            f"method.judge.tuned={models['tuned']}",
            f"method.judge.untuned={models['before']}",
            "method.judge.max_length=96",
        ],
        "llm": ["judge=llm", f"method.judge.model={models['judge']}", f"method.judge.question={QUESTION}"],
        "rewards of one's own": ["judge=own_judges.Letters", "method.judge.letter=a"],
        "comparisons of one's own": ["judge=own_judges.Longer"],
    }


def run(typed, method, out, *more, name="run"):
    name_of_conf = "decode" if method == "decode" else "train"
    config = check(compose(*typed(method, out, *more), name=name_of_conf))
    return run_method(config, out / name, list(more)).content


def pair_of(content, out, method):
    """What was measured of one system over another, how the judge's rewards are stored, and the replies of both."""
    name, other = {"cong": ("cong", "base"), "decode": ("eft", "plain"), "refine": ("student", "base")}[method]
    rows = pq.read_table(out / "run" / "samples.parquet").to_pylist()
    sides = [{row["prompt_id"]: row for row in rows if row["system"] == system} for system in (name, other)]
    found = {"cong": "text", "decode": "decoding", "refine": "refinement"}[method]
    found = content[found]
    wins = found["wins"][other] if method == "refine" else found["systems"][name]["against"][other]
    return found, wins, [[side[i] for i in sides[0]] for side in sides]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("judge", JUDGES)
def test_every_judge_judges_what_every_method_wrote(typed, judged, tmp_path, method, judge):
    axis = ["method.content.kind=reward"] if (method, judge) == ("refine", "reward") else []
    content = run(typed, method, tmp_path, *judged[judge], *axis)
    found, wins, (mine, theirs) = pair_of(content, tmp_path, method)
    assert 0 <= wins["win_rate"]["low"] <= wins["win_rate"]["value"] <= wins["win_rate"]["high"] <= 1
    assert wins["prompts"] == len(mine) == SIZES["test"]
    assert {"length_controlled", "longer", "p"} <= set(wins)
    assert found["judge"]["gives_rewards"] == (judge in REWARDS) == ("gap" in wins)
    assert found["judge"]["kind"] == {"reward": "reward", "implicit": "implicit", "llm": "llm"}.get(judge, "own")
    assert 0 <= found["judge"]["accuracy"]["value"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert ">None<" not in page
    if method == "refine":
        assert "student wins<br>over this" in page
    else:
        column = {"cong": "explicit", "decode": "reward"}[method]
        assert all((column in row) == (judge in REWARDS) for row in mine)
        assert all(("reward" in system) == (judge in REWARDS) for system in found["systems"].values())
    # by hand
    if judge == "rewards of one's own":
        a, b = (np.array([row["reply"].count("a") for row in rows], float) for rows in (mine, theirs))
        assert wins["win_rate"] == comparisons.win_rate(a, b, Bootstrap(len(a))).as_dict()
        assert wins["gap"] == comparisons.reward_gap(a, b, Bootstrap(len(a))).as_dict()
    if judge == "comparisons of one's own":
        a, b = (np.array([len(row["reply"]) for row in rows]) for rows in (mine, theirs))
        preferred = (1 + np.sign(a - b)) / 2
        assert wins["win_rate"] == comparisons.preference_rate(preferred, Bootstrap(len(a))).as_dict()
        assert wins["p"] == comparisons.paired_test(preferred, np.full(len(a), 0.5))
    if judge == "reward" and method != "refine":
        a, b = (np.array([row[column] for row in rows], float) for rows in (mine, theirs))
        assert wins["win_rate"] == comparisons.win_rate(a, b, Bootstrap(len(a))).as_dict()
    if judge == "llm":
        assert {"position_bias", "flips", "label_mass"} <= set(wins)
        assert "on_test_pairs" in found["judge"]


# -- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "judge", "more", "said"),
    [
        (
            "cong",
            "llm",
            ["weak.before_alignment=null", "method.alignment.pairs=on_policy"],
            "method.judge: on-policy samples are ranked by rewards; name a judge that gives them, as judge=reward",
        ),
        (
            "cong",
            "comparisons of one's own",
            ["weak.before_alignment=null", "method.alignment.pairs=on_policy"],
            "method.judge: on-policy samples are ranked by rewards; name a judge that gives them, as judge=reward",
        ),
        (
            "refine",
            "llm",
            ["method.content.kind=reward"],
            "method.content.kind: a reward, and this judge gives none; name another, as judge=reward, or measure in "
            "another way",
        ),
        ("refine", "implicit", ["method.target=labels"], "judge: not read by method.target=labels; leave it out"),
        ("cong", "llm", ["method.judge.model=weak"], "weak would be guide and judge at once"),
        ("decode", "llm", ["method.judge.model=weak"], "weak would be guide and judge at once"),
        (
            "cong",
            "rewards of one's own",
            ["method.judge.letter=3"],
            "method.judge.letter: 3 is not text",
        ),
        ("cong", "rewards of one's own", ["+method.judge.leter=a"], "method.judge.leter: "),
        ("cong", "reward", ["judge=own_judges.no_judge"], "own_judges.no_judge is no judge"),
        ("cong", "reward", ["judge=own_judges.Silent"], "own_judges.Silent has neither a method rewards nor compare"),
    ],
)
def test_what_a_judge_cannot_do_is_refused_before_any_work(typed, judged, models, tmp_path, method, judge, more, said):
    choices = [*(judged[judge] if judge != "reward" else ()), *more]
    with pytest.raises(ConfigError) as error:
        check(compose(*typed(method, tmp_path, *choices), name="decode" if method == "decode" else "train"))
    (line,) = error.value.problems
    assert said.replace("weak would", f"{models['weak']} would") in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("Halves", r"Halves\.rewards: gave \(12,\) for 24 replies; give one number each"),
        ("Percent", r"Percent\.compare: give w2sg\.judges\.Verdicts of 8 numbers between 0 and 1"),
        ("NanJudge", r"^own_judges\.NanJudge\.rewards: gave NaN for 22 of 24 replies"),
        ("Infinite", r"^own_judges\.Infinite\.rewards: 24 of 24 rewards are infinite"),
        ("InfiniteVerdicts", r"^own_judges\.InfiniteVerdicts\.compare: 8 of 8 rewards are infinite"),
        ("NoVerdicts", r"method\.judge: NoVerdicts came to no verdict on guide over plain; choose another"),
        ("NoTestVerdicts", r"^own_judges\.NoTestVerdicts: it came to no verdict on any of the 8 test pairs"),
        ("NoStart", r"^own_judges\.NoStart: call super\(\).__init__\(run\) first"),
        ("EarlyUse", r"^own_judges\.EarlyUse.__init__: AttributeError: .*'models' \(own_judges.py, line \d+\)$"),
        ("Fails", r"^own_judges\.Fails\.rewards: ZeroDivisionError: division by zero \(own_judges.py, line \d+\)$"),
        ("FailsToCompare", r"^own_judges\.FailsToCompare\.compare: AttributeError: .*'scores' \(own_judges.py, line"),
    ],
)
def test_opinions_that_do_not_fit_the_replies_are_refused(typed, tmp_path, judge, said):
    with pytest.raises(UserError, match=said):
        run(typed, "decode", tmp_path, f"judge=own_judges.{judge}")


def test_verdicts_may_be_a_list(typed, tmp_path):
    content = run(typed, "decode", tmp_path, "judge=own_judges.Listed")
    assert content["decoding"]["systems"]["eft"]["against"]["plain"]["win_rate"]["value"] == 0.75


def test_a_guide_is_refused_by_its_weights_where_it_teaches(typed, models, tmp_path):
    copy = shutil.copytree(models["weak"], tmp_path / "another-name")
    with pytest.raises(UserError, match="the aligned weak model would be guide and judge at once"):
        run(typed, "cong", tmp_path, "judge=llm", f"method.judge.model={copy}", f"method.judge.question={QUESTION}")
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("contrastive*"))


def test_a_judge_that_wrote_the_replies_is_said_to(typed, judged, tmp_path):
    content = run(typed, "cong", tmp_path, *judged["llm"], "method.judge.model=strong")
    assert any("the judge is the strong model" in line and "self-preference" in line for line in content["warnings"])


@pytest.mark.slow
def test_rewards_of_ones_own_rank_on_policy_samples(typed, judged, tmp_path):
    more = ["weak.before_alignment=null", "method.alignment.pairs=on_policy", "method.alignment.samples=4"]
    more += ["method.alignment.lr.full=0.002", "method.alignment.global_batch_size=8"]
    content = run(typed, "cong", tmp_path, *judged["rewards of one's own"], *more)
    (weak,) = [stage["key"] for stage in content["stages"] if stage["name"] == "weak"]
    key = json.loads((tmp_path / "store" / weak / "key.json").read_text())
    assert key["from"]["rewards"]["judge"] == "Letters"
    again = run(typed, "cong", tmp_path, *judged["rewards of one's own"], *more, "method.judge.letter=o", name="other")
    assert weak not in {stage["key"] for stage in again["stages"]}  # other rewards, other pairs


def test_one_spelling_for_all_programs():
    assert of_judges(["judge@method.judge=llm", "+judge.model=x"]) == ["judge=llm", "+method.judge.model=x"]
    assert of_judges(["method.judge._target_=a.B", "judges=1"]) == ["judge=a.B", "judges=1"]
    for typed, kind in ((["method=cong"], "reward"), (["method=refine", "judge=implicit"], "implicit")):
        assert compose(*typed).method.judge.kind == kind
    assert "judge" not in compose().method
    with pytest.raises(ConfigError, match=r"judge: w2sg.methods.finetune.finetune judges nothing"):
        check(compose("judge=llm"))


def test_verdicts_are_mirrored():
    verdicts = Verdicts.of_rewards(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
    assert verdicts.preferred.tolist() == [0.5, 0.0, 1.0]
    assert verdicts.mirrored().preferred.tolist() == [0.5, 1.0, 0.0]
    assert verdicts.mirrored().rewards[0].tolist() == [1.0, 3.0, 2.0]
    first, mass = np.array([[0.9, 0.4], [0.2, 0.2]]), np.ones(2)
    judged = LabelVerdicts.of_labels(first, mass)
    assert judged.mirrored().preferred == pytest.approx(LabelVerdicts.of_labels(first[:, ::-1], mass).preferred)
    assert judged.mirrored().of_judge() == judged.of_judge()
