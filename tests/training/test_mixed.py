"""Under bf16-mixed what nothing trains is held in bf16, and heads compute in fp32: same numbers, no cast a token."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from fits import devices, options, stages
from model_folders import spec
from safetensors.torch import load_file
from tiny_engines import draw, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from w2sg import losses
from w2sg.data.completions import Completions
from w2sg.data.loading import Examples
from w2sg.data.rows import pack
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.models.mixed import hold_in_bf16
from w2sg.models.scorer import load_language_model
from w2sg.models.source import find
from w2sg.store.shards import Found
from w2sg.training import cpu_speed
from w2sg.training.label_modules import SoftLabelModule
from w2sg.training.stage_values import load_values
from w2sg.training.stages import FitJob, ReadJob


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    monkeypatch.setattr(cpu_speed, "bf16_speedup", lambda: 2.0)


class Casts(TorchDispatchMode):
    """Counts casts of a module's frozen weights to bf16."""

    def __init__(self, module):
        super().__init__()
        self.places = {p.untyped_storage().data_ptr() for p in module.parameters() if not p.requires_grad}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_bf16 = (kwargs or {}).get("dtype") == torch.bfloat16
        if func is torch.ops.aten._to_copy.default and to_bf16:
            self.count += args[0].untyped_storage().data_ptr() in self.places
        return func(*args, **(kwargs or {}))


class Two(torch.nn.Module):
    """One model that writes and reads in a stage, as policies do there."""

    def __init__(self, kind):
        super().__init__()
        self.policy = tiny(kind).requires_grad_(False)

    def read(self, batch, casts):
        engine = TransformersEngine(self.policy)
        assert engine._gaps_work  # what bf16 rounds is no fault of the cache
        assert engine._shares
        engine.start([np.array([3, 4, 5]), np.array([6, 7])])
        with Casts(self) as seen:
            steps = []
            for _ in range(3):
                engine.extend(torch.tensor([8, 9]))
                steps.append(engine.logits[0, 0])
            casts.append(seen.count / 3)
        with Casts(self) as seen:
            read = self.policy(batch)
            casts.append(seen.count)
        return Found(torch.cat([*steps, read]), torch.tensor([3 * len(steps[0]) + len(read)]))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_that_write_and_read_cast_no_weight_and_say_the_same(kind, tmp_path):
    model = Two(kind)
    fresh = copy.deepcopy(model)
    generator = np.random.default_rng(0)
    rows = Completions([draw(generator, 5)], [(draw(generator, 4), draw(generator, 3))])
    examples = Examples(rows, ["a"], torch.zeros(1, dtype=torch.long))
    casts = []
    job = ReadJob(model, partial(model.read, casts=casts), examples)
    folder = stages(tmp_path, devices(precision="bf16-mixed")).read("m", {}, lambda: job, whole=True)
    assert casts == [0, 0]
    before = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as it was: fp32 weights
        wanted = fresh.read(rows.collate(range(1)), before)
    layers = {"gpt2": 4, "llama": 7}[kind]  # linear ones in each of two blocks
    assert before == [2 * layers * (2 if kind == "gpt2" else 1)] * 2  # GPT-2's have biases
    assert torch.equal(load_values(folder)[1], wanted.values)
    kinds = {name: p.dtype for name, p in model.policy.named_parameters()}
    assert {kinds[n] for n in kinds if "norm" in n or "ln_" in n or "emb" in n or "wte" in n} == {torch.float32}
    assert model.policy.head()[0].dtype == torch.float32
    assert hold_in_bf16(model) == 0  # no second time


def test_the_base_of_adapters_is_held_in_bf16_while_they_train(tiny_gpt2, tmp_path, monkeypatch):
    source = find(spec(name=str(tiny_gpt2), train="lora"), "strong")
    texts = [("the good cat sat", "the bad dog"), ("hi", "hi there"), ("a!", "a! b"), ("x y z", "p q")]
    casts = []

    class Counted(SoftLabelModule):
        def training_step(self, batch, index):
            with Casts(self.scorer) as seen:
                super().training_step(batch, index)
            casts.append(seen.count)

    def fit(folder):
        torch.manual_seed(0)
        scorer = load_language_model(source, True, 2)
        rows = pack(texts, source.encode, 64)
        targets = torch.tensor([[1.0, -1.0]] * 4)
        examples = Examples(rows, list("abcd"), torch.zeros(4, dtype=torch.long), targets, targets.argmax(1))
        module = partial(Counted, loss=losses.cross_entropy)
        job = FitJob(scorer, module, examples, None, options(epochs=3, batch_size=4, lr=0.01), seed=1)
        made = stages(tmp_path / folder, devices(precision="bf16-mixed")).fit("m", {}, lambda: job)
        return load_file(made / "model" / "adapter_model.safetensors")

    held = fit("held")
    assert casts == [0, 0, 0]
    monkeypatch.setattr("w2sg.training.stages.hold_in_bf16", lambda *_, **__: 0)
    plain = fit("plain")
    assert casts[3] > 0
    assert held.keys() == plain.keys()
    assert all(torch.equal(held[name], plain[name]) for name in held)
    assert any(bool(value.any()) for name, value in held.items() if "lora_B" in name)  # they moved


def test_scores_have_the_digits_of_fp32(tiny_gpt2):
    scorer = load_language_model(find(spec(name=str(tiny_gpt2)), "strong"), True, 2)
    hidden = torch.randn(64, 1, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = scorer._score(hidden)
    assert torch.equal(scores, scorer._score(hidden).detach())
    assert not torch.equal(scores, scores.bfloat16().float())
