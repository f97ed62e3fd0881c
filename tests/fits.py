"""Tiny fits: examples, options, and stages that train on them."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from w2sg import losses
from w2sg.config.schema import FitOptions, TrainerConfig
from w2sg.data.loading import Examples
from w2sg.data.rows import pack
from w2sg.models.heads import BagOfWords, HashedWords
from w2sg.store.files import read_json
from w2sg.store.store import Store
from w2sg.training.devices import Devices
from w2sg.training.label_modules import SoftLabelModule
from w2sg.training.stages import FitJob, Stages


def options(**changes) -> FitOptions:
    base = {
        "lr": 0.05,
        "epochs": 2,
        "batch_size": 8,
        "optimizer": "adamw",
        "schedule": "cosine",
        "warmup": 0.1,
        "weight_decay": 0.01,
        "clip": 1.0,
        "validation": 0.0,
        "patience": None,
    }
    return FitOptions.model_validate(base | changes)


def texts(n: int, seed: int = 0) -> list[tuple[str, str]]:
    random = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i}" for i in range(40)])
    return [tuple(" ".join(random.choice(vocabulary, random.integers(2, 12))) for _ in range(2)) for _ in range(n)]


def examples(n: int = 30, seed: int = 0) -> Examples:
    rows = pack(texts(n, seed), HashedWords(64), 32)
    random = torch.Generator().manual_seed(seed)
    targets = torch.randn(n, 2, generator=random)
    first = torch.randint(0, 2, (n,), generator=random)
    return Examples(rows, [f"id{i}" for i in range(n)], first, targets, targets.argmax(1))


def devices(**changes) -> Devices:
    node = {"accelerator": "cpu", "eval_tokens": 256}
    return Devices(TrainerConfig.model_validate(node | changes))


def stages(folder, on=None, **changes) -> Stages:
    settings = {"checkpoint_minutes": 10.0, "curve_every": 1} | changes
    return Stages(Store(Path(folder) / "store"), on or devices(), lambda name: None, **settings)


def job(at=None, validated=None, selecting=True) -> FitJob:
    """Three epochs of four steps; ``at(step)`` comes before each, ``validated`` before each batch of held-out rows."""

    class Module(SoftLabelModule):
        def training_step(self, batch, index):
            if at is not None:
                at(self.global_step)
            super().training_step(batch, index)

        def validation_step(self, batch, index):
            if validated is not None:
                validated(self.current_epoch, index)
            super().validation_step(batch, index)

    torch.manual_seed(3)
    held_out = examples(60, seed=9) if selecting else None
    module = partial(Module, loss=losses.cross_entropy)
    return FitJob(BagOfWords(64, True, 2), module, examples(), held_out, options(epochs=3, lr=0.5), seed=5)


def found(folder):
    from safetensors.torch import load_file

    info = read_json(folder / "manifest.json")["info"]
    weights = load_file(next((folder / "model").glob("*.safetensors")))["words.weight"]
    return weights, read_json(folder / "curve.json"), {k: v for k, v in info.items() if k != "seconds"}


def same(one, two):
    return torch.equal(one[0], two[0]) and one[1:] == two[1:]
