"""The units of work: fit a model, or read rows with one. Cached by content, resumable, on one device or many."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from w2sg.config import FitOptions
from w2sg.data.loading import Examples, StageData
from w2sg.devices import Devices
from w2sg.errors import UserError
from w2sg.models import LanguageScorer
from w2sg.modules import ReadingModule, SoftLabelModule
from w2sg.sharding import load_weights, unshard
from w2sg.store import REFERENCE, SCRATCH, Store, read_json, write_json

log = logging.getLogger(__name__)


@dataclass
class FitJob:
    """What `Stages.fit` trains.

    Attributes:
        scorer: a module with ``forward(inputs)`` and ``save(folder)``.
        train, held_out: rows; ``held_out`` (or None) decides early stopping and the best epoch.
        loss: ``(logits, label_logits, progress) -> [B]``.
        notes: anything the report should know (clamped labels, truncated texts, ...).
    """

    scorer: nn.Module
    train: Examples
    held_out: Examples | None
    loss: Callable[..., Tensor]
    options: FitOptions
    seed: int
    micro_batch: int | None = None
    select_on_gold: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class ReadJob:
    """What `Stages.read` runs: ``read(inputs) -> [b, ...]`` of a frozen model over the rows of ``examples``."""

    model: nn.Module
    read: Callable[[dict[str, Tensor]], Tensor]
    examples: Examples
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageRecord:
    """One line of the report's stage list."""

    name: str
    key: str
    cached: bool
    seconds: float
    tokens: int
    useful_token_fraction: float | None
    info: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "info"}


class Stages:
    """Runs stages through a store and keeps the list of what was done.

    Args:
        store: where outputs live.
        devices: who works.
        logger: ``stage name -> Lightning logger or None``.
        checkpoint_minutes: between checkpoints inside a fit; 0 writes one every step.
        curve_every: optimizer steps between points of a loss curve.
    """

    def __init__(
        self,
        store: Store,
        devices: Devices,
        logger: Callable[[str], Any],
        checkpoint_minutes: float,
        curve_every: int,
    ):
        self.store, self.devices, self.logger = store, devices, logger
        self.checkpoint_minutes, self.curve_every = checkpoint_minutes, curve_every
        self.records: list[StageRecord] = []
        self._walked: set[str] = set()  # stages that this run has asked for before

    # -- fit ----------------------------------------------------------------------------------------------------------

    def fit(self, name: str, key: dict[str, Any], make: Callable[[], FitJob]) -> Path:
        """Train a model, or find it trained. Returns the stage's folder, which holds ``model/`` and ``curve.json``."""
        return self._stage(name, key, lambda part: self._fit(name, make, part))

    def _fit(self, name: str, make: Callable[[], FitJob], part: Path) -> dict[str, Any]:
        job = make()
        options = job.options
        data = StageData(
            train=job.train,
            held_out=job.held_out,
            batch_size=options.batch_size,
            micro_batch=job.micro_batch,
            eval_tokens=self.devices.eval_tokens,
            seed=job.seed,
        )
        steps = -(-len(job.train) // options.batch_size) * options.epochs
        module = SoftLabelModule(job.scorer, job.loss, options, steps, job.select_on_gold, self.curve_every)
        resume, best, callbacks = self._checkpoints(part, job)
        large = isinstance(job.scorer, LanguageScorer)
        if self.devices.shards and not large:
            log.info("%s: too small to be cut over the devices; each holds all of it", name)
        trainer = self.devices.trainer(
            large,
            max_epochs=options.epochs,
            callbacks=callbacks,
            logger=self.logger(name) or False,
            limit_val_batches=None if job.held_out is not None else 0,
            enable_checkpointing=True,
        )
        checkpoint = self._resumable(name, resume)
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except UserError as error:
            raise type(error)(f"{name}: {error}") from error
        module._check_now()
        chosen = None
        if best is not None and best.best_model_path:
            state = torch.load(best.best_model_path, map_location="cpu", mmap=True, weights_only=True)
            load_weights(module, state["state_dict"])
            chosen = state["epoch"] + 1
        if self.devices.shards and large:
            unshard(job.scorer)
        tokens, padded, examples = (self.devices.total(module.counts[k]) for k in ("useful", "padded", "examples"))
        if self.devices.main:
            job.scorer.save(part / "model")
            write_json(part / "curve.json", module.curve)
        return {
            "seconds": module.seconds_so_far,
            "tokens": int(tokens),
            "padded_tokens": int(padded),
            "examples": int(examples),
            "steps": trainer.global_step,
            "best_epoch": chosen,
            **job.notes,
        }

    def _checkpoints(self, part: Path, job: FitJob):
        folder = part / SCRATCH
        callbacks: list[L.Callback] = []
        best = None
        if job.held_out is not None:
            best = ModelCheckpoint(
                folder,
                "best",
                monitor="held_out_loss",
                save_weights_only=True,
                enable_version_counter=False,
                save_on_train_epoch_end=False,  # right after validation, before the resume checkpoint records it
            )
            callbacks.append(best)
            if job.options.patience is not None:
                callbacks.append(EarlyStopping("held_out_loss", patience=job.options.patience, min_delta=0.0))
        resume = _Resume(folder / "resume.ckpt", 60.0 * self.checkpoint_minutes, validates=job.held_out is not None)
        return resume.file, best, [*callbacks, resume]  # last, so that it sees what the others decided

    def _resumable(self, name: str, file: Path) -> str | None:
        """The checkpoint of an unfinished fit, if it can be read."""
        step = None
        if self.devices.main and file.exists():
            try:
                step = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"]
                log.info("%s: goes on at step %d, from %s", name, step, file.parent.parent.name)
            except Exception as error:  # any unreadable file means the same: start this stage afresh
                log.warning("%s: the checkpoint %s cannot be read (%s); the stage starts afresh", name, file, error)
                file.unlink()
        return str(file) if self.devices.agree(step) is not None else None

    # -- read ---------------------------------------------------------------------------------------------------------

    def read(self, name: str, key: dict[str, Any], make: Callable[[], ReadJob]) -> Path:
        """Run a frozen model over rows, or find it done. The folder holds ``values.safetensors`` and ``ids.json``."""
        return self._stage(name, key, lambda part: self._read(make, part))

    def _read(self, make: Callable[[], ReadJob], part: Path) -> dict[str, Any]:
        job = make()
        scratch = part / SCRATCH
        done = self.devices.agree(_Shards.done(scratch) if self.devices.main else None)
        todo = np.setdiff1d(np.arange(len(job.examples)), done)
        if len(done):
            log.info("%d of %d rows were read before", len(done), len(job.examples))
        if len(todo):
            module = ReadingModule(job.model, job.read)
            writer = _Shards(scratch, self.devices.rank, todo)
            large = isinstance(job.model, LanguageScorer)
            trainer = self.devices.trainer(large, callbacks=[writer], logger=False, enable_checkpointing=False)
            data = StageData(score=job.examples.take(todo), eval_tokens=self.devices.eval_tokens)
            trainer.predict(module, data, return_predictions=False)
        self.devices.wait()
        counts: dict[str, Any] = {}
        if self.devices.main:
            values, counts = _Shards.join(scratch, len(job.examples), self.devices.world)
            save_file({"values": values}, part / "values.safetensors")
            write_json(part / "ids.json", job.examples.ids)
        return {"examples": len(job.examples), **counts, **job.notes}

    # -- any stage ----------------------------------------------------------------------------------------------------

    def compute(self, name: str, key: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> Path:
        """Anything small and deterministic: ``work(folder)`` writes files (on rank 0) and returns its info."""

        def timed(part: Path) -> dict[str, Any]:
            begun = time.perf_counter()
            info = work(part) if self.devices.main else {}
            return {"seconds": time.perf_counter() - begun, **info}

        return self._stage(name, key, timed)

    def _stage(self, name: str, key: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> Path:
        with contextlib.ExitStack() as stack:
            claim = stack.enter_context(self.store.claim(name, key)) if self.devices.main else None
            path, part, cached = self.devices.agree(
                (claim.path, claim.part, claim.cached) if claim is not None else None
            )
            if not cached:
                self._announce(name, key, path)
                info = work(part)
                self.devices.wait()
                if claim is not None:
                    claim.seal(info)
            info = self.devices.agree(claim.info if claim is not None else None)
        tokens, padded = info.get("tokens", 0), info.get("padded_tokens", 0)
        fraction = tokens / padded if padded else None
        seconds = float(info.get("seconds", 0.0))
        if path.name in self._walked:
            return path
        self._walked.add(path.name)
        self.records.append(StageRecord(name, path.name, cached, seconds, tokens, fraction, info))
        if self.devices.main:
            log.info("%s: %s", name, "from the store" if cached else f"done in {seconds:.1f} s")
        return path

    def _announce(self, name: str, key: dict[str, Any], path: Path) -> None:
        if not self.devices.main:
            return
        near = self.store.nearest(name, key)
        why = ""
        if near is not None:
            other, differences = near
            # what hangs on another stage differs with it, and that one has said why
            differences = [d for d in differences if not all(REFERENCE.fullmatch(str(value)) for value in d[1:])]
            shown = ", ".join(f"{k}: {theirs} -> {ours}" for k, theirs, ours in differences[:3])
            if shown:
                why = f" ({other} differs in {shown}{', ...' if len(differences) > 3 else ''})"
        log.info("%s: working on %s%s", name, path.name, why)


class _Resume(Checkpoint):
    """Writes the checkpoint that a killed fit goes on from.

    Lightning does not repeat a validation that was due when its checkpoint was written, so at the end of an epoch the
    checkpoint waits until held-out rows were scored; and none is written once training has decided to stop, because
    that decision is not part of a checkpoint.

    Args:
        seconds: between checkpoints; 0 writes one after every step.
    """

    def __init__(self, file: Path, seconds: float, validates: bool):
        self.file, self.seconds, self.validates = file, seconds, validates
        self.written = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not (self.validates and trainer.is_last_batch):
            self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.validates and not trainer.should_stop:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        due = time.perf_counter() - self.written >= self.seconds
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)
        if due:
            trainer.save_checkpoint(self.file)
            self.written = time.perf_counter()


class _Shards(L.Callback):
    """Writes what was read every few seconds, so that a killed run keeps all but the last few seconds."""

    def __init__(self, scratch: Path, rank: int, rows: np.ndarray, seconds: float = 10.0):
        self.scratch, self.rank, self.rows, self.seconds = scratch, rank, torch.from_numpy(rows), seconds
        self.flushed = time.perf_counter()
        self.pending: list[dict[str, Any]] = []

    def on_predict_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.pending.append(outputs)
        if time.perf_counter() - self.flushed > self.seconds:
            self._flush()

    def on_predict_end(self, *_: Any) -> None:
        self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        now = time.perf_counter()
        tensors = {
            "index": self.rows[torch.cat([p["index"] for p in self.pending])],
            "values": torch.cat([p["values"] for p in self.pending]).contiguous(),
            "useful": torch.tensor(sum(p["useful"] for p in self.pending)),
            "padded": torch.tensor(sum(p["padded"] for p in self.pending)),
            "seconds": torch.tensor(now - self.flushed, dtype=torch.float64),
        }
        taken = len(list(self.scratch.glob(f"shard-{self.rank:04d}-*.safetensors")))
        file = self.scratch / f"shard-{self.rank:04d}-{taken:06d}.safetensors"
        save_file(tensors, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
        self.pending, self.flushed = [], now

    @staticmethod
    def done(scratch: Path) -> np.ndarray:
        """Rows that are on disk. Unreadable shards are deleted: their rows are read again."""
        done = [np.zeros(0, np.int64)]
        for file in sorted(scratch.glob("shard-*.safetensors")):
            try:
                done.append(load_file(file)["index"].numpy())
            except Exception as error:  # whatever is wrong with it, the remedy is the same
                log.warning("the shard %s cannot be read (%s); its rows are read again", file.name, error)
                file.unlink()
        return np.concatenate(done)

    @staticmethod
    def join(scratch: Path, rows: int, world: int) -> tuple[Tensor, dict[str, Any]]:
        """All shards by row, and what was counted while reading them."""
        shards = [load_file(file) for file in sorted(scratch.glob("shard-*.safetensors"))]
        index = torch.cat([s["index"] for s in shards])
        values = torch.cat([s["values"] for s in shards])
        missing = rows - len(torch.unique(index))
        if missing:
            raise RuntimeError(f"{scratch.parent.name}: {missing} rows were never read")
        joined = torch.empty((rows, *values.shape[1:]))
        joined[index] = values
        return joined, {
            "tokens": sum(int(s["useful"]) for s in shards),
            "padded_tokens": sum(int(s["padded"]) for s in shards),
            "seconds": sum(float(s["seconds"]) for s in shards) / world,
        }


def load_values(folder: Path) -> tuple[list[str], Tensor]:
    """Ids and values of a finished read stage."""
    return read_json(folder / "ids.json"), load_file(folder / "values.safetensors")["values"]
