"""A section from outside the tree: in report.json, on the page, among the warnings and in `evaluate.py runs=`."""

import io
import json
import sys

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
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_section.py").write_text(OUTSIDE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "runs"
    sys.modules.pop("outside_section", None)


def run(out, name, method, **options):
    sizes = "dataset.sizes={weak_train: 16, transfer: 16, test: 10}"
    cfg = compose("weak=bow", "strong=bow", sizes, "trainer=cpu", "logger=none", "weak.epochs=1", "strong.epochs=1")
    cfg.out, cfg.store = str(out), str(out / "store")
    cfg.method = {"_target_": f"outside_section.{method}", "_partial_": True, **options}
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
        pass

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
