"""A model on several devices, or cut over processes, says what it says on one; what cannot be so is refused."""

import json
import logging
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers as T
from conftest import compose, refused, save_tiny_model, start_ranks
from runs import run_typed

from w2sg.config.check import check
from w2sg.config.model_schema import ModelConfig
from w2sg.decoding.contrastive import decode
from w2sg.decoding.engine import Several
from w2sg.decoding.sampling import Settings
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import ConfigError, UserError
from w2sg.models.policy import load_policy
from w2sg.models.source import find
from w2sg.models.spread import is_spread, weights_at_hand
from w2sg.models.tensor_parallel import count_parts, mark, plan_of
from w2sg.planning.memory import held

PAIR = ["dataset=hh_rlhf", "strong=gpt2", "weak=gpt2", "trainer=cpu"]
BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}


@pytest.fixture(scope="module", params=BLOCKS)
def kind(request, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "m", request.param, layers=4, width=64)
    return request.param, folder


def policy_of(folder, **options):
    spec = ModelConfig(name=str(folder), **options)
    return load_policy(find(spec, "strong"), trainable=False).eval()


def written(*policies):
    """Greedy and drawn replies, with rows that fork, stop early and are let go of."""
    engines = [TransformersEngine(policy) for policy in policies]
    engine = engines[0] if len(engines) == 1 else Several(*engines)
    prompts = [np.arange(5, 25), np.arange(30, 33), np.arange(40, 49)]
    columns = [[0.5, 0.1, 0.0, 0.0, 1.0, 1.0], [0.5, 0.1, 1.0, 0.0, 0.9, 1.2]] * 6
    uniform = torch.from_numpy(np.random.default_rng(0).random((12, 5)))
    return decode(engine, prompts, Settings.from_columns(torch.tensor(columns)), uniform, [7, 90], [0, 1, 2] * 4)


def test_blocks_on_disk_write_what_they_write_in_memory(kind, caplog):
    name, folder = kind
    block = BLOCKS[name].format
    whole = policy_of(folder)
    with caplog.at_level(logging.WARNING):
        spread = policy_of(folder, device_map={block(1): "disk", block(2): "disk"})
    assert "of 4 blocks of" in caplog.text
    assert (
        "2 in host memory, 2 on disk; those away from the device that computes go there at every token" in caplog.text
    )
    places = {n: p.device.type for n, p in spread.plain.named_parameters()}
    assert {n for n, place in places.items() if place == "meta"} == {n for n in places if re.search(r"\.[12]\.", n)}
    assert is_spread(spread)
    assert not is_spread(whole)
    for models in ((spread,), (whole, spread)):
        ours, theirs = written(*models), written(*[whole] * len(models))
        assert [t.tolist() for t in ours.tokens] == [t.tolist() for t in theirs.tokens]
        assert all(np.array_equal(a, b) for a, b in zip(ours.log_probabilities, theirs.log_probabilities, strict=True))
    batch = {"input_ids": torch.arange(5, 15)[None], "position_ids": torch.arange(10)[None]}
    batch |= {"source": torch.arange(9), "targets": torch.arange(6, 15)}
    with torch.no_grad():
        assert torch.equal(spread(batch), whole(batch))
    torch.nn.ModuleList([spread]).to(torch.float64).cpu()  # nobody moves it as a whole
    assert {n: p.device.type for n, p in spread.plain.named_parameters()} == places
    found = {name: weight.clone() for name, weight in weights_at_hand(spread.plain)}
    assert all(torch.equal(found[name], weight) for name, weight in whole.plain.named_parameters())


@pytest.mark.parametrize("changed", [{"quantise": 4}, {"random_init": True}, {"dtype": "bfloat16"}], ids=str)
def test_weights_that_are_changed_are_spread_as_well(kind, changed):
    name, folder = kind
    block = BLOCKS[name].format(0)
    torch.manual_seed(0)
    whole = policy_of(folder, **changed)
    torch.manual_seed(0)
    spread = policy_of(folder, device_map={block: "disk"}, **changed)
    assert is_spread(spread)
    ours, theirs = written(spread), written(whole)
    assert [t.tolist() for t in ours.tokens] == [t.tolist() for t in theirs.tokens]


def test_a_rule_fills_what_each_place_may_hold(kind):
    name, folder = kind
    auto = policy_of(folder, device_map="auto", max_memory={"cpu": "700KB"})
    places = auto.plain.hf_device_map
    blocks = [places[BLOCKS[name].format(k)] for k in range(4)]
    assert blocks == sorted(blocks)  # in order
    assert set(blocks) == {"cpu", "disk"}
    assert {place for n, place in places.items() if "layers" not in n and ".h." not in n} == {"cpu"}
    assert not is_spread(policy_of(folder, device_map="auto"))  # there is room for all


def test_what_cannot_be_spread_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "llama")
    (problem,) = refused(*PAIR, "strong.device_map=auto")
    assert problem.startswith("strong.device_map: the run trains this model")
    assert "use trainer=fsdp" in problem
    with pytest.raises(ConfigError, match=r"strong\.device_map: it takes the GPUs for one process.*trainer\.devices=1"):
        check(compose(*PAIR, "strong.device_map=auto", "trainer.devices=2", name="decode"))
    for options, said in (
        (
            {"device_map": {"model.layers.0": "gpu"}},
            "device_map: 'gpu' is no place; name the number of a GPU, cpu or disk",
        ),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory: read only where device_map is a rule"),
        ({"device_map": "auto", "tp_plan": "auto"}, "tp_plan: device_map does not go with it"),
        ({"load": "8bit", "train": "lora", "tp_plan": "auto"}, "tp_plan: load=8bit does not go with it"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            ModelConfig(name="x", **options)
    with pytest.raises(UserError, match=r"strong\.device_map: model\.norm is no block of the model"):
        policy_of(folder, device_map={"model.norm": "disk"})
    with pytest.raises(UserError, match=r"strong\.device_map: there is no GPU 3 in this run"):
        policy_of(folder, device_map={"model.layers.0": 3})


# -- cut over processes -----------------------------------------------------------------------------------------------


def test_what_cannot_be_cut_is_refused(tmp_path):
    llama = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    plan = plan_of(T.LlamaConfig(**llama), "strong", 2)
    assert plan["layers.*.self_attn.o_proj"] == "rowwise"
    assert "lm_head" not in plan
    assert plan_of(T.Qwen3Config(**llama), "strong", 2).keys() == plan.keys()
    remedy = r"use strong\.device_map=auto with trainer\.devices=1, or set strong\.tp_plan=null"
    with pytest.raises(UserError, match=rf"strong\.tp_plan: transformers cannot cut a model of type gpt2; {remedy}"):
        plan_of(T.GPT2Config(), "strong", 2)
    with pytest.raises(UserError, match=rf"type phi3 cuts layers in a way that is not supported .*{remedy}"):
        plan_of(T.Phi3Config(), "strong", 2)
    with pytest.raises(
        UserError, match=rf"num_key_value_heads=2 of the model is no multiple of the 4 devices; {remedy}"
    ):
        plan_of(T.LlamaConfig(**llama), "strong", 4)
    two = ["trainer.devices=2", "trainer.strategy=ddp", "strong.tp_plan=auto"]
    for typed, said in (
        (["strong.tp_plan=auto"], "it cuts a model over several processes, and trainer.devices=1 starts one"),
        ([*two, "strong.tune=lora"], "what is trained here is read with adapters"),
    ):
        assert any(said in problem for problem in refused(*PAIR, *typed)), typed


def test_a_plan_counts_a_part_of_what_is_cut(tmp_path):
    config = T.LlamaConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4)
    with torch.device("meta"):
        model = T.LlamaForCausalLM(config)
    whole, linear = held(model.parameters()), 4 * 2 * (4 * 64 * 64 + 3 * 64 * 128)
    mark(model, plan_of(config, "strong", 4))
    count_parts(model, 4)
    assert held(model.parameters()) == whole - linear * 3 // 4


@pytest.mark.slow
def test_two_processes_write_together_what_one_writes(pairs_folder, tmp_path):
    for role, seed in (("weak", 0), ("untuned", 7), ("strong", 1)):
        folder = save_tiny_model(tmp_path / role, "llama", seed=seed)
        config = T.AutoConfig.from_pretrained(folder)
        config.num_key_value_heads = 2
        torch.manual_seed(seed)
        T.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    typed = [f"dataset.path={pairs_folder}", "dataset.sizes={weak_train: 8, transfer: 8, test: 6}", "decoder=eft"]
    typed += [f"{role}=hf" for role in ("weak", "strong")]
    typed += [f"{role}.{key}" for role in ("weak", "strong") for key in (f"name={tmp_path / role}", "max_length=96")]
    typed += [f"weak.before_alignment={tmp_path / 'untuned'}", "decoder.max_new_tokens=8", "decoder.temperature=0"]
    typed += ["method.judge.model=null", "trainer=cpu", "logger=none"]
    run_typed([*typed, f"store={tmp_path / 'one-store'}", f"out={tmp_path}"], tmp_path / "one", [], name="decode")
    two = ["trainer.devices=2", "trainer.strategy=ddp", "strong.tp_plan=auto", f"store={tmp_path / 'two-store'}"]
    start_ranks("evaluate.py", *typed, *two, f"out={tmp_path / 'two'}", folder=tmp_path)()
    (found,) = (tmp_path / "two").glob("*/report.json")
    rows = [pq.read_table(folder / "samples.parquet").to_pylist() for folder in (tmp_path / "one", found.parent)]
    assert len(rows[0]) == 18
    for key in ("system", "prompt_id", "reply"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]
    one, both = (json.loads(file.read_text())["decoding"]["systems"] for file in (tmp_path / "one/report.json", found))
    assert both["eft"]["surprise"]["value"] == pytest.approx(one["eft"]["surprise"]["value"], abs=1e-5)
    assert f"the layers of {tmp_path / 'strong'} are cut over 2 processes" in found.read_text()
