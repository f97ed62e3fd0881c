"""Several processes learn what one does; sweeps, launchers and torchrun train nothing twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, compose, run_script, save_tiny_model, start_ranks
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from runs import DDP, FSDP, QUICK, label_arguments, stages_of, start_ranks_of
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from w2sg.config.check import check
from w2sg.config.hydra import register
from w2sg.config.plugins import CONF
from w2sg.errors import ConfigError
from w2sg.experiment.run import run_method
from w2sg.models.scorer import load_language_model
from w2sg.models.source import find
from w2sg.training import processes, sharding

ONE = ["trainer=cpu"]
EVALUATED = "logger.eval_every=4"  # also what is measured during a fit is the same
arguments = partial(label_arguments, **QUICK, trainer=None)  # which each test gives
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(out, overrides):
    return run_method(check(compose(*overrides)), out / "run", []).content


def report(out):
    return json.loads(next(Path(out).glob("*/report.json")).read_text())


def differences(one, two):
    """Largest absolute differences of predictions and of saved weights between two finished runs, by model.

    The store of a run is in its folder or beside it.
    """
    reports = [report(out) for out in (one, two)]
    keys = [{s["name"]: s["key"] for s in content["stages"]} for content in reports]
    assert keys[0] == keys[1]  # devices are no part of any key
    for name in ("weak", "student", "ceiling"):
        assert stages_of(reports[0])[name]["tokens"] == stages_of(reports[1])[name]["tokens"]
    tables = [pq.read_table(next(Path(out).glob("*/predictions.parquet"))) for out in (one, two)]
    assert tables[0]["id"] == tables[1]["id"]
    found = {}
    for name in ("weak", "student", "ceiling"):
        columns = [torch.tensor(table[name].to_pylist()) for table in tables]
        stores = [next(s for s in (out / "store", out.parent / "store") if s.exists()) for out in (one, two)]
        folders = [store / keys[0][name] / "model" for store in stores]
        files = sorted(p.name for p in folders[0].iterdir())
        assert files == sorted(p.name for p in folders[1].iterdir())
        weights = 0.0
        for file in (f for f in files if f.endswith(".safetensors")):
            a, b = (load_file(folder / file) for folder in folders)
            assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
            weights = max(weights, *(float((a[k] - b[k]).abs().max()) for k in a))
        curves = [json.loads((folder.parent / "curve.json").read_text()) for folder in folders]
        for a, b in zip(*curves, strict=True):  # with the gradient's norm, to whose scale an Adam step is blind
            assert a.pop("rows", None) == b.pop("rows", None), name  # which test rows a point was read on
            assert a == pytest.approx(b, rel=1e-4), name
        found[name] = (float((columns[0] - columns[1]).abs().max()), weights)
    print(f"{one} and {two}:", found)
    return found


def assert_equal(one, two):
    for name, (predictions, weights) in differences(one, two).items():
        assert predictions < 1e-4, name
        assert weights < 1e-4, name


def made(out):
    """What the reports of a sweep say was not in the store."""
    reports = [json.loads(p.read_text()) for p in Path(out).glob("*/report.json")]
    return len(reports), Counter(s["name"] for r in reports for s in r["stages"] if not s["cached"])


def trained(out):
    """Finished fits in a store."""
    names = (p.name.rpartition("-")[0] for p in (Path(out) / "store").glob("*-*") if (p / "manifest.json").exists())
    return Counter(name for name in names if name in {"weak", "student", "ceiling"})


# -- one process or two -----------------------------------------------------------------------------------------------

RUNS = {
    "clipped": [
        "loss=rkl",
        "optim.full.max_grad_norm=0.2",
        "weak=hf",
        "weak.lr=0.001",
        "weak.epochs=1",
        "weak.max_length=64",
    ],
    "whole-batch": [
        "loss=conf_ce",
        "strong.micro_batch_size=3",
        "optim.full.max_grad_norm=0.5",
        "optim.full.validation_fraction=0.2",
        "optim.full.patience=2",
        "strong.epochs=3",
    ],
    "checkpointed": ["strong.gradient_checkpointing=true", "loss=jeffreys"],
    "text-a-row": ["strong.share_prompt=false", "strong.micro_batch_size=3"],
    "lora": [
        "strong.tune=lora",
        "optim.lora.epochs=2",
        "optim.lora.validation_fraction=0.2",
        "strong.micro_batch_size=5",
    ],
    "head": [
        "strong.tune=head",
        "strong.feature_layer=auto",
        "strong.feature_layer_candidates=[1,2]",
        "optim.head.epochs=2",
    ],
}


@pytest.fixture(scope="module")
def both(pairs_folder, tiny_gpt2, tiny_llama, tmp_path_factory):
    """Folder of every run of `RUNS`, by one process, and by two under ddp and under fsdp."""
    folder = tmp_path_factory.mktemp("both")

    def typed(name, how, on):
        more = [f"weak.name={tiny_gpt2}", EVALUATED, f"store={folder / how / 'store'}", *RUNS[name], *on]
        return arguments(pairs_folder, tiny_llama, folder / how / name, *more)

    plan = {}
    for how, on in (("ddp", DDP), ("fsdp", FSDP)):
        plan |= {str(folder / how / name / "run"): typed(name, how, on) for name in RUNS}
    finish = start_ranks_of(plan, folder)
    for name in RUNS:
        run(folder / "one" / name, typed(name, "one", ONE))
    said = finish()
    assert "Warning" not in said, said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_learn_the_weights_of_one(how, name, both):
    assert_equal(both / "one" / name, both / how / name)


@pytest.mark.slow
def test_a_sharded_fit_that_is_killed_goes_on_on_any_devices(pairs_folder, tiny_llama, tmp_path):
    more = ["strong.epochs=6", "loss=conf_ce", "trainer.checkpoint_minutes=0", "optim.full.validation_fraction=0.1"]
    run(tmp_path / "whole", arguments(pairs_folder, tiny_llama, tmp_path / "whole", *more, *ONE))
    broken = arguments(pairs_folder, tiny_llama, tmp_path / "broken", *more)
    store = tmp_path / "broken" / "store"

    def wait_for(moment, is_alive):
        deadline = time.time() + 240  # a loaded machine takes a minute to start two processes
        while time.time() < deadline and is_alive():
            if list(store.glob(f"{moment}-*.part/scratch/fit-*.ckpt")):
                break
            time.sleep(0.005)

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *broken, *FSDP],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    wait_for("student", lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    try:  # until the other process, which holds the pipe too, has followed
        said, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the other process did not end with the one that was killed: {process.communicate()[0]}")
    assert list(store.glob("student-*.part")), said
    finish = start_ranks("train.py", *broken, *FSDP, folder=tmp_path)
    wait_for("ceiling", finish.processes[0].is_alive)
    for rank in finish.processes:
        rank.kill()
    said = finish(code=-signal.SIGKILL)
    assert list(store.glob("ceiling-*.part")), said
    assert "student: resumes at step" in said
    content = run(tmp_path / "broken", arguments(pairs_folder, tiny_llama, tmp_path / "broken", *more, *ONE))
    assert stages_of(content)["student"]["cached"]
    assert not stages_of(content)["ceiling"]["cached"]
    assert_equal(tmp_path / "whole", tmp_path / "broken")


# -- what is cut, and how it becomes whole again ----------------------------------------------------------------------


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "opt"])
def test_each_block_is_cut_by_itself_and_the_saved_model_is_whole(kind, alone, tmp_path):
    folder = save_tiny_model(tmp_path / "model", kind)
    config = check(compose("strong=hf", f"strong.name={folder}"))
    scorer, plain = (load_language_model(find(config.strong, "strong"), True, 2) for _ in range(2))
    plain.load_state_dict(scorer.state_dict())
    sharding.shard(scorer, alone)
    assert sum(isinstance(module, FSDPModule) for module in scorer.modules()) == 2 + 2  # blocks; body and head
    assert all(isinstance(p, DTensor) for p in scorer.parameters())
    with torch.no_grad():  # without a backward the body stays gathered
        tokens = torch.arange(6)[None]
        batch = {"input_ids": tokens, "position_ids": tokens, "segments": torch.ones(1, 6).long()}
        scores = [m(batch | {"ends": torch.tensor([[5]])}) for m in (scorer, plain)]
    assert torch.equal(*scores)
    sharding.load_weights(scorer, {name: w + 1 for name, w in plain.state_dict().items()})
    sharding.unshard(scorer)
    for name, weight in plain.state_dict().items():
        assert torch.equal(scorer.state_dict()[name], weight + 1)
    for name, model in (("sharded", scorer), ("plain", plain)):
        model.save(tmp_path / name)
    assert (tmp_path / "sharded" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()


def test_an_optimizer_that_cannot_be_cut_is_refused():
    adafactor = [*FSDP, "strong=gpt2", "optim.full.optimizer=adafactor"]
    with pytest.raises(ConfigError, match=r"optim\.full\.optimizer: .*adamw, or trainer=ddp"):
        check(compose(*adafactor))
    check(compose(*adafactor, "strong.tune=head"))  # the bag of words and the head are not cut
    check(compose(*adafactor, "trainer.strategy=ddp"))


# -- sweeps and launchers ---------------------------------------------------------------------------------------------


def test_the_other_processes_of_a_job_run_that_job_alone(monkeypatch, tmp_path):
    """Whatever was typed to start a sweep, and however odd the folder's name."""
    typed = ["loss=rkl", "seed=1", "strong.feature_layer_candidates=[1,2]"]
    odd = tmp_path / "a 'b', c=d\\"
    sources = {"main": str(CONF), "command-line": "/mine", "schema": ""}
    hydra = OmegaConf.create(
        {
            "runtime": {
                "output_dir": str(odd),
                "cwd": str(tmp_path),
                "config_sources": [{"provider": provider, "path": path} for provider, path in sources.items()],
            },
            "job": {"name": "train", "config_name": "train"},
            "overrides": {
                "hydra": [
                    "hydra.mode=MULTIRUN",
                    "hydra/launcher=joblib",
                    "hydra.launcher.n_jobs=2",
                    "hydra.sweep.dir=/elsewhere",
                    "hydra.searchpath=[file:///more]",
                ],
                "task": typed,
            },
        }
    )
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    monkeypatch.setattr(sys, "argv", ["/somewhere/launcher.py", "-m", "loss=ce,rkl"])
    command, folder = processes._command()
    assert folder == str(tmp_path)
    assert command[1:5] == [str(ROOT / "w2sg"), "train", "--config-name", "train"]
    assert command[5:9] == ["--config-path", str(CONF), "--config-dir", "/mine"]
    assert command[9:13] == ["hydra.searchpath=[file:///more]", *typed]
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(command[13:])}
    assert parsed == {
        "hydra.mode": "RUN",
        "hydra.run.dir": str(odd),
        "hydra.output_subdir": None,
        "hydra/job_logging": "none",
    }


@pytest.mark.slow
def test_a_sweep_over_two_processes_trains_each_model_once(pairs_folder, tiny_gpt2, tmp_path):
    sweep = arguments(pairs_folder, tiny_gpt2, tmp_path, "loss=ce,rkl", *DDP)
    result = run_script("train.py", "-m", *sweep, timeout=400)
    count, stages = made(tmp_path)
    assert count == 2
    assert {name: stages[name] for name in ("weak", "ceiling", "student")} == {"weak": 1, "ceiling": 1, "student": 2}
    assert trained(tmp_path) == {"weak": 1, "ceiling": 1, "student": 2}
    assert len(list(tmp_path.glob("*/train.log"))) == 2  # no process made a folder of its own
    said = result.stdout + result.stderr
    assert len(re.findall(r"student: \d+ steps? in", said)) == 2  # rank 0 alone speaks
    assert said.count("dataset: test.jsonl") == 1
    assert "Warning" not in said


@pytest.mark.slow
def test_jobs_at_the_same_time_train_each_model_once(pairs_folder, tiny_gpt2, tmp_path):
    """Two losses, two seeds; jobs of one seed want the same supervisor and ceiling at the same moment."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = ["seed=0,1", "loss=ce,rkl", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    run_script("train.py", "-m", *arguments(pairs_folder, tiny_gpt2, tmp_path, *sweep, *ONE), timeout=400, fresh=True)
    count, stages = made(tmp_path)
    assert count == 4
    assert {name: stages[name] for name in ("weak", "ceiling", "student")} == {"weak": 2, "ceiling": 2, "student": 4}
    assert trained(tmp_path) == {"weak": 2, "ceiling": 2, "student": 4}


@pytest.mark.slow
def test_submitit_runs_the_jobs_of_a_sweep(pairs_folder, tiny_gpt2, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep = ["loss=ce,rkl", "hydra/launcher=submitit_local"]
    run_script("train.py", "-m", *arguments(pairs_folder, tiny_gpt2, tmp_path, *sweep, *ONE), timeout=400, fresh=True)
    assert made(tmp_path)[0] == 2
    assert trained(tmp_path) == {"weak": 1, "ceiling": 1, "student": 2}


def test_a_sweep_on_slurm_composes():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    register()
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=8", "hydra.launcher.partition=gpu"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra_compose("train", ["loss=rkl", *slurm], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith("SlurmLauncher")
    assert cfg.hydra.launcher.tasks_per_node == 8


@pytest.mark.slow
def test_torchrun_starts_the_processes_and_nothing_else_does(pairs_folder, tiny_gpt2, tmp_path):
    sweep = arguments(pairs_folder, tiny_gpt2, tmp_path, "loss=ce,rkl", *FSDP)
    result = subprocess.run(
        [*TORCHRUN, str(ROOT / "train.py"), "-m", *sweep],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert made(tmp_path)[0] == 2
    assert trained(tmp_path) == {"weak": 1, "ceiling": 1, "student": 2}
    assert len(re.findall(r"student: \d+ steps? in", result.stdout)) == 2
