"""A model whose blocks stand on several devices says what it says on one; what cannot be spread is refused."""

import logging
import re

import numpy as np
import pytest
import torch
from conftest import compose, refused, save_tiny_model

from w2sg.config.check import check
from w2sg.decoding.contrastive import decode
from w2sg.decoding.engine import Several
from w2sg.decoding.sampling import Settings
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import ConfigError, UserError
from w2sg.models.policy import load_policy
from w2sg.models.source import find
from w2sg.models.spread import is_spread, weights_at_hand

PAIR = ["dataset=hh_rlhf", "strong=gpt2", "weak=gpt2", "trainer=cpu"]
BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}


@pytest.fixture(scope="module", params=BLOCKS)
def kind(request, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "m", request.param, layers=4, width=64)
    return request.param, folder


def policy_of(folder, *typed: str):
    config = check(compose(*PAIR, "strong=hf", f"strong.name={folder}", *typed, name="decode"))
    return load_policy(find(config.strong, "strong"), trainable=False).eval()


def written(*policies):
    """Greedy and drawn replies, with rows that fork, stop early and are let go of."""
    engines = [TransformersEngine(policy) for policy in policies]
    engine = engines[0] if len(engines) == 1 else Several(*engines)
    prompts = [np.arange(5, 25), np.arange(30, 33), np.arange(40, 49)]
    columns = [[0.5, 0.1, 0.0, 0.0, 1.0, 1.0], [0.5, 0.1, 1.0, 0.0, 0.9, 1.2]] * 6
    uniform = torch.from_numpy(np.random.default_rng(0).random((12, 8)))
    return decode(engine, prompts, Settings.from_columns(torch.tensor(columns)), uniform, [7, 90], [0, 1, 2] * 4)


def test_blocks_on_disk_write_what_they_write_in_memory(kind, caplog):
    name, folder = kind
    block = BLOCKS[name].format
    whole = policy_of(folder)
    with caplog.at_level(logging.WARNING):
        spread = policy_of(folder, f"strong.device_map={{{block(1)}:disk,{block(2)}:disk}}")
    assert "of 4 blocks of" in caplog.text
    assert (
        "2 in host memory, 2 on disk; those away from the device that computes go there at every token" in caplog.text
    )
    places = {n: p.device.type for n, p in spread.plain.named_parameters()}
    assert {n for n, place in places.items() if place == "meta"} == {n for n in places if re.search(r"\.[12]\.", n)}
    assert is_spread(spread)
    assert not is_spread(whole)
    for models in ((spread,), (spread, whole), (whole, spread)):
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


@pytest.mark.parametrize("changed", ["strong.round_weights=4", "strong.random_init=true", "strong.dtype=bfloat16"])
def test_weights_that_are_changed_are_spread_as_well(kind, changed):
    name, folder = kind
    block = BLOCKS[name].format(0)
    torch.manual_seed(0)
    whole = policy_of(folder, changed)
    torch.manual_seed(0)
    spread = policy_of(folder, changed, f"strong.device_map={{{block}:disk}}")
    assert is_spread(spread)
    ours, theirs = written(spread), written(whole)
    assert [t.tolist() for t in ours.tokens] == [t.tolist() for t in theirs.tokens]


def test_a_rule_fills_what_each_place_may_hold(kind):
    name, folder = kind
    auto = policy_of(folder, "strong.device_map=auto", "strong.max_memory={cpu: 700KB}")
    places = auto.plain.hf_device_map
    blocks = [places[BLOCKS[name].format(k)] for k in range(4)]
    assert blocks == sorted(blocks)  # in order
    assert set(blocks) == {"cpu", "disk"}
    assert {place for n, place in places.items() if "layers" not in n and ".h." not in n} == {"cpu"}
    assert not is_spread(policy_of(folder, "strong.device_map=auto"))  # there is room for all


def test_what_cannot_be_spread_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "llama")
    (problem,) = refused(*PAIR, "strong.device_map=auto")
    assert problem.startswith("strong.device_map: the run trains this model")
    assert "use trainer=fsdp" in problem
    with pytest.raises(ConfigError, match=r"strong\.device_map: it takes the GPUs for one process.*trainer\.devices=1"):
        check(compose(*PAIR, "strong.device_map=auto", "trainer.devices=2", name="decode"))
    with pytest.raises(ConfigError, match=r"device_map: 'gpu' is no place; name the number of a GPU, cpu or disk"):
        check(compose(*PAIR, "strong.device_map={model.layers.0:gpu}", name="decode"))
    with pytest.raises(ConfigError, match=r"max_memory: read only where device_map is a rule"):
        check(compose(*PAIR, "strong.max_memory={cpu: 1GB}", name="decode"))
    with pytest.raises(UserError, match=r"strong\.device_map: model\.norm is no block of the model"):
        policy_of(folder, "strong.device_map={model.norm:disk}")
    with pytest.raises(UserError, match=r"strong\.device_map: there is no GPU 3 in this run"):
        policy_of(folder, "strong.device_map={model.layers.0:3}")
