"""A section from outside the tree: in report.json, on the page, among the warnings and in `evaluate.py runs=`."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import compose

from w2sg.compare.collect import collect
from w2sg.config.check import check
from w2sg.console import Plain
from w2sg.errors import UserError
from w2sg.experiment.run import run_method
from w2sg.reports.assemble import compose as put_together
from w2sg.reports.section import Section, Story
from w2sg.store.files import read_json

OUTSIDE = '''
from dataclasses import replace

import torch

from w2sg.losses import reverse_kl as of_the_tree
from w2sg.reports.section import Section, Story


class Words(Section):
    """How long texts are."""

    key = "words"
    template = "<h2>Words</h2><p>{{ mean | number(1) }} words a text, the first: {{ report.words.first }}</p>"

    def show(self, report):
        return {"mean": report["words"]["mean"]}

    def warnings(self, report):
        return ["texts are short"] if report["words"]["mean"] < 1000 else []

    def summary(self, report):
        return {"words a text": {"value": report["words"]["mean"], "low": 1.0, "high": 99.0}}

    def table(self, report):
        return f"{report['words']['mean']:.1f} words a text"


class Broken(Words):
    def show(self, report):
        return {"mean": report["wrods"]}


def words_of(run, section=Words):
    texts = [text for texts in run.data.test.texts for text in texts]
    mean = sum(len(text.split()) for text in texts) / len(texts)
    return section(content={"words": {"mean": mean, "first": "<b>" + texts[0]}})


def labels(run, broken: bool = False):
    """A label method with a section of its own."""
    data = run.data
    weak = run.fit("weak", run.weak, data.ground_truth, run.gold(data.ground_truth))
    student = run.fit("student", run.strong, data.transfer, run.predict(weak, data.transfer), loss=run.loss)
    predictions = {"weak": run.predict(weak, data.test), "student": run.predict(student, data.test)}
    predictions["ceiling"] = run.predict(run.ceiling("transfer"), data.test)
    return run.report(sections=[words_of(run, Broken if broken else Words)], **predictions)


def counting(run):
    """A method that trains nothing."""
    story = Story("Words are counted", uses_of_splits={"test": "texts whose words are counted"})
    return run.report(story, [words_of(run)], columns={"id": list(run.data.test.ids)})


def reverse_kl(logits, weak_logits, progress: float = 1.0):
    return 0.5 * of_the_tree(logits, weak_logits, progress)


def holed(labels, value):
    """The same with no number in its first row."""
    logits = labels.logits.clone()
    logits[0] = value
    return replace(labels, logits=logits)


def called(run, model: str = "label"):
    """A method that gives a model a name."""
    weak = run.fit("weak", run.weak, run.data.ground_truth, run.gold(run.data.ground_truth))
    return run.report(**{model: run.predict(weak, run.data.test)})


def empty(run, words: bool = False):
    """A method that gives neither predictions nor a story."""
    return run.report(sections=[words_of(run)]) if words else run.report()


def both(run):
    return run.report(columns={"id": []}, weak=run.gold(run.data.test))


def no_numbers(run, taught: bool = False, value: float = float("nan")):
    """A method whose labels are no numbers in a row."""
    if taught:
        run.fit("student", run.strong, run.data.transfer, holed(run.gold(run.data.transfer), value))
    return run.report(weak=run.gold(run.data.test), mine=holed(run.gold(run.data.test), value))


SUMMARIES = {
    "nan": {"value": float("nan")},
    "infinite": {"value": 1.0, "low": 0.0, "high": float("inf")},
    "alone": float("nan"),
    "words": {"value": "words"},
    "none": {"low": 1.0},
}


class Summed(Words):
    def summary(self, report):
        return {"words a text": SUMMARIES[report["words"]["first"]]}


class Found(Words):
    def finding(self, report):
        return f"A text has {report['words']['mean']:.1f} words."


class Silent(Words):
    def finding(self, report):
        return None


def summed(run, which: str):
    return run.report(Story("x"), [Summed(content={"words": {"mean": 1.0, "first": which}})], columns={"id": []})


def silent(run):
    return run.report(Story("x"), [words_of(run, Silent)], columns={"id": []})


def concluding(run):
    """A label method, with a section that has a part in the verdict."""
    data = run.data
    weak = run.fit("weak", run.weak, data.ground_truth, run.gold(data.ground_truth))
    student = run.fit("student", run.strong, data.transfer, run.predict(weak, data.transfer), loss=run.loss)
    predictions = {"weak": run.predict(weak, data.test), "student": run.predict(student, data.test)}
    predictions["ceiling"] = run.predict(run.ceiling("transfer"), data.test)
    return run.report(sections=[words_of(run, Found)], **predictions)
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_section.py").write_text(OUTSIDE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "runs"
    sys.modules.pop("outside_section", None)


def run(out, name, method, loss="w2sg.losses.reverse_kl", **options):
    sizes = "dataset.sizes={weak_train: 16, transfer: 16, test: 10}"
    cfg = compose("weak=bow", "strong=bow", sizes, "trainer=cpu", "logger=none", "weak.epochs=1", "strong.epochs=1")
    cfg.out, cfg.store = str(out), str(out / "store")
    cfg.method = {"_target_": f"outside_section.{method}", "_partial_": True, **options}
    cfg.loss = {"_target_": loss, "_partial_": True}
    return run_method(check(cfg), out / name, [])


def test_it_is_in_the_report_on_the_page_among_the_warnings_and_beside_other_runs(outside, capsys):
    run(outside, "labels", "labels")
    run(outside, "counting", "counting")
    said = capsys.readouterr().out
    for name in ("labels", "counting"):
        content = read_json(outside / name / "report.json")
        assert content["sections"][0 if name == "counting" else -3] == "words"
        assert "texts are short" in content["warnings"]
        assert content["summary"]["words a text"]["low"] == 1.0
        page = (outside / name / "report.html").read_text(encoding="utf-8")
        assert "<h2>Words</h2>" in page
        assert "the first: &lt;b&gt;" in page
    assert said.count("words a text") == 2
    counted = (outside / "counting" / "report.html").read_text(encoding="utf-8")
    assert "<h1>Words are counted</h1>" in counted
    assert "texts whose words are counted" in counted
    assert not any(word in counted for word in ("student", "judge", "aligned", "DPO", "supervis"))
    summary = collect(outside)
    rows = {row["method"]: row for row in summary.content["settings"]}
    assert set(rows) == {"labels", "counting"}
    mean = content["words"]["mean"]
    assert rows["counting"]["columns"]["words a text"] == {"mean": mean, "sd": None, "low": 1.0, "high": 99.0}
    assert {"words a text", "accuracy"} <= rows["labels"]["columns"].keys()
    assert summary.content["left_out"] == []
    assert "words a text" in summary.html
    terminal = io.StringIO()
    summary.show(Plain(file=terminal, width=160))
    assert terminal.getvalue().count("words a text") == 2  # a table for each method
    assert "words a text" in summary.lines[0]


def test_one_that_cannot_be_shown_is_named_and_the_numbers_are_kept(outside):
    with pytest.raises(UserError, match=r"section 'words' \(outside_section.Broken\): its page cannot be made"):
        run(outside, "broken", "labels", broken=True)
    assert read_json(outside / "broken" / "report.json")["words"]["mean"] > 0


def test_two_sections_do_not_say_the_same(outside):
    first = Section("one", {"text": {"systems": {"a": {"kl": 1}}}})
    second = Section("two", {"text": {"systems": {"a": {"reward": 2}}}})
    taken = Section("three", {"text": {"systems": {"a": {"kl": 3}}}})

    class Run:
        config = SimpleNamespace(report=SimpleNamespace(texts=True))

    from w2sg.reports.assemble import _merge

    content = {}
    for section in (first, second):
        _merge(content, section.content, section.key)
    assert content == {"text": {"systems": {"a": {"kl": 1, "reward": 2}}}}
    assert first.content == {"text": {"systems": {"a": {"kl": 1}}}}
    with pytest.raises(UserError, match=r"section 'three': text.systems.a.kl is in the report already"):
        _merge(content, taken.content, taken.key)
    with pytest.raises(UserError, match="two have the key 'one'"):
        put_together(Run(), Story("x"), [first, first], {})


def test_numbers_and_a_template_are_enough():
    section = Section("words", {"words": 7}, "<p>{{ report.words }} {{ '<' }}</p>", ["few"], {"words": {"value": 7.0}})
    assert section.html(section.content) == "<p>7 &lt;</p>"
    assert (section.warnings({}), section.summary({})) == (["few"], {"words": {"value": 7.0}})
    assert json.dumps(section.content)


# -- what is given to run.report --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["id", "prompt", "label", "first_text"])
def test_a_model_is_not_called_as_a_column_is(outside, name):
    with pytest.raises(UserError, match=f"run.report: '{name}' is a column of predictions.parquet; give the model"):
        run(outside, "called", "called", model=name)


def test_a_report_of_nothing_is_refused_in_a_line(outside):
    for words in (False, True):
        with pytest.raises(UserError, match=r"run.report: nothing was given to tell of"):
            run(outside, "empty", "empty", words=words)
    with pytest.raises(UserError, match=r"run.report: columns would not be written beside predictions"):
        run(outside, "both", "both")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_labels_that_are_no_numbers_are_named(outside, value):
    with pytest.raises(UserError, match=r"run.report: mine predicts no numbers .* in 1 of 10 rows"):
        run(outside, "predicted", "no_numbers", value=value)
    with pytest.raises(UserError, match=r"run.fit: the labels of 'student' .* in 1 of 16 rows"):
        run(outside, "taught", "no_numbers", taught=True, value=value)


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("nan", "its value is nan"),
        ("alone", "its value is nan"),
        ("infinite", "its high is inf"),
        ("words", "its value is 'words'"),
        ("none", "has no value"),
    ],
)
def test_a_summary_holds_numbers(outside, which, words):
    with pytest.raises(UserError, match=rf"section 'words' .*column 'words a text'.*{words}") as caught:
        run(outside, "summed", "summed", which=which)
    assert "\n" not in str(caught.value)


def test_what_a_section_found_follows_the_verdict_of_the_method(outside):
    verdict = run(outside, "concluding", "concluding").content["verdict"]
    assert "the student is " in verdict
    mean = read_json(outside / "concluding" / "report.json")["words"]["mean"]
    assert verdict.endswith(f"add to them. A text has {mean:.1f} words.")
    with pytest.raises(UserError, match=r"section 'words' .*its finding cannot be made .*NoneType, not text"):
        run(outside, "silent", "silent")


def test_a_loss_from_outside_is_told_apart_from_one_of_the_same_name(outside):
    of_the_tree = run(outside, "tree", "labels").content
    of_outside = run(outside, "outside", "labels", loss="outside_section.reverse_kl").content
    conditions = [content["diagnostics"]["theorem_conditions"] for content in (of_the_tree, of_outside)]
    assert [met["reverse_kl"] for met in conditions] == [True, False]
    assert ": labels, reverse kl, seed 0" in of_the_tree["title"]
    assert ": labels, outside_section.reverse_kl, seed 0" in of_outside["title"]
    assert "the student, trained by outside_section.reverse_kl, is " in of_outside["verdict"]
    losses = {row["loss"] for row in collect(outside).content["cells"]}
    assert len(losses) == 2
