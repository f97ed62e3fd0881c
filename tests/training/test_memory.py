"""What runs out of memory is done again, cut smaller, and comes out the same.

Run as a script, this file is a rank that trains beside another one.
"""

import doctest
import itertools
import logging
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from fits import examples, options, stages
from safetensors.torch import load_file, save_file
from torch import nn

from w2sg import losses, memory
from w2sg.config.schema import TrainerConfig
from w2sg.data.completions import Completions
from w2sg.data.loading import Examples
from w2sg.data.rows import ByPlace
from w2sg.errors import UserError, calling
from w2sg.losses.preferences import LOSSES
from w2sg.memory import Budget, cut, in_parts, padded
from w2sg.models import footprint
from w2sg.models.footprint import cache_bytes
from w2sg.models.heads import BagOfWords
from w2sg.store.files import read_json
from w2sg.store.shards import Found
from w2sg.training import within_memory
from w2sg.training.devices import Devices
from w2sg.training.label_modules import SoftLabelModule
from w2sg.training.stage_values import load_parts, load_values
from w2sg.training.stages import FitJob, ReadJob
from w2sg.training.text_modules import PreferenceModule
from w2sg.training.within_memory import backbones, room_to_read, room_to_write

CONFIDENCE = partial(losses.confidence, alpha=0.5, warmup=0.3)


class Fails(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class Small(BagOfWords):
    """A model on a device with room for so many padded tokens. It drops units, so that random numbers count."""

    def __init__(self, room=10**9, when="forward", dropout=0.0):
        super().__init__(64, True, 2)
        self.room, self.when, self.dropout, self.asked = room, when, dropout, []

    def forward(self, batch):
        tokens = batch["input_ids"].numel()
        self.asked.append(tokens)
        if tokens > self.room and self.when == "forward":
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        scores = nn.functional.dropout(super().forward(batch), self.dropout, self.training)
        return Fails.apply(scores) if tokens > self.room else scores


def job(loss, scorer, held_out=None, micro_tokens=None, micro_batch=None, **changes):
    torch.manual_seed(3)
    nn.init.normal_(scorer.words.weight, std=0.1)
    module = partial(SoftLabelModule, loss=loss)
    setting = options(**changes)
    return FitJob(scorer, module, examples(), held_out, setting, 5, micro_batch, {}, {}, micro_tokens, "weak")


def fitted(work, name, *args, **changes):
    """Weights, curve and info of a fit."""
    folder = work.fit(name, {}, lambda: job(*args, **changes))
    info = read_json(folder / "manifest.json")["info"]
    return (
        load_file(next((folder / "model").glob("*.safetensors")))["words.weight"],
        read_json(folder / "curve.json"),
        info,
    )


def test_the_examples_of_the_docstrings():
    result = doctest.testmod(memory, extraglobs={"np": np})
    assert result.attempted
    assert not result.failed


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "when"), [("ce", "forward"), ("ce", "backward"), ("confidence", "backward")])
def test_a_step_that_ran_out_is_done_again_and_learns_the_same(loss, when, tmp_path, caplog):
    work, loss = stages(tmp_path), {"ce": losses.cross_entropy, "confidence": CONFIDENCE}[loss]
    expected, curve, info = fitted(work, "whole", loss, Small(), held_out=examples(20, seed=9))
    assert "micro_tokens" not in info
    with caplog.at_level(logging.WARNING):
        found, again, info = fitted(work, "cut", loss, Small(40, when), held_out=examples(20, seed=9))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert [point["step"] for point in again] == [point["step"] for point in curve]
    for one, other in zip(again, curve, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert 16 <= info["micro_tokens"] < 64  # as many as fit: a power of two
    lines = [r.getMessage() for r in caplog.records if "memory ran out" in r.getMessage()]
    assert any(f"weak.micro_tokens={info['micro_tokens']} begins so" in line for line in lines)
    assert len(lines) <= 8  # once for each halving of steps and of reading, and never again


def test_a_single_row_that_does_not_fit_is_named_with_what_helps(tmp_path):
    with pytest.raises(UserError, match=r"a single row of \d+ tokens.*weak\.max_length.*weak\.tune=lora"):
        fitted(stages(tmp_path), "m", losses.cross_entropy, Small(10))


def test_tokens_that_were_asked_for_are_kept_to(tmp_path):
    scorer = Small()
    found, _, _ = fitted(stages(tmp_path), "cut", losses.cross_entropy, scorer, micro_tokens=48)
    assert 32 < max(scorer.asked) <= 48
    expected, _, _ = fitted(stages(tmp_path / "b"), "whole", losses.cross_entropy, Small())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("room", [40, 10**9])
def test_the_longest_batch_is_tried_first_and_leaves_no_trace(room, tmp_path, monkeypatch, caplog):
    expected, curve, _ = fitted(stages(tmp_path), "m", losses.cross_entropy, Small(dropout=0.5), micro_tokens=32)
    monkeypatch.setattr(within_memory, "has_limit", lambda device: True)
    scorer = Small(room, "backward", dropout=0.5)
    found, again, info = fitted(stages(tmp_path / "b"), "m", losses.cross_entropy, scorer)
    lengths = np.sort(examples().inputs.lengths)[::-1]
    assert scorer.asked[0] == 8 * lengths[0]  # a batch of eight, before any other
    assert "memory ran out" not in caplog.text
    if room == 40:
        assert info["micro_tokens"] == 32
        assert torch.equal(found, expected)  # the same cut: also of the dropout
        assert again == curve
    else:
        assert "micro_tokens" not in info


def test_devices_that_hold_a_model_together_choose_by_what_rows_take(tmp_path, monkeypatch):
    """5,000 bytes whatever the tokens, and 10 for each of them; none of them runs out, for the others would wait."""
    lengths = np.sort(examples().inputs.lengths)[::-1]
    monkeypatch.setattr(within_memory, "has_limit", lambda device: True)
    monkeypatch.setattr(within_memory, "free_bytes", lambda device: 5000 + 10 * 70)
    monkeypatch.setattr(SoftLabelModule, "_peak", lambda self, batch, rows: 5000 + 10 * padded(batch.costs, rows))
    monkeypatch.setattr(SoftLabelModule, "on_fit_start", lambda self: setattr(self.budget, "alone", False))
    scorer = Small()
    _, _, info = fitted(stages(tmp_path), "m", losses.cross_entropy, scorer)
    assert info["micro_tokens"] == 64
    assert lengths[0] < max(scorer.asked) <= 64


def test_devices_read_as_much_as_the_fullest_of_them_has_room_for(monkeypatch):
    monkeypatch.setattr(within_memory, "has_limit", lambda device: True)
    fabric, config = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(eval_tokens=4096)
    on = SimpleNamespace(fabric=fabric, config=config, mixed=False, everyone=lambda room: [room, 1024])
    assert within_memory.tokens_at_once(on, Small()) == 1024


class Policy(nn.Module):
    """Log-probabilities of reply tokens by a table; at most so many tokens at once."""

    def __init__(self, room=10**9):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.room = nn.Embedding(30, 30), room

    def forward(self, batch):
        if batch["input_ids"].numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        before = batch["input_ids"].flatten()[batch["source"]]
        return self.table(before).log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]

    def save(self, folder):
        folder.mkdir()
        save_file({"words.weight": self.table.weight.detach()}, folder / "model.safetensors")


def pairs(count=12):
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 30, random.integers(2, 9)) for _ in range(count)]
    replies = [tuple(random.integers(0, 30, random.integers(2, 12)) for _ in range(2)) for _ in range(count)]
    inputs = Completions(prompts, replies)
    reference = torch.randn(count, 2, generator=torch.Generator().manual_seed(1)) - 9
    return Examples(inputs, [f"p{k}" for k in range(count)], torch.zeros(count, dtype=torch.long), reference)


def test_preferences_too(tmp_path):
    def learned(room):
        loss = partial(LOSSES["sigmoid"], beta=0.1)
        module = partial(PreferenceModule, loss=loss, beta=0.1, supervised=0.5, supervised_mean="token")
        setting = options(batch_size=4, validation=0.1)
        work = stages(tmp_path / str(room))
        folder = work.fit("m", {}, lambda: FitJob(Policy(room), module, pairs(), pairs(6), setting, 5))
        return load_file(folder / "model" / "model.safetensors")["words.weight"], read_json(folder / "curve.json")

    (expected, curve), (found, again) = learned(10**9), learned(50)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(again, curve, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


class Hungry(BagOfWords):
    """Takes a megabyte for each token, for a moment."""

    def forward(self, batch):
        torch.empty((batch["input_ids"].numel(), 2**20), dtype=torch.uint8, device=batch["input_ids"].device)
        return super().forward(batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_longest_batch_is_cut_to_what_fits(tmp_path, caplog):
    on = Devices(TrainerConfig(accelerator="gpu", devices=1, precision="32-true"))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 60 * 2**20) / total)
    try:
        work = stages(tmp_path, on)
        folder = work.fit("m", {}, lambda: job(losses.cross_entropy, Hungry(64, True, 2)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert read_json(folder / "manifest.json")["info"]["micro_tokens"] == 32
    assert "memory ran out" not in caplog.text


# -- two devices ------------------------------------------------------------------------------------------------------


# of the second, the first step fails before others wait, or when it has their logits and no gradient yet; or both have
# tried the longest batch before, and keep to what fits into the smaller memory
SHARES = {
    "ce": (losses.cross_entropy, "forward", None),
    "confidence": (CONFIDENCE, "backward", 2),
    "chosen": (losses.cross_entropy, "backward", None),
}


def two(folder: str) -> None:
    """A rank: the second has less memory than the first, and so cuts its share into more parts."""
    on = Devices(TrainerConfig(accelerator="cpu", devices=2, strategy="ddp", eval_tokens=256))
    work = stages(folder, on)
    for name, (loss, when, rows) in SHARES.items():
        scorer = Small(32 if on.rank else 10**9, when)
        held_out = examples(20, seed=9)
        within_memory.has_limit = lambda _, tried=name == "chosen": tried
        work.fit(name, {}, partial(job, loss, scorer, held_out, micro_batch=rows))
        assert any(tokens > scorer.room for tokens in scorer.asked) == bool(on.rank)


@pytest.mark.slow
def test_devices_may_cut_differently(tmp_path):
    from conftest import start_ranks

    said = start_ranks("tests/training/test_memory.py", str(tmp_path / "two"), folder=tmp_path)()
    assert "memory ran out" not in said  # rank 0 has room, and alone speaks: also for the other
    assert "ce: another device ran out of memory, and went on with 32 tokens at once" in said
    for name, (loss, _, _) in SHARES.items():
        expected, curve, _ = fitted(stages(tmp_path / "one"), name, loss, Small(), held_out=examples(20, seed=9))
        (folder,) = (tmp_path / "two" / "store").glob(f"{name}-*")
        found = load_file(next((folder / "model").glob("*.safetensors")))["words.weight"]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        for one, other in zip(read_json(folder / "curve.json"), curve, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        assert read_json(folder / "manifest.json")["info"]["micro_tokens"] == 32


def test_all_devices_cut_alike_as_long_as_all_have_room():
    from w2sg.data.loading import make_batch

    data, budget = examples(), Budget(tokens=40)
    rows = np.argsort(-data.inputs.lengths, kind="stable")[:11]
    batches = [make_batch(data, rows, rank, 2, budget) for rank in range(2)]
    assert batches[0].parts == batches[1].parts
    assert len(batches[0].parts) > 1
    for batch in batches:
        assert all(m["input_ids"].numel() <= 40 for m in batch.micro)


# -- reading and writing ----------------------------------------------------------------------------------------------


def test_rows_that_ran_out_are_read_again_and_no_others(tmp_path, caplog):
    data, scorer = examples(50), Small(40)
    torch.manual_seed(0)
    nn.init.normal_(scorer.words.weight)
    folder = stages(tmp_path).read("scores", {}, lambda: ReadJob(scorer, scorer, data))
    ids, values = load_values(folder)
    assert ids == data.ids
    whole = Small()
    whole.load_state_dict(scorer.state_dict())
    torch.testing.assert_close(values, whole(data.inputs.collate(range(50))).detach())
    failed = [tokens for tokens in scorer.asked if tokens > 40]
    assert len(failed) == caplog.text.count("memory ran out") <= 4  # what failed once is not tried at that size again
    done = sum(tokens for tokens in scorer.asked if tokens <= 40)
    assert data.inputs.useful.sum() <= done < 1.5 * data.inputs.useful.sum()


def test_what_is_found_before_memory_runs_out_is_kept():
    costs, asked = np.array([9, 9, 4, 4, 4, 4]), []

    def read(rows):
        asked.append((rows.start, rows.stop))
        if padded(costs, rows) > 10:
            raise torch.OutOfMemoryError
        return list(range(rows.start, rows.stop))

    budget = Budget()
    found = in_parts(budget, costs, read, torch.device("cpu"), [slice(0, 1), slice(1, 6)])
    assert list(itertools.chain(*found)) == list(range(6))
    assert asked.count((0, 1)) == 1
    assert budget.tokens == 16  # after 45 and 27
    with pytest.raises(UserError, match="a single row of 9 tokens"):
        in_parts(budget, costs, lambda rows: read(slice(0, 6)), torch.device("cpu"))
    together = Budget(alone=False)
    with pytest.raises(UserError, match=r"devices that hold a model together.*trainer\.tokens_per_eval_batch=32"):
        in_parts(together, costs, read, torch.device("cpu"))


def test_other_errors_are_not_taken_for_it():
    def read(rows):
        raise RuntimeError("the size of tensor a must match")

    with pytest.raises(RuntimeError, match="must match"):
        in_parts(Budget(), np.array([1, 1]), read, torch.device("cpu"))


def test_code_from_outside_may_run_out_of_memory_too():
    with pytest.raises(torch.OutOfMemoryError), calling(np.linalg.norm):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_replies_do_not_depend_on_the_rows_that_memory_holds(tmp_path, monkeypatch):
    """Replies have as many values as tokens: parts of a batch are put together again."""
    lengths = np.arange(1, 9) + 4
    seen = []

    def run(folder, room):
        def write(batch):
            rows = batch["row"].tolist()
            seen.append(len(rows))
            if len(rows) > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            sizes = torch.tensor([row % 3 + 1 for row in rows])
            values = torch.cat([torch.full((row % 3 + 1,), float(row)) for row in rows])
            return Found(values, sizes, torch.tensor(rows), int(sizes.sum()), 7)

        data = Examples(ByPlace(lengths), [f"p{k}" for k in range(8)], torch.zeros(8))
        work = stages(tmp_path / folder)
        stage = work.read("r", {}, lambda: ReadJob(nn.Linear(1, 1), write, data, rows=8, written=1))
        return load_parts(stage), work.records[-1].tokens

    whole, tokens = run("whole", 8)
    assert seen == [8]
    seen.clear()
    parts, again = run("parts", 3)
    assert tokens == again == 15
    assert all((parts[i] == whole[i]).all() for i in whole)
    assert max(seen[1:]) < 8
    seen.clear()
    monkeypatch.setattr("w2sg.training.within_memory.room_to_write", lambda *_: 36)  # three of the longest
    assert run("room", 8)[0].keys() == whole.keys()
    assert seen == [3, 4, 1]


def test_rows_of_a_cache_by_what_is_free(monkeypatch):
    """All models that take part are counted, and a cache that grows moves with half as much again."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    models = nn.ModuleList([transformers.AutoModelForCausalLM.from_config(config) for _ in range(2)])
    assert len(backbones(models)) == 2
    monkeypatch.setattr(within_memory, "free_bytes", lambda device: 10**6)
    alone, both = (room_to_write(part, torch.device("cpu"), 100, 4) for part in (models[0], models))
    assert alone * 1.5 * 4 * cache_bytes(config, 100) / 100 < 10**6
    assert both < 0.7 * alone
    assert room_to_write(models, torch.device("cpu"), 100, 8) < 0.6 * both
    assert room_to_write(models, torch.device("cpu"), 100, 4, mixed=True) > 1.5 * both
    monkeypatch.setattr(footprint, "kept", lambda *_: 1 / 0)  # as of a model whose code is its own
    assert room_to_read(models, torch.device("cpu")) == within_memory.MOST


def test_cuts_keep_to_rows_and_tokens():
    costs = np.random.default_rng(0).integers(1, 30, 40)
    for rows, tokens in ((None, 60), (3, None), (3, 60), (None, 1)):
        runs = cut(costs, tokens, rows)
        assert [k for run in runs for k in range(run.start, run.stop)] == list(range(40))
        assert all(rows is None or run.stop - run.start <= rows for run in runs)
        assert all(tokens is None or run.stop - run.start == 1 or padded(costs, run) <= tokens for run in runs)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    two(sys.argv[1])
