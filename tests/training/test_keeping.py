"""Weights that are not kept go when their run has reported; all else of their stages stays, and stays sound."""

from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model
from fits import job, stages
from model_folders import spec
from runs import QUICK, label_arguments, run_typed
from safetensors.torch import load_file

from w2sg.errors import UserError
from w2sg.models.finished import find_finished
from w2sg.models.half import to_bf16
from w2sg.models.scorer import load_scorer
from w2sg.models.source import find
from w2sg.store import weights as kept
from w2sg.store.soundness import problem, verified
from w2sg.training.keeping import FULL, Keep

NONE = Keep("none", "strong")


def trained(folder: Path, keep: Keep, end: bool = True):
    """A fit and whether it came from the store, as a process of its own has it."""
    verified.clear()
    work = stages(folder)
    path = work.fit("m", {}, lambda: job(selecting=False), keep=keep)
    if end:
        work.kept.end()
    return path, work.records[0].cached, work.notes


def test_weights_go_at_the_end_of_their_run_and_are_trained_again_where_they_are_kept(tmp_path):
    path, _, notes = trained(tmp_path, NONE)
    assert notes == ["m: its weights are not kept, its predictions and curves are (strong.save=none)"]
    assert not (path / "model").exists()
    assert (path / "curve.json").exists()
    assert problem(path, afresh=True) is None
    with pytest.raises(UserError, match=r"weights were not kept .* start that run with strong\.save=full"):
        kept.weights(path)
    assert trained(tmp_path, NONE)[1]  # nothing is missing for whoever does not want them
    again, cached, notes = trained(tmp_path, FULL)
    assert (again, cached, notes) == (path, False, [])
    whole = load_file(kept.weights(path) / "model.safetensors")
    assert not list(tmp_path.glob("store/*.damaged"))
    _, cached, notes = trained(tmp_path, NONE)
    assert cached
    assert notes == ["m: its weights stay, since an earlier run kept them (strong.save=none)"]
    assert whole.keys() == load_file(kept.weights(path) / "model.safetensors").keys()


def test_a_run_that_keeps_weights_keeps_those_of_one_that_does_not(tmp_path):
    """Both are at work; the first would let them go with its report."""
    path, *_ = trained(tmp_path, NONE, end=False)
    work = stages(tmp_path)
    work.kept.add("m", path, NONE)
    assert trained(tmp_path, Keep("bf16", "strong"))[1]
    work.kept.end()
    assert (kept.weights(path) / "model.safetensors").exists()
    assert problem(path, afresh=True) is None


def test_a_kill_while_weights_go_leaves_a_sound_stage(tmp_path, monkeypatch):
    path, *_ = trained(tmp_path, NONE, end=False)
    monkeypatch.setattr(kept, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        kept.give_up(stages(tmp_path).store, path)
    monkeypatch.undo()
    assert (path / "model").exists()
    assert problem(path, afresh=True) is None
    assert trained(tmp_path, NONE)[1]
    assert not (path / "model").exists()


def test_weights_in_bf16_are_half_the_size_and_the_head_is_exact(tmp_path):
    source = find(spec(name=str(save_tiny_model(tmp_path / "model", "llama", layers=1))), "strong")
    scorer = load_scorer(source, True, 2)
    scorer.save(tmp_path / "saved")
    before = load_file(tmp_path / "saved" / "model.safetensors")
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    to_bf16(tmp_path / "saved")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        exact = name.startswith("score.")
        assert tensor.equal(before[name] if exact else before[name].bfloat16())
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 0.6 * size
    read = load_scorer(source, True, 2, tmp_path / "saved")
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert Keep.of(spec(save="bf16", train="full"), "strong").key == {"save": "bf16"}
    for small in ({"train": "lora"}, {"train": "head"}, {"arch": "bow", "train": "full"}):
        assert Keep.of(spec(save="bf16", **small), "strong").key == {}


@pytest.mark.slow
def test_a_run_without_its_weights_has_its_report_and_says_what_is_kept(tmp_path, pairs_folder, tiny_gpt2):
    """Then the same run from the store, and one that keeps all: the weak model is trained again, to the same end."""
    typed = label_arguments(pairs_folder, tiny_gpt2, tmp_path, **QUICK)
    less = ["strong.save=bf16", "weak.save=none"]

    def run(name, *more):
        return run_typed([*typed, *more], tmp_path / name, list(more))

    first = run("first", *less)
    folders = {s["name"]: tmp_path / "store" / s["key"] for s in first["stages"]}
    assert not (folders["weak"] / "model").exists()
    assert {t.dtype for t in load_file(folders["student"] / "model" / "model.safetensors").values()} == {
        torch.bfloat16,
        torch.float32,
    }
    said = "\n".join(first["warnings"])
    assert "weak: its weights are not kept, its predictions and curves are (weak.save=none)" in said
    assert "student: its weights are kept in bf16, and its predictions are of these (strong.save=bf16)" in said
    with pytest.raises(UserError, match=r"weights were not kept .*weak\.save=full"):
        find_finished(tmp_path / "first", "weak", tmp_path, tmp_path / "store")
    again = run("again", *less)
    assert all(stage["cached"] for stage in again["stages"])
    assert again["metrics"] == first["metrics"]
    whole = run("whole")
    made = {s["name"] for s in whole["stages"] if not s["cached"]}
    assert {"weak", "student", "ceiling"} <= made
    assert "weak-on-transfer" not in made  # its predictions were kept
    assert whole["metrics"]["weak"] == first["metrics"]["weak"]
    assert (folders["weak"] / "model").exists()
    assert not any("save=" in line for line in whole["warnings"])
