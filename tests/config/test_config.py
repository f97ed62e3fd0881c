"""Every file in conf/ composes and is read; a run's folder and its stages' keys depend on what changes the result."""

import json
import re
import subprocess
import sys
from pkgutil import resolve_name

import pytest
import torch
import yaml
from conftest import compose
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from pydantic import ValidationError

from w2sg.config import Options, data_schema, evaluate_schema, schema
from w2sg.config import options as text_options
from w2sg.config.build import build, fit_options, function_identity
from w2sg.config.check import check, check_evaluate
from w2sg.config.hydra import register, run_name
from w2sg.config.option import defaults_of
from w2sg.config.plugins import CONF
from w2sg.config.schema import TrainConfig
from w2sg.errors import ConfigError, UserError
from w2sg.methods.refine import options as refine_options
from w2sg.models.steps import LEAST, USUAL_WEIGHT


def names(group):
    return sorted(f.stem for f in (CONF / group).glob("*.yaml") if not f.stem.startswith("_"))


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("model"))
def test_every_model_serves_in_both_roles(name):
    more = [f"{role}.name=org/model" for role in ("weak", "strong")] if name == "hf" else []
    config = check(compose(f"weak={name}", f"strong={name}", *more))
    assert config.weak == config.strong
    assert fit_options(config, config.weak).lr > 0


@pytest.mark.parametrize("name", names("loss"))
def test_every_loss_can_be_called(name):
    config = check(compose(f"loss={name}"))
    values = build(config.loss)(torch.tensor([[0.5, -0.5], [0.1, 0.3]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 0.5)
    assert values.shape == (2,)
    assert values.isfinite().all()


@pytest.mark.parametrize("name", names("dataset"))
def test_every_dataset_composes(name):
    config = check(compose(f"dataset={name}", *(["dataset.path=some.jsonl"] if name in ("local", "questions") else [])))
    assert config.dataset.name == name
    assert config.dataset.noise.kind == "none"


@pytest.mark.parametrize("name", names("method"))
def test_every_method_composes(name):
    writers = ["weak=gpt2", "strong=gpt2-medium"] if name in ("cong", "refine") else []  # a bag of words cannot write
    writers += ["method.links=[{feature_layer: 8}]"] if name == "chain" else []
    if name == "decode":
        with pytest.raises(ConfigError, match="method: a decoder is measured by `w2sg decode`"):
            check(compose("method=decode"))
        return
    assert callable(build(check(compose(f"method={name}", *writers)).method))


@pytest.mark.parametrize("name", names("logger"))
def test_every_logger_composes(name):
    assert check(compose(f"logger={name}")).logger.kind == name


@pytest.mark.parametrize("name", names("trainer"))
def test_every_trainer_composes(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = compose(f"trainer={name}")
    if name in {"gpu", "ddp", "fsdp"}:
        with pytest.raises(ConfigError, match=r"trainer\.accelerator: no CUDA GPU"):
            check(cfg)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    check(cfg)


def test_a_pair_and_another_model_are_a_contradiction():
    """In a sweep over pairs, `strong=` would give every pair the same strong model under the pairs' names."""
    cfg = compose("pair=gpt2_gpt2-large")
    chosen = {"pair": "gpt2_gpt2-large", "weak": "gpt2", "strong": "gpt2-large"}
    check(cfg, chosen)
    check(cfg, {**chosen, "pair": "none", "strong": "hf"})
    with pytest.raises(ConfigError, match="pair: gpt2_gpt2-large is contradicted by weak=gpt2 strong=gpt2-medium"):
        check(cfg, {**chosen, "strong": "gpt2-medium"})


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_composes(name):
    decodes = name.startswith(("search_", "wsd_"))
    check(compose(f"experiment={name}", name="decode" if decodes else "train"))


def test_evaluate_composes():
    for store in ("list", "prune"):
        assert check_evaluate(compose(f"store={store}", name="evaluate")).apply is False
    assert check_evaluate(compose("store=why", "key=weak", "out=runs", name="evaluate")).root == "runs/store"


def test_every_section_refuses_keys_that_it_does_not_know():
    modules = (schema, data_schema, evaluate_schema)
    classes = {c for module in modules for c in vars(module).values() if isinstance(c, type)}
    sections = [c for c in classes if issubclass(c, Options)]
    assert len(sections) >= 12
    for section in sections:
        # a loader may have options of its own; they are held against its signature
        assert section.model_config["extra"] == ("allow" if section is schema.DatasetConfig else "forbid")
    plain = compose()
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({**plain, "more": 1})


GROUPS = ("model", "dataset", "optim", "trainer", "engine", "logger", "method", "refine", "alignment", "judge")
FILES = [f"{group}/{file.stem}" for group in (*GROUPS, "decoder", "loss") for file in (CONF / group).glob("*.yaml")]
IDENTITY = {"_target_", "_partial_", "kind", "name", "path"}  # said in each file, also where it is the default


def values(file):
    """What a file of conf/ says itself, and the files that it stands on."""
    content = yaml.safe_load((CONF / f"{file}.yaml").read_text()) or {}
    return content, [base for base in content.pop("defaults", []) if isinstance(base, str) and base != "_self_"]


def beneath(file):
    """The defaults that a file stands on, as Hydra lays them over each other; None where some are in files alone."""
    defaults = {}
    for base in values(file)[1]:
        if base.startswith("/options/"):
            path, _, package = base.removeprefix("/options/").partition("@")
            below = defaults_of(resolve_name(path))
            defaults |= below if package == "_here_" else {package: below}
        else:
            group = file.rpartition("/")[0]
            defaults = OmegaConf.to_container(
                OmegaConf.merge(defaults, beneath(f"{group}/{base}"), values(f"{group}/{base}")[0])
            )
    return defaults


@pytest.mark.parametrize("file", FILES)
def test_a_file_chooses_what_differs_and_comments_what_python_does_not_know(file):
    """A default stands in Python alone, with its help: a key has another value here, or is a loader's and commented."""
    own, known, lines = values(file)[0], beneath(file), (CONF / f"{file}.yaml").read_text().splitlines()
    for key, value in own.items():
        if key in known:
            assert key in IDENTITY or value != known[key], f"{key} is {value} anyway"
        elif key not in IDENTITY:
            (place,) = [k for k, line in enumerate(lines) if line.startswith(f"{key}:")]
            assert "#" in lines[place] or lines[place - 1].startswith("#"), key


def test_every_option_has_a_help():
    """What stands in docs/options.md; `kind` chooses a class, whose name says what it is."""
    kinds = {
        cls for module in (schema, text_options, refine_options) for cls in vars(module).values() if is_options(cls)
    }
    assert len(kinds) > 30
    bare = {f"{cls.__name__}.{name}" for cls in kinds for name, f in cls.model_fields.items() if not f.description}
    assert {name for name in bare if not name.endswith(".kind")} == set()


def is_options(cls):
    return isinstance(cls, type) and issubclass(cls, Options) and cls is not Options


def test_a_key_that_no_file_lists_is_typed_without_a_plus():
    cfg = compose("method=cong", "weak=gpt2", "strong=gpt2", "method.sft.lr.full=3e-5", "weak.lora.r=4", "seed=3")
    assert (cfg.method.sft.lr.full, cfg.weak.lora.r, cfg.strong.lora.r, cfg.seed) == (3e-5, 4, 16, 3)
    with pytest.raises(ConfigCompositionException):
        compose("weak.lora.rank=4")


def test_defaults_of_what_is_not_there_are_an_error(tmp_path):
    register()
    (tmp_path / "train.yaml").write_text("defaults:\n  - /options/w2sg.nothing.Here@_here_\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"), pytest.raises(OSError, match=r"no w2sg\.nothing"):
        hydra_compose("train")


def test_every_file_says_what_it_is_and_lists_its_keys_once():
    for file in CONF.rglob("*.yaml"):
        text = file.read_text()
        assert text.startswith("# "), file.name
        assert all(len(line) <= 160 for line in text.splitlines()), file.name
        assert isinstance(yaml.safe_load(text), dict)
        top = re.findall(r"^(\w+):", text, re.M)
        assert len(top) == len(set(top)), file.name


# -- the folder of a run ----------------------------------------------------------------------------------------------


def test_the_same_command_has_the_same_folder():
    assert run_name(["loss=rkl", "seed=1"]) == run_name(["seed=1", "loss=rkl"]) == "loss=rkl,seed=1"
    assert run_name(["strong.lr=5e-6"]) == run_name(["strong.lr=0.000005"]) == run_name(["strong.lr=5.0e-06"])
    assert run_name(["strong.feature_layer_candidates=[8, 12]"]) == run_name(["strong.feature_layer_candidates=[8,12]"])
    assert run_name([]) == "default"


def test_the_last_of_two_counts():
    assert run_name(["seed=1", "seed=2"]) == run_name(["seed=2"]) != run_name(["seed=2", "seed=1"])


@pytest.mark.parametrize(
    "override",
    [
        "trainer=ddp",
        "trainer.devices=2",
        "trainer.progress=none",
        "++trainer.num_nodes=2",
        "logger=wandb",
        "logger.tags=[a,b]",
        "out=elsewhere",
        "store=elsewhere",
        "out=a/b/c",
        "hydra.verbose=true",
        "hydra/launcher=joblib",
    ],
)
def test_what_changes_no_result_is_not_in_the_name(override):
    assert run_name(["seed=1", override]) == "seed=1"


@pytest.mark.parametrize(
    "override",
    ["trainer.precision=bf16-mixed", "weak=gpt2", "+loss.k=1", "~logger_like", "output=3", "optim.full.epochs=2"],
)
def test_what_changes_the_result_is_in_the_name(override):
    assert run_name([override]).startswith(override.replace("~", "-"))


def test_a_name_is_one_folder():
    hub, other = run_name(["strong=hf", "strong.name=org/model"]), run_name(["strong=hf", "strong.name=org-model"])
    assert re.fullmatch(r"strong.name=org-model,strong=hf-[0-9a-f]{8}", hub)
    assert other == "strong.name=org-model,strong=hf"
    for typed in (
        ["strong.name='a b/../c'"],
        ["dataset.path=/data/x.jsonl"],
        ["x='*?<>|\"'"],
        ["x=${seed}"],
        ["x={a:1}"],
    ):
        assert re.fullmatch(r"[\w.,=+-]+", run_name(typed))


def test_a_long_name_is_cut_and_told_apart_by_its_hash():
    long = [f"+key{i}={'x' * 20}" for i in range(10)]
    name, other = run_name(long), run_name([*long[:-1], "+key9=y"])
    assert len(name) <= 120
    assert name[:100] == other[:100]
    assert name != other


def test_a_job_of_a_sweep_has_the_folder_of_the_single_run():
    typed = [
        "loss=rce,rkl",
        "strong.lr=5e-6,1e-4",
        "strong.feature_layer_candidates=[8, 12]",
        "+loss.note='a b'",
        "trainer=cpu",
    ]
    parser = OverridesParser.create()
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(typed), None)
    assert len(jobs) == 4
    singles = [[f"loss={loss}", f"strong.lr={lr}", *typed[2:]] for loss in ("rce", "rkl") for lr in ("5e-6", "1e-4")]
    assert [run_name(job) for job in jobs] == [run_name(single) for single in singles]


def test_an_installation_without_conf_says_so(tmp_path):
    with pytest.raises(UserError, match="lacks its configuration files; install it once more"):
        register(tmp_path / "conf")


def test_the_package_itself_imports_nothing():
    code = "import sys, w2sg; print(sorted(m for m in sys.modules if m.split('.')[0] in {'torch', 'hydra', 'rich'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_hydra_asks_for_these_names(monkeypatch):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra_compose("train", ["loss=rkl", "seed=1", "trainer=cpu", "out=runs"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    assert cfg.hydra.run.dir == "runs/loss=rkl,seed=1"
    assert f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}" == cfg.hydra.run.dir
    assert cfg.hydra.job.chdir is False


# -- what the rest asks for -------------------------------------------------------------------------------------------


def test_a_models_own_learning_rate_overrules_its_modes():
    config = check(compose("weak=gpt2", "optim.full.lr=0.5", "optim.full.epochs=7", "weak.lr=0.25"))
    options = fit_options(config, config.weak)
    assert (options.lr, options.epochs) == (0.25, 7)
    assert config.training.full.lr == 0.5
    assert fit_options(config, config.strong) == config.training.head  # the default strong model trains its head
    config = check(compose("weak=gpt2", "weak.tune=lora", "weak.epochs=3"))
    assert fit_options(config, config.weak) == config.training.lora.model_copy(update={"epochs": 3})


def test_a_function_from_elsewhere_counts_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, power in (("mine_a", 1), ("mine_b", 2)):
        (tmp_path / f"{name}.py").write_text(
            f"def loss(a, b, progress, k=1.0):\n    return (a - b).sum(-1) ** {power}\n"
        )
    first = function_identity({"_target_": "mine_a.loss", "_partial_": True, "k": 2.0})
    second = function_identity({"_target_": "mine_b.loss", "_partial_": True, "k": 2.0})
    assert {k: v for k, v in first.items() if k != "source"} == {"_target_": "mine_a.loss", "k": 2.0}
    assert first["source"] != second["source"]
    own = {"_target_": "w2sg.losses.confidence", "_partial_": True, "alpha": 0.5}
    assert function_identity(own) == {"_target_": "w2sg.losses.confidence", "alpha": 0.5}
    with pytest.raises(UserError, match="source cannot be read"):
        function_identity({"_target_": "math.sqrt"})


def fit_keys(*overrides):
    """The keys of the weak model and of the student, as a run would make them; nothing is trained."""
    from w2sg.data.labels import Labels
    from w2sg.experiment import fit_labels
    from w2sg.experiment.run import Run

    config = check(compose("dataset=local", "weak=bow", "strong=hf", *overrides))
    run = Run(config, f"{config.out}/run")
    table, gold = run.data.ground_truth, run.gold(run.data.ground_truth)
    labels = run.noisy(Labels(table, gold.logits, {"stage": "weak-0"}))
    keys = []
    for name, source, loss, of in (("weak", run.weak, None, gold), ("student", run.strong, run.loss, labels)):
        options = fit_options(config, source.spec)
        keys.append(json.dumps(fit_labels.fit_key(run, name, source, table, of, loss, options, None), sort_keys=True))
    return keys


@pytest.mark.slow
def test_a_stages_key_holds_what_changes_its_result(pairs_folder, tiny_gpt2, tmp_path):
    base = [f"dataset.path={pairs_folder}", f"strong.name={tiny_gpt2}", "trainer=cpu", "logger=none", f"out={tmp_path}"]
    base.append("strong.max_length=128")
    weak, student = fit_keys(*base)
    same = [
        "logger=csv",
        "trainer=auto",
        f"store={tmp_path / 'other'}",
        "strong.micro_batch_size=8",
        "strong.gradient_checkpointing=true",
        "optim.head.lr=0.5",  # of a mode that neither uses
        "dataset.noise.shrink=0.5",  # read by one kind of noise only
        "trainer.checkpoint_minutes=1",
        "trainer.tokens_per_eval_batch=512",
    ]
    assert fit_keys(*base, *same) == [weak, student]
    for change in ("loss=rkl", "strong.lr=0.5", "optim.label_smoothing=0.1", "strong.max_length=64"):
        other_weak, other_student = fit_keys(*base, change)
        assert other_weak == weak
        assert other_student != student
    noisy = fit_keys(*base, "dataset.noise.kind=flip", "dataset.noise.rate=0.2")
    assert noisy[0] == weak
    assert noisy[1] != student
    other = ("seed=1", "trainer.precision=bf16-mixed", "trainer.matmul=high", "optim.full.global_batch_size=16")
    for change in other:
        other_weak, other_student = fit_keys(*base, change)
        assert other_weak != weak
        assert other_student != student
    for key in (weak, student):
        assert str(tmp_path) not in key
        assert str(tiny_gpt2) not in key
        assert str(pairs_folder) not in key


BF16 = ["weak.dtype=bfloat16", "strong.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["method=finetune", "strong=gpt2", *BF16[1:]], {"strong": ["optim.full.lr=1e-05"]}),
        (["method=finetune", "strong=gpt2", *BF16[1:], "strong.lr=7e-5"], {"strong": ["strong.lr=7e-05"]}),
        (["method=finetune", "strong=gpt2", *BF16[1:], "strong.lr=1e-4"], {}),
        (["method=finetune", "strong=gpt2", *BF16[1:], "strong.tune=lora"], {}),
        (["method=finetune", "strong=gpt2", *BF16[1:], "strong.tune=head"], {}),
        (["method=finetune", "strong=gpt2", "trainer.precision=bf16-mixed"], {}),
        (["method=ensemble", "strong=gpt2", "weak=gpt2", BF16[0]], {"weak": ["optim.full.lr=1e-05"]}),
        (
            ["method=cong", "weak=gpt2", "strong=gpt2", *BF16],
            {"weak": ["method.alignment.lr.full=8e-07"], "strong": ["sft.lr.full=1e-05", "dpo.lr.full=6e-07"]},
        ),
        (["method=cong", "weak=gpt2", "weak.before_alignment=gpt2", "strong=gpt2", BF16[0]], {}),
        (["method=cong", "weak=gpt2", "strong=gpt2", *BF16, "weak.tune=lora", "strong.tune=lora"], {}),
        (
            [
                "method=cong",
                "weak=gpt2",
                "strong=gpt2",
                BF16[1],
                "method.baselines=[]",
                "method.sft.lr.full=1e-3",
                "method.dpo.lr.full=1e-4",
            ],
            {},
        ),
    ],
)
def test_steps_that_bfloat16_rounds_away_are_refused(options, named):
    try:
        check(compose("dataset=hh_rlhf", *options))
        lines = []
    except ConfigError as error:
        lines = error.problems
    found = {line.partition(".dtype: ")[0]: line for line in lines if "bfloat16" in line}
    assert found.keys() == named.keys()
    for role, words in named.items():
        for word in (*words, f"use {role}.dtype=float32 with trainer.precision=bf16-mixed"):
            assert word in found[role]


def test_the_rule_for_steps_is_what_bfloat16_does():
    """Of weights of the usual size, a step at the least rate moves some and a hundredth of it nearly none."""
    weights = (torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * USUAL_WEIGHT).bfloat16()
    for rate, least, most in ((LEAST, 0.4, 0.9), (LEAST / 10, 0.0, 0.2), (LEAST / 100, 0.0, 0.02)):
        moved = ((weights.float() - rate).bfloat16() != weights).float().mean().item()
        assert least <= moved <= most
