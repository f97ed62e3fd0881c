"""Replies as the alpaca_eval tool reads them, and its annotations as win rates worked out by hand."""

import json

import numpy as np
import pytest
from conftest import compose, run_script

from w2sg.config.check import check_evaluate
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Replies, prompt_id
from w2sg.errors import ConfigError, UserError
from w2sg.evaluation import alpaca_eval as alpaca
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap

PROMPTS = [f"\n\nHuman: question {k}?\n\nAssistant:" for k in range(6)]
MULTI = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And now?\n\nAssistant:"
SAID = {
    "plain": [f"plain answer {k}" for k in range(6)],
    "search": [f"an answer that was searched for {'x' * k}" for k in range(6)],
}


def replies(texts, prompts=PROMPTS):
    zeros = np.zeros(len(texts), np.int64)
    prompts = [Dialogue.of_text(prompt) for prompt in prompts]
    return Replies([prompt_id(p) for p in prompts], prompts, list(texts), np.ones(len(texts), bool), zeros, zeros, {})


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "decoder=search"
    alpaca.export_replies(folder, {name: replies(texts) for name, texts in SAID.items()}, "mine")
    return folder


def annotation(k, preference, ours="decoder=search:search", base="decoder=search:plain", swap=False, **more):
    sides = [(SAID["plain"][k], base), (SAID["search"][k], ours)]
    (a, by_a), (b, by_b) = sides[::-1] if swap else sides
    row = {"instruction": f"question {k}?", "output_1": a, "generator_1": by_a, "output_2": b, "generator_2": by_b}
    return {**row, "annotator": "some_judge", "preference": preference, **more}


def write(folder, rows):
    file = folder / "annotations.json"
    file.write_text(json.dumps(rows))
    return file


# -- export -----------------------------------------------------------------------------------------------------------


def test_every_system_has_a_file_with_the_tools_keys(run):
    assert sorted(p.name for p in (run / "alpaca_eval").iterdir()) == ["plain.json", "search.json"]
    rows = json.loads((run / "alpaca_eval" / "search.json").read_text())
    assert rows[2] == {
        "instruction": "question 2?",
        "output": SAID["search"][2],
        "generator": "decoder=search:search",
        "dataset": "mine",
    }


def test_one_question_is_written_as_it_is_and_a_dialogue_with_its_speakers():
    assert alpaca.instruction(Dialogue.of_text("\n\nHuman: a\n\nb: c\n\nAssistant:")) == "a\n\nb: c"
    assert alpaca.instruction(Dialogue.of_text("no turns at all")) == "no turns at all"
    assert alpaca.instruction(Dialogue.of_text(MULTI)) == "Human: Hi\n\nAssistant: Hello.\n\nHuman: And now?"


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "alpaca_eval").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        alpaca.export_replies(tmp_path, {"plain": replies(SAID["plain"])}, "mine")


# -- import -----------------------------------------------------------------------------------------------------------


def test_win_rates_are_the_means_of_what_the_second_side_got(tmp_path):
    preferences = [1.0, 2.0, 1.9, 1.5, 2.0, 1.6]
    found = alpaca.win_rates(
        alpaca.read_annotations(write(tmp_path, [annotation(k, p) for k, p in enumerate(preferences)]))
    )
    (pair,) = found["pairs"]
    assert (pair["system"], pair["over"]) == ("decoder=search:search", "decoder=search:plain")
    assert pair["win_rate"]["value"] == pytest.approx(np.mean(preferences) - 1)
    assert pair["win_rate"]["low"] < pair["win_rate"]["value"] < pair["win_rate"]["high"]
    lengths = [np.array([len(t) for t in SAID[name]]) for name in ("search", "plain")]
    expected = comparisons.length_controlled_preference(np.array(preferences) - 1, *lengths, Bootstrap(6))
    assert pair["length_controlled"] == expected.as_dict()
    assert pair["longer"]["value"] == pytest.approx((lengths[0] - lengths[1]).mean())
    assert pair["p"] == pytest.approx(0.375)  # four wins of five
    assert found["annotators"] == ["some_judge"]


def test_both_orders_and_several_annotators_are_one_verdict(tmp_path):
    rows = [annotation(0, 2), annotation(0, 2, swap=True), annotation(0, 1.4, annotator="other"), annotation(1, 1)]
    found = alpaca.win_rates(alpaca.read_annotations(write(tmp_path, rows)))
    (pair,) = found["pairs"]
    assert pair["prompts"] == 2
    assert pair["win_rate"]["value"] == pytest.approx(((1 + 0 + 0.4) / 3 + 0) / 2)
    assert found["annotators"] == ["other", "some_judge"]


def test_old_draws_count_half_and_no_verdict_counts_not(tmp_path):
    file = write(tmp_path, [annotation(0, 0), annotation(1, None), annotation(2, float("nan"))])
    found = alpaca.win_rates(alpaca.read_annotations(file))
    assert found["pairs"][0]["win_rate"]["value"] == 0.5
    assert found["without_verdict"] == 2
    with pytest.raises(UserError, match="none of them has a preference"):
        alpaca.win_rates(alpaca.read_annotations(write(tmp_path, [annotation(1, None)])))


def test_generators_are_recognised_by_what_they_said(run, tmp_path):
    rows = [annotation(k, 1 + k / 5, ours="my model", base="the old one") for k in range(6)]
    rows += [{**annotation(0, 2), "generator_1": "gpt4", "output_1": "something else"}]
    found = alpaca.win_rates(alpaca.read_annotations(write(tmp_path, rows)), alpaca.replies_of(run))
    names = [(pair["system"], pair["over"]) for pair in found["pairs"]]
    assert names == [("decoder=search:search", "decoder=search:plain"), ("decoder=search:search", "gpt4")]


def test_replies_that_the_run_no_longer_has_are_refused(run, tmp_path):
    rows = [annotation(k, 2) for k in range(4)]
    rows[2]["output_2"] = "from an earlier run"
    with pytest.raises(UserError, match=r"row 3: this is not what 'decoder=search:search' replied"):
        alpaca.win_rates(alpaca.read_annotations(write(tmp_path, rows)), alpaca.replies_of(run))
    strangers = [{**annotation(0, 2, ours="x", base="y"), "output_1": "no", "output_2": "nor this"}]
    with pytest.raises(UserError, match="no reply of the run is among them"):
        alpaca.win_rates(alpaca.read_annotations(write(tmp_path, strangers)), alpaca.replies_of(run))
    with pytest.raises(UserError, match=r"has no alpaca_eval/\*\.json"):
        alpaca.replies_of(tmp_path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("text", "is no object"),
        ({"output_1": 3}, "output_1 must be text"),
        ({"instruction": None}, "instruction must be text"),
        ({"preference": 2.5}, "must lie between 1 and 2"),
        ({"preference": "2"}, "must be a number from 1 to 2"),
        ({"preference": True}, "must be a number from 1 to 2"),
        ({"generator_2": "decoder=search:plain"}, "with itself"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, said):
    bad = row if isinstance(row, str) else {**annotation(1, 2), **row}
    with pytest.raises(UserError, match=rf"row 2 of .*{said}"):
        alpaca.read_annotations(write(tmp_path, [annotation(0, 1), bad]))


def test_a_row_without_its_preference_is_named(tmp_path):
    row = annotation(0, 1)
    del row["preference"]
    with pytest.raises(UserError, match=r"row 1 of .* has no preference"):
        alpaca.read_annotations(write(tmp_path, [row]))


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read"), ("{}", "no list"), ("[]", "no list")])
def test_a_file_that_is_none_is_said(tmp_path, text, said):
    file = tmp_path / "annotations.json"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        alpaca.read_annotations(file)
    with pytest.raises(UserError, match="cannot be read"):
        alpaca.read_annotations(tmp_path / "missing.json")


def test_the_command_prints_the_table_and_writes_it(run, tmp_path):
    file = write(tmp_path, [annotation(k, 1 + k / 5) for k in range(6)])
    result = run_script("evaluate.py", f"annotations={file}", f"of={run}")  # its name holds "="
    assert "Judged by some_judge" in result.stdout
    found = json.loads((tmp_path / "win_rates.json").read_text())
    assert found["pairs"][0]["win_rate"]["value"] == pytest.approx(0.5)


def test_the_run_is_named_only_with_annotations():
    with pytest.raises(ConfigError, match=r"of: read only with annotations"):
        check_evaluate(compose("runs=outputs", "of=outputs/x", name="evaluate"))
