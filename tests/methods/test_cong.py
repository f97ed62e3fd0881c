"""ConG as a whole on tiny models: stages, sharing, kills, variants, what the report holds, many processes."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import compose, stand_in_for_vllm
from runs import CONG_SIZES, CONG_SMALL, DDP, FSDP, assert_planned, cong_arguments, planned, start_ranks_of
from runs import run_cong as run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from w2sg.compare.collect import collect
from w2sg.config.check import check
from w2sg.config.options import PlainSampling
from w2sg.data.replies import Replies, ReplyPairs, gold_pairs, prompts_of
from w2sg.data.splits import load_tables
from w2sg.errors import ConfigError, TrainingError, UserError
from w2sg.experiment.run import Run
from w2sg.models.source import find
from w2sg.models.trained import Trained
from w2sg.store.files import read_json
from w2sg.store.shards import Shards
from w2sg.training.label_modules import FitModule
from w2sg.training.stage_values import load_tensors


@pytest.fixture(scope="module")
def arguments(pairs_folder, models):
    return cong_arguments(pairs_folder, models)


def keys(content: dict) -> dict[str, str]:
    return {stage["name"]: stage["key"] for stage in content["stages"]}


def columns(out: Path, name: str = "run") -> dict[str, list]:
    return pq.read_table(out / name / "predictions.parquet").to_pydict()


# -- one run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_command_walks_the_papers_stages_and_reports_them(arguments, tmp_path):
    content = run(arguments, tmp_path)
    order = [stage["name"] for stage in content["stages"]]
    steps = ["weak-reference", "weak", "contrastive", "cong-s", "cong-s-samples", "cong-reference", "cong"]
    assert [name for name in order if name in steps] == steps
    plan = planned(arguments(tmp_path), store=tmp_path / "empty")
    assert_planned(plan, content)
    assert {s.name for s in plan.stages if not s.foreseeable} > {"cong-s", "cong"}
    assert {"weak", "student", "ceiling", "cong_s", "weak_sft"} == set(content["metrics"])
    text = content["text"]
    assert set(text["systems"]) == {"base", "weak", "cong_s", "cong", "weak_sft", "ceiling"}
    for name, system in text["systems"].items():
        assert {"reward", "length", "perplexity", "against"} <= set(system)
        assert ("kl_per_token" in system) == (name != "base")
        if name != "base":
            assert system["kl_per_token"]["value"] > 0
    assert text["alphas"]["names"] == ["plain", "0", "1", "0.4"]
    assert text["alphas"]["chosen"] == "0.4"
    assert np.array(text["alphas"]["explicit"]["wins"]["value"], float).shape == (4, 4)
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"report.json", "report.html", "predictions.parquet", "samples.parquet"} <= files
    samples = pq.read_table(tmp_path / "run" / "samples.parquet").to_pylist()
    assert Counter(row["system"] for row in samples)["cong"] == CONG_SIZES["test"]
    row = next(r for r in samples if r["system"] == "alpha 0.4")
    assert {"prompt_id", "prompt", "reply", "finished", "tokens", "implicit", "explicit"} <= row.keys()
    # once more: everything is there
    again = run(arguments, tmp_path)
    assert all(stage["cached"] for stage in again["stages"])
    assert again["metrics"] == content["metrics"]
    assert again["text"]["systems"] == text["systems"]


@pytest.mark.slow
def test_a_sweep_shares_what_its_runs_have_in_common(arguments, tmp_path):
    more = {
        "a": [],
        "b": ["method.decoding.alpha=0.7"],
        "c": ["method.dpo.beta=0.1"],
        "d": ["method.decoding.batch_size=3", "strong.micro_batch_size=3"],
    }
    runs = {name: run(arguments, tmp_path, "method.analysis.alphas=[]", *m, name=name) for name, m in more.items()}
    first, alpha, beta, batch = map(keys, runs.values())
    same = {"weak", "weak-reference", "weak-samples", "weak-sft", "ceiling", "judge", "strong-on-test"}
    changed = {"contrastive", "cong-s", "cong-s-samples", "cong-reference", "cong"}
    assert {n for n in first if alpha.get(n) == first[n]} >= same
    assert {n for n in first if alpha.get(n) != first[n]} >= changed
    # beta changes the last stage and what is read of it
    read = {"cong", "cong-on-test", "cong-on-test-pairs", "cong-divergence"}
    assert {n for n in beta if beta[n] != first[n]} == read | {n for n in first if n.endswith("on-replies-on-test")}
    assert batch.items() <= first.items()  # how batches are cut is no part of a key
    summary = collect(tmp_path)
    rows = {row["setting"]: row for row in summary.content["settings"]}
    assert len(rows) == 4
    assert sum("alpha 0.7" in setting for setting in rows) == 1
    own = json.loads((tmp_path / "c" / "report.json").read_text())["text"]["systems"]["cong"]
    (row,) = (row for setting, row in rows.items() if "beta 0.1" in setting)
    columns = row["columns"]
    assert columns["wins over untrained"]["mean"] == own["against"]["base"]["win_rate"]["value"]
    assert (row["seeds"], columns["student's reward"]["low"]) == (1, own["reward"]["low"])
    assert all(file.stat().st_size for file in summary.write(tmp_path))
    assert summary.cells == []  # none of them is a label run


@pytest.mark.slow
def test_dpo_starts_at_log_2_and_its_checkpoint_holds_no_reference(arguments, tmp_path, monkeypatch):
    from w2sg.training.checkpoints import SealedFiles

    sizes = {}
    save = SealedFiles.save_checkpoint

    def watch(self, checkpoint, path, **more):
        save(self, checkpoint, path, **more)
        state = torch.load(self.written, map_location="cpu", weights_only=True)["state_dict"]
        sizes[self.written.parent.parent.name.rpartition("-")[0]] = sum(v.numel() for v in state.values())

    monkeypatch.setattr(SealedFiles, "save_checkpoint", watch)
    settings = ["method.baselines=[]", "method.analysis.alphas=[]", "trainer.checkpoint_minutes=0", "logger.every=1"]
    content = run(arguments, tmp_path, *settings, "method.dpo.epochs=2", "method.alignment.validation_fraction=0.0")
    for name in ("weak", "cong"):
        curve = read_json(tmp_path / "store" / keys(content)[name] / "curve.json")
        first = next(p for p in curve if "loss" in p)
        assert first["loss"] == pytest.approx(np.log(2), abs=2e-5)
        assert abs(first["rewards/margins"]) < 1e-4
        assert [p for p in curve if "loss" in p][-1]["loss"] < first["loss"]
    from safetensors import safe_open

    with safe_open(tmp_path / "store" / keys(content)["cong"] / "model" / "model.safetensors", "pt") as saved:
        assert sizes["cong"] <= sum(saved.get_tensor(k).numel() for k in saved.keys()) + 32 * 400  # noqa: SIM118 (tied)


class Killed(BaseException):
    """Not an error that anything could catch and mend."""


KILLED = [
    "method.baselines=[]",
    "method.evaluation.kl=false",
    "method.evaluation.perplexity=false",
    "trainer.checkpoint_minutes=0",
    "method.decoding.batch_size=4",
]


@pytest.mark.slow
def test_kills_in_the_middle_of_stages_cost_nothing_but_the_last_batch(arguments, tmp_path, monkeypatch):
    """One run, killed in one stage after the other."""
    out = tmp_path / "whole"
    whole = run(arguments, out, *KILLED)
    monkeypatch.setattr(Shards.__init__, "__defaults__", (0.0,))
    working = {}
    from w2sg.training.stages import Stages

    announce = Stages._why

    def remember(self, name, key, path):
        working["name"] = name
        return announce(self, name, key, path)

    step, batch_end = FitModule.training_step, Shards.on_predict_batch_end
    counted, waiting = Counter(), ["weak", "contrastive", "cong", "alphas"]

    def dies(call):
        def wrapped(self, *args, **kwargs):
            if waiting and working["name"] == waiting[0]:
                counted[waiting[0]] += 1
                if counted[waiting[0]] > 1:
                    waiting.pop(0)
                    raise Killed
            return call(self, *args, **kwargs)

        return wrapped

    monkeypatch.setattr(Stages, "_why", remember)
    monkeypatch.setattr(FitModule, "training_step", dies(step))
    monkeypatch.setattr(Shards, "on_predict_batch_end", dies(batch_end))
    monkeypatch.setattr("w2sg.training.devices.Devices.eval_tokens", 256)
    for left in (3, 2, 1, 0):
        with pytest.raises(Killed):
            run(arguments, tmp_path / "killed", *KILLED)
        assert len(waiting) == left
    resumed = run(arguments, tmp_path / "killed", *KILLED)
    assert keys(resumed) == keys(whole)
    a, b = columns(out), columns(tmp_path / "killed")
    for name in ("weak", "student", "cong_s"):
        assert a[name] == pytest.approx(b[name], abs=2e-4)
    files = [out / "run/samples.parquet", tmp_path / "killed/run/samples.parquet"]
    replies = [[(r["system"], r["prompt_id"], r["reply"]) for r in pq.read_table(f).to_pylist()] for f in files]
    assert replies[0] == replies[1]


# -- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_baselines_with_one_tokenizer(arguments, tmp_path, models):
    more = [f"strong.name={models['other']}", "method.baselines=[weak_sft,plain,aux_conf,wspo,ceiling]"]
    content = run(arguments, tmp_path, *more, "method.analysis.alphas=[]")
    assert set(content["text"]["systems"]) == {
        *("base", "weak", "cong_s", "cong", "weak_sft", "plain", "aux_conf", "wspo", "ceiling")
    }
    wspo = content["text"]["training"]["wspo"]
    assert wspo["last"]["loss"] >= 0


def test_wspo_across_tokenizers_is_refused(arguments, tmp_path, models, pairs_folder):
    import shutil

    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    folder = tmp_path / "templated"
    shutil.copytree(models["strong"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    with pytest.raises(UserError, match="wspo compares the models token by token"):
        run(arguments, tmp_path, f"strong.name={folder}", "method.baselines=[wspo]")
    with pytest.raises(UserError, match="must read the same length"):
        run(arguments, tmp_path, f"strong.name={models['other']}", "method.baselines=[wspo]", "weak.max_length=90")
    assert not list((tmp_path / "store").glob("*/manifest.json"))  # before anything is computed


@pytest.mark.slow
def test_self_alignment_trains_the_model_as_it_was(arguments, tmp_path, models):
    same = f"strong.name={models['weak']}"
    content = run(arguments, tmp_path, same, "method.self_alignment=true", *CONG_SMALL)
    start = read_json(tmp_path / "store" / keys(content)["cong-s"] / "key.json")["start"]
    weak = read_json(tmp_path / "store" / keys(content)["weak"] / "key.json")["start"]
    assert start == weak  # pi_0, not pi_r
    with pytest.raises(ConfigError, match="self-alignment trains"):
        check(compose(*arguments(tmp_path, "method.self_alignment=true")))


@pytest.mark.slow
def test_adapters_are_trained_saved_alone_and_read_with_their_base_in_one_forward(arguments, tmp_path, monkeypatch):
    from w2sg.experiment import generate

    engines = []
    engine = generate.TransformersEngine
    monkeypatch.setattr(generate, "TransformersEngine", lambda *a, **k: engines.append(k) or engine(*a, **k))
    more = ["weak.tune=lora", "strong.tune=lora", "method.alignment.lr.lora=0.01", *CONG_SMALL]
    content = run(arguments, tmp_path, *more)
    assert {"base_too": True} in engines
    for name in ("weak", "cong-s", "cong"):
        files = {p.name for p in (tmp_path / "store" / keys(content)[name] / "model").iterdir()}
        assert "adapter_model.safetensors" in files
        assert "model.safetensors" not in files
    assert content["text"]["systems"]["cong"]["length"]["mean"] > 0


@pytest.mark.slow
def test_a_given_pair_is_not_aligned_again(arguments, tmp_path, models):
    content = run(arguments, tmp_path, f"weak.before_alignment={models['other']}", *CONG_SMALL)
    assert "weak" not in keys(content)
    key = read_json(tmp_path / "store" / keys(content)["contrastive"] / "key.json")
    assert key["model"] != key["reference"]


def templated(folder: Path, source: Path) -> Path:
    """The same model with a chat template."""
    shutil.copytree(source, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


@pytest.mark.slow
def test_implicit_rewards_are_those_of_plain_transformers_whatever_template_the_untuned_model_has(
    arguments, tmp_path, models, pairs_folder
):
    """Both read what the aligned model writes, joined by id; the untuned one has no template and another max_length."""
    weak = templated(tmp_path / "chat", models["weak"])
    more = [f"weak.name={weak}", f"weak.before_alignment={models['other']}", "strong.max_length=70", *CONG_SMALL]
    content = run(arguments, tmp_path, *more)
    found = columns(tmp_path)
    config = check(compose(*arguments(tmp_path, *more)))
    table = load_tables(config.dataset.model_dump(by_alias=True), config.seed).test
    chat = find(config.weak, "weak").chat
    assert chat.template
    logs = [AutoModelForCausalLM.from_pretrained(name).eval() for name in (weak, models["other"])]
    pairs = gold_pairs(table)
    for row, (i, label) in enumerate(zip(table.ids, table.labels, strict=True)):
        rewards = []
        for side in (pairs.chosen, pairs.rejected):
            prompt = chat.prompts([side.prompts[row]])[0]
            whole = torch.from_numpy(np.concatenate([prompt, chat.replies([side.texts[row]])[0], [chat.end]]))[None]
            assert whole.shape[1] <= 96
            with torch.no_grad():
                each = [model(input_ids=whole).logits[0].log_softmax(-1) for model in logs]
            own = [x[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None]).sum() for x in each]
            rewards.append(config.method["alignment"]["beta"] * float(own[0] - own[1]))
        margin = (rewards[0] - rewards[1]) * (1 if label == 0 else -1)  # of the reply that is in front
        assert found["weak"][found["id"].index(i)] == pytest.approx(margin, abs=1e-4)
    assert content["metrics"]["weak"]["accuracy"] == np.mean(
        [(x < 0) == y for x, y in zip(found["weak"], found["label"], strict=True)]
    )


def test_what_was_cut_off_is_never_taught_to_end_there(arguments, tmp_path, models):
    """From the sampler's flags, over samples.parquet, to the rows that the student is trained on."""
    text = Run(check(compose(*arguments(tmp_path))), tmp_path / "run")
    writer, prompts = Trained("weak", text.weak), prompts_of(text.data.test)
    # a random model seldom ends by itself: half of the vocabulary are ends here
    writer.source.chat.stop = list(range(0, 300, 2))
    replies = text.generate("some", writer, prompts, PlainSampling(
        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=2, batch_size=4, engine="transformers"
    ), samples=4)  # fmt: skip
    ends = [int(row[-1]) % 2 == 0 for row in replies.tokens]
    assert replies.finished.tolist() == ends
    assert 0 < sum(ends) < len(ends)
    taught = Replies(**{**vars(replies), "tokens": None, "texts": [t or "x" for t in replies.texts]})
    rows = text.encode(text.strong, taught, "taught")
    end = text.strong.chat.end
    for row, k in enumerate(rows.kept):
        assert (int(rows.completions.replies[row][0][-1]) == end) == ends[k]


def test_a_pair_of_two_vocabularies_is_refused(arguments, tmp_path, models):
    other = shutil.copytree(models["other"], tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="another vocabulary"):
        run(arguments, tmp_path, f"weak.before_alignment={other}", *CONG_SMALL)


def test_blank_replies_are_left_out_and_none_at_all_is_said(arguments, tmp_path):
    text = Run(check(compose(*arguments(tmp_path))), tmp_path / "run")
    pairs = gold_pairs(text.data.test)
    blank = replace(pairs.chosen, texts=[" \n", *pairs.chosen.texts[1:]])
    rows = text.encode(text.strong, replace(pairs, chosen=blank), "some")
    assert 0 not in rows.kept
    assert len(rows.kept) == len(pairs) - 1
    none = ReplyPairs([], pairs.chosen.take([]), pairs.rejected.take([]), pairs.key, {"identical replies": 7})
    with pytest.raises(UserError, match="nothing to read or train on; left out were 7 identical replies"):
        text.encode(text.strong, none, "none")


@pytest.mark.slow
def test_on_policy_pairs_are_the_best_and_worst_of_own_samples(arguments, tmp_path):
    content = run(arguments, tmp_path, "method.alignment.pairs=on_policy", "method.alignment.samples=3", *CONG_SMALL)
    stages = {s["name"]: s for s in content["stages"]}
    assert {"untuned-samples", "ranker", "ranker-on-untuned-samples"} <= stages.keys()
    assert stages["ranker"]["key"] != stages["judge"]["key"]  # what ranks is not what measures
    assert read_json(tmp_path / "store" / stages["untuned-samples"]["key"] / "key.json")["samples"] == 3


@pytest.mark.slow
def test_without_a_judge_there_are_no_rewards_and_all_else(arguments, tmp_path):
    content = run(arguments, tmp_path, "method.judge.model=null", "method.baselines=[]")
    assert "judge" not in content["text"]
    assert "reward" not in content["text"]["systems"]["cong"]
    assert "explicit" not in content["text"]["alphas"]


@pytest.mark.slow
def test_a_reward_model_is_used_as_it_is(arguments, tmp_path, models):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rewarder = AutoModelForSequenceClassification.from_pretrained(models["weak"], num_labels=1)
    rewarder.save_pretrained(tmp_path / "rewarder")
    AutoTokenizer.from_pretrained(models["weak"]).save_pretrained(tmp_path / "rewarder")
    content = run(arguments, tmp_path, f"method.judge.model={tmp_path / 'rewarder'}", *CONG_SMALL)
    assert "judge" not in keys(content)
    assert content["text"]["judge"]["trained"] is False
    row = next(r for r in pq.read_table(tmp_path / "run/samples.parquet").to_pylist() if r["system"] == "cong")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rewarder")
    turns = row["prompt"].removesuffix("\n\nAssistant:") + f"\n\nAssistant: {row['reply']}"
    with torch.no_grad():
        reward = rewarder.eval()(**tokenizer(turns, return_tensors="pt", return_token_type_ids=False)).logits[0, 0]
    assert row["explicit"] == pytest.approx(float(reward), abs=1e-4)
    with pytest.raises(UserError, match="is no reward model"):
        run(arguments, tmp_path, f"method.judge.model={models['weak']}", *CONG_SMALL, name="no-head")


@pytest.mark.slow
def test_single_models_are_sampled_by_vllm_with_the_same_outputs(arguments, tmp_path, monkeypatch):
    fake, made = stand_in_for_vllm()
    with pytest.raises(ConfigError, match="the package vllm is not installed"):
        check(compose(*arguments(tmp_path, "method.sampling.engine=vllm")))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    greedy = ["method.decoding.temperature=0.0", "method.sampling.temperature=0.0", *CONG_SMALL]
    theirs = run(arguments, tmp_path, "method.sampling.engine=vllm", *greedy, name="vllm")
    ours = run(arguments, tmp_path, *greedy, name="ours")
    assert len(made) == 5  # own samples, and four systems on test
    assert keys(theirs)["cong-s-samples"] != keys(ours)["cong-s-samples"]
    assert keys(theirs)["cong"] != keys(ours)["cong"]  # hangs on which stage wrote
    assert columns(tmp_path, "vllm")["student"] == pytest.approx(columns(tmp_path, "ours")["student"], abs=1e-4)
    a, b = (load_tensors(tmp_path / "store" / keys(c)["cong-s-samples"])[1] for c in (theirs, ours))
    assert torch.equal(a["values"][:, 0], b["values"][:, 0])
    assert torch.allclose(a["values"], b["values"], atol=1e-4)
    assert torch.equal(a["sizes"], b["sizes"])
    assert torch.equal(a["flags"], b["flags"])


@pytest.mark.slow
def test_reference_log_probabilities_of_other_tokens_are_refused(arguments, tmp_path, monkeypatch, caplog):
    from w2sg.experiment import score

    content = run(arguments, tmp_path, *CONG_SMALL)
    stage = tmp_path / "store" / keys(content)["cong-reference"]
    tensors = load_file(stage / "values.safetensors")
    tensors["values"][0] += 1.0
    save_file(tensors, stage / "values.safetensors")
    again = run(
        arguments, tmp_path, *CONG_SMALL, "method.dpo.beta=0.3", name="again"
    )  # the store sees it and makes it anew
    assert next(s for s in again["stages"] if s["name"] == "cong-reference")["cached"] is False

    def other(folder):
        ids, found = load_tensors(folder)
        if folder.name.startswith("cong-reference"):
            found["sizes"] = found["sizes"].roll(1) + torch.arange(len(ids))
        return ids, found

    monkeypatch.setattr(score, "load_tensors", other)
    with pytest.raises(TrainingError, match="are of other tokens than those asked for; delete that folder"):
        run(arguments, tmp_path, *CONG_SMALL, "method.dpo.beta=0.2", name="third")


@pytest.mark.slow
def test_reference_log_probabilities_hang_on_tokens_and_precision(arguments, tmp_path):
    changes = ["strong.max_length=20", "strong.dtype=bfloat16", "trainer.precision=bf16-mixed"]
    found = set()
    for changed in ([], *([change] for change in changes)):
        plan = planned(arguments(tmp_path, "method.baselines=[ceiling]", *CONG_SMALL[1:], *changed))
        stage = next(stage for stage in plan.stages if stage.name == "ceiling-reference")
        assert stage.foreseeable
        found.add(stage.key)
    assert len(found) == 1 + len(changes)


@pytest.mark.slow
def test_alpha_and_gamma_name_the_same_law(arguments, tmp_path):
    """gamma 1.5 at temperature 0.8 is alpha 0.4 at temperature 0.32."""
    one = run(arguments, tmp_path, "method.decoding.alpha=null", "method.decoding.gamma=1.5", *CONG_SMALL, name="gamma")
    two = run(arguments, tmp_path, "method.decoding.temperature=0.32", "method.sampling.temperature=0.8", *CONG_SMALL)
    read = [read_json(tmp_path / "store" / keys(c)["contrastive"] / "key.json")["settings"] for c in (one, two)]
    assert np.allclose(read[0], read[1])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["weak=bow"], "weak.arch: a bag of words cannot write"),
        (["loss=rkl"], "loss: not read by method=cong"),
        (["strong.micro_batch_size=9"], "strong.micro_batch_size: 9 is more than the batch of 8 it is a part of"),
        (["strong.tune=head"], "strong.tune: a language model is trained whole or by adapters"),
        (
            ["strong.tune=head", "strong.feature_layer=1"],
            "strong.tune: a language model is trained whole or by adapters; use strong.tune=lora, or full, and "
            "strong.feature_layer=null",
        ),
        (["method.dpo.loss=dpo"], "method.dpo.loss: there is no 'dpo'; choose"),
        (
            ["method.dpo.loss=hinge", "method.dpo.label_smoothing=0.1"],
            "method.dpo.label_smoothing: not read by loss=hinge",
        ),
        (["method.decoding.gamma=1.0"], "method.decoding.alpha: give either alpha (as in ConG) or gamma"),
        (["method.decoding.alpha=1.5"], "method.decoding.alpha"),
        (["method.analysis.alphas=[0.1,2.0]"], "method.analysis.alphas: different numbers between 0 and 1"),
        (["+method.dpo.betta=1"], "method.dpo.betta: no such key"),
        (["method.baselines=[burns]"], "method.baselines"),
        (
            ["method.judge.feature_layer=auto"],
            "method.judge.feature_layer_candidates: feature_layer=auto chooses among these",
        ),
        (
            ["method.judge.model=null", "method.alignment.pairs=on_policy"],
            "method.judge: on-policy samples are ranked",
        ),
        (["dataset.noise.kind=flip", "dataset.noise.rate=0.1"], "dataset.noise.kind: method=cong trains on no labels"),
        (["strong.lr=1e-4"], "strong.lr: not read by method=cong"),
        (["strong.before_alignment=gpt2"], "strong.before_alignment: only the weak model has an alignment to undo"),
    ],
)
def test_what_does_not_hold_together_is_named_before_any_work(arguments, tmp_path, more, expected):
    with pytest.raises(ConfigError) as error:
        check(compose(*arguments(tmp_path, *more)))
    assert expected in str(error.value)


def test_finetune_says_that_it_reads_no_untuned_model(tmp_path):
    with pytest.raises(ConfigError, match=r"weak\.before_alignment: not read by method=finetune"):
        check(compose("weak=gpt2", "weak.before_alignment=gpt2"))


@pytest.mark.slow
def test_prompts_that_do_not_fit_are_counted_and_nothing_is_joined_by_position(arguments, tmp_path):
    content = run(arguments, tmp_path, "weak.max_length=17", "dataset.sizes.transfer=96", *CONG_SMALL)
    dropped = content["text"]["dropped"]
    assert dropped["contrastive"]["prompt longer than max_length"] > 0
    with pytest.raises(UserError, match=r"none of 8 examples can be used .8 prompts longer than max_length"):
        run(arguments, tmp_path, "strong.max_length=4", "method.prompts=8", *CONG_SMALL, name="none")


# -- many processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_do_what_one_does(arguments, tmp_path):
    # the likeliest tokens: weights differ by rounding, on which a draw may fall
    greedy = ["method.decoding.temperature=0.0", "method.sampling.temperature=0.0"]
    more = ["method.analysis.alphas=[]", "method.baselines=[]", "strong.micro_batch_size=3", *greedy]
    devices = {"ddp": DDP, "fsdp": FSDP}
    plan = {str(tmp_path / how / "run"): arguments(tmp_path / how, *more, *on) for how, on in devices.items()}
    finish = start_ranks_of(plan, tmp_path)
    alone = run(arguments, tmp_path / "one", *more)
    finish()
    a = columns(tmp_path / "one")
    files = [tmp_path / how / "run/samples.parquet" for how in ("one", *devices)]
    replies = [{(r["system"], r["prompt_id"]): r["reply"] for r in pq.read_table(f).to_pylist()} for f in files]
    for how, written in zip(devices, replies[1:], strict=True):
        assert keys(alone) == keys(read_json(tmp_path / how / "run/report.json"))
        b = columns(tmp_path / how)
        assert a["id"] == b["id"]
        for name in ("weak", "student", "cong_s"):
            assert a[name] == pytest.approx(b[name], abs=2e-4)
        assert replies[0] == written
