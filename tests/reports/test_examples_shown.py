"""Rows and prompts that pages show: which, how many there are, cut, escaped, or left out."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import QUICK, label_arguments, run_typed

from w2sg.data.messages import Dialogue
from w2sg.reports.sections.overturned import EACH, SHOWN, Overturned, cut
from w2sg.reports.sections.won_and_lost import WonAndLost

LOGITS = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # the first, the second


class Rows(SimpleNamespace):
    def __len__(self):
        return len(self.ids)


def table(count: int, labels: list[int]) -> Rows:
    prompts = [Dialogue.of_text(f"\n\nHuman: <b>{k}</b>?\n\nAssistant:") for k in range(count)]
    texts = [(f"{prompt.text} one {k}", f"{prompt.text} two {k} {'long ' * 300}") for k, prompt in enumerate(prompts)]
    first = np.array([k % 2 for k in range(count)])
    return Rows(
        ids=[f"{count - k:03d}" for k in range(count)],
        prompts=prompts,
        texts=texts,
        first=first,
        kind="pairs",
        labels=np.array(labels),
    )


def test_rows_that_the_student_overturns_are_counted_cut_and_escaped():
    weak, student, labels = [0, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1, 0]
    test = table(7, labels)
    predictions = {"weak": LOGITS[weak], "student": LOGITS[student]}
    section = Overturned.measure(predictions, test)
    content = section.content["overturned"]
    assert content["rows"] == {"both right": 1, "student alone right": 4, "teacher alone right": 1, "both wrong": 1}
    shown = content["student_alone_right"]
    assert [row["id"] for row in shown] == ["001", "002", "005"]  # by id, of rows 6, 5, 2 and 1
    assert len(shown) == EACH
    assert [row["texts"][0].split()[:1] for row in shown] == [["one"], ["two"], ["one"]]  # the first reply of each
    assert "characters left out" in shown[0]["texts"][1]
    assert len(shown[0]["texts"][1]) < SHOWN + 60
    html = section.html(section.content)
    assert "3 of 4 rows" in html
    assert "&lt;b&gt;6&lt;/b&gt;" in html
    assert "<b>6" not in html
    without = Overturned.measure(predictions, test, texts=False)
    assert list(without.content["overturned"]) == ["rows"]
    assert "report.texts=false" in without.html(without.content)


def test_a_cut_says_how_much_is_left_out():
    text = "".join(map(str, range(400)))
    found = cut(text, 101)
    assert found == f"{text[:50]} [... {len(text) - 101:,} characters left out ...] {text[-51:]}"
    assert cut("short", 5) == "short"


def test_prompts_that_a_student_wins_and_loses_are_shown():
    prompts = [Dialogue.of_text(f"question {k}") for k in range(5)]
    mine, theirs = (
        SimpleNamespace(ids=[f"{k}" for k in range(5)], prompts=prompts, texts=[f"{who} {k}" for k in range(5)])
        for who in ("ours", "theirs")
    )
    section = WonAndLost.measure(("student", "base"), np.array([0.9, 0.2, 0.5, np.nan, 1.0]), mine, theirs)
    content = section.content["won_and_lost"]
    assert content["prompts"] == {"won": 2, "tied": 1, "lost": 1, "without a verdict": 1}
    assert [row["replies"] for row in content["lost"]] == [["ours 1", "theirs 1"]]
    html = section.html(section.content | {"names": {"base": "untrained"}})
    assert "Won and lost against untrained" in html
    assert "2 of 2 prompts" in html


@pytest.mark.slow
@pytest.mark.parametrize("texts", [True, False])
def test_texts_stand_in_the_files_unless_they_are_left_out(texts, tiny_gpt2, pairs_folder, tmp_path):
    typed = label_arguments(pairs_folder, tiny_gpt2, tmp_path, f"report.texts={texts}", **QUICK)
    report = run_typed(typed, tmp_path / "run", [])
    columns = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    whole = "".join(file.read_text("utf-8") for file in (tmp_path / "run").glob("report.*"))
    assert ("Human: question" in whole) == texts
    assert ("first_text" in columns) == texts
    assert any("report.texts=false" in line for line in report["warnings"]) != texts
    assert sum(report["overturned"]["rows"].values()) == 64
    wrong = [label != weak for label, weak in zip(columns["label"], columns["weak_label"], strict=True)]
    assert np.mean(wrong) == pytest.approx(1 - report["metrics"]["weak"]["accuracy"])
    if texts:
        pairs = [json.loads(line) for line in (pairs_folder / "test.jsonl").read_text().splitlines()]
        sides = zip(columns["first_text"], columns["second_text"], columns["label"], strict=True)
        better = {(one, two)[label].strip() for one, two, label in sides}
        assert better == {pair["chosen"].strip() for pair in pairs}
