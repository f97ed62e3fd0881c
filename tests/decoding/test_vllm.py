"""vLLM behind `w2sg.decoding.text_engine`: a stand-in of its interface, and the real thing where it is installed."""

import importlib.util
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import conf_node, save_tiny_model, stand_in_for_vllm

from w2sg.config.engine_schema import EngineConfig
from w2sg.config.model_schema import ModelConfig
from w2sg.decoding.contrastive import ReplyRows
from w2sg.decoding.vllm import VISIBLE, VLLM, _visible
from w2sg.errors import UserError
from w2sg.models.export import merged, write_model
from w2sg.models.policy import load_policy
from w2sg.models.source import find
from w2sg.store.shards import Found, Shards
from w2sg.training.asking import ask_rows

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
REPLIES = [[6, 9], [7], [8, 5, 10]]


def expected(model, prompt, reply):
    with torch.no_grad():
        logs = model(torch.tensor([[*prompt, *reply]])).logits[0].double().log_softmax(-1)
    return [float(logs[len(prompt) - 1 + k, token]) for k, token in enumerate(reply)]


def check_readings(engine, model, tolerance):
    rows = engine.token_log_probabilities(PROMPTS, REPLIES)
    for prompt, reply, values in zip(PROMPTS, REPLIES, rows, strict=True):
        assert values == pytest.approx(expected(model, prompt, reply), abs=tolerance)
    for labels in ([[6], [9]], [[3, 6], [3, 9]]):
        values = engine.label_log_probabilities(PROMPTS, labels)
        assert values.shape == (3, 2)
        wanted = [[sum(expected(model, prompt, label)) for label in labels] for prompt in PROMPTS]
        assert values == pytest.approx(np.array(wanted), abs=tolerance)


def test_texts_are_read_as_the_model_reads_them(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    fake, made = stand_in_for_vllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    folder = str(save_tiny_model(tmp_path / "model"))
    engine = VLLM(lambda: folder, None, "float32", 64, EngineConfig(name="vllm"))
    check_readings(engine, AutoModelForCausalLM.from_pretrained(folder), 1e-4)
    assert made == [folder]  # alive from question to question
    engine.sleep()
    engine.label_log_probabilities(PROMPTS, [[6], [9]])
    assert made == [folder, folder]
    with pytest.raises(ValueError, match="last token"):
        engine.label_log_probabilities(PROMPTS, [[3, 6], [4, 9]])


def test_engines_of_ranks_see_their_own_gpus(monkeypatch):
    monkeypatch.setenv(VISIBLE, "4,5,6,7")
    for first, seen in ((0, "4,5"), (2, "6,7")):
        with _visible(first, 2):
            assert os.environ[VISIBLE] == seen
    assert os.environ[VISIBLE] == "4,5,6,7"
    with pytest.raises(UserError, match="2 GPUs are wanted from GPU 3 on"), _visible(3, 2):
        pass
    with pytest.raises(UserError, match="3 does not divide the 8 devices"):
        VLLM(lambda: "x", None, "float32", 64, EngineConfig(name="vllm", tensor_parallel_size=3), ranks=8)


def test_rows_are_shared_by_engines_and_asked_once(tmp_path):
    def devices(rank):
        return SimpleNamespace(rank=rank, world=4, main=rank == 0, first=lambda work: work(), everyone=lambda x: [x])

    asked, started = [], []

    def ask(places):
        asked.append(places.tolist())
        values = torch.arange(len(places)).float() + float(places[0])
        return Found(values[:, None], torch.ones(len(places), dtype=torch.long), None, len(places), len(places))

    def of_rank(rank):
        return ask_rows(devices(rank), tmp_path, 7, ask, lambda: started.append(rank), 2, "writing", "replies")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "done", lambda _: np.zeros(0, np.int64))  # all ranks look before any of them asks
        assert [of_rank(rank) for rank in (3, 2, 1)] == [None] * 3
        tensors, counts = of_rank(0)
    assert asked == [[4, 5, 6], [0, 1, 2, 3]]
    assert started == [3, 2, 1, 0]
    assert tensors["values"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert counts["tokens"] == 7
    again, _ = of_rank(0)
    assert len(asked) == 2
    assert len(started) == 4
    assert torch.equal(again["values"], tensors["values"])


real = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (benchmarks/vllm_smoke.sh)"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 out of its GGUF file as a folder, and the model."""
    source = find(ModelConfig(**conf_node("model/smollm2-135m-gguf")), "strong")
    model = merged(load_policy(source, trainable=False), "strong")
    folder = tmp_path_factory.mktemp("smollm2") / "whole"
    write_model(model, folder)
    return source, model, str(folder)


@pytest.mark.vllm
@real
@pytest.mark.filterwarnings("default")  # what vLLM imports warns of its own
def test_the_real_one_writes_and_reads_as_our_own(smollm2):
    source, model, folder = smollm2
    engine = VLLM(
        lambda: folder, None, "float32", 256, EngineConfig(name="vllm", gpu_memory_utilization=0.2), source.chat.ids
    )
    text = source.tokenizer("The capital of France is")["input_ids"]
    rows = ReplyRows(
        [np.array(text), np.array(text[:3])],
        ["a", "b"],
        np.array([0, 0, 1, 1]),
        np.array([0, 1, 0, 1]),
        np.array([[1.0, 0.0, heat, 0, 1.0, 1.0] for heat in (0.0, 1.0, 0.0, 1.0)]),
        12,
        3,
    )
    try:
        first = engine.sample(rows, source.chat.stop)
        for row in (0, 2):  # greedy
            prompt = rows.prompts[rows.prompt_of[row]]
            with torch.no_grad():
                ours = model.generate(torch.tensor(prompt)[None], max_new_tokens=12, do_sample=False)[0, len(prompt) :]
            assert first.tokens[row].tolist() == ours.tolist()
        for row, (tokens, logs) in enumerate(zip(first.tokens, first.log_probabilities, strict=True)):
            prompt = rows.prompts[rows.prompt_of[row]]
            assert logs[:, 0] == pytest.approx(expected(model, prompt, tokens), abs=2e-3)
        check_readings(engine, model, 2e-3)
        engine.close()
        again = engine.sample(rows, source.chat.stop)  # started anew
        for one, other in zip(first.tokens, again.tokens, strict=True):
            assert np.array_equal(one, other)
    finally:
        engine.close()
