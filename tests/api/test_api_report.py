"""Reports and tables of finished runs, as notebooks read them."""

import copy
import csv
import json
import pickle

import pandas as pd
import pytest
from runs import QUICK, label_arguments, run_typed

import w2sg
from w2sg.compare.collect import collect

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def label_runs(pairs_folder, tiny_gpt2, tmp_path_factory):
    """A folder of two runs, ``ce`` and ``rkl``, and their store."""
    out = tmp_path_factory.mktemp("runs")
    for loss in ("ce", "rkl"):
        more = ["loss=rkl"] if loss == "rkl" else []
        run_typed(label_arguments(pairs_folder, tiny_gpt2, out, *more, **QUICK), out / loss, more)
    return out


def test_the_numbers_are_those_of_the_report(label_runs):
    run = w2sg.read_report(label_runs / "ce")
    written = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    assert w2sg.pgr(data=run).as_dict() == written["pgr"]
    for name, found in written["tests"].items():
        test = w2sg.paired_test(*name.split(" - "), data=run.folder / "predictions.parquet")
        assert (test.difference, test.low, test.high, test.p) == tuple(
            found[key] for key in ("difference", "low", "high", "p")
        )
        assert (test.only_a, test.only_b, test.test) == (found["only_student"], found["only_other"], found["test"])


def test_a_report_is_what_its_folder_holds_and_is_not_changed(label_runs, monkeypatch):
    report = w2sg.read_report(label_runs / "rkl")
    content = json.loads((label_runs / "rkl" / "report.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(report.content)) == content | {"config": json.loads(json.dumps(report.config))}
    assert report.metrics["student"]["accuracy"] == content["metrics"]["student"]["accuracy"]
    assert (report.method, report.loss, report.seed) == ("finetune", "reverse_kl", content["seed"])
    assert [stage["name"] for stage in report.stages] == [stage["name"] for stage in content["stages"]]
    assert (report.verdict, report.title) == (content["verdict"], content["title"])
    assert report.pgr.as_dict() == content["pgr"]
    assert list(report.predictions.columns)[:3] == ["id", "prompt", "label"]
    assert report.samples is None
    assert report.page.is_file()
    changed = report.predictions
    changed["label"] = 0
    assert report.predictions["label"].any()
    with pytest.raises(TypeError, match="read-only"):
        report.metrics["student"]["accuracy"] = 1.0
    monkeypatch.setenv("HOME", str(label_runs))
    monkeypatch.chdir(label_runs)
    near, home = w2sg.read_report("rkl"), w2sg.read_report("~/rkl")
    assert near.folder == home.folder == report.folder
    monkeypatch.chdir(label_runs.parent)
    assert near.predictions.equals(report.predictions)
    assert len(w2sg.runs("~")) == 2
    assert copy.deepcopy(report.content) == pickle.loads(pickle.dumps(report)).content == report.content
    assert pd.DataFrame(report.metrics).T.loc["weak", "accuracy"] == content["metrics"]["weak"]["accuracy"]


def test_a_report_is_shown_in_one_line_and_as_a_table_without_markup_from_outside(label_runs, tmp_path):
    report = w2sg.read_report(label_runs / "ce")
    assert repr(report).startswith(f"<Report: {report.title}; student 0.")
    assert "\n" not in repr(report)
    html = report._repr_html_()
    assert f"<td>{report.metrics['student']['accuracy']:.3f}</td>" in html
    assert str(report.pgr) in html.replace("&#x27;", "'")
    content = json.loads((label_runs / "ce" / "report.json").read_text(encoding="utf-8")) | {
        "title": "<script>x</script>"
    }
    (tmp_path / "report.json").write_text(json.dumps(content), encoding="utf-8")
    assert "<script>" not in w2sg.read_report(tmp_path)._repr_html_()


def test_runs_has_the_rows_of_the_summary(label_runs, tmp_path, caplog):
    (label_runs / "broken").mkdir()
    (label_runs / "broken" / "report.json").write_text("{}", encoding="utf-8")
    table = w2sg.runs(label_runs)
    collect(label_runs).write(label_runs)
    with open(label_runs / "summary.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(table.columns) == list(rows[0])
    assert len(table) == len(rows) == 2
    assert set(table["loss"]) == {row["loss"] for row in rows} == {"cross_entropy", "reverse_kl"}
    accuracy = dict(zip(table["folder"], table["student_accuracy"], strict=True))
    assert accuracy == {row["folder"]: float(row["student_accuracy"]) for row in rows}
    assert accuracy["rkl"] == w2sg.read_report(label_runs / "rkl").metrics["student"]["accuracy"]
    assert "broken: its report is of an earlier version" in caplog.text
    assert len(table.attrs["left_out"]) == 1


def test_what_is_no_run_is_called_so(label_runs, tmp_path):
    for folder, said in {
        tmp_path / "nowhere": "there is no folder",
        tmp_path: "is no finished run",
        label_runs: f"is no run and holds [23]; name one, as {label_runs / 'ce'}|is no run and holds",
    }.items():
        with pytest.raises(w2sg.UserError, match=said):
            w2sg.read_report(folder)
    (tmp_path / ".hydra").mkdir()
    with pytest.raises(w2sg.UserError, match="is not finished"):
        w2sg.read_report(tmp_path)
    for text, said in {
        "[1]": "it holds no object",
        "{": "cannot be read",
        '{"metrics": {}}': "it has no config",
    }.items():
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
        with pytest.raises(w2sg.UserError, match=said):
            w2sg.read_report(tmp_path)
    with pytest.raises(w2sg.UserError, match="no folder"):
        w2sg.runs(tmp_path / "nowhere")


def test_the_student_of_a_report_says_what_it_said_in_the_run(label_runs):
    report = w2sg.read_report(label_runs / "rkl")
    table = report.predictions
    pairs = list(zip(table["first_text"], table["second_text"], strict=True))
    for system, student in (("weak", w2sg.load_student(report, "weak")), ("student", w2sg.load_student(report.folder))):
        rewards = student.label_logits(pairs)
        assert (rewards[:, 0] - rewards[:, 1]).tolist() == pytest.approx(table[system].tolist(), abs=1e-4)
        assert student.score(["fair and kind", "rude"]).shape == (2, 1)
    for call, said in (
        (lambda: student.score("fair and kind"), "one text was given; give a list of texts"),
        (lambda: student.score([("fair", "rude")]), "is no text; give each dialogue or reply as one text"),
        (lambda: student.score([[{"role": "user", "content": "fair"}]]), "is no text; give each"),
        (lambda: student.score(["fair", ""]), "'' has no tokens"),
        (lambda: student.label_logits(["no", "ok"]), "give tuples of one text each"),
        (lambda: student.label_logits([("fair", "rude"), ("fair",)]), "give tuples of one text each"),
    ):
        with pytest.raises(w2sg.UserError, match=said):
            call()
    with pytest.raises(w2sg.UserError, match="this run has no nobody: weak, student, ceiling"):
        w2sg.load_student(report, "nobody")
    with pytest.raises(w2sg.UserError, match="dict was given; give a report or a folder"):
        w2sg.load_student(dict(report.content))
