"""Tiny stand-ins for real models and data, made here: no network, no GPU, seconds."""

import gc
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the many commands that are run would each compile the package

import commands
import pytest
import remembered
import torch

ROOT = Path(__file__).resolve().parent.parent
begun: set[Path] = set()  # files of tests
torch.set_num_threads(1)
remembered.remember()
# What starts the tests may ignore these (nohup, a shell's background jobs), and then runs and their processes do, too.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

WORDS = [
    "good",
    "bad",
    "fine",
    "poor",
    "kind",
    "rude",
    "warm",
    "cold",
    "clear",
    "vague",
    "wise",
    "silly",
    "calm",
    "angry",
    "brave",
    "weak",
    "true",
    "false",
    "fair",
    "mean",
]
BETTER = set(WORDS[::2])


def make_pairs(count: int, seed: int = 0) -> list[dict]:
    """Preference pairs whose better reply has more of the good words; the longer reply is not the better one."""
    draw = random.Random(seed)
    good, bad = sorted(BETTER), sorted(set(WORDS) - BETTER)
    rows = []
    for i in range(count):
        prompt = f"\n\nHuman: question {seed} {i} {draw.choice(WORDS)}?\n\nAssistant:"
        replies = []
        for source, other in ((good, bad), (bad, good)):
            words = draw.choices(source, k=draw.randint(3, 9)) + draw.choices(other, k=draw.randint(0, 2))
            draw.shuffle(words)
            replies.append(prompt + " " + " ".join(words))
        rows.append({"chosen": replies[0], "rejected": replies[1]})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    """A folder of three splits: 96 / 96 / 64 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (name, count) in enumerate({"ground_truth": 96, "transfer": 96, "test": 64}.items()):
        write_jsonl(folder / f"{name}.jsonl", make_pairs(count, seed))
    return folder


def save_tiny_model(folder: Path, kind: str = "gpt2", layers: int = 2, width: int = 32, seed: int = 0) -> Path:
    """A randomly initialised decoder with a small byte-level tokenizer, saved as an ordinary folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        OPTConfig,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["!"], show_progress=False
    )  # token 0 is "!", as in GPT-2: a text may end in it
    tokenizer.train_from_iterator([" ".join(WORDS), "\n\nHuman: question?\n\nAssistant:"] * 20, trainer)
    vocabulary = tokenizer.get_vocab_size()
    common = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    if kind == "gpt2":
        config = GPT2Config(n_embd=width, n_layer=layers, n_head=2, n_positions=128, **common)
    else:
        configs = {
            "neox": (GPTNeoXConfig, {"intermediate_size": 2 * width}),
            "llama": (LlamaConfig, {"intermediate_size": 2 * width, "num_key_value_heads": 1}),
            "opt": (OPTConfig, {"ffn_dim": 2 * width, "word_embed_proj_dim": width}),
        }
        config_class, more = configs[kind]
        config = config_class(**sizes, **more, **common)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama", layers=3, seed=1)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tiny language models by role; `other` is another than `weak`, of the same tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {"weak": {}, "strong": {"kind": "llama", "seed": 1}, "untuned": {"seed": 7}, "other": {"seed": 5}}
    return {
        name: save_tiny_model(folder / name, **({"width": 16} if "kind" not in kind else {}), **kind)
        for name, kind in kinds.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models of `architectures`, by family, each written once."""
    from architectures import write

    made = {}

    def of(family):
        if family not in made:
            made[family] = write(family, tmp_path_factory.mktemp("model") / "m")
        return made[family]

    return of


def compose(*overrides: str, name: str = "train"):
    """A configuration as the command line would compose it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from w2sg.config import renamed
    from w2sg.config.hydra import register
    from w2sg.config.plugins import CONF

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose(name, overrides=[renamed.override(override) for override in overrides])


def refused(*overrides: str) -> list[str]:
    """The problems of a configuration, as the command line would say them."""
    from w2sg.config.check import check
    from w2sg.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        check(compose(*overrides))
    return error.value.problems


def conf_node(file: str) -> dict:
    """The plain values of a file of conf/, as ``dataset/local``, with the defaults that it stands on."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(compose(name=file))[file.partition("/")[0]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no worker is left with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], str(item.path)))


def run_script(
    script: str,
    *overrides: str,
    check: bool = True,
    timeout: int = 240,
    fresh: bool = False,
    folder: Path = ROOT,
    **environment: str,
):
    """Run train.py, evaluate.py or a benchmark as a user would; ``fresh`` if it starts processes like itself."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if fresh:
        command = [sys.executable, str(ROOT / script), *overrides]
        result = subprocess.run(
            command, cwd=folder, env=known, capture_output=True, text=True, timeout=timeout, check=False
        )
    else:
        with tempfile.TemporaryDirectory() as said:
            out, err = (Path(said) / name for name in ("out", "err"))
            process = commands.start(script, overrides, known, out, err, folder)
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
            result = subprocess.CompletedProcess(
                [script, *overrides], process.exitcode, out.read_text(), err.read_text()
            )
    if check and result.returncode:
        raise AssertionError(f"{script} {' '.join(overrides)} failed:\n{result.stdout}\n{result.stderr}")
    return result


def start_ranks(script: str, *overrides: str, folder: Path, count: int = 2) -> Callable[[], str]:
    """The processes of one command, as torchrun starts them; what is returned waits for them and has what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files, processes = [folder / f"rank{rank}" for rank in range(count)], []
    for rank, file in enumerate(files):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "w2sg"}
        known = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in ranks.items()}}
        processes.append(commands.start(script, overrides, known, file, file))

    def finish(timeout: int = 240, code: int = 0) -> str:
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if not code and any(process.exitcode for process in processes):
                break  # the others would wait for this one
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.join()
        said = "\n".join(file.read_text() for file in files)
        assert [process.exitcode for process in processes] == [code] * count, said
        return said

    finish.processes = processes
    return finish


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Figures are made but not drawn, which is half the time of a small run; tests marked `drawn` draw them all."""
    os.environ[commands.UNDRAWN] = "" if item.get_closest_marker("drawn") else "1"
    commands.draw_where_wanted()
    if item.path not in begun:  # what is imported stays, and need not be looked through by each collection of garbage
        begun.add(item.path)
        gc.collect()
        gc.freeze()
    return (yield)


def the_script(name: str) -> ModuleType:
    """A script of the project's root as a module of its own; packages of the same name (`evaluate`) are left alone."""
    specification = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def train(monkeypatch):
    """train.py in this process: imports take longer than a sweep of these."""
    from hydra.core.singleton import Singleton

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # raise, with the whole trace
    state = Singleton.get_state()

    def run(*typed: str) -> None:
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # leaves pytest's own handlers alone
        monkeypatch.setattr(sys, "argv", ["train.py", *typed, *quiet])
        the_script("train").main()

    yield run
    Singleton.set_state(state)


def stand_in_for_vllm():
    """A module with vLLM's interface (0.33): ids in, ids, log-probabilities and the reason for the end out.

    Returns:
        The module, and a list that each model it loads is added to.
    """
    from transformers import AutoModelForCausalLM

    made = []

    class LLM:
        def __init__(self, model, **options):
            assert options["skip_tokenizer_init"]
            assert options["logprobs_mode"] == "raw_logprobs"
            self.model = AutoModelForCausalLM.from_pretrained(model)
            made.append(model)

        @torch.no_grad()
        def generate(self, prompts, settings, use_tqdm):
            for prompt, setting in zip(prompts, settings, strict=True):
                assert setting.temperature == 0.0
                if getattr(setting, "logprob_token_ids", None) is not None:
                    yield self.read(prompt["prompt_token_ids"], setting)
                    continue
                ids, logs = list(prompt["prompt_token_ids"]), []
                before = len(ids)
                reason = "length"
                for _ in range(setting.max_tokens):
                    log = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                    allowed = setting.allowed_token_ids
                    token = int(log.argmax()) if allowed is None else allowed[int(log[allowed].argmax())]
                    ids.append(token)
                    logs.append({token: SimpleNamespace(logprob=float(log[token]))})
                    if token in setting.stop_token_ids:
                        reason = "stop"
                        break
                output = SimpleNamespace(token_ids=ids[before:], logprobs=logs, finish_reason=reason)
                yield SimpleNamespace(outputs=[output])

        def read(self, ids, setting):
            logs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            known = [None] + [{t: SimpleNamespace(logprob=float(at[t]))} for at, t in zip(logs, ids[1:], strict=False)]
            after = {t: SimpleNamespace(logprob=float(logs[-1, t])) for t in setting.logprob_token_ids}
            output = SimpleNamespace(logprobs=[after], finish_reason="length")
            return SimpleNamespace(
                prompt_logprobs=known if setting.prompt_logprobs is not None else None, outputs=[output]
            )

    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, lambda **options: SimpleNamespace(**options)
    fake.__spec__ = SimpleNamespace(name="vllm")
    return fake, made
