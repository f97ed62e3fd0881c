"""Models cut over two ranks: read by one of them, held in parts, kept in checkpoints that any number goes on from.

Run as a script, this file is one of the two ranks: starting Python costs more than all that is looked at here.
"""

import errno
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import start_ranks
from fits import devices, options, stages, texts
from lightning.pytorch.strategies import strategy
from model_folders import llama, load, save, spec
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from w2sg import losses, stops
from w2sg.config.schema import TrainerConfig
from w2sg.data.loading import Examples
from w2sg.data.rows import pack
from w2sg.models import loading
from w2sg.models.once import read_by_one
from w2sg.models.policy import Policy
from w2sg.models.source import find
from w2sg.store.files import read_json
from w2sg.store.sealed import unsound
from w2sg.training import sending, sharding
from w2sg.training.checkpoints import Checkpoints, SealedFiles
from w2sg.training.devices import Devices
from w2sg.training.label_modules import SoftLabelModule
from w2sg.training.stages import FitJob

WIDTH, LAYERS = 97, 5
CASES = {
    "score": {},
    "tied": {},
    "cut": {"layers": 1, "quantise": 4},
    "drawn": {"random_init": True},
    "score-lora": {"train": "lora"},
    "score-bf16": {"dtype": "bfloat16"},
    "gguf": {},
}


class Held(TorchDispatchMode):
    """The most bytes that tensors made in here have had at one time."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return out


def size_of(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def models_come_from_one(on, folder: Path) -> None:
    """However a model is made: rank 1 never holds it whole, and has the parts and buffers of the one that is read."""
    mesh = init_device_mesh("cpu", (on.world,))
    read = dict(load("policy", folder / "tied").plain.state_dict())
    loading.dequantised = lambda *_: read
    for name, changes in CASES.items():
        place = folder / ("tied" if name in ("tied", "gguf") else "plain")
        make = partial(load, "score" if "score" in name or name in ("cut", "drawn") else "policy", place, **changes)
        if name == "gguf":
            make = partial(gguf, place)
        torch.manual_seed(0)
        expected = make()
        torch.manual_seed(0)
        with Held() as held:
            with read_by_one(on.main, on.first, on.world):
                model = make()
            assert on.main or all(p.is_meta for p in model.parameters()), name
            sending.send(model, torch.device("cpu"), partial(sharding.shard, model, mesh))
        if not on.main:
            one = max(p.numel() * p.element_size() for p in expected.parameters())
            assert held.most <= size_of(expected) / 2 + 4 * one, (name, held.most)
            if name == "score":
                assert held.most < 0.75 * size_of(expected), held.most
        for key, weight in expected.named_parameters():
            there = model.get_parameter(key)
            assert isinstance(there, DTensor), (name, key)
            assert there.requires_grad == weight.requires_grad, (name, key)
            assert torch.equal(there.full_tensor(), weight), (name, key)
        buffers = dict(model.named_buffers())
        for key, buffer in expected.named_buffers():
            assert torch.equal(buffers[key], buffer), (name, key)
        sharding.unshard(model)
        if on.main and name in ("tied", "score-lora"):
            model.save(folder / name)
            expected.save(folder / f"{name}-alone")
            (file,) = folder.glob(f"{name}-alone/*.safetensors")
            ours, theirs = load_file(folder / name / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            if name == "score-lora":  # the base is not collected for adapters
                assert size_of(model) < size_of(expected) / 2


def gguf(place: Path) -> Policy:
    source = replace(find(spec(name=str(place)), "strong"), gguf="x.gguf")
    return Policy(loading.load_transformer(AutoModelForCausalLM, source)[0])


class Watching(SoftLabelModule):
    """Counts bytes of whole weights that wait for the backward pass, and exchanges of gradients."""

    most = 0.0

    def training_step(self, batch, index):
        self.saved = []
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            super().training_step(batch, index)

    def keep(self, tensor):
        self.saved.append(tensor)
        return tensor

    def manual_backward(self, loss):
        blocks = self.scorer._blocks()
        weights = [p for p in blocks.parameters() if WIDTH in p.shape]  # a prime, which no activation has
        shapes = {shape for p in weights for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
        held = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.saved if tuple(t.shape) in shapes
        }
        whole = sum(2 * p.numel() for p in weights)
        Watching.most = max(Watching.most, sum(held.values()) / whole)
        self.saved.clear()
        super().manual_backward(loss)


def fit_job(folder: Path, module=Watching, held_out: bool = False, **changes) -> FitJob:
    """Epochs of four steps, of two micro-batches on each of two ranks."""
    torch.manual_seed(7)
    scorer = load("score", folder / "plain")
    rows = pack(texts(40), lambda batch: [[2 + int(w[1:]) for w in text.split()] for text in batch], 32)
    targets = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    data = Examples(rows, [f"id{i}" for i in range(40)], torch.zeros(40, dtype=torch.long), targets, targets.argmax(1))
    setting = options(**{"batch_size": 12, "lr": 0.003, "epochs": 1, **changes})
    module = partial(module, loss=losses.cross_entropy)
    return FitJob(scorer, module, data, data.take(np.arange(9)) if held_out else None, setting, 5, micro_batch=4)


def a_replicated_model_is_read_once(on, folder: Path) -> None:
    """Under ddp, too, one rank reads; and when the fit ends, nothing moves to the host but what is saved."""
    jobs, bare, left, usual = [], [], [], strategy._optimizers_to_device

    def make():
        jobs.append(fit_job(folder))
        bare.append(all(p.is_meta for p in jobs[0].scorer.parameters()))
        return jobs[0]

    on.config = on.config.model_copy(update={"strategy": "ddp"})
    strategy._optimizers_to_device = lambda optimizers, to: (left.append(len(optimizers)), usual(optimizers, to))
    done = stages(folder / "ddp", on).fit("m", {}, make)
    assert bare == [not on.main]
    assert left == [0]
    assert (size_of(jobs[0].scorer) > 0) == on.main
    on.config = on.config.model_copy(update={"strategy": "fsdp"})
    if on.main:
        (folder / "ddp.json").write_text((done / "curve.json").read_text())


class Stopping(SoftLabelModule):
    """Hears SIGTERM before its sixth step, if it is to."""

    at: int | None = None
    first: int | None = None  # step that it began with

    def training_step(self, batch, index):
        if Stopping.first is None:
            Stopping.first = self.global_step
        if self.global_step == Stopping.at:
            os.kill(os.getpid(), signal.SIGTERM)
        super().training_step(batch, index)


def long_fit(folder: Path, place: str, on=None, at: int | None = None):
    """Two epochs, the better one chosen; stopped before a step, or from wherever it was stopped."""
    Stopping.at, Stopping.first = at, None
    if on is not None:
        on.wait()
        stops.join(on._peers())
    make = partial(fit_job, folder, Stopping, held_out=True, epochs=2)
    work = stages(folder / place, on, checkpoint_minutes=0.0)
    if at is None:
        return work.fit("m", {}, make)
    with pytest.raises(stops.Stopped):
        work.fit("m", {}, make)
    return next((folder / place / "store").glob("m-*.part")) / "scratch"


def learned(folder: Path) -> tuple[dict, list, dict]:
    info = read_json(folder / "manifest.json")["info"]
    return load_file(folder / "model" / "model.safetensors"), read_json(folder / "curve.json"), info


def assert_same(one: Path, two: Path, **how) -> None:
    (weights, curve, info), (others, other_curve, other_info) = learned(one), learned(two)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, **(how or {"rtol": 0, "atol": 0}), msg=name)
    for point, other in zip(curve, other_curve, strict=True):
        assert point == pytest.approx(other, rel=1e-4)
    keep = {"tokens", "steps", "examples", "best_epoch"}
    assert {k: info[k] for k in keep} == {k: other_info[k] for k in keep}


def a_stopped_fit_goes_on(on, folder: Path) -> None:
    """From what two ranks have written, by two; what one has written, by two; never from a write that was killed."""
    on.config = on.config.model_copy(update={"precision": "32-true"})
    whole = long_fit(folder, "whole", on)
    scratch = long_fit(folder, "two", on, at=5)
    on.wait()  # until rank 0 has removed older ones
    kept = sorted(scratch.glob("fit-*.ckpt"))
    assert [file.name[:13] for file in kept] == ["fit-000000005", "fit-000000006"]
    assert all(file.is_dir() and unsound(file) is None for file in kept)
    assert len(list(scratch.glob("best-*.ckpt"))) == 1
    assert len(list(kept[1].glob("__*"))) == 2  # a file of each rank
    on.wait()
    if on.main:
        shutil.copytree(folder / "two", folder / "one-of-two")
        killed = scratch / ".fit-000000007.ckpt.w2sg-tmp"  # written, but for its name
        shutil.copytree(kept[1], killed)
        piece = next(kept[1].glob("__1_*"))
        piece.write_bytes(piece.read_bytes()[:-1] + b"?")
        assert "has another hash" in unsound(kept[1])
    done = long_fit(folder, "two", on)
    assert Stopping.first == 5  # of the older one
    on._sharded = lambda: sharding.Sharded(on.line, 2, copies=2, offload=True)  # as for two machines of one device
    done_of_one = long_fit(folder, "two-of-one", on)
    if on.main:
        assert not killed.exists()
        assert_same(whole, done)
        assert_same(whole, done_of_one, rtol=0, atol=1e-5)


def a_fit_holds_parts(on, folder: Path) -> None:
    """In bf16-mixed no whole weights wait for the backward pass, and gradients are summed once a step."""
    sums, reduce = [], param_group.foreach_reduce
    param_group.foreach_reduce = lambda *args, **rest: (sums.append(1), reduce(*args, **rest))[1]
    left = []
    usual = sharding.Sharded.teardown
    sharding.Sharded.teardown = lambda self: (left.append(len(self.optimizers)), usual(self))[1]
    done = stages(folder, on).fit("m", {}, partial(fit_job, folder))
    assert Watching.most < 0.05, Watching.most
    assert len(sums) == 4 * (LAYERS + 2), len(sums)  # steps; blocks, body and head
    assert left == [0]
    if on.main:
        (folder / "two.json").write_text((done / "curve.json").read_text())


@pytest.mark.slow
def test_two_ranks_hold_parts_and_learn_what_one_does(tmp_path):
    save(tmp_path / "plain", llama(num_hidden_layers=LAYERS, intermediate_size=WIDTH))
    save(tmp_path / "tied", llama(tie_word_embeddings=True))
    long_fit(tmp_path, "two-of-one", at=5)
    finish = start_ranks("tests/training/test_sharding.py", str(tmp_path), folder=tmp_path)
    one = stages(tmp_path / "one", devices(precision="bf16-mixed")).fit("m", {}, partial(fit_job, tmp_path))
    assert Watching.most > 0.9  # what autocast keeps
    said = finish()
    assert "Warning" not in said, said
    assert_same(next(tmp_path.glob("whole/store/m-*")), long_fit(tmp_path, "one-of-two"), rtol=0, atol=1e-5)
    assert Stopping.first == 6
    for name, error in {"two": 0.03, "ddp": 0.003}.items():
        for a, b in zip(read_json(one / "curve.json"), read_json(tmp_path / f"{name}.json"), strict=True):
            assert a == pytest.approx(b, rel=error), name


@pytest.mark.parametrize(("over", "copies"), [("all", 1), ("node", 2)])
def test_each_machine_may_have_a_copy(over, copies):
    config = TrainerConfig(strategy="fsdp", num_nodes=2, devices=4, shard_over=over, offload=True)
    on = SimpleNamespace(config=config, line=None, world=8, mixed=True)
    on.parts = Devices.parts.fget(on)
    made = Devices._sharded(on)
    assert (made.copies, made._data_parallel_size, made._tensor_parallel_size) == (copies, copies, 8 // copies)
    assert made.offload
    assert made.mixed


def test_weights_that_an_architecture_keeps_in_fp32_are_named():
    router = torch.nn.Sequential(torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 2)}), torch.nn.Linear(2, 2))
    assert sharding._wide(router) == []
    router._keep_in_fp32_modules_strict = ["gate.weight", "e_score_correction_bias"]
    assert sharding._wide(router) == ["gate.weight"]


def test_a_disk_that_fills_up_beside_training_costs_the_older_checkpoint(tmp_path):
    """Once; and every rank learns of it by the error that all of them get."""

    class Full:
        def wait(self):
            raise OSError(errno.ENOSPC, "no space")

    files = SealedFiles()
    kept = Checkpoints(tmp_path, files, 600.0, False, stops.Deferral())
    files.spare = tmp_path / "fit-1"
    (files.spare / "piece").mkdir(parents=True)
    files.writing = Full()
    assert not kept._settle()
    assert not list(tmp_path.iterdir())
    assert kept.written == -math.inf  # the next one is due
    files.writing = Full()
    with pytest.raises(OSError, match="no space"):
        kept._settle()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    on = devices(devices=2, strategy="fsdp", precision="bf16-mixed")
    models_come_from_one(on, folder)
    a_fit_holds_parts(on, folder)
    a_replicated_model_is_read_once(on, folder)
    a_stopped_fit_goes_on(on, folder)
    print("done")
