"""Pretrained weights in 4 and 8 bits: near what they were, below adapters that train, and refused where they cannot."""

import json

import pytest
import torch
from conftest import compose, refused, save_tiny_model
from runs import label_arguments, run_typed
from transformers import AutoModelForCausalLM, LlamaConfig

from w2sg.config.check import check
from w2sg.errors import ConfigError, UserError
from w2sg.models.export import load_merged
from w2sg.models.finished import FinishedModel
from w2sg.models.low_bits import hold_in_bits
from w2sg.planning.memory import held

PAIR = ["dataset=hh_rlhf", "strong=gpt2", "weak=gpt2", "trainer=cpu"]


def test_weights_in_few_bits_are_refused_where_they_cannot_work(monkeypatch, tmp_path):
    there = []
    monkeypatch.setattr("w2sg.config.machine.find_spec", lambda name: name != "bitsandbytes" or there or None)

    typed = ["strong.load=4bit", "strong.tune=lora"]
    missing = "strong.load: 4bit needs bitsandbytes; install the extra quantized (pip install 'w2sg[quantized]')"
    assert refused(*PAIR, *typed) == [f"{missing}, or set it to null"]
    there.append("bitsandbytes")
    assert "use tune=lora (QLoRA), also where they are read alone" in refused(*PAIR, typed[0])[0]
    assert refused(*PAIR, *typed, "trainer.strategy=fsdp", "strong.round_weights=4") == [
        "strong.round_weights: load holds weights in few bits already; set one of the two to null"
    ]
    assert "cannot be cut over devices; use trainer=ddp" in refused(*PAIR, *typed, "trainer.strategy=fsdp")[0]
    served = ["decoder=best_of_n", "decoder.server.url=http://127.0.0.1:9/v1", "decoder.server.model=m"]
    with pytest.raises(ConfigError, match=r"strong\.load: a server writes in place of the strong model"):
        check(compose(*PAIR, *typed, *served, name="decode"))
    spec = check(compose(*PAIR, *typed)).strong
    trained = FinishedModel("student", spec, "strong", tmp_path, None, tmp_path, "", 0)
    with pytest.raises(UserError, match=r"student: .*gpt2 in 4bit .*; adapter=true writes its adapters alone"):
        load_merged(trained)


def test_a_plan_counts_weights_in_few_bits():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
        )
    whole = held(model.parameters())
    linear = hold_in_bits(model, "4bit")
    assert 0 < linear < sum(p.numel() for p in model.parameters())
    assert whole - held(model.parameters()) == pytest.approx(linear * (4 - 0.516), rel=1e-3)


@pytest.mark.parametrize("load", ["4bit", "8bit"])
def test_layers_in_few_bits_say_nearly_the_same_and_stay_out_of_the_way_of_autocast(load):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quantized)")
    from w2sg.models.low_bits import _layer

    draws = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 128, generator=draws), torch.randn(4, 128, generator=draws).requires_grad_()
    layer = _layer(load)(weight, torch.nn.Parameter(torch.ones(96), requires_grad=False)).train()
    said = layer(x)
    wanted = x @ weight.T + 1
    assert said.dtype == torch.float32
    assert (said - wanted).norm() < {"4bit": 0.12, "8bit": 0.02}[load] * wanted.norm()
    said.sum().backward()  # adapters below need it
    assert (x.grad - weight.sum(0)).norm() < {"4bit": 0.12, "8bit": 0.02}[load] * x.grad.norm()
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - said).norm() < 0.02 * said.norm()
    assert torch.equal(layer.to("cpu")(x), said)  # moved after it has read


@pytest.mark.slow
def test_adapters_train_on_a_base_in_4_bits(pairs_folder, tmp_path):
    """QLoRA from the command line: the run, its keys, what it saves, and its second time from the store."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quantized)")
    model = save_tiny_model(tmp_path / "model", "llama", width=64)
    typed = [*label_arguments(pairs_folder, model, tmp_path), "strong.tune=lora", "optim.lora.epochs=2"]
    typed += ["strong.load=4bit", "trainer.precision=bf16-mixed"]
    content = run_typed(typed, tmp_path / "one", [])
    stage = tmp_path / "store" / next(s["key"] for s in content["stages"] if s["name"] == "student")
    assert json.loads((stage / "key.json").read_text())["model"]["load"] == "4bit"
    assert content["metrics"]["student"]["accuracy"] > 0.6
    files = {f.name for f in (stage / "model").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    again = run_typed(typed, tmp_path / "again", [])
    assert all(stage["cached"] for stage in again["stages"])
