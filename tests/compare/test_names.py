"""Runs whose names end alike, columns that are called like others, and what is left out: nothing is merged unsaid."""

import csv
import io
import json
import os
import shutil

import numpy as np
import pytest
from test_collect import composed, config, draw, finished

from w2sg.compare.collect import collect
from w2sg.compare.label_section import findings
from w2sg.compare.names import losses_in_words, settings_in_words, shortest
from w2sg.console import Plain


def predictions(rate, n=300):
    return {"weak": draw(0.6, 1, n), "student": draw(rate, 2, n), "ceiling": draw(0.9, 5, n)}


def changed(base, path, value):
    """A configuration with one other value, which needs not be there for anyone to import."""
    section, key = path.split(".")
    return base | {section: base[section] | {key: value}}


def rows_of(folder):
    with open(folder / "summary.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def edit(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def said(summary):
    terminal = io.StringIO()
    summary.show(Plain(file=terminal, width=200))
    return terminal.getvalue()


def test_losses_of_one_last_name_are_two(tmp_path):
    own = changed(config("rkl"), "loss._target_", "mine2.reverse_kl")
    for name, of, rate in (("a", config("rkl"), 0.7), ("b", own, 0.8), ("c", config("kl"), 0.65)):
        finished(tmp_path / name, of, predictions(rate))
    content = collect(tmp_path).content
    accuracy = {row["loss"]: row["accuracy"]["student"]["mean"] for row in content["cells"]}
    assert accuracy == {
        "losses.reverse_kl": draw(0.7, 2, 300).mean(),
        "mine2.reverse_kl": draw(0.8, 2, 300).mean(),
        "forward_kl": draw(0.65, 2, 300).mean(),
    }
    assert content["left_out"] == []
    assert content["runs"] == 3
    assert {row["setting"] for row in content["settings"]} == {
        "losses.reverse kl",
        "mine2.reverse kl",
        "forward kl",
    }


def test_what_is_said_of_shipped_losses_is_said_of_these_alone(tmp_path):
    """Of two losses that are called reverse_kl, the sentence is about the one of arXiv 2502.11107."""
    for rate in (0.0, 0.4):
        more = ["dataset.noise.kind=flip", f"dataset.noise.rate={rate}"]
        base = config("rkl", 0, *more)
        own = changed(base, "loss._target_", "mine2.reverse_kl")
        for name, of, right in (("a", base, 0.7), ("b", own, 0.8), ("c", config("kl", 0, *more), 0.65)):
            finished(tmp_path / f"{name}{rate}", of, predictions(right + rate / 9))
    lines = [line for line in findings(collect(tmp_path).content) if "is ahead of" in line]
    assert [line.split(" in ")[0] for line in lines] == ["losses.reverse kl is ahead of forward kl"]


def test_models_of_one_last_name_are_two_rows_with_their_own_numbers(tmp_path):
    for k, (name, rate) in enumerate({"/a/weak": 0.7, "/b/weak": 0.8}.items()):
        for loss in ("ce", "rkl"):
            of = changed(config(loss), "weak.name", name)
            finished(tmp_path / f"{k}{loss}", of, predictions(rate if loss == "ce" else rate + 0.05))
    summary = collect(tmp_path)
    content = summary.content
    accuracy = {(row["setting"], row["loss"]): row["accuracy"]["student"]["mean"] for row in content["cells"]}
    assert accuracy == {
        ("a/weak", "cross_entropy"): draw(0.7, 2, 300).mean(),
        ("a/weak", "reverse_kl"): draw(0.75, 2, 300).mean(),
        ("b/weak", "cross_entropy"): draw(0.8, 2, 300).mean(),
        ("b/weak", "reverse_kl"): draw(0.85, 2, 300).mean(),
    }
    assert {(e["setting"], e["a"], e["b"]) for e in content["between_losses"]} == {
        ("a/weak", "reverse_kl", "cross_entropy"),
        ("b/weak", "reverse_kl", "cross_entropy"),
    }  # none across the two models
    shown = said(summary)
    assert "a/weak: weak" in shown
    assert "b/weak: weak" in shown


def test_panels_over_a_number_are_named_apart(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    for k, name in enumerate(("/a/weak", "/b/weak")):
        for rate in (0.0, 0.4):
            of = config("ce", 0, "dataset.noise.kind=flip", f"dataset.noise.rate={rate}")
            finished(tmp_path / f"{k}{rate}", changed(of, "weak.name", name), predictions(0.7 + rate / 4))
    collect(tmp_path)
    assert {"a/weak", "b/weak"} <= set(titles)


def test_methods_of_one_last_name_are_two(tmp_path):
    own = changed(config(), "method._target_", "mine.finetune")
    for name, of, rate in (("a", config(), 0.7), ("b", own, 0.8)):
        finished(tmp_path / name, of, predictions(rate))
    summary = collect(tmp_path)
    summary.write(tmp_path)
    methods = {row["method"] for row in summary.content["settings"]}
    assert len(methods) == 2
    assert "mine.finetune" in methods
    assert {row["folder"]: row["method"] == "mine.finetune" for row in rows_of(tmp_path)} == {"a": False, "b": True}
    assert {cell.setting for cell in summary.cells} == methods


def test_folders_of_one_last_name_are_told_apart(tmp_path):
    finished(tmp_path / "monday" / "0", config("ce"), predictions(0.7))
    finished(tmp_path / "tuesday" / "0", config("rkl"), predictions(0.8))
    finished(tmp_path / "tuesday" / "1", config("kl"), predictions(0.75))
    collect(tmp_path).write(tmp_path)
    assert {row["folder"]: row["loss"] for row in rows_of(tmp_path)} == {
        "monday/0": "cross_entropy",
        "tuesday/0": "reverse_kl",
        "1": "forward_kl",
    }


def test_words_are_the_same_only_where_values_are():
    assert shortest(["weak", "a/weak", "b/weak"]) == {"weak": "weak", "a/weak": "a/weak", "b/weak": "b/weak"}
    assert shortest(["a/weak", "a/weak/"]) == {"a/weak": "a/weak", "a/weak/": "a/weak/"}
    assert shortest(["m.f", "n.f", "n.g"], ".") == {"m.f": "m.f", "n.f": "n.f", "n.g": "g"}
    close = settings_in_words([{"strong.lr": 0.1}, {"strong.lr": 0.10000001}, {"strong.lr": 0.2}])
    assert close == ["strong.lr 0.1, strong.lr=0.1", "strong.lr 0.1, strong.lr=0.10000001", "strong.lr 0.2"]
    kinds = losses_in_words([{"loss._target_": "m.f", "loss.a": 1}, {"loss._target_": "m.f", "loss.a": "1"}])
    assert kinds == ["f(a=1), loss.a=1", 'f(a=1), loss.a="1"']
    twice = {"optim.lr": None, "dataset.lr": 1}, {"optim.lr": 1, "dataset.lr": None}
    assert len(set(settings_in_words(twice))) == 2


RESERVED = ("method", "folder", "seed", "split_seed", "setting", "loss", "student_accuracy", "pgr_value")


def test_a_column_of_a_section_hides_none_of_the_run(tmp_path):
    finished(tmp_path / "plain", config("ce"), predictions(0.7))
    finished(tmp_path / "other", config("rkl"), predictions(0.8))
    collect(tmp_path).write(tmp_path)
    before = {row["folder"]: row for row in rows_of(tmp_path)}
    accuracy = {"value": 0.125, "low": 0.0625, "high": 0.25}
    summary = {heading: {"value": -7.0, "low": -8.0, "high": -6.0} for heading in RESERVED}
    summary |= {"accuracy": accuracy, "accuracy low": {"value": -9.0}}
    edit(tmp_path / "other" / "report.json", summary=summary)
    collected = collect(tmp_path)
    collected.write(tmp_path)
    after = {row["folder"]: row for row in rows_of(tmp_path)}
    assert set(after) == {"plain", "other"}
    for heading in RESERVED:
        assert after["other"][heading] == before["other"][heading], heading
        assert after["other"][f"summary: {heading}"] == "-7.0"
        assert after["other"][f"{heading} low"] == "-8.0"
        assert after["plain"][heading] == before["plain"][heading]
    assert after["other"]["accuracy low"] == "-9.0"  # what another heading is called stays its own
    assert after["other"]["summary: accuracy low"] == "0.0625"
    names = collected.lines[0]
    assert len(names) == len(set(names))


def test_a_reserved_heading_is_kept_apart_in_runs_that_have_no_such_column(tmp_path):
    """A method that trains nothing has no loss of its own; its column `loss` is none of the label runs'."""
    finished(tmp_path / "labels", config("ce"), predictions(0.7))
    finished(tmp_path / "words", config("ce"), predictions(0.8))
    edit(tmp_path / "words" / "report.json", metrics={}, summary={"loss": {"value": 3.0}})
    collect(tmp_path).write(tmp_path)
    rows = {row["folder"]: row for row in rows_of(tmp_path)}
    assert (rows["labels"]["loss"], rows["words"]["loss"]) == ("cross_entropy", "")
    assert rows["words"]["summary: loss"] == "3.0"


def age(folder, seconds):
    at = (folder / "report.json").stat().st_mtime - seconds
    os.utime(folder / "report.json", (at, at))


def test_older_runs_and_runs_that_are_one_are_named(tmp_path):
    for name, seconds in (("new", 0), ("old/1", 100), ("old/2", 50)):
        finished(tmp_path / name, config("ce"), predictions(0.7 + seconds / 1000))
        age(tmp_path / name, seconds)
    finished(tmp_path / "twin", config("ce", 1), predictions(0.7))
    summary = collect(tmp_path)
    assert summary.content["left_out"][0] == "2 older runs of the same configuration: old/1, old/2"
    assert summary.content["left_out"][1].endswith("so they are no repeats: twin")
    assert "old/1, old/2" in summary.html
    assert "old/1, old/2" in said(summary)


def test_older_runs_without_labels_are_named_too(tmp_path):
    for name, seconds, value in (("new", 0, 1.0), ("old", 100, 2.0)):
        finished(tmp_path / name, config("ce"), predictions(0.7))
        summary = {"words": {"value": value}, **({"more": {"value": 5.0}} if name == "old" else {})}
        edit(tmp_path / name / "report.json", metrics={}, summary=summary)
        age(tmp_path / name, seconds)
    content = collect(tmp_path).content
    (row,) = content["settings"]
    assert {k: v["mean"] for k, v in row["columns"].items()} == {"words": 1.0, "more": 5.0}
    (line,) = content["left_out"]
    assert line == "1 older run of the same configuration, but for what the newer did not measure: old"


@pytest.mark.parametrize("text", ["[]", "3", "null", '"report"', "[{}]"])
def test_a_file_that_is_no_report_is_called_so(tmp_path, text):
    finished(tmp_path / "run", config(), predictions(0.7))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text(text)
    (line,) = collect(tmp_path).content["left_out"]
    assert line == "other: its report.json is no report of a run (it holds no object)"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("metrics", [], "metrics is no object"),
        ("config", 3, "config is no object"),
        ("stages", {}, "stages is no list"),
        ("summary", [], "summary is no object"),
        ("decoding", "x", "decoding is no object"),
    ],
)
def test_a_part_of_another_kind_is_named(tmp_path, key, value, reason):
    for name in ("run", "other"):
        finished(tmp_path / name, config("ce" if name == "run" else "rkl"), predictions(0.7))
    edit(tmp_path / "other" / "report.json", **{key: value})
    (line,) = collect(tmp_path).content["left_out"]
    assert line == f"other: its report.json is no report of a run ({reason})"


def decoded(folder, reward, **changes):
    """A decoder's folder, as small as `runs=` takes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    base = composed("ce", ()) | {"seed": 0}
    of = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 8, "kind": "eft"}
    system = {"length": {"mean": 8.0, "truncated": 0.0}, "cost": {"strong": 1.0, "guide": 1.0, "seconds": 0.1}}
    rewards = {"plain": 0.0, "guide": reward - 0.5, "eft": reward}
    systems = {
        name: system | {"reward": {"value": value, "low": value, "high": value}} for name, value in rewards.items()
    }
    judge = {"kind": "reward", "model": changes.get("judge", "judge")}
    method = {"_target_": "w2sg.methods.decode.decode", "style": "plain", "judge": judge}
    content = {
        "config": base | {"method": method} | {k: base[k] | v for k, v in changes.get("sections", {}).items()},
        "strong": changes.get("strong", "strong"),
        "weak": changes.get("weak", "weak"),
        "dataset": "reviews",
        "seed": 0,
        "metrics": {},
        "diagnostics": {},
        "stages": [],
        "decoding": {
            "decoder": of,
            "words": {"name": "emulated fine-tuning", "setting": ""},
            "systems": systems,
            "judge": judge,
        },
        "summary": {"reward": {"value": reward}},
    }
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(content))
    rows = np.arange(6)
    columns = {f"reward_{k}": (v + 0.01 * rows).tolist() for k, v in rewards.items()}
    pq.write_table(pa.table({"id": [f"r{i}" for i in rows]} | columns), folder / "predictions.parquet")


def test_guides_of_one_last_name_are_two_decoders(tmp_path):
    for name, reward in (("/a/weak", 1.0), ("/b/weak", 2.0)):
        decoded(tmp_path / name[1:2], reward, weak=name, sections={"weak": {"name": name}})
    (group,) = collect(tmp_path).content["decoders"]
    rewards = {row["name"]: row["reward"]["value"] for row in group["rows"]}
    sampling = "temperature 0.7, 8 tokens"
    assert rewards == {
        f"plain, {sampling}": 0.0,
        f"guide alone, a/weak, {sampling}": 0.5,
        f"guide alone, b/weak, {sampling}": 1.5,
        "emulated fine-tuning, aligned as a/weak": 1.0,
        "emulated fine-tuning, aligned as b/weak": 2.0,
    }


def test_decoders_that_differ_in_what_is_not_of_the_decoder_are_two(tmp_path):
    """Options that no column of words has are said in full; before, one run stood under the other's name."""
    for k, reward in enumerate((1.0, 2.0)):
        decoded(tmp_path / str(k), reward, sections={"weak": {"max_length": 64 + k}})
    (group,) = collect(tmp_path).content["decoders"]
    rewards = {row["name"]: row["reward"]["value"] for row in group["rows"] if row["kind"] == "eft"}
    assert rewards == {
        "emulated fine-tuning, weak.max_length=64": 1.0,
        "emulated fine-tuning, weak.max_length=65": 2.0,
    }
    guides = {row["name"]: row["reward"]["value"] for row in group["rows"] if row["kind"] == "guide"}
    assert sorted(guides.values()) == [0.5, 1.5]
    assert all(f"weak.max_length={64 + k}" in name for k, name in enumerate(guides))


def test_strong_models_of_one_last_name_head_their_own_tables(tmp_path):
    for name in ("/a/strong", "/b/strong"):
        decoded(tmp_path / name[1:2], 1.0, strong=name, sections={"strong": {"name": name}})
    summary = collect(tmp_path)
    for text in (summary.html, said(summary)):
        assert "Decoders of a/strong on reviews" in text
        assert "Decoders of b/strong on reviews" in text


def test_a_copied_folder_is_an_older_run_by_name(tmp_path):
    decoded(tmp_path / "new", 1.0)
    shutil.copytree(tmp_path / "new", tmp_path / "copies" / "of")
    age(tmp_path / "copies" / "of", 100)
    (line,) = collect(tmp_path).content["left_out"]
    assert line.endswith("did not measure: copies/of")


def test_columns_that_no_decoder_has_are_left_out():
    from w2sg.compare.decoders import _filled
    from w2sg.reports.words import NONE, stacked

    value = stacked({"value": 0.5, "low": 0.4, "high": 0.6})
    head, rows = _filled(("", "reward", "wins"), [("plain", stacked(NONE), "–"), ("eft", stacked(NONE), value)])
    assert head == ["", "wins"]
    assert rows == [["plain", "–"], ["eft", value]]
