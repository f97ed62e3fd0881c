"""Bad input is refused before any work, with the key that is wrong and what to do, and every problem at once."""

import copy
import functools
import sys

import pytest
import torch
from conftest import compose, run_script, the_script
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from w2sg.config.check import check
from w2sg.errors import ConfigError, UserError

BAD = [  # what was typed, the key that is named, words of the remedy
    # numbers out of range
    (["optim.full.lr=-1"], "optim.full.lr", "greater than 0"),
    (["optim.head.lr=0"], "optim.head.lr", "greater than 0"),
    (["optim.full.lr=nan"], "optim.full.lr", "finite"),
    (["optim.full.lr=inf"], "optim.full.lr", "finite"),
    (["weak.lr=-0.1"], "weak.lr", "greater than 0"),
    (["optim.lora.epochs=0"], "optim.lora.epochs", "greater than 0"),
    (["strong.epochs=0"], "strong.epochs", "greater than 0"),
    (["optim.full.global_batch_size=0"], "optim.full.global_batch_size", "greater than 0"),
    (["optim.full.warmup_fraction=1.5"], "optim.full.warmup_fraction", "less than or equal to 1"),
    (["optim.full.weight_decay=-1"], "optim.full.weight_decay", "greater than or equal to 0"),
    (["optim.full.validation_fraction=1"], "optim.full.validation_fraction", "less than 1"),
    (["optim.full.max_grad_norm=0"], "optim.full.max_grad_norm", "greater than 0"),
    (["optim.label_smoothing=1"], "optim.label_smoothing", "less than 1"),
    (["optim.hard_label_clamp=0.5"], "optim.hard_label_clamp", "less than 0.5"),
    (["dataset.noise.kind=flip", "dataset.noise.rate=1.5"], "dataset.noise.rate", "less than or equal to 1"),
    (["dataset.noise.kind=shrink", "dataset.noise.shrink=2"], "dataset.noise.shrink", "less than or equal to 1"),
    (["dataset.sizes.test=0"], "dataset.sizes.test", "greater than 0"),
    (["weak.max_length=0"], "weak.max_length", "greater than 0"),
    (["seed=-1"], "seed", "greater than or equal to 0"),
    (["logger.every=0"], "logger.every", "greater than 0"),
    (["trainer.num_nodes=0"], "trainer.num_nodes", "greater than 0"),
    # wrong types
    (["optim.full.lr=fast"], "optim.full.lr", "valid number"),
    (["optim.full.epochs=1.5"], "optim.full.epochs", "valid integer"),
    (["optim.full.epochs=true"], "optim.full.epochs", "valid integer"),
    (["optim.full.lr='0.1'"], "optim.full.lr", "valid number"),
    (["seed=null"], "seed", "valid integer"),
    (["strong.random_init=perhaps"], "strong.random_init", "valid boolean"),
    (["strong.name=7"], "strong.name", "quote it twice"),
    (["weak=hf", "weak.name=[a,b]"], "weak.name", "valid string"),
    (["strong.feature_layer=top"], "strong.feature_layer", "valid integer or input should be 'auto'"),
    (["strong.feature_layer_candidates=8"], "strong.feature_layer_candidates", "valid list"),
    (["strong.feature_layer_candidates=[8,0]"], "strong.feature_layer_candidates.1", "greater than 0"),
    (["logger.tags=a"], "logger.tags", "valid list"),
    (["optim=3"], "optim", "a section with the keys full, lora, head"),
    # names that are none of the choices
    (["optim.full.optimizer=sgd"], "optim.full.optimizer", "'adafactor', 'adamw8bit' or 'paged_adamw8bit'"),
    (["optim.full.schedule=step"], "optim.full.schedule", "'cosine', 'linear' or 'constant'"),
    (["optim.select_on=test"], "optim.select_on", "'weak' or 'gold'"),
    (["trainer.precision=16"], "trainer.precision", "'32-true' or 'bf16-mixed'"),
    (["trainer.offload=true"], "trainer.offload", "read with trainer=fsdp alone"),
    (["trainer.strategy=deepspeed"], "trainer.strategy", "'auto', 'ddp' or 'fsdp'"),
    (["trainer.accelerator=abacus"], "trainer.accelerator", "'auto', 'cpu'"),
    (["strong.dtype=float16"], "strong.dtype", "'float32' or 'bfloat16'"),
    (["strong.tune=some"], "strong.tune", "'full', 'lora' or 'head'"),
    (["strong.head=quadratic"], "strong.head", "'linear', 'mixture' or 'label_tokens'"),
    (["strong.attention=none"], "strong.attention", "none of auto, sdpa, flex_attention"),
    (["strong.attention=flash_attention_3"], "strong.attention", "w2sg[kernels]"),
    (["strong.attention=flex_attention", "trainer=cpu"], "strong.attention", "needs a CUDA GPU"),
    (["dataset.noise.kind=salt"], "dataset.noise.kind", "'class_conditional'"),
    (["logger.kind=paper"], "logger.kind", "'tensorboard'"),
    # keys that do not go together
    (["weak=bow", "weak.tune=head"], "weak.tune", "use tune=full"),
    (["weak=gpt2", "weak.head=mixture"], "weak.head", "use tune=head"),
    (["weak=gpt2", "weak.feature_layer=3"], "weak.feature_layer", "use tune=head"),
    (["weak=gpt2", "weak.tune=head", "weak.feature_layer=9", "weak.keep_layers=6"], "weak.feature_layer", "lower it"),
    (
        ["weak=gpt2", "weak.tune=head", "weak.feature_layer=auto"],
        "weak.feature_layer_candidates",
        "name at least one layer",
    ),
    (
        ["strong=smollm2-135m-gguf", "strong.feature_layer_candidates=[]"],
        "strong.feature_layer_candidates",
        "name at least one layer",
    ),
    (["weak.micro_batch_size=64"], "weak.micro_batch_size", "raise optim.full.global_batch_size"),
    (["strong.micro_batch_size=64"], "strong.micro_batch_size", "raise optim.head.global_batch_size"),
    (["optim.full.patience=2"], "optim.full.patience", "set validation_fraction above 0"),
    (["dataset.noise.rate=0.2"], "dataset.noise.rate", "set dataset.noise.kind=flip"),
    (["dataset.noise.kind=class_conditional"], "dataset.noise.rates", "one rate per class"),
    (["dataset.noise.kind=class_conditional", "dataset.noise.rates=[0.1,2]"], "dataset.noise.rates", "between 0 and 1"),
    (["dataset.noise.kind=flip", "dataset.noise.rates=[0.1,0.2]"], "dataset.noise.rates", "use dataset.noise.rate"),
    (
        ["dataset.noise.kind=class_conditional", "dataset.noise.rates=[0.1,0.2]", "dataset.noise.rate=0.1"],
        "dataset.noise.rate",
        "use dataset.noise.rates",
    ),
    *(
        (
            [
                f"loss={loss}",
                "dataset.noise.kind=hard_flip",
                "dataset.noise.rate=0.1",
                "optim.hard_label_clamp=null",
            ],
            "optim.hard_label_clamp",
            "set it",
        )
        for loss in ("rkl", "rce", "conf_rce", "symmetric", "jeffreys")
    ),
    (["trainer.devices=0"], "trainer.devices", "use 1 or more"),
    (["trainer.devices=-2"], "trainer.devices", "use 1 or more"),
    (["trainer.devices=many"], "trainer.devices", "-1 for all"),
    (["trainer=cpu", "trainer.devices=[0,1]"], "trainer.devices", "valid integer or input should be a valid string"),
    # functions and their options
    (["loss._target_=w2sg.losses.nothing"], "loss._target_", "there is no w2sg.losses.nothing"),
    (["loss._target_=no_such_module.loss"], "loss._target_", "there is no no_such_module.loss"),
    (["loss._target_=..."], "loss._target_", "there is no"),
    (["loss._target_=null"], "loss._target_", "choose loss="),
    (["loss._target_=w2sg.losses.adaptive.math.pi"], "loss._target_", "name a function"),
    (["loss._target_=math.sqrt"], "loss._target_", "cannot serve as a loss"),
    (["+loss.alpha=1"], "loss.alpha", "takes no options; leave it out"),
    (["loss=conf_ce", "+loss.beta=1"], "loss.beta", "takes alpha, warmup, threshold; leave it out"),
    (["+loss.logits=1"], "loss.logits", "takes no options; leave it out"),
    (["+loss._args_=[1]"], "loss._args_", "leave it out"),
    (["loss=conf_ce", "loss.alpha=much"], "loss.alpha", "valid number"),
    (["loss=conf_ce", "loss.threshold=1"], "loss.threshold", "'prior' or 'half'"),
    (["optim.select_on=gold"], "optim.select_on", "optim.head.validation_fraction above 0"),
    (["method._target_=w2sg.methods.nothing"], "method._target_", "there is no w2sg.methods.nothing"),
    (["+method.rounds=3"], "method.rounds", "takes ceiling_split; leave it out"),
    (["method.ceiling_split=3"], "method.ceiling_split", "'transfer'"),
    (["+dataset.language=en"], "dataset.language", "takes path, subset, revision; leave it out"),
    (["dataset._target_=w2sg.data.sources.nothing"], "dataset._target_", "there is no w2sg.data.sources.nothing"),
    # no value, or one key too many
    (["strong=hf"], "strong.name", "a hub id, a folder or a .gguf file"),
    (["weak=hf"], "weak.name", "a hub id"),
    (["dataset=local"], "dataset.path", ".jsonl, .json, .csv or .parquet file"),
    (["seed=???"], "seed", "needs a value"),
    (["~store"], "store", "needs a value"),
    (["~strong.name"], "strong.name", "needs a value"),
    (["~loss"], "loss", "needs a value"),
    (["out=${nowhere}"], "out", "nowhere"),
    (["out=???"], "store", "out"),
    (["+strong.rank=8"], "strong.rank", "no such key here"),
    (["+extra=1"], "extra", "no such key here"),
    (["+trainer.gpus=2"], "trainer.gpus", "no such key here"),
]


@functools.cache
def choices(*overrides):
    return compose(*overrides)


def typed(*overrides):
    """As `compose`, with the composition of files shared between tests that choose the same ones."""
    groups = tuple(o for o in overrides if o.partition("=")[0] in {"weak", "strong", "loss", "dataset", "trainer"})
    cfg = copy.deepcopy(choices(*groups))
    for override in OverridesParser.create().parse_overrides([o for o in overrides if o not in groups]):
        if override.is_delete():
            return compose(*overrides)
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=override.is_add())
    return cfg


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        check(typed(*overrides))
    return caught.value.problems


@pytest.mark.parametrize(("overrides", "key", "remedy"), BAD, ids=[" ".join(row[0]) for row in BAD])
def test_a_bad_value_is_named_with_its_remedy_and_alone(overrides, key, remedy):
    found = problems(*overrides)
    assert len(found) == 1, found
    assert found[0].startswith(f"{key}: ")
    assert remedy in found[0]
    assert "\n" not in found[0]


def test_all_problems_come_at_once_one_line_each():
    found = problems(
        "weak=gpt2",
        "weak.head=mixture",
        "weak.feature_layer=3",  # a second rule of the same model
        "strong=hf",
        "strong.micro_batch_size=64",
        "optim.full.global_batch_size=0",
        "optim.head.patience=1",
        "+loss.alpha=1",
        "+method.rounds=2",
        "dataset.noise.rate=2",
        "trainer.devices=0",
        "seed=x",
    )
    assert sorted(line.split(":")[0] for line in "\n".join(found).splitlines()) == [
        "dataset.noise.rate",
        "loss.alpha",
        "method.rounds",
        "optim.full.global_batch_size",
        "optim.head.patience",
        "seed",
        "strong.name",
        "trainer.devices",
        "weak.feature_layer",
        "weak.head",
    ]


def test_rules_across_sections_are_reported_with_the_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gold = ["optim.select_on=gold", "optim.head.validation_fraction=0"]
    found = problems("seed=x", *gold, "trainer=gpu", "dataset.max_chars=0")
    assert [line.split(":")[0] for line in found] == [
        "dataset.max_chars",
        "seed",
        "optim.select_on",
        "trainer.accelerator",
    ]


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for trainer in ("gpu", "ddp"):
        assert "use trainer=cpu" in problems(f"trainer={trainer}")[0]
    check(compose("trainer=auto", "trainer.devices=2"))  # two processes on the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(compose("trainer=ddp"))
    check(compose("trainer=gpu", "trainer.devices=2"))
    for trainer in ("gpu", "auto"):
        (line,) = problems(f"trainer={trainer}", "trainer.devices=4")
        assert line.startswith("trainer.devices: 4 GPUs were asked for, 2 are visible")


def test_smoothed_labels_are_not_hard():
    check(compose("loss=rkl", *HARD, "optim.label_smoothing=0.1"))


HARD = ["dataset.noise.kind=hard_flip", "dataset.noise.rate=0.1", "optim.hard_label_clamp=null"]


@pytest.mark.parametrize("loss", ["ce", "kl", "conf_ce", "product", "cace"])
def test_losses_that_are_finite_on_hard_labels_take_them(loss):
    check(compose(f"loss={loss}", *HARD))


def test_a_loss_from_elsewhere_that_is_marked_is_refused_hard_labels(tmp_path, monkeypatch):
    (tmp_path / "marked_for_errors.py").write_text(
        "from w2sg.losses import needs_soft_labels\n"
        "@needs_soft_labels\n"
        "def student_first(logits, weak_logits, progress): ...\n"
        "def reverse_in_name_alone(logits, weak_logits, progress): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = problems("loss._target_=marked_for_errors.student_first", *HARD)
    assert line.startswith("optim.hard_label_clamp: marked_for_errors.student_first is infinite on hard labels")
    check(compose("loss._target_=marked_for_errors.student_first"))
    check(compose("loss._target_=marked_for_errors.reverse_in_name_alone", *HARD))


def test_a_loss_from_elsewhere_is_checked_by_its_signature(tmp_path, monkeypatch):
    (tmp_path / "mine_for_errors.py").write_text(
        "def soft(logits, weak_logits, progress, *, k, power: float = 1.0, shape: 'Unknown' = None): ...\n"
        "def free(*args, **options): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert problems("loss._target_=mine_for_errors.soft") == [
        "loss.k: mine_for_errors.soft needs a value; give it with +loss.k="
    ]
    check(compose("loss._target_=mine_for_errors.soft", "+loss.k=1.5", "+loss.power=2"))
    check(compose("loss._target_=mine_for_errors.free", "+loss.anything=1"))


# -- the scripts, in this process -------------------------------------------------------------------------------------


def script(name, monkeypatch, capsys, *overrides):
    """Run a script's ``main`` on a command line; returns its exit status and what it printed."""
    module = the_script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *overrides, "hydra/job_logging=none", "hydra/hydra_logging=none"])
    try:
        module.main()
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        GlobalHydra.instance().clear()
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def no_hub(monkeypatch):
    """Whatever reads a model's configuration, its tokens or its weights fails the test."""
    import transformers

    def reached(*args, **kwargs):
        raise AssertionError("a model was looked for")

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", reached)


def test_nothing_is_fetched_for_a_configuration_that_does_not_hold(no_hub, monkeypatch, capsys, tmp_path):
    status, out, err = script(
        "train", monkeypatch, capsys, "weak=gpt2", "strong=gpt2-xl", "weak.lr=-1", "+loss.alpha=1", f"out={tmp_path}"
    )
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert [line.split(":")[0].strip() for line in err.splitlines()[1:]] == ["weak.lr", "loss.alpha"]
    assert "Traceback" not in err
    assert not (tmp_path / "store").exists()


def test_the_guard_of_the_hub_works(no_hub, monkeypatch, capsys, tmp_path):
    _, _, err = script("train", monkeypatch, capsys, "weak=gpt2", f"out={tmp_path}")
    assert "AssertionError: a model was looked for" in err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["runs: say what to do", "store=list, =why, =prune or =verify"]),
        (["runs=OUT", "store=list"], ["runs: one thing at a time"]),
        (["runs=OUT/nowhere"], ["runs: there is no folder"]),
        (["store=nonsense"], ["store: ", "'list', 'why', 'prune' or 'verify'", "'nonsense'"]),
        (["store=why"], ["key: ", "store=list"]),
        (["store=why", "key=unknown"], ["No stage of", "'unknown'"]),
        (["store=why", "key=12e4"], ["No stage of", "'12e4'"]),
        (["store=why", "key=1_000"], ["No stage of", "'1_000'"]),
        (["store=prune", "apply=flase"], ["apply: ", "valid boolean"]),
        (["store=prune", "apply=no", "store=all"], ["apply: ", "store: "]),
        (["store=prune", "apply=true", "out=OUT/nowhere", "root=OUT/store"], ["out: there is no folder"]),
        (["store=list", "+verbose=1"], ["verbose: no such key"]),
    ],
)
def test_evaluate_says_what_it_needs(overrides, words, monkeypatch, capsys, tmp_path):
    overrides = [o.replace("OUT", str(tmp_path)) for o in overrides]
    if not any(o.startswith("out=") for o in overrides):
        overrides.append(f"out={tmp_path}")
    status, out, err = script("evaluate", monkeypatch, capsys, *overrides)
    assert (status, out) == (1, "")
    for word in ["error: ", *words]:
        assert word in err
    assert "Traceback" not in err


def test_prune_removes_nothing_where_a_report_cannot_be_read(monkeypatch, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    for text in ("{", "[]", "{}", '{"stages": [{}]}'):
        (tmp_path / "run" / "report.json").write_text(text)
        status, _, err = script("evaluate", monkeypatch, capsys, "store=prune", "apply=true", f"out={tmp_path}")
        assert status == 1
        assert "report.json is no report of a run" in err


# -- what only a look at the disk tells -------------------------------------------------------------------------------


@pytest.fixture
def folder_without_config(tmp_path):
    (tmp_path / "model.safetensors").touch()
    return tmp_path


@pytest.mark.parametrize("role", ["weak", "strong"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{role}.name=no-such-org/no-such-model"], ["no-such-org/no-such-model", "Check the name", "{role}=hf"]),
        (["{role}.name=not a name"], ["'not a name'", "Check the name"]),
        (["{role}.name=FOLDER/nowhere"], ["{role}.name: there is no model folder or .gguf file at"]),
        (["{role}.name=./nowhere"], ["{role}.name: there is no model folder"]),
        (["{role}.name=FOLDER"], ["{role}.name: the folder", "holds no config.json"]),
        (["{role}.name=FOLDER/model.gguf"], ["{role}.name: there is no file"]),
        (
            ["{role}.name=package:no_such_package/model.gguf"],
            ["{role}.name: the package no-such-package", "pip install"],
        ),
        (["{role}.name=TINY", "{role}.keep_layers=9"], ["{role}.keep_layers: ", "has 2 layers, 9 were asked for"]),
    ],
)
def test_a_model_that_is_not_there(role, options, words, folder_without_config, tiny_gpt2):
    from w2sg.models.source import find

    places = {"FOLDER": str(folder_without_config), "TINY": str(tiny_gpt2), "{role}": role}
    for place, path in places.items():
        options, words = ([o.replace(place, path) for o in some] for some in (options, words))
    options = ["='".join(o.split("=", 1)) + "'" if ".name=" in o else o for o in options]
    config = check(compose(f"{role}=hf", *options))
    with pytest.raises(UserError) as caught:
        find(getattr(config, role), role)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["strong.name=no-such-org/no-such-model"], ["strong.name: ", "hf download"]),
        (["strong.name=TINY", "dataset.path=FOLDER/none.jsonl"], ["dataset.path: there is no file or folder"]),
        (
            ["strong.name=TINY", "dataset.noise.kind=class_conditional", "dataset.noise.rates=[0.1,0.2,0.3]"],
            ["dataset.noise.rates: ", "2 classes (got 3)"],
        ),
    ],
)
def test_a_run_refuses_before_it_works(options, words, pairs_folder, tiny_gpt2, tmp_path):
    from w2sg.experiment.run import Run

    options = [o.replace("TINY", str(tiny_gpt2)).replace("FOLDER", str(tmp_path)) for o in options]
    if not any(o.startswith("dataset.path") for o in options):
        options.append(f"dataset.path={pairs_folder}")
    config = check(compose("strong=hf", "dataset=local", "trainer=cpu", f"out={tmp_path}", *options))
    with pytest.raises(UserError) as caught:
        Run(config, tmp_path / "run")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "store").exists()


# -- as a user sees it ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        (
            "train.py",
            ["optim.full.lr=-1", "dataset.noise.rate=2"],
            ["error: Invalid configuration (", "\n  optim.full.lr: ", "\n  dataset.noise.rate: "],
        ),
        (
            "train.py",
            ["strong=gpt2xl", "lr=1"],
            ["\n  strong: there is no gpt2xl; ", "strong=gpt2-xl?", "\n  lr: "],
        ),
        ("evaluate.py", [], ["error: ", "runs: say what to do"]),
        ("evaluate.py", ["store=nonsense"], ["error: ", "'list', 'why', 'prune' or 'verify'"]),
        ("evaluate.py", ["store=why"], ["error: ", "key: "]),
        ("evaluate.py", ["store=why", "key=unknown"], ["error: ", "No stage of", "'unknown'"]),
    ],
)
def test_errors_are_printed_without_a_traceback(name, overrides, words, tmp_path):
    result = run_script(name, *overrides, f"out={tmp_path}", check=False)
    assert result.returncode == 1
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
