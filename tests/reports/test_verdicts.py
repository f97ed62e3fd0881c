"""Pages say what a judge gave: rewards only where there are any, win rates only of prompts with a verdict."""

import copy
import re

import numpy as np
import pytest

from w2sg.decoding.decoders import Eft, Search
from w2sg.evaluation.comparisons import Comparisons
from w2sg.judges import Judge, Verdicts
from w2sg.reports.sections.alpha_sweep import AlphaSweep
from w2sg.reports.sections.axes import Axes
from w2sg.reports.sections.decoded import Decoded
from w2sg.reports.sections.judge import JudgeFacts
from w2sg.reports.sections.systems import Systems

EMPTY = {"value": None, "low": None, "high": None}
CUT = {"mean": 8.0, "median": 8.0, "truncated": 0.9, "empty": 0.0}


def around(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def over(prompts, without, gap=None):
    """What one system's wins over another are, on ``prompts`` of which ``without`` more have no verdict."""
    measured = {"prompts": prompts, "without_verdict": without, "win_rate": around(0.8)}
    return measured | {"length_controlled": around(0.7), "p": 0.5} | ({} if gap is None else {"gap": around(gap)})


def decoded(kind, decoder, reward=None, against=None):
    """The report of a decoder: plain samples and its own."""
    system = {"replies": 16, "length": CUT, "characters": 30.0, "distinct_1": 0.5, "distinct_2": 0.6}
    system["cost"] = {"strong": 1.0, "guide": 0.0, "seconds": 0.0}
    systems = {"plain": copy.deepcopy(system), kind: system}
    if against is not None:
        systems["plain"]["against"], systems[kind]["against"] = {}, {"plain": against}
    if reward is not None:
        for measured in systems.values():
            measured["reward"] = around(reward)
    content = {"decoder": decoder | {"kind": kind}, "words": {"name": kind, "setting": ""}, "prompts": 16}
    return {"decoding": content | {"systems": systems}}


def replies(against=None, reward=None):
    """The report of a student that writes."""
    system = {"replies": 16, "length": CUT}
    student = system | ({} if against is None else {"against": {"base": against}})
    systems = {"base": system | ({} if against is None else {"against": {}}), "student": student}
    if reward is not None:
        systems = {name: measured | {"reward": around(reward)} for name, measured in systems.items()}
    return {"text": {"systems": systems, "student": "student", "judge": {"model": "x"}}, "metrics": {}}


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


MEASURED = {  # which of rewards and verdicts there are, and what replies that were cut off mean then
    "nothing": ({}, ""),
    "verdicts": ({"against": over(16, 0)}, ", so that verdicts are of unfinished text"),
    "rewards": ({"against": over(16, 0, 0.2), "reward": 0.3}, ", so that rewards are of unfinished text"),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_replies_that_were_cut_off_spoil_what_was_measured_alone(kind):
    measured, words = MEASURED[kind]
    for section, report in ((Decoded(), decoded("eft", {}, **measured)), (Systems(), replies(**measured))):
        lines = [line for line in section.warnings(report) if "cut off at max_new_tokens" in line]
        assert len(lines) == 1
        assert lines[0].startswith(f"replies cut off at max_new_tokens{words}: ")


@pytest.mark.parametrize("kind", MEASURED)
def test_the_decoders_tables_have_no_empty_columns(kind):
    report = decoded("eft", {}, **MEASURED[kind][0])
    html, (rewards, verdicts) = Decoded().html(report), (kind == "rewards", kind != "nothing")
    heads = re.findall(r"<th scope=col>(.*?)</th>", html)
    assert [("reward" in heads), ("reward − plain" in heads)] == [rewards, rewards]
    assert ("wins over plain" in heads) == ("sign test" in html) == verdicts
    assert "surprise" not in heads
    assert all(len(re.findall("<td>|<th scope=row>", row)) == len(heads) for row in html.split("<tr>")[2:])
    columns = [column.header for column in Decoded().table(report).columns]
    assert [("reward" in columns), ("wins over plain" in columns)] == [rewards, verdicts]
    report["decoding"]["systems"]["eft"]["surprise"] = around(2.0)
    assert "<th scope=col>surprise</th>" in Decoded().html(report)


def test_the_terminal_has_no_empty_column_of_rewards():
    for kind in ("verdicts", "rewards"):
        columns = [column.header for column in Systems().table(replies(**MEASURED[kind][0])).columns]
        assert ("reward" in columns) == (kind == "rewards")


def test_a_judge_that_compares_has_no_rewards_to_doubt():
    judge = {"model": "x", "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "notes": []}
    for gives, words in ((True, "so its rewards and win rates say little"), (False, "so its win rates say little")):
        (line,) = JudgeFacts("text").warnings({"text": {"judge": judge | {"gives_rewards": gives}}})
        assert words in line


def test_a_remedy_is_of_a_decoder_that_has_a_guide():
    hurt = {"reward": 0.1, "against": over(16, 0, -0.5)}
    for decoder, remedy in (
        (Eft().model_dump(), None),
        (Search().model_dump(), "try a smaller weight of the guide, another guide, normalise=mean, or none"),
        (Search(guide={"normalise": "mean"}).model_dump(), "try a smaller weight of the guide, another guide, or none"),
    ):
        (line,) = [line for line in Decoded().warnings(decoded(decoder["kind"], decoder, **hurt)) if "hurts" in line]
        assert line.endswith("[-0.600, -0.400])" if remedy is None else remedy)


# -- prompts without a verdict ----------------------------------------------------------------------------------------


def test_a_win_rate_is_of_the_prompts_that_have_a_verdict():
    words = "on the 1 of 16 prompts with a verdict"
    few, all_of_them = over(1, 15), over(16, 0)
    finding = Decoded().finding(decoded("eft", {}, against=few))
    assert f"against plain samples of the strong model 0.800 [0.700, 0.900] {words}." in finding
    assert "16 test prompts" not in finding
    assert "On 16 test prompts the win rate is" in Decoded().finding(decoded("eft", {}, against=all_of_them))
    assert f"is 0.800 [0.700, 0.900] {words}, with length controlled" in Systems().finding(replies(few))
    assert "verdict" not in Systems().finding(replies(all_of_them))
    for section, report in ((Decoded(), decoded("eft", {}, against=few)), (Systems(), replies(few))):
        assert f"0.800 0.700 to 0.900 {words}" in text_of(section.html(report))
        lost = [line for line in section.warnings(report) if "no verdict" in line]
        assert len(lost) == 1
        assert "15 of 16 prompts" in lost[0]


def test_the_sweep_says_how_many_prompts_have_a_verdict():
    sweep = AlphaSweep.measure(
        {"plain": None, "0.5": 0.5},
        "0.5",
        {name: np.arange(1, 17) for name in ("plain", "0.5")},
        {name: np.ones(16, bool) for name in ("plain", "0.5")},
        {"implicit_per_token": {"plain": np.linspace(0, 1, 16), "0.5": np.linspace(1, 0, 16)}},
        {"0.5": over(3, 13)},
    )
    assert "0.800 0.700 to 0.900 on the 3 of 16 prompts with a verdict" in text_of(sweep.html(sweep.content))
    assert any("alpha 0.5 over plain, 13 of 16 prompts" in line for line in sweep.warnings(sweep.content))


def test_the_axes_say_how_many_prompts_have_a_verdict():
    system = {"content": around(0.5), "characters": 9.0, "cut_off": 0.0}
    refinement = {"systems": {"base": system, "student": system}, "differences": {}, "left_out": [], "prompts": 16}
    report = {"refinement": refinement | {"wins": {"base": over(2, 14)}}}
    assert "on the 2 of 16 prompts with a verdict" in text_of(Axes().html(report))
    assert any("student over base, 14 of 16 prompts" in line for line in Axes().warnings(report))


def test_the_judges_accuracy_is_of_the_pairs_that_have_a_verdict():
    judge = {"model": "x", "accuracy": around(1.0), "gives_rewards": False, "pairs": 3, "without_verdict": 13}
    page = text_of(JudgeFacts("text").html({"text": {"judge": judge}}))
    assert "in 1.000 [0.900, 1.100] of the 3 of 16 test pairs on which it came to a verdict." in page
    page = text_of(JudgeFacts("text").html({"text": {"judge": judge | {"pairs": 16, "without_verdict": 0}}}))
    assert "in 1.000 [0.900, 1.100] of the test pairs." in page
    older = {key: judge[key] for key in ("model", "accuracy")}  # before pairs were counted
    assert "of the test pairs." in text_of(JudgeFacts("text").html({"text": {"judge": older}}))


class Some(Judge):
    """Comes to a verdict on the first prompt alone."""

    def compare(self, name, a, b):
        return Verdicts(np.array([1.0] + [np.nan] * (len(a) - 1)))


class Texts:
    """As much of replies as is compared."""

    def __init__(self, texts):
        self.texts, self.ids, self.fingerprint = texts, [str(k) for k in range(len(texts))], ""

    def __len__(self):
        return len(self.texts)

    def take(self, rows):
        return Texts([self.texts[row] for row in rows])


def test_prompts_without_a_verdict_are_counted():
    sides = {"one": Texts(["a"] * 16), "two": Texts(["bb"] * 16)}
    measured = Comparisons(Some(None), "stage", sides).over("one", "two")
    assert (measured["prompts"], measured["without_verdict"]) == (1, 15)
