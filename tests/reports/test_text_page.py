"""The page of a run whose models write: every number of the report is on it, whatever was measured."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest

from w2sg.methods.cong import story
from w2sg.reports.assemble import Report, findings_of
from w2sg.reports.sections.alpha_sweep import AlphaSweep
from w2sg.reports.sections.held_out_pairs import HeldOutPairs
from w2sg.reports.sections.judge import JudgeFacts
from w2sg.reports.sections.provenance import Provenance, Reading
from w2sg.reports.sections.replies import RepliesShown
from w2sg.reports.sections.splits import Splits
from w2sg.reports.sections.systems import Systems
from w2sg.reports.sections.training import FitTraining

pytestmark = pytest.mark.drawn

SYSTEMS = ["base", "weak", "cong_s", "cong", "weak_sft", "ceiling"]
NAMES = ["plain", "0", "0.4", "1"]
EMPTY = {"value": None, "low": None, "high": None}
REPLY = "It is <b>bold</b> & <script>alert('x')</script>\n\nsecond paragraph " + "word " * 900


class Numbers:
    """Numbers that are nowhere twice."""

    def __init__(self):
        self.draw = np.random.default_rng(0)

    def between(self, low, high):
        return float(self.draw.uniform(low, high))

    def around(self, low, high, width=0.05):
        value = self.between(low, high)
        return {"value": value, "low": value - width, "high": value + width}


def compared(of):
    return {
        "prompts": 40,
        "win_rate": of.around(0.3, 0.7),
        "length_controlled": of.around(0.3, 0.7),
        "gap": of.around(-1, 1),
        "standardised": of.around(-1, 1),
        "p": of.between(0.01, 0.9),
    }


def swept(of, controlled):
    wins = {key: [[None if i == j else of.between(0.1, 0.9) for j in NAMES] for i in NAMES] for key in EMPTY}
    found = {
        "mean": {n: of.around(-1, 1) for n in NAMES},
        "scaled": {n: of.around(0.2, 0.8) for n in NAMES},
        "over_plain": {n: {k: compared(of)[k] for k in ("gap", "standardised", "p")} for n in NAMES[1:]},
        "wins": {"names": NAMES, **wins},
        "length_correlation": {n: of.around(-0.5, 0.5) for n in NAMES},
    }
    return found | ({"length_controlled": {n: of.around(0.3, 0.7) for n in NAMES[1:]}} if controlled else {})


def lengths(of):
    return {"mean": of.between(100, 300), "median": of.between(100, 300), "truncated": 0.25, "empty": 0.0}


def measured(of):
    values = {key: of.between(0.2, 0.8) for key in ("accuracy", "auroc", "nll", "brier", "ece", "overconfidence")}
    return {**values, "intervals": {key: [value - 0.04, value + 0.04] for key, value in values.items()}}


def a_reply(of, system):
    row = {"system": system, "prompt_id": "p", "reply": REPLY, "finished": False, "tokens": 1234}
    more = {"implicit": of.between(-9, 9), "implicit_per_token": of.between(-1, 1)} if "alpha" in system else {}
    return row | more | {"explicit": of.between(-3, 3)}


def whole():
    """A report of everything."""
    of = Numbers()
    systems = {}
    for name in SYSTEMS:
        others = [o for o in ("base", "weak", "weak_sft", "cong_s", "ceiling") if o != name]
        systems[name] = {
            "length": lengths(of),
            "replies": 40,
            **({} if name == "base" else {"kl_per_token": of.around(0.1, 0.5)}),
            "reward": of.around(-1, 1),
            "length_correlation": of.around(-0.5, 0.5),
            "against": {other: compared(of) for other in others},
            "perplexity": of.around(20, 90),
        }
    last = {"step": 20, "loss": of.between(1, 5), "grad_norm": of.between(0.1, 2)}
    rewards = {f"rewards/{key}": of.between(0.1, 0.9) for key in ("chosen", "rejected", "margins", "accuracies")}
    fit = {"steps": 20, "examples": 1280, "packed": True, "best_epoch": 1}
    return {
        "method": "cong",
        "dataset": "hh-rlhf",
        "weak": "models/Small-1B",
        "strong": "models/Large-8B",
        "loss": "sigmoid",
        "seed": 3,
        "command": "python train.py method=cong",
        "metrics": {name: measured(of) for name in ("weak", "cong_s", "student", "weak_sft", "ceiling")},
        "tests": {
            f"student - {other}": {
                **{"difference": of.between(-0.1, 0.1), "low": -0.2, "high": 0.2},
                **{"only_student": 7, "only_other": 5, "p": of.between(0.1, 0.9)},
            }
            for other in ("weak", "cong_s", "weak_sft", "ceiling")
        },
        "pgr": {
            **{"value": of.between(0.1, 0.9), "low": 0.05, "high": 0.95, "resolved": True},
            **{"gap": of.between(0.1, 0.3), "gap_low": 0.05, "gap_high": 0.4},
        },
        "text": {
            "systems": systems,
            "dropped": {"cong": {"identical replies": 17}, "weak": {}},
            "pairs": 1263,
            "judge": {
                "model": "org/Judge-2B",
                "trained": False,
                "accuracy": of.around(0.6, 0.8),
                "length_correlation": of.around(-0.5, 0.5),
            },
            "alphas": {
                "names": NAMES,
                "alphas": [None, 0.0, 0.4, 1.0],
                "chosen": "0.4",
                "prompts": 40,
                "length": {n: lengths(of) for n in NAMES},
                "implicit": swept(of, False),
                "implicit_per_token": swept(of, False),
                "explicit": swept(of, True),
            },
            "examples": [
                {
                    "prompt": "\n\nHuman: <i>why</i>?\n\nAssistant:",
                    "replies": [a_reply(of, system) for system in (*(f"alpha {n}" for n in NAMES), *SYSTEMS)],
                }
            ],
            "training": {"cong-s": fit | {"packed": None, "last": last}, "cong": fit | {"last": last | rewards}},
        },
        "data": {
            "sizes": {"ground_truth": 5000, "transfer": 6000, "test": 40},
            "overlaps": {"transfer and test": 0},
            "length_only": {"rule": "longer is preferred", "accuracy": 0.51, "low": 0.4, "high": 0.6},
            "label_noise": {},
        },
        "diagnostics": {},
        "stages": [
            {
                **{"name": "cong", "key": "cong-1a2b", "cached": False, "seconds": 12.5},
                **{"tokens": 1000, "useful_token_fraction": 0.9},
            }
        ],
        "versions": {"w2sg": "0.1.0"},
        "config": {
            "method": {
                "self_alignment": False,
                "alignment": {"pairs": "given"},
                "decoding": {"alpha": 0.4, "gamma": None},
            },
            "weak": {"untuned": None},
        },
        "warnings": ["the judge <is> near chance"],
    }


CURVES = {
    "cong-s": [{"step": 10, "loss": 3.0, "grad_norm": 1.0}],
    "cong": [
        *(
            {"step": s, "loss": 0.7, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2}
            | {"rewards/accuracies": 0.6}
            for s in (10, 20)
        ),
        {"step": 20, "held_out_loss": 0.6},
    ],
    "judge": [{"step": s, "loss": 0.5} for s in (1, 2)],
    **{f"other-{k}": [{"step": s, "loss": 0.5} for s in (1, 2)] for k in range(3)},
    "empty": [],
}


def words(page):
    """The page's text without figures and tags."""
    body = re.sub(r"<(style|script|svg).*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def figures(page):
    return re.findall(r"<svg [^>]*>", page)


def alts(page):
    return [re.search('aria-label="([^"]*)"', image)[1] for image in figures(page)]


def sections(curves):
    training = FitTraining("text")
    training.curves = curves
    first = [AlphaSweep(), Systems(), HeldOutPairs(), JudgeFacts("text"), training, RepliesShown("text")]
    return [*first, Splits(), Reading(), Provenance()]


def verdict(content):
    return findings_of(content, sections({}))


def text_page(content, curves):
    """The page from what report.json holds, with ConG's story."""
    options = content["config"]["method"]
    config = SimpleNamespace(
        method=options
        | {"dpo": {"loss": content["loss"]}, "analysis": {"alphas": [0.0]}, "baselines": [], "judge": {}},
        weak=SimpleNamespace(name=content["weak"], untuned=content["config"]["weak"]["untuned"]),
        strong=SimpleNamespace(name=content["strong"]),
        dataset=SimpleNamespace(name=content["dataset"]),
        seed=content["seed"],
    )
    told = story(config)
    heading = {"title": told.title, "verdict": verdict(content), "names": told.names}
    heading |= {"uses_of_splits": told.uses_of_splits}
    return Report(content | heading, sections(curves), {}).page()


@pytest.fixture(scope="module")
def rendered():
    content = whole()
    page = text_page(content, CURVES)
    return content, page, words(page)


def shown(found, digits, sign=""):
    low, high = (format(found[key], f"{sign},.{digits}f") for key in ("low", "high"))
    return f"{format(found['value'], f'{sign},.{digits}f')} {low} to {high}"


def test_every_setting_of_the_sweep_stands_in_its_tables(rendered):
    content, _, text = rendered
    sweep = content["text"]["alphas"]
    for kind, digits in (("implicit_per_token", 4), ("explicit", 3)):
        for name in NAMES:
            assert shown(sweep[kind]["mean"][name], digits, "+") in text
            assert shown(sweep[kind]["length_correlation"][name], 2, "+") in text
        for i, name in enumerate(NAMES[1:], 1):
            over, wins = sweep[kind]["over_plain"][name], sweep[kind]["wins"]
            assert shown(over["gap"], digits, "+") in text
            assert shown(over["standardised"], 2, "+") in text
            against_plain = {key: wins[key][i][0] for key in EMPTY}
            p = f"{over['p']:.3f}".lstrip("0")
            assert f"{shown(against_plain, 3)} {p} " in text
    for name in NAMES[1:]:
        assert shown(sweep["explicit"]["length_controlled"][name], 3) in text
    for found in sweep["length"].values():
        assert f"{found['mean']:,.1f} median {found['median']:,.0f} 25.0% 14.2% to 40.2%" in text  # Wilson, 10 of 40


def test_every_system_stands_in_the_table(rendered):
    content, _, text = rendered
    for name, found in content["text"]["systems"].items():
        assert shown(found["reward"], 3) in text
        assert shown(found["perplexity"], 2) in text
        assert f"{found['length']['mean']:,.1f} median" in text
        if name != "base":
            assert shown(found["kl_per_token"], 4) in text
            assert shown(found["against"]["base"]["win_rate"], 3) in text
            assert shown(found["against"]["base"]["length_controlled"], 3) in text
            of_pairs = content["metrics"]["student" if name == "cong" else name]
            low, high = of_pairs["intervals"]["accuracy"]
            assert text.count(f"{of_pairs['accuracy']:.3f} {low:.3f} to {high:.3f}") == 2  # there and among the metrics
        for other in {"weak_sft", "ceiling"} - {name}:
            assert shown(found["against"][other]["win_rate"], 3) in text


def test_verdict_says_what_is_resolved(rendered):
    content = copy.deepcopy(rendered[0])
    sweep, against = content["text"]["alphas"], content["text"]["systems"]["cong"]["against"]
    sweep["implicit_per_token"]["over_plain"]["0.4"]["gap"] = {"value": 0.1, "low": 0.05, "high": 0.15}
    sweep["explicit"]["over_plain"]["0.4"]["gap"] = {"value": -0.1, "low": -0.25, "high": 0.15}
    against["base"] |= {"win_rate": {"value": 0.7, "low": 0.6, "high": 0.8}, "length_controlled": EMPTY}
    against["weak_sft"]["win_rate"] = {"value": 0.45, "low": 0.4, "high": 0.52}
    against["ceiling"]["win_rate"] = {"value": 0.3, "low": 0.2, "high": 0.4}
    assert verdict(content) == (
        "Contrastive samples at alpha 0.4 over plain ones of the aligned weak model, on 40 test prompts: implicit "
        "reward per token +0.1000 [+0.0500, +0.1500], explicit reward -0.100 [-0.250, +0.150] (not resolved). The "
        "student's win rate over the untrained strong model is 0.700 [0.600, 0.800], with length controlled not "
        "estimable; against weak SFT 0.450 [0.400, 0.520] (not resolved), against the ceiling 0.300 [0.200, 0.400]. "
        "95 % intervals over test prompts, of one run: other seeds and training rows add to them. "
        "“Not resolved”: the interval includes no difference."
    )


def test_the_rest_of_the_page(rendered):
    content, page, text = rendered
    assert "Small-1B aligns Large-8B on hh-rlhf: ConG, alpha 0.4, seed 3" in text
    assert "python train.py method=cong" in text
    judge = content["text"]["judge"]["accuracy"]
    assert f"{judge['value']:.3f} [{judge['low']:.3f}, {judge['high']:.3f}]" in text
    assert "The judge (Judge-2B, used as it is)" in text
    assert f"performance gap recovered: {content['pgr']['value']:.2f} [0.05, 0.95]" in text
    assert "1,263 pairs" in text
    assert "identical replies: 17" in text
    last = content["text"]["training"]["cong"]["last"]
    assert f"{last['loss']:.3f} {last['grad_norm']:.3f} +{last['rewards/chosen']:.3f}" in text
    assert f"+{last['rewards/margins']:.3f} {last['rewards/accuracies']:.3f}" in text
    assert "5,000 rows; the weak model is aligned on its pairs" in text
    assert "self_alignment: false" in page
    assert page.count("<h2>") == 8
    assert [alt.count("loss") for alt in alts(page)].count(4) == 1  # four fits beside each other, not all in one row


def test_replies_are_escaped_and_whole(rendered):
    content, page, text = rendered
    assert page.count("<script") == 1
    assert "<b>bold" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == len(NAMES) + len(SYSTEMS)
    assert "Human: &lt;i&gt;why&lt;/i&gt;?" in page
    assert page.count("word word word word") > 0
    assert text.count("1,234 cut off") == len(NAMES) + len(SYSTEMS)
    assert "the judge &lt;is&gt; near chance" in page
    for reply in content["text"]["examples"][0]["replies"]:
        assert f"{reply['explicit']:+.3f}" in text
    after = page[page.index("<summary>The settings of the sweep") :]
    assert after.index("alpha plain") < after.index("</details>")


def test_every_figure_has_words_and_is_in_the_page(rendered):
    page = rendered[1]
    assert len(figures(page)) == 8  # sweep: 3, systems, preferences, fits: cong, four others, one more
    assert all(len(alt) > 10 for alt in alts(page))
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def no_judge(content):
    del content["text"]["judge"]
    del content["text"]["alphas"]["explicit"]
    for found in content["text"]["systems"].values():
        for key in ("reward", "against", "length_correlation"):
            del found[key]
    for row in content["text"]["examples"][0]["replies"]:
        del row["explicit"]


def no_sweep(content):
    del content["text"]["alphas"]
    content["text"]["examples"][0]["replies"] = content["text"]["examples"][0]["replies"][len(NAMES) :]


def no_baselines(content):
    for name in ("ceiling", "weak_sft"):
        del content["text"]["systems"][name], content["metrics"][name], content["tests"][f"student - {name}"]
        for found in content["text"]["systems"].values():
            del found["against"][name]
    del content["pgr"]
    example = content["text"]["examples"][0]
    example["replies"] = [row for row in example["replies"] if row["system"] not in ("ceiling", "weak_sft")]


def no_damage(content):
    for found in content["text"]["systems"].values():
        found.pop("kl_per_token", None)
        del found["perplexity"]


def no_values(content):
    """Everything that may be without a value is."""

    def empty(found):
        if isinstance(found, dict):
            return dict(EMPTY) if found.keys() == EMPTY.keys() else {k: empty(v) for k, v in found.items()}
        return found

    for key in ("systems", "judge"):
        content["text"][key] = empty(content["text"][key])
    sweep = content["text"]["alphas"]
    for kind in ("implicit_per_token", "explicit"):
        sweep[kind] = empty(sweep[kind]) | {"wins": sweep[kind]["wins"]}
    content["text"]["systems"]["base"]["reward"] = {"value": 0.25, "low": None, "high": None}


def gamma(content):
    """The setting used has a temperature of its own, and stands last."""
    sweep = content["text"]["alphas"]
    sweep["names"], sweep["alphas"] = ["plain", "0", "1", "0.4"], [None, 0.0, 1.0, 0.4]
    content["text"]["alphas"] = renamed(sweep, "0.4", "0.4 (gamma 1.5)")
    content["config"]["method"]["decoding"] = {"alpha": None, "gamma": 1.5}


def renamed(found, old, new):
    if isinstance(found, dict):
        return {new if key == old else key: renamed(value, old, new) for key, value in found.items()}
    if isinstance(found, list):
        return [renamed(value, old, new) for value in found]
    return new if found == old else found


def itself(content):
    content["config"]["method"]["self_alignment"] = True
    content["config"]["weak"]["untuned"] = "models/Small-1B-before"


@pytest.mark.parametrize(
    ("change", "there", "missing"),
    [
        (no_judge, ["No judge was given", "implicit reward per token", "by implicit"], ["explicit", "wins over untr"]),
        (no_sweep, ["Trained models", "win rate over the untrained"], ["Contrastive decoding", "The settings of the"]),
        (no_baselines, ["Trained models"], ["strong ceiling", "against the ceiling", "weak SFT", "gap recovered"]),
        (no_damage, ["wins over untrained"], ["KL per token"]),
        (no_values, ["not estimable", "0.250"], ["None", "nan"]),
        (itself, ["Small-1B aligns itself on hh-rlhf: ConG in self-alignment", "not trained on"], []),
    ],
)
def test_what_was_not_measured_is_left_out(change, there, missing):
    content = whole()
    change(content)
    page = text_page(content, {})
    text = words(page) + " ".join(alts(page))
    for part in there:
        assert part in text
    for part in missing:
        assert part not in text
    assert all(alts(page))


def test_gamma_stands_at_its_alpha():
    content = whole()
    gamma(content)
    text = words(text_page(content, {}))
    assert "ConG, gamma 1.5, seed 3" in text
    table = text[text.index("Implicit reward per token") :]
    signs = "[+-]"
    places = [re.search(rf" {re.escape(n)} {signs}", table) for n in ("plain", "0", "0.4 (gamma 1.5) (used)", "1")]
    assert [p.start() for p in places] == sorted(p.start() for p in places)
