"""The benchmarks run; what they measure is written down, not tested."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script


def output(name: str, *options: str) -> str:
    return run_script(f"benchmarks/{name}", *options).stdout


@pytest.mark.slow
def test_reward_training_runs_small():
    found = output("reward_training.py", "--pairs", "8", "--layers", "1", "--width", "64", "--repeats", "1")
    for name in ("plain, micro-batch 1", "plain, micro-batch 32", "w2sg"):
        assert name in found


DECODING = ("--random", "--prompts", "4", "--new-tokens", "8", "--single", "2", "--repeats", "1", "--threads", "1",
            "--batches", "1", "4")  # fmt: skip


@pytest.mark.slow
def test_contrastive_decoding_runs_small():
    found = output("contrastive_decoding.py", *DECODING, "--no-memory")
    equal = re.findall(r"(loop|generate|two models|LoRA) at (\d+): (\d+)/(\d+)", found)
    assert len(equal) == 7
    assert all(same == of and int(of) for *_, same, of in equal)  # greedy replies of all loops are one and the same
    rows = re.findall(
        r"^(loop|generate|two models|LoRA) +batch +(\d+) +[\d.]+ tokens/s .* useful rows +([\d.]+)%", found, re.M
    )
    assert {(name, int(batch)) for name, batch, _ in rows} == {
        ("loop", 1), *((name, batch) for name in ("generate", "two models", "LoRA") for batch in (1, 4))
    }  # fmt: skip
    assert all(0 < float(useful) <= 100 for *_, useful in rows)


DPO = ("--layers", "1", "--width", "32", "--vocabulary", "96", "--batch", "2", "--batches", "2", "--repeats", "1",
       "--max-length", "64", "--threads", "1")  # fmt: skip


@pytest.mark.slow
def test_dpo_step_runs_small():
    found = output("dpo_step.py", *DPO, "--no-memory")
    names = ["plain", "+ cached reference", "+ replies only, in chunks", "+ packed", "+ prompt shared (w2sg)"]
    names += ["w2sg in Lightning"]
    if importlib.util.find_spec("trl") is not None:
        names += ["TRL", "TRL, precomputed"]
    checked = re.findall(r"^(.+?) +loss [\d.]+ .* (the same|DIFFERS)$", found, re.M)
    assert checked == [(name, "the same") for name in names]
    rows = re.findall(r"^(.+?) +[\d.]+ s/step .* of plain .*?(\d+) tokens$", found, re.M)
    assert [name for name, _ in rows] == names
    read = {name: int(tokens) for name, tokens in rows}
    assert read["+ prompt shared (w2sg)"] < read["+ packed"] < read["plain"]
    assert "w2sg, reading charged" in found


@pytest.mark.slow
def test_search_runs_small_and_chooses_what_the_plain_one_does():
    small = (
        "--settings",
        "0",
        "--layers",
        "1",
        "--width",
        "32",
        "--in-flight",
        "2",
        "--repeats",
        "1",
        "--threads",
        "1",
    )
    found = output("search.py", *small)
    assert "each small model read 6,320 and 812 tokens; first 50 of 50 tokens equal" in found


@pytest.mark.slow
def test_drafting_runs_small_and_writes_what_the_plain_one_does():
    sizes = {"layers": 1, "width": 64, "vocabulary": 200, "prompt": 20, "draft": 64, "new-tokens": 64, "within": 40}
    small = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    found = output("drafting.py", *small, "--prompts", "2", "--repeats", "1", "--threads", "1")
    assert "differ" not in found
    drafted = {line.split()[0]: float(line.split()[1].replace(",", "")) for line in found.splitlines()[-2:]}
    assert drafted["plain"] == 64
    assert drafted["w2sg"] <= 48  # a look at every 16, and the switch is within 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("contrastive_decoding.py", (*DECODING, "--memory-of", "LoRA")),
        ("dpo_step.py", (*DPO, "--memory-of", "+ prompt shared (w2sg)")),
    ],
)
def test_peak_memory_is_of_a_process_of_its_own(name, options):
    assert int(output(name, *options).splitlines()[-1]) > 10**7


@pytest.mark.slow
@pytest.mark.parametrize("part", ["products", "reward", "lora", "dpo", "waits"])
def test_a_part_of_the_gpus_benchmark_runs_small(part):
    found = output("gpu.py", "--device", "cpu", "--small", "--part", part, "--seconds", "1")
    assert json.loads(found.splitlines()[-1])


def test_lines_of_the_gpus_benchmark_say_what_failed_and_what_was_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    one = {"rate": 10.0, "unit": "pairs/s", "flops": 5e12, "peak": 2e9, "foreseen": 1.9e9, "against": "the plain loop"}
    found = {"products": {"bf16": 10.0}, "reward": {**one, "other": 4.0}, "lora": one, "dpo": {"failed": "no room"}}
    lines = "\n".join(gpu.table(found, SimpleNamespace(device="cpu")))
    assert "10.0 pairs/s; 2.50 times the plain loop; 5.0 TFLOP/s (50% of its own products)" in lines
    assert "peak 2.0 GB, foreseen 1.9 GB" in lines
    assert "not measured: no room" in lines
