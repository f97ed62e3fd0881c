"""What a fit's optimizer does to weights: on GPUs in one kernel, in 8 bits, and in bf16 without losing small steps."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import compose, refused
from fits import devices, options, stages
from model_folders import spec

from w2sg import losses
from w2sg.config.check import check
from w2sg.config.machine import optimizer_problems
from w2sg.config.schema import TrainerConfig
from w2sg.data.loading import Examples
from w2sg.data.rows import pack
from w2sg.errors import UserError
from w2sg.models.scorer import load_language_model
from w2sg.models.source import find
from w2sg.store.files import read_json
from w2sg.training import optimizers
from w2sg.training.label_modules import SoftLabelModule
from w2sg.training.optimizers import make_optimizer
from w2sg.training.stages import FitJob


def test_adam_is_fused_on_a_gpu_and_as_ever_on_a_cpu(monkeypatch):
    asked = {}
    monkeypatch.setitem(optimizers.TORCHS, "adamw", lambda parameters, **more: asked.update(more))
    for kind in ("cuda", "cpu"):
        asked.clear()
        make_optimizer(options(), 0.1, [SimpleNamespace(device=torch.device(kind), dtype=torch.float32)])
        assert asked == {"lr": 0.1, "weight_decay": 0.01} | ({"fused": True} if kind == "cuda" else {})


def moved(choices, steps=300, rate=1e-6, seed=0):
    """Mean way of bf16 weights of the usual size along a gradient that always points the same way, in steps."""
    torch.manual_seed(seed)
    start = (torch.randn(8192, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    weights = torch.nn.Parameter(start.clone())
    optimizer = choices([weights])
    for _ in range(steps):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    return weights.detach(), float((start.double() - weights.detach().double()).mean() / rate / steps)


def test_small_steps_of_bf16_weights_count_when_they_are_rounded_by_chance():
    _, lost = moved(partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0))
    assert lost < 0.1
    by_chance = options(stochastic_rounding=True, weight_decay=0.0)
    found, way = moved(lambda parameters: make_optimizer(by_chance, 1e-6, parameters))
    assert 0.95 < way < 1.05
    again, _ = moved(lambda parameters: make_optimizer(by_chance, 1e-6, parameters), seed=1)
    assert torch.equal(found, again)  # copies of the weights on several devices stay copies
    with pytest.raises(UserError, match=r"lr=1e-06 .* lost in weights of bfloat16.* stochastic_rounding=true"):
        make_optimizer(options(), 1e-6, [torch.nn.Parameter(found)])


def test_rounding_by_chance_of_fp32_weights_is_torchs_adamw():
    """In fp32 there is nothing to round, so that the same class shows whether its arithmetic is right."""
    draws = torch.Generator().manual_seed(0)
    start, grads = torch.randn(50, generator=draws), torch.randn(20, 50, generator=draws)
    ends = []
    for kind in (torch.optim.AdamW, optimizers.RoundedAdamW):
        weights = torch.nn.Parameter(start.clone())
        optimizer = kind([weights], lr=0.01, weight_decay=0.1)
        for grad in grads:
            weights.grad = grad.clone()
            optimizer.step()
        ends.append(weights.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


def test_moments_of_bf16_weights_stay_in_fp32_over_a_stop():
    draws, ends = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    for stopped in (False, True):
        weights = torch.nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
        optimizer = optimizers.RoundedAdamW([weights], lr=1e-3)
        for k, grad in enumerate(draws):
            if stopped and k == 2:
                kept = optimizer.state_dict()
                optimizer = optimizers.RoundedAdamW([weights], lr=1e-3)
                optimizer.load_state_dict(kept)
            weights.grad = grad.clone()
            optimizer.step()
        ends.append(optimizer.state[weights]["exp_avg"])
    assert ends[1].dtype == torch.float32
    assert torch.equal(*ends)


PAIR = ["dataset=hh_rlhf", "strong=gpt2", "weak=gpt2", "trainer=cpu"]


def test_optimizers_that_cannot_work_are_refused(monkeypatch):
    there = []
    monkeypatch.setattr("w2sg.config.machine.find_spec", lambda name: name != "bitsandbytes" or there or None)

    def lines(name, **changes):
        return optimizer_problems("optim.full", name, TrainerConfig(accelerator="cpu", **changes))

    (missing,) = refused(*PAIR, "optim.full.optimizer=adamw8bit")
    (needless,) = refused(*PAIR, "optim.full.stochastic_rounding=true")
    assert missing.startswith("optim.full.optimizer: adamw8bit needs bitsandbytes; install the extra quantized")
    assert needless.startswith("optim.full.stochastic_rounding: it trains no weights of bfloat16")
    in_text = ["strong.dtype=bfloat16", "method.dpo.optimizer=adamw8bit", "method.sft.stochastic_rounding=true"]
    missing, lost = refused(*PAIR, "method=cong", *in_text, "method.baselines=[]")
    assert missing.startswith("method.dpo.optimizer: adamw8bit needs bitsandbytes")
    assert "steps of method.dpo.lr.full=6e-07 are lost" in lost
    assert "or method.dpo.stochastic_rounding=true" in lost
    there.append("bitsandbytes")
    assert lines("adamw8bit") == []
    assert "pages between a GPU and its host; use adamw8bit" in lines("paged_adamw8bit")[0]
    assert "use adamw, whose states are cut as well, or trainer=ddp" in lines("adamw8bit", strategy="fsdp")[0]
    (lost,) = refused(*PAIR, "optim.full.optimizer=adafactor", "strong.lr=1e-3", "strong.dtype=bfloat16")
    assert "strong.lr=0.001 of adafactor are lost" in lost  # which multiplies it by the size of the weights
    with pytest.raises(ValueError, match="stochastic_rounding: not read by optimizer=adafactor; use adamw"):
        options(optimizer="adafactor", stochastic_rounding=True)


def test_rounding_by_chance_is_no_mistake_and_stands_in_keys():
    config = check(compose(*PAIR, "strong.dtype=bfloat16", "optim.full.stochastic_rounding=true"))
    assert config.training.full.key()["stochastic_rounding"] is True
    assert "stochastic_rounding" not in config.training.lora.key()  # keys of before


def test_states_of_8_bits_train_and_go_on_where_they_stopped(tiny_gpt2, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quantized)")
    eight = options(optimizer="adamw8bit", weight_decay=0.0, stochastic_rounding=True)
    _, way = moved(lambda parameters: make_optimizer(eight, 1e-6, parameters))
    assert 0.9 < way < 1.1
    source = find(spec(name=str(tiny_gpt2)), "strong")
    texts = [("the good cat sat", "the bad dog"), ("hi", "hi there"), ("a!", "a! b"), ("x y z", "p q")]

    def fit(folder, name, stop=None):
        class Module(SoftLabelModule):
            def training_step(self, batch, index):
                if self.global_step == stop:
                    raise RuntimeError("stopped here")
                super().training_step(batch, index)

        torch.manual_seed(0)
        scorer = load_language_model(source, True, 2)
        targets = torch.tensor([[1.0, -1.0]] * 4)
        rows = pack(texts, source.encode, 64)
        examples = Examples(rows, list("abcd"), torch.zeros(4, dtype=torch.long), targets, targets.argmax(1))
        chosen = options(epochs=4, batch_size=4, lr=1e-3, optimizer=name)
        job = FitJob(scorer, partial(Module, loss=losses.cross_entropy), examples, None, chosen, seed=1)
        made = stages(tmp_path / folder, devices(), checkpoint_minutes=0.0).fit("m", {}, lambda: job)
        return [point["loss"] for point in read_json(made / "curve.json")]

    whole = fit("whole", "adamw8bit")
    with pytest.raises(RuntimeError, match="stopped here"):
        fit("stopped", "adamw8bit", stop=2)
    assert fit("stopped", "adamw8bit") == whole
    assert whole == pytest.approx(fit("plain", "adamw"), abs=0.02)
