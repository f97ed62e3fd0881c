"""The figures in conf/experiment: every job of every sweep is in order, and each sweep runs on tiny stand-ins."""

import json
import re

import pytest
from conftest import run_script, save_tiny_model
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from w2sg.config.build import fit_options
from w2sg.config.check import check
from w2sg.config.hydra import register, run_name
from w2sg.config.plugins import CONF

NAMES = sorted(f.stem for f in (CONF / "experiment").glob("rkl_*.yaml"))
REFINE = sorted(f.stem for f in (CONF / "experiment").glob("refine_*.yaml"))
CONG = sorted(f.stem for f in (CONF / "experiment").glob("cong_*.yaml"))
DECODE = sorted(f.stem for f in (CONF / "experiment").glob("[sw]*.yaml"))
PAIRS = sorted(f.stem for f in (CONF / "pair").glob("*.yaml") if f.stem != "none")


def jobs(*typed: str) -> list[list[str]]:
    """What Hydra would run for a command: the overrides of each job of the sweep (Hydra's own merge and product)."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    single = [o.input_line for o in parser.parse_overrides(list(typed)) if not o.is_sweep_override()]
    cfg = hydra_compose("train", single, return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    (expanded,) = BasicSweeper.split_arguments(parser.parse_overrides([*params, *typed]), None)
    return expanded


@pytest.fixture
def hydra():
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def size(name: str) -> float:
    """Parameters in millions, from the first line of a model's file."""
    number, unit = re.search(r"(\d+(?:\.\d+)?)([MB])\b", (CONF / f"model/{name}.yaml").read_text(), re.I).groups()
    return float(number) * {"m": 1, "b": 1000}[unit.lower()]


def chosen(cfg) -> tuple[str, str]:
    choices = cfg.hydra.runtime.choices
    return choices["weak"], choices["strong"]


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_figures_are_there():
    figures = {"confidence", "gpt2", "gpt2_cai", "gpt2_hh", "last_layer", "noise", "pythia"}
    assert {f"rkl_{name}" for name in figures} <= set(NAMES)


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_what_its_name_says_and_its_supervisor_is_smaller(name):
    weak, strong = chosen(hydra_compose("train", [f"pair={name}"], return_hydra_config=True))
    assert name == f"{weak}_{strong}"
    assert size(weak) < size(strong)


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_job_of_a_figure_is_in_order(name):
    """One seed of three: a seed is a number, and composing takes a sixth of a second."""
    folders, typed = set(), [f"experiment={name}", "seed=0"]
    for job in jobs(*typed):
        cfg = hydra_compose("train", job, return_hydra_config=True)
        assert cfg.hydra.sweep.dir == cfg.out == f"outputs/{name}"
        folders.add(run_name(job))
        weak, strong = chosen(cfg)
        assert size(weak) < size(strong)
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra")
        config = check(cfg)
        # the protocol of the paper
        assert (config.trainer.precision, config.trainer.matmul) == ("32-true", "highest")
        assert config.dataset.sizes.ground_truth == config.dataset.sizes.transfer == 4000
        for model in (config.weak, config.strong):
            assert (model.dropout, model.max_length, model.dtype, model.layers) == (0.0, 512, "float32", None)
            options = fit_options(config, model)
            assert (options.batch_size, options.weight_decay, options.clip) == (32, 0.0, None)
            assert (options.schedule, options.warmup, options.validation) == ("cosine", 0.0, 0.0)
            if model.train == "full":
                assert (options.lr, options.epochs, options.optimizer) == (1e-5, 1, "adamw")
        assert config.weak.train == "full"
        assert config.strong.train == ("head" if name == "rkl_last_layer" else "full")
        assert (config.dataset.noise.rate > 0) == (name == "rkl_noise")
    assert len(folders) == len(jobs(*typed))  # no two runs share one


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("name", "count", "varied"),
    [
        ("rkl_gpt2", 72, {"dataset": 2, "pair": 3, "seed": 3, "loss": 4}),
        ("rkl_gpt2_cai", 36, {"pair": 3, "seed": 3, "loss": 4}),
        ("rkl_gpt2_hh", 36, {"pair": 3, "seed": 3, "loss": 4}),
        ("rkl_confidence", 36, {"pair": 3, "seed": 3, "loss": 4}),
        ("rkl_pythia", 72, {"pair": 6, "seed": 3, "loss": 4}),
        ("rkl_noise", 60, {"dataset.noise.rate": 5, "seed": 3, "loss": 4}),
        ("rkl_last_layer", 24, {"strong.head": 2, "seed": 3, "loss": 4}),
    ],
)
def test_a_figure_is_swept_over_what_it_shows(name, count, varied):
    expanded = jobs(f"experiment={name}")
    values: dict[str, set[str]] = {}
    for job in expanded:
        for override in job:
            key, _, value = override.partition("=")
            values.setdefault(key, set()).add(value)
    assert {key: len(v) for key, v in values.items() if key != "experiment"} == varied
    assert values["seed"] == {"0", "1", "2"}
    confidence = name == "rkl_confidence"
    assert values["loss"] == ({"ce", "conf_ce", "rce", "conf_rce"} if confidence else {"ce", "kl", "rce", "rkl"})
    # its file says how many runs it is, and how to start them
    command = rf"python train.py experiment={name} +{count} runs: "
    assert len(expanded) == count
    assert re.search(command, (CONF / f"experiment/{name}.yaml").read_text())


def test_every_experiment_is_tested_here():
    there = {f.stem for f in (CONF / "experiment").glob("*.yaml") if not f.stem.startswith("_")}
    assert there == {*NAMES, *CONG, *REFINE, *DECODE}
    assert set(REFINE) == {"refine_persona", "refine_explain", "refine_gsm8k"}
    assert set(CONG) == {"cong_llama3", "cong_qwen2.5", "cong_self", "cong_offline"}


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", CONG)
def test_contrastive_experiments_hold_together_and_keep_the_authors_settings(name):
    typed = [f"experiment={name}"]
    if name == "cong_self":  # the other pair of its comment
        typed = [*typed, "weak=qwen2.5-3b-instruct", "strong=qwen2.5-3b-instruct", "method.dpo.lr.full=8e-7"]
    cfg = hydra_compose("train", typed, return_hydra_config=True)
    weak, strong = chosen(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    config = check(cfg)
    assert config.out == f"outputs/{name}"
    method = config.method
    assert (size(weak) < size(strong)) == (not method["self_alignment"])
    assert (method["decoding"]["alpha"], method["decoding"]["temperature"], method["decoding"]["top_p"]) == (
        0.4,
        0.8,
        0.95,
    )
    assert (method["decoding"]["relative_top"], method["decoding"]["repetition_penalty"]) == (0.1, 1.2)
    assert (method["alignment"]["beta"], method["dpo"]["beta"]) == (0.1, 0.5)
    assert (method["alignment"]["epochs"], method["sft"]["epochs"], method["dpo"]["epochs"]) == (1, 2, 1)
    if name != "cong_offline":
        assert method["alignment"]["lr"]["full"] == 8e-7
        assert method["sft"]["lr"]["full"] == 1e-5
        assert method["dpo"]["lr"]["full"] == (8e-7 if name == "cong_self" else 6e-7)
        assert (method["alignment"]["global_batch_size"], method["dpo"]["global_batch_size"]) == (64, 64)
        assert method["sft"]["global_batch_size"] == (128 if name == "cong_self" else 64)
        assert {config.weak.max_length, config.strong.max_length, method["decoding"]["max_new_tokens"]} == {2048}
        # a step of 6e-7 would be lost in weights of bfloat16
        assert (config.weak.dtype, config.trainer.precision) == ("float32", "bf16-mixed")


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", REFINE)
def test_refinements_hold_together_and_measure_what_their_task_asks_for(name):
    typed = [[f"experiment={name}"]] if name == "refine_gsm8k" else jobs(f"experiment={name}")
    kinds = []
    for job in typed:
        cfg = hydra_compose("train", job, return_hydra_config=True)
        weak, strong = chosen(cfg)
        assert size(weak) < size(strong)
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra")
        config = check(cfg)
        assert config.out == f"outputs/{name}"
        method = config.method
        kinds.append(method["refine"]["kind"])
        # the published sizes; the weak model alone knows the concept, except where it was trained on right answers
        assert method["refine"]["context_size"] == (4 if name == "refine_explain" else 5)
        assert (method["refine"]["temperature"], method["refine"]["samples"]) == (0.0, 1)
        assert {"naive", "self", "icl", "shuffled", "ceiling"} <= set(method["baselines"])
        assert (method["weak_instruction"] is None) == method["train_weak"] == (name == "refine_gsm8k")
        text = {
            "refine_persona": ("Arrr, ye be right!", "You are right."),
            "refine_explain": ("It is like a river.", "It is a flow of charge."),
        }.get(name)
        if text is None:
            assert (method["content"]["kind"], method["concept"]["kind"]) == ("number", "none")
        else:
            pattern = re.compile(method["concept"]["pattern"], re.IGNORECASE)
            assert [bool(pattern.search(t)) for t in text] == [True, False]
    assert kinds == (["icl"] if name == "refine_gsm8k" else ["icl", "iar"])
    assert f"python train.py experiment={name}" in (CONF / f"experiment/{name}.yaml").read_text()


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", DECODE)
def test_decoding_experiments_hold_together_and_keep_the_papers_settings(name):
    cfg = hydra_compose("decode", [f"experiment={name}"], return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    config = check(cfg)
    assert config.out == f"outputs/{name}"
    assert f"python evaluate.py experiment={name}" in (CONF / f"experiment/{name}.yaml").read_text()
    decoder = config.decoder
    if name.startswith("wsd"):
        assert (decoder["window"], decoder["threshold"], decoder["draft"], decoder["max_new_tokens"]) == (
            6,
            0.8,
            512,
            2048,
        )
        assert (decoder["temperature"], config.method["style"]) == (0.0, "roles")
        assert (config.weak.untuned is None) == (name == "wsd_pilot")
        return
    tokens = {"search_sentiment": (4, 4, 5, 50), "search_summary": (4, 4, 5, 128), "search_instruct": (2, 2, 30, 2048)}
    found = tuple(decoder[key] for key in ("beams", "children", "chunk", "max_new_tokens"))
    assert found == tokens[name]
    assert decoder["temperature"] == 0.7
    for other in ("sampling", "contrastive", "eft", "search", "best_of_n", "wsd", "nudging"):  # to be compared
        cfg = hydra_compose("decode", [f"experiment={name}", f"decoder={other}"])
        assert check(cfg).decoder["max_new_tokens"] == decoder["max_new_tokens"]
    if name != "search_instruct":
        alignment = config.method["alignment"]
        assert (alignment["lr"]["full"], alignment["epochs"], alignment["global_batch_size"]) == (5e-4, 3, 32)


# -- what is typed ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hydra")
def test_what_is_typed_overrules_the_sweep():
    assert len(jobs("experiment=rkl_gpt2_cai", "loss=rkl")) == 9
    assert len(jobs("experiment=rkl_gpt2_cai", "seed=0,1")) == 24
    assert len(jobs("experiment=rkl_gpt2_cai", "pair=glob(gpt2_*)", "seed=0", "loss=rkl")) == 2
    assert [sorted(job) for job in jobs("experiment=rkl_noise", "loss=rkl", "seed=5", "dataset.noise.rate=0.25")] == [
        ["dataset.noise.rate=0.25", "experiment=rkl_noise", "loss=rkl", "seed=5"]
    ]
    (job,) = jobs("experiment=rkl_gpt2_cai", "pair=gpt2-medium_gpt2-large", "loss=rkl", "seed=0")
    assert chosen(hydra_compose("train", job, return_hydra_config=True)) == ("gpt2-medium", "gpt2-large")


@pytest.mark.usefixtures("hydra")
def test_a_figure_takes_other_models():
    for typed in (
        ["experiment=rkl_gpt2_cai", "pair=none", "strong=gpt2-xl"],
        ["experiment=rkl_noise", "strong=gpt2-xl"],
        ["experiment=rkl_last_layer", "strong=gpt2-xl"],
    ):
        job, *_ = jobs(*typed, "weak=gpt2,gpt2-large")
        assert chosen(hydra_compose("train", job, return_hydra_config=True)) == ("gpt2", "gpt2-xl")
    job, *_ = jobs("experiment=rkl_last_layer", "weak=bow", "strong=smollm2-135m-gguf", "dataset=reviews")
    config = check(hydra_compose("train", job))
    assert (config.strong.train, config.strong.layer) == ("head", None)  # the last, not the one that its file asks for


@pytest.mark.usefixtures("hydra")
def test_keys_of_a_model_are_typed_after_its_pair():
    job, *_ = jobs("experiment=rkl_pythia", "weak.name=here", "strong.name=there", "strong.lr=0.5", "out=elsewhere")
    cfg = hydra_compose("train", job, return_hydra_config=True)
    assert (cfg.weak.name, cfg.strong.name, cfg.strong.lr) == ("here", "there", 0.5)
    assert chosen(cfg) == ("pythia-70m", "pythia-160m")
    assert cfg.hydra.sweep.dir == "elsewhere"
    assert cfg.store == "elsewhere/store"


# -- whole sweeps, run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    return {
        kind: (save_tiny_model(folder / f"{kind}-1", kind, 1, 16), save_tiny_model(folder / f"{kind}-2", kind, 2, 32))
        for kind in ("gpt2", "neox")
    }


def tiny(name, typed, pairs_folder, tiny_models, out) -> list[str]:
    """A figure's command with stand-ins for its models and data."""
    weak, strong = tiny_models["neox" if name == "rkl_pythia" else "gpt2"]
    return [
        f"experiment={name}",
        "dataset=local",
        f"dataset.path={pairs_folder}",
        f"weak.name={weak}",
        f"strong.name={strong}",
        "optim.head.epochs=2",
        "weak.max_length=128",
        "strong.max_length=128",
        "trainer=cpu",
        "logger=none",
        f"out={out}",
        *typed,
    ]


def finished(out) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(out.glob("*/report.json"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "typed", "runs", "trained"),
    [
        # every seed; the next two have every loss
        ("rkl_gpt2_cai", ["pair=gpt2_gpt2-medium", "loss=ce,rkl"], 6, {"weak": 3, "student": 6, "ceiling": 3}),
        ("rkl_gpt2_hh", ["pair=gpt2-medium_gpt2-large", "seed=0"], 4, {"weak": 1, "student": 4, "ceiling": 1}),
        ("rkl_confidence", ["pair=gpt2_gpt2-large", "seed=0"], 4, {"weak": 1, "student": 4, "ceiling": 1}),
        # every pair; the stand-ins are one and the same, whose stages are made once
        ("rkl_pythia", ["seed=0", "loss=rkl"], 6, {"weak": 1, "student": 1, "ceiling": 1}),
        ("rkl_noise", ["seed=0", "loss=ce,rkl"], 10, {"weak": 1, "student": 10, "ceiling": 1}),
        # a ceiling for each head
        ("rkl_last_layer", ["seed=0"], 8, {"weak": 1, "student": 8, "ceiling": 2}),
    ],
)
def test_a_figure_runs(name, typed, runs, trained, pairs_folder, tiny_models, tmp_path, train):
    train(*tiny(name, typed, pairs_folder, tiny_models, tmp_path))
    reports = finished(tmp_path)
    assert len(reports) == runs
    made = [s["name"] for report in reports for s in report["stages"] if not s["cached"]]
    assert {role: made.count(role) for role in trained} == trained
    kept = [folder.name.rpartition("-")[0] for folder in (tmp_path / "store").glob("*-*")]
    assert {role: kept.count(role) for role in trained} == trained
    models = tiny_models["neox" if name == "rkl_pythia" else "gpt2"]
    assert {(r["weak"], r["strong"]) for r in reports} == {tuple(map(str, models))}
    if name == "rkl_noise":
        hit = {r["data"]["label_noise"]["rate_asked"]: r["data"]["label_noise"]["rows_hit"] for r in reports}
        assert sorted(hit) == [0.1, 0.2, 0.3, 0.4, 0.5]
        assert sorted(hit.values()) == [hit[rate] for rate in sorted(hit)]
    if name == "rkl_last_layer":
        assert {r["config"]["strong"]["head"] for r in reports} == {"linear", "mixture"}


@pytest.mark.slow
def test_a_figure_runs_from_one_command(pairs_folder, tiny_models, tmp_path):
    """As a user starts it; -m is not needed. The sweep's datasets are overruled by the stand-in."""
    command = tiny("rkl_gpt2", ["seed=0", "loss=rkl"], pairs_folder, tiny_models, tmp_path)
    result = run_script("train.py", *command)
    reports = finished(tmp_path)
    assert len(reports) == 3  # one per pair
    assert "\n3 runs in " in result.stdout
    assert len({stage["key"] for report in reports for stage in report["stages"] if stage["name"] == "student"}) == 1
