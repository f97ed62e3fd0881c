"""Fits for known answers: the stages, store and LightningModules of every other run, on small arrays.

Shapes: N rows, D features, C outputs, R replicates of one experiment, trained in parallel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from w2sg.config.data_schema import DatasetConfig
from w2sg.config.option import defaults_of
from w2sg.config.schema import FitOptions, TrainerConfig
from w2sg.data.loading import Examples, Features
from w2sg.data.splits import Tables, load_tables
from w2sg.data.table import Table
from w2sg.models.heads import LinearHead
from w2sg.store.store import Store
from w2sg.training.devices import Devices
from w2sg.training.label_modules import SoftLabelModule
from w2sg.training.schedule import learning_rate_factor
from w2sg.training.stage_values import values_of
from w2sg.training.stages import FitJob, ReadJob, Stages


def squared_error(outputs: Tensor, targets: Tensor, progress: float = 1.0) -> Tensor:
    """[B] half the squared distance of outputs [B, C] from targets [B, C]: the regression loss."""
    return 0.5 * (outputs - targets).square().sum(-1)


class GradientDescent(SoftLabelModule):
    """The same objective by plain gradient descent, because theory gives its whole path and not only its end.

    It replaces the optimizer of the options. ``weight_decay`` is added to the gradient, so it is the ridge penalty
    ``weight_decay / 2 ||w||^2``.
    """

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.options
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=options.lr, weight_decay=options.weight_decay)
        factor = learning_rate_factor(options.schedule, options.warmup, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, factor)}


class Kept(nn.Module):
    """A model that saves its weights only."""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")


class Separate(Kept):
    """R linear models, one per replicate: features [B, R, D] to outputs [B, R]. Weights start at 0."""

    def __init__(self, replicates: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(replicates, width))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.einsum("brd,rd->br", batch["features"], self.weight)


def linear(width: int, outputs: int) -> LinearHead:
    """The linear head of w2sg with zero weights: one linear model per output, on the same features [B, 1, D]."""
    head = LinearHead(width, False, outputs)
    nn.init.zeros_(head.score.weight)
    return head


def whitening(features: Tensor) -> Tensor:
    """[..., D, K] matrix that whitens features [..., N, D], K = min(N, D).

    On whitened features one step of gradient descent from 0 at rate 1 reaches the least-squares solution. If there are
    several, it is the one of least norm.
    """
    _, scale, directions = torch.linalg.svd(features.double(), full_matrices=False)
    return directions.mT / scale[..., None, :] * features.shape[-2] ** 0.5


# options of a fit: full batches at rate 1, without clipping or held-out rows
PLAIN = {"lr": 1.0, "schedule": "constant", "weight_decay": 0.0, "optimizer": "adam", "warmup": 0.0, "clip": None}
PLAIN |= {"validation": 0.0, "patience": None}


class Bench:
    """Fits and reads on the CPU.

    Args:
        folder: where the store goes. It must be new, because a stage of other code would hide what this code does.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.devices = Devices(TrainerConfig(accelerator="cpu"))
        self.stages = Stages(Store(folder / "store"), self.devices, lambda _: None, 10.0, curve_every=1)

    def fit(
        self,
        name: str,
        model: nn.Module,
        features: Tensor,
        targets: Tensor,
        loss: Callable[..., Tensor] = squared_error,
        *,
        steps: int = 1,
        module: type[SoftLabelModule] = GradientDescent,
        **options: Any,
    ) -> Path:
        """Train ``model`` on targets [N, C], in place, and return the folder of the stage.

        Args:
            features: [N, n, D].
            steps: passes over the rows. Without ``batch_size`` (all rows) these are optimizer steps.
            module: `GradientDescent`, or `SoftLabelModule` for Adam.
            options: those of `FitOptions` that differ from `PLAIN`.
        """
        examples = _examples(features, targets)
        given = FitOptions.model_validate({"epochs": steps, "batch_size": len(features)} | PLAIN | options)
        key = {
            "options": given.key(),
            "objective": f"{module.__name__} {loss!r}".partition(" at 0x")[0],
            "inputs": _digest(features.float(), targets, *model.state_dict().values()),
        }
        make = partial(module, loss=loss)
        folder = self.stages.fit(name, key, lambda: FitJob(model, make, examples, None, given, seed=0))
        model.load_state_dict(load_file(next((folder / "model").glob("*.safetensors"))))
        return folder

    def learn(self, name: str, model: nn.Module, features: Tensor, *taught: Any, on: Tensor, **settings: Any) -> Tensor:
        """`fit`, then `read` other features: [N, C]."""
        self.fit(name, model, features, *taught, **settings)
        return self.read(f"{name}-read", model, on)

    def read(self, name: str, model: nn.Module, features: Tensor) -> Tensor:
        """[N, C] outputs of a model for features [N, n, D], in fp64 (from fp32)."""
        examples = _examples(features)
        key = {"inputs": _digest(features.float(), *model.state_dict().values()), "model": type(model).__name__}
        return values_of(self.stages.read(name, key, lambda: ReadJob(model, model, examples)), examples.ids).double()

    def tables(self, path: Path, sizes: dict[str, int | None]) -> Tables:
        """The splits of a file of labelled rows, or of a folder with one file for each split."""
        node = {"name": "local", "_target_": "w2sg.data.sources.local", "path": str(path), "sizes": sizes}
        return load_tables(defaults_of(DatasetConfig) | node, seed=0)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A file of rows, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def numbered(table: Table, x: np.ndarray) -> Tensor:
    """[N, 1, D] the rows of x that a table's texts name, as in "row 3"."""
    return torch.tensor(x[[int(texts[0].split()[1]) for texts in table.texts]], dtype=torch.float32)[:, None]


def _examples(features: Tensor, targets: Tensor | None = None) -> Examples:
    ids, labels = [str(row) for row in range(len(features))], torch.zeros(len(features), dtype=torch.long)
    return Examples(Features(features.float()), ids, labels, targets)


def _digest(*tensors: Tensor) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.detach().numpy())
        state.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return state.hexdigest()
