"""A plan against the run that it is of: stages, keys, tokens and memory."""

import json
import shutil

import pytest
import torch
from conftest import WORDS, run_script, write_jsonl
from runs import CONG_SMALL, assert_planned, cong_arguments, label_arguments, planned, run_typed
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def kept(monkeypatch):
    """Bytes that each forward with gradients keeps for its backward, beside the model's own tensors, by class."""
    from w2sg.models.footprint import counting
    from w2sg.models.policy import Policy
    from w2sg.models.scorer import LanguageScorer

    found = {}
    for kind in (LanguageScorer, Policy):

        def forward(self, batch, *more, usual=kind.forward, **options):
            if not torch.is_grad_enabled():
                return usual(self, batch, *more, **options)
            mine = {t.untyped_storage()._cdata for t in (*self.parameters(), *self.buffers())}
            with counting(mine) as saved:
                out = usual(self, batch, *more, **options)
            found.setdefault(type(self).__name__, []).append((batch["input_ids"].numel(), sum(saved.values())))
            return out

        monkeypatch.setattr(kind, "forward", forward)
    return found


def test_labels(pairs_folder, tiny_gpt2, tmp_path, kept):
    typed = label_arguments(pairs_folder, tiny_gpt2, tmp_path, "loss=rkl")
    before = planned(typed)
    assert not (tmp_path / "store").exists()
    content = run_typed(typed, tmp_path / "run", [])
    assert_planned(before, content)
    assert all(s.foreseeable for s in before.stages)
    student = next(s for s in before.stages if s.name == "student")
    assert max(kept["LanguageScorer"]) == (student.micro[1], pytest.approx(student.peak.activations, rel=0.1))
    after = planned(typed)
    assert all(s.cached for s in after.stages)
    assert [s.tokens for s in after.stages] == [s["tokens"] for s in content["stages"]]


@pytest.mark.slow
def test_a_model_that_is_cut_over_devices(pairs_folder, tiny_llama, tmp_path):
    """Parts of it on each, what is gathered beside them, and nothing that is cast again."""

    def student(*more):
        typed = label_arguments(pairs_folder, tiny_llama, tmp_path, "plan.gpu=h100-80", *more, trainer=None)
        found = planned(typed)
        assert any("a run tries it" in note for note in found.notes)  # whether texts share rows was not looked at
        return next(s.peak for s in found.stages if s.name == "student")

    alone = student("trainer=auto")
    cut = ["trainer=fsdp", "trainer.accelerator=auto", "trainer.devices=4", "trainer.num_nodes=2"]
    copied, offloaded = student(*cut, "trainer.shard_over=node"), student(*cut, "trainer.offload=true")
    assert (copied.optimizer, copied.gradients) == (alone.optimizer / 4, alone.gradients / 4)
    assert (offloaded.optimizer, offloaded.gradients) == (0, 0)
    gathered = offloaded.weights
    assert copied.weights == alone.weights / 4 + gathered
    assert alone.weights / 10 < gathered < alone.weights / 2  # in bf16: the ends, and two of three blocks
    assert copied.activations < alone.activations


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("adapters", [False, True])
def test_operations(family, adapters):
    """Those of the formula beside those that torch counts of every product in a forward and a backward."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    from w2sg.models.policy import Policy
    from w2sg.planning.flops import Work, shape_of

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_key_value_heads": 2, "num_attention_heads": 4}
    config = (
        GPT2Config(vocab_size=300, n_embd=64, n_layer=4, n_head=4)
        if family == "gpt2"
        else LlamaConfig(vocab_size=300, num_hidden_layers=4, **sizes)
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # torch counts products alone
    if adapters:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=family == "gpt2"))
    policy = Policy(model)
    rows, length = 3, 40
    ids, source = torch.randint(0, 300, (rows, length)), torch.arange(20)
    places = torch.arange(length).expand(rows, length)
    batch = {"input_ids": ids, "position_ids": places, "source": source, "targets": torch.randint(0, 300, (20,))}
    shape, work = shape_of(policy, config), Work(rows * length, rows * length**2, 20)
    with FlopCounterMode(display=False) as reading, torch.no_grad():
        policy(batch)
    assert shape.forward(work) == pytest.approx(reading.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as training:
        policy(batch).sum().backward()
    assert shape.step(work) == pytest.approx(training.get_total_flops(), rel=0.05)


@pytest.mark.slow
def test_a_sweep_has_one_table_and_leaves_nothing_behind(pairs_folder, tiny_gpt2, tmp_path):
    settings = [*label_arguments(pairs_folder, tiny_gpt2, tmp_path / "out", trainer=None), "loss=ce,rkl,kl", "seed=0,1"]
    more = ["trainer=ddp", "trainer.devices=4", "plan=true", "plan.gpu=rtx4090", f"plan.file={tmp_path / 'plan.json'}"]
    said = run_script("train.py", "-m", *settings, *more).stdout
    assert "6 runs ask for 48 stages, 28 of them distinct, 0 in the store" in said
    assert "for 4 x rtx4090 (23.5 GiB each), bf16-mixed" in said
    assert max(map(len, said.splitlines())) <= 80 + len(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"plan.json"}
    runs = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert len(runs) == 6
    assert all(stage["fits"] for run in runs for stage in run["stages"])
    students = {stage["key"] for run in runs for stage in run["stages"] if stage["name"] == "student"}
    assert len(students) == 6
    refused = run_script("train.py", *settings[:-2], "plan.gpu=rtx4090", check=False)
    assert refused.returncode == 1
    assert "plan.gpu: read by a plan alone; add plan=true" in refused.stderr


@pytest.mark.slow
def test_a_judges_folder_needs_no_weights_to_be_planned(pairs_folder, models, tmp_path):
    bare = tmp_path / "judge"
    shutil.copytree(models["other"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((bare / "config.json").read_text()) | {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    (bare / "config.json").write_text(json.dumps(config))
    typed = cong_arguments(pairs_folder, models)(
        tmp_path / "out", *CONG_SMALL, "judge=reward", f"method.judge.model={bare}"
    )
    found = planned(typed)
    assert found.ends is None
    assert any(f"the weights of {bare} are not there" in note for note in found.notes)


@pytest.mark.slow
def test_classes(tiny_gpt2, tmp_path, kept):
    for name, count in (("weak_train", 48), ("transfer", 40), ("test", 32)):
        rows = [{"text": f"{name} {WORDS[k % len(WORDS)]} " * (1 + k % 7), "label": k % 2} for k in range(count)]
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    typed = label_arguments(tmp_path / "data", tiny_gpt2, tmp_path)
    student = next(s for s in planned(typed).stages if s.name == "student")
    run_typed(typed, tmp_path / "run", [])
    assert max(kept["LanguageScorer"]) == (student.micro[1], pytest.approx(student.peak.activations, rel=0.1))


@pytest.mark.slow
def test_preferences(pairs_folder, models, tmp_path, kept):
    typed = cong_arguments(pairs_folder, models)(tmp_path / "out", *CONG_SMALL)
    stages = {s.name: s for s in planned(typed).stages if s.kind == "train"}
    run_typed(typed, tmp_path / "run", [])
    tokens, held = max(kept["Policy"])
    hardest = max((s for s in stages.values() if s.micro[1]), key=lambda s: s.micro[1])
    assert (hardest.micro[1], hardest.peak.activations) == (tokens, pytest.approx(held, rel=0.1)), hardest.name
