"""What is typed is read as it is meant: dashes, flags anywhere, text in quotes; what is not is said in one line."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from w2sg.cli import launch as cli
from w2sg.config import choices, composing
from w2sg.config.check import check, check_evaluate
from w2sg.config.hydra import register, run_name
from w2sg.config.plugins import CONF
from w2sg.config.suggest import ELSEWHERE, nearest, similar
from w2sg.config.typed import quoted, typed
from w2sg.errors import ConfigError

# -- quotes -----------------------------------------------------------------------------------------------------------

ODD = """a[b]|[a]|[a,b]|a,b|a=b|loss=rkl,seed=1|x(1)|100%|a b|数据/ф|é|it's|'x|a{b}|{a:1}|a$b|a${b|${|a#b;c&d
|a'b"c\\'|a\\|C:\\x y\\|7|1e5|12e4|true|[/x]|~|range(1,3)|a\u00a0b|\udcff|<script>|a!b^c`|@x|a:b|(a)|%s %d|a\tb
|1_000|-x|+x""".replace("\n", "")
ODD = [*ODD.split("|"), "a|b"]
KEYS = [
    "out",
    "runs",
    "dataset.path",
    "strong.name",
    "weak.name",
    "weak.before_alignment",
    "method.judge.model",
    "export",
    "to",
]


def value_of(override: str):
    """What a configuration holds in the end, interpolations resolved."""
    from omegaconf import OmegaConf

    value = OverridesParser.create().parse_override(override).value()
    return OmegaConf.create({"v": value}).v


@pytest.mark.parametrize("text", ODD)
def test_a_text_is_itself_whatever_it_holds(text):
    for key in KEYS:
        assert value_of(quoted(f"{key}={text}")) == text
    once = quoted(f"out={text}")
    assert quoted(once) == once  # the processes of a run are given what was read


@pytest.mark.parametrize(
    "override",
    [
        "out=a/b",
        "out='a b'",
        'out="a,b"',
        "out=${oc.env:HOME}/runs",
        "dataset.path=null",
        "strong.name=org/model",
        "strong=a,b",
        "seed=1,2",
        "strong.feature_layer_candidates=[8,12]",
        "dataset.sizes={test: 4}",
        "strong.feature_layer=auto",
        "dataset.zero_shot.answers=[a,b]",
        "+out=x",
        "~seed",
    ],
)
def test_what_hydra_reads_right_is_not_touched(override):
    assert quoted(override) == quoted(override, multirun=True) == override
    assert run_name([quoted(override)]) == run_name([override])


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("strong.name=a,b", ["a", "b"]),
        ("dataset.path=x(1).jsonl,y z.jsonl", ["x(1).jsonl", "y z.jsonl"]),
        ("dataset.path=a=1,b=2,c", ["a=1", "b=2", "c"]),
        ("dataset.path=d[1,2].jsonl,e", ["d[1,2].jsonl", "e"]),
        ("weak.name='a,b','c'", ["a,b", "c"]),
        ("strong.name=choice(a,b)", ["a", "b"]),
        ("strong=gpt2,gpt2-xl", ["gpt2", "gpt2-xl"]),
    ],
)
def test_with_m_a_comma_parts_two_values(override, values):
    parsed = OverridesParser.create().parse_override(quoted(override, multirun=True))
    assert [getattr(v, "text", v) for v in parsed.value().list] == values


def test_an_experiment_that_is_a_sweep_has_commas_of_sweeps():
    found = typed(["experiment=rkl_gpt2", "weak.name=a,b"])
    assert found.multirun
    assert found.overrides[1] == "weak.name=a,b"
    assert not typed(["experiment=cong_llama3", "weak.name=a,b"]).multirun


# -- dashes and flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (["--seed=1", "--loss=rkl"], ["seed=1", "loss=rkl"]),  # ${args} of a W&B sweep
        (["seed=1", "loss=rkl"], ["seed=1", "loss=rkl"]),  # ${args_no_hyphens}
        (["--optim.full.lr=1e-05", "--weak.random_init=True"], ["optim.full.lr=1e-05", "weak.random_init=True"]),
        (["--seed", "1", "--strong.lr", "-1"], ["seed=1", "strong.lr=-1"]),
        (["-seed=1"], ["seed=1"]),
        (["seed=1", "-m", "loss=kl,rkl"], ["-m", "seed=1", "loss=kl,rkl"]),
        (["seed=1", "--multirun"], ["--multirun", "seed=1"]),
        (["seed=1", "--cfg", "job", "--resolve"], ["--cfg", "job", "--resolve", "seed=1"]),
        (["seed=1", "--cfg=job", "-p", "strong"], ["--cfg=job", "-p", "strong", "seed=1"]),
        (["seed=1", "--config-name", "decode"], ["--config-name", "decode", "seed=1"]),
        (["--info", "defaults", "seed=1", "-h"], ["--info", "defaults", "-h", "seed=1"]),
        (["--info", "seed=1"], ["--info", "seed=1"]),
        (["--help"], ["--help"]),
        (["--out=a,b"], ["out='a,b'"]),
        (["~seed", "+loss.k=1"], ["~seed", "+loss.k=1"]),
        (["--loss@w2sg.x=rkl"], ["loss@w2sg.x=rkl"]),
    ],
)
def test_flags_are_hydras_and_the_rest_are_settings(arguments, read):
    assert typed(arguments).arguments == read


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hlep"], "did you mean --help?"),
        (["--multi-run", "seed=1,2"], "did you mean --multirun?"),
        (["--cfg"], "--cfg: needs a value"),
        (["--apply"], "a setting is typed key=value"),
        (["-x"], "a setting is typed key=value"),
    ],
)
def test_a_flag_that_there_is_none_of(arguments, words):
    with pytest.raises(ConfigError) as caught:
        typed(arguments)
    assert words in str(caught.value)


def test_dashes_change_no_folder():
    assert run_name(typed(["--seed=1", "--loss=rkl"]).overrides) == run_name(["seed=1", "loss=rkl"])


# -- unknown keys and choices -----------------------------------------------------------------------------------------


def problems(*arguments, name="train"):
    register()
    check_it = (lambda cfg, _: check_evaluate(cfg)) if name == "evaluate" else check
    with pytest.raises(ConfigError) as caught:
        composing.settle(name, typed(arguments, sweeps=name != "evaluate"), check_it)
    return caught.value.problems


UNKNOWN = [  # what is typed, what is offered
    ("method.judge.train=x", "strong.tune or weak.tune"),
    ("loss=reverse_kl", "loss=rkl?"),
    ("loss=cross_entropy", "loss=ce?"),
    ("strong=gpt2xl", "strong=gpt2-xl?"),
    ("weak=GPT2_XL", "weak=gpt2-xl?"),
    ("strong=Qwen/Qwen2.5-0.5B", "strong=qwen2.5-0.5b?"),
    ("strong=some-org/some-model", "strong=hf strong.name=some-org/some-model"),
    ("dataset=mine/rows.jsonl", "dataset=local dataset.path=mine/rows.jsonl"),
    ("dataset=Anthropic/hh-rlhf", "dataset=hh_rlhf?"),
    ("trainer=ddpp", "trainer=ddp?"),
    ("logger=tensorbord", "logger=tensorboard?"),
    ("experiment=rkl_gpt", "experiment=rkl_gpt2"),
    ("experiment=search_instruct", "is read by `w2sg decode`"),
    ("optim=lora", "strong.tune=lora or weak.tune=lora?"),
    ("model=gpt2", "weak=gpt2 or strong=gpt2?"),
    ("loss=dpo", "method=cong, whose preference loss is method.dpo.loss"),
    ("trainer=2", "trainer.devices=2?"),
    ("optim=adamw_torch", "an optimizer is typed optim.full.optimizer="),
    ("dataset.sizes.train=100", "did you mean dataset.sizes.weak_train or dataset.sizes.transfer?"),
    ("weak_model=gpt2", "did you mean weak=gpt2?"),
    ("judge=llm", "judges nothing; leave it out, or use method=cong or refine"),
    ("decoder=search", "is read by `w2sg decode`"),
    ("runs=outputs", "runs: is read by `w2sg compare outputs`"),
    ("loss=null", "needs a choice"),
    ("lr=1e-5", "strong.lr, weak.lr, optim.full.lr"),
    ("batch_size=16", "optim.full.global_batch_size"),
    ("epochs=3", "strong.epochs, weak.epochs"),
    ("dataset.nois.rate=.3", "dataset.noise.rate?"),
    ("noise.rate=.3", "dataset.noise.rate?"),
    ("weak.learning_rate=1", "weak.lr?"),
    ("optim.head.learning_rate=1", "optim.head.lr?"),
    ("optim.lr=1", "optim.full.lr, optim.lora.lr or optim.head.lr?"),
    ("trainer.gpus=2", "trainer.devices?"),
    ("sede=1", "seed?"),
    ("strong.dtypes=float32", "strong.dtype?"),
    ("strong.lora_r=8", "strong.lora.r?"),
    ("strong.batch_size=8", "optim.full.global_batch_size"),
    ("strong.model=gpt2", "strong=gpt2?"),
    ("loss.name=rkl", "loss=rkl?"),
    ("optim.loss=rkl", "loss=rkl?"),
    ("trainer/strategy=ddp", "trainer.strategy=ddp?"),
    ("method.dpo.beta=.2", "it is of method=cong"),
    ("beta=.2", "method.dpo.beta (of method=cong)"),
    ("seed.x=1", "seed is one value"),
    ("~x", "nothing of that name"),
    ("~strong.lrr", "strong.lr?"),
    ("per_device_train_batch_size=4", "optim.full.global_batch_size"),
    ("num_train_epochs=3", "strong.epochs"),
    ("max_seq_length=64", "strong.max_length or weak.max_length?"),
    ("max_steps=10", "strong.epochs"),
    ("fp16=true", "trainer.precision=bf16-mixed?"),
    ("bf16=true", "trainer.precision=bf16-mixed?"),
    ("gradient_accumulation_steps=4", "strong.micro_batch_size or weak.micro_batch_size?"),
    ("output_dir=x", "did you mean out?"),
    ("hydra.vrbose=1", "--cfg hydra"),
]


@pytest.fixture(scope="module")
def refused():
    """All of them typed at once: composing each alone takes longer."""
    return problems(*(row[0] for row in UNKNOWN))


@pytest.mark.parametrize(("argument", "words"), UNKNOWN, ids=[row[0] for row in UNKNOWN])
def test_one_line_names_what_was_meant(argument, words, refused):
    assert len(refused) == len(UNKNOWN)
    key = argument.lstrip("~").partition("=")[0]
    (line,) = [line for line in refused if line.startswith(f"{key}: ") and words in line]
    assert "\n" not in line


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--lr=0.1", "lr: no such key; did you mean strong.lr, weak.lr, optim.full.lr"),
        ("+lr=1", "lr: no such key; did you mean strong.lr, weak.lr, optim.full.lr"),
        ("+loss.alpha=1", "loss.alpha: no such key of this loss; it is of loss=conf_ce"),
        ("+method.dpo.beta=0.2", "method.dpo.beta: no such key of method=finetune; it is of method=cong"),
        ("dataset=conf/dataset/reviews.yaml", "without its folder and ending; did you mean dataset=reviews?"),
        ("+strong.rank=8", "did you mean strong.lora.r?"),
        ("dataset.noise=flip", "a section with the keys kind, rate, shrink, rates"),
        ("optim.full.lr=[1,2]", "to run each of several values: -m optim.full.lr=1,2"),
        ("optim.full.lr=1e-5,1e-4", "optim.full.lr: 1e-5,1e-4 are several values; add -m"),
        ("optim.full.lr=[1", "optim.full.lr: [1 cannot be read"),
        ("strong.feature_layer=None", "nothing is written null"),
        ("dataset.name=hh_rlhf", "choose dataset=hh_rlhf, and in a file of yours that builds on it set name: "),
        ("rkl", "rkl: a setting is typed key=value"),
        ("strong.lora={rank: 8}", "strong.lora.rank: no such key; did you mean strong.lora.r?"),
        ("+seed=3", "seed: is there already; leave out the +"),
        ("+experiment=rkl_gpt2", "experiment: is chosen already; leave out the +"),
        ("~strong.lr", "leave ~strong.lr out"),
        ("experiment=null", "experiment: leave experiment=null out"),
        ("experiment=", "experiment: leave experiment= out"),
        ("loss=", "loss: needs a choice, as loss=cace"),
        ("logger=[csv,wandb]", "logger: [csv,wandb] is a list; choose one, as logger=csv"),
        ("loss=[]", "loss: [] is a list; choose one"),
        ("logger=wandb,csv", "logger: wandb,csv are several values; add -m to run each of them, or choose one"),
        ("strong.chat_template_kwargs.enable_thinking=false", "write 'strong.chat_template_kwargs={enable_thinking: "),
        ("dataset.difficulty.column=n", "write 'dataset.difficulty={column: n}'"),
        ('strong.chat_template_kwargs={"a": 1}', "keys stand without quotes"),
        ("out=${nowhere}", "nowhere"),
        ("seed=a", "seed: input should be a valid integer (got 'a')"),
    ],
)
def test_one_problem_is_one_line(argument, words):
    (line,) = problems(argument)
    assert words in line
    assert "\n" not in line


WRITERS = ["weak=gpt2", "strong=gpt2"]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("evaluate", ["run=outputs"], "run: no such key; did you mean runs?"),
        ("evaluate", ["store=list,prune"], "store: list,prune are several values; give one"),
        ("evaluate", ["loss=kl"], "loss: is read by `w2sg train`"),
        ("evaluate", ["decoder.kind=wsd"], "decoder.kind: no decoder is chosen; type decoder=wsd as well"),
        ("evaluate", ["decoder.beams=2"], "decoder.beams: no decoder is chosen; type decoder=search or"),
        ("evaluate", ["decoder.bems=2"], "decoder.bems: no decoder is chosen; type decoder=... as well"),
        (
            "train",
            ["training.head.btch_size=4"],
            "training.head.btch_size: no such key; did you mean optim.head.global_batch_size?",
        ),
        (
            "evaluate",
            ["judge=llm"],
            "judge: is read by `w2sg train` and `w2sg decode`, and not here",
        ),
        ("decode", ["decoder=serch"], "did you mean decoder=search?"),
        ("decode", ["decoder.beam=3"], "did you mean decoder.beams?"),
        ("decode", ["judge=llmm"], "did you mean judge=llm?"),
        ("decode", ["method.judge=llm"], "a section with the keys"),
        (
            "train",
            ["method=cong", *WRITERS, "method.judge=llm"],
            "a section with the keys kind, model",
        ),
        ("train", ["method=cong", *WRITERS, "method.judge.modle=x"], "did you mean method.judge.model?"),
        ("train", ["method=cong", *WRITERS, "lr=1"], "method.alignment.lr, method.sft.lr"),
    ],
)
@pytest.mark.slow
def test_each_program_knows_the_others(name, arguments, words):
    (line,) = problems(*arguments, name=name)
    assert words in line


def test_every_problem_of_every_kind_comes_at_once():
    found = problems("lr=1", "batch_size=2", "seed=x", "loss=foo")
    assert [line.partition(":")[0] for line in found] == ["loss", "lr", "batch_size", "seed"]


@pytest.mark.slow
def test_a_sweep_is_checked_whole_before_its_first_run():
    found = problems("-m", "seed=0,-1", "strong.lr=1e-4,x")
    assert [line.partition(":")[0] for line in found] == ["strong.lr", "seed"]
    assert all("in 2 of 4 runs" in line for line in found)
    assert problems("loss=ce,kll", "-m")[0].startswith("loss: there is no kll; did you mean loss=kl")
    assert problems("experiment=rkl_gpt2_hh", "lr=1", "loss=rkl")[0].startswith("lr: no such key")


def test_a_sweep_that_cannot_be_taken_apart_is_one_line():
    (line,) = problems("-m", "strong.lr=interval(0,1)")
    assert "the sweep cannot be taken apart" in line
    assert "\n" not in line
    (line,) = problems("-m", "loss=glob(*kl)", "seed=x")  # kl, rkl
    assert line == "seed: input should be a valid integer (got 'x')"


def test_a_run_that_holds_is_let_through():
    register()
    for arguments in (["seed=1"], ["-m", "seed=0,1"], ["--seed=1", "out=a[b]", "store=c d"]):
        composing.settle("train", typed(arguments), check)


def test_words_of_other_libraries_stand_for_keys_that_there_are():
    import hydra
    from omegaconf import OmegaConf

    register()
    trees = []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for name, choices in (("train", ["method=cong"]), ("decode", []), ("train", ["method=chain"])):
            trees.append(OmegaConf.to_container(hydra.compose(name, choices)))
    lost = [word for word in ELSEWHERE if not any(nearest(word, tree) for tree in trees)]
    assert lost == []


def test_a_choice_is_no_file():
    assert choices.file_problem("loss=rkl.yaml").endswith("did you mean loss=rkl?")
    assert choices.file_problem("strong=/home/me/tiny.yaml").endswith("put it into ./conf/model and type strong=tiny")
    assert choices.file_problem("loss=losses/mine.py").endswith("type loss=losses.mine.NAME")
    assert choices.file_problem("strong=gpt2") is None


def test_names_that_differ_in_signs_alone_are_first():
    assert similar("gpt2xl", ["gpt2", "gpt2-xl", "gpt2-large"]) == ["gpt2-xl"]
    assert similar("zzz", ["gpt2", "rkl"]) == []


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["optim.full.lr=1e-4"], "optim.full.lr: not read, since no model is trained so (weak.tune=head"),
        (["optim.head.lr=1", "weak.lr=1", "strong.lr=2"], "optim.head.lr: not read, since weak.lr and strong.lr"),
        (["optim.head.lr=1", "strong.lr=2"], None),
        (["strong.lora.r=4"], "strong.lora.r: not read, since strong.tune=head"),
        (["strong.experts=4"], "strong.experts: not read, since strong.head=linear"),
        (["optim.label_smoothing=0.1", "seed=1", "optim.head.epochs=2"], None),
    ],
)
def test_a_setting_that_nothing_reads_is_said(typed, words):
    from conftest import compose

    from w2sg.config.unread import unread

    found = unread(check(compose("weak=smollm2-135m-gguf", *typed)), typed)
    assert len(found) == (words is not None)
    assert words is None or found[0].startswith(words)


# -- the line as it is printed ----------------------------------------------------------------------------------------


def test_one_problem_is_one_line_on_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "lr=1e-5"])
    with pytest.raises(SystemExit) as ended:
        cli.launch(lambda cfg: None, "train")
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (1, "")
    assert said.err == (
        "error: lr: no such key; did you mean strong.lr, weak.lr, optim.full.lr, optim.lora.lr or optim.head.lr?\n"
    )


def test_hydras_parser_is_made_where_argparse_checks_every_help(monkeypatch):
    """As Python 3.14 does: https://github.com/facebookresearch/hydra/issues/3121."""

    def check_help(parser, action):
        return action.help is not None and "%" in action.help

    def add(container, *names, **options):
        action = before(container, *names, **options)
        getattr(container, "_check_help", lambda _: None)(action)
        return action

    before = argparse._ActionsContainer.add_argument
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", add)
    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help, raising=False)
    with pytest.raises(TypeError, match="LazyCompletionHelp"):
        get_args_parser()
    with cli.late_help():
        get_args_parser()


@pytest.mark.slow
def test_a_flag_after_settings_sweeps(train, monkeypatch, tmp_path):
    import w2sg.experiment.run

    ran = []

    monkeypatch.setattr(
        w2sg.experiment.run,
        "run_method",
        lambda config, *_: ran.append((config.seed, config.out)) or SimpleNamespace(content={"metrics": {}}),
    )
    train(f"out={tmp_path}/a (b) [c]", "-m", "seed=0,1")
    assert ran == [(0, f"{tmp_path}/a (b) [c]"), (1, f"{tmp_path}/a (b) [c]")]
    assert {p.name for p in (tmp_path / "a (b) [c]").iterdir()} == {"seed=0", "seed=1", "multirun.yaml"}


@pytest.mark.slow
def test_help_of_hydra_is_left_alone():
    done = subprocess.run(
        [sys.executable, "train.py", "seed=3", "--cfg", "job", "-p", "seed"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "3")


def test_a_tilde_is_the_home_folder_of_every_folder_that_is_written(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    line = typed(["out=~/runs", "--store", "~/store", "export=x", "to=~/m", "dataset.path=~/rows"])
    assert line.overrides == [
        "out=/home/somebody/runs",
        "store=/home/somebody/store",
        "export=x",
        "to=/home/somebody/m",
        "dataset.path='~/rows'",
    ]
