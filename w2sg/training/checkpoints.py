"""Checkpoints inside a fit: when they are written, where, and which of them a killed fit goes on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from w2sg import progress, stops
from w2sg.store.files import FULL, remove
from w2sg.store.sealed import seal, sweep, unsound
from w2sg.training import pieces
from w2sg.training.pieces import Writing

log = logging.getLogger(__name__)


class SealedFiles(CheckpointIO):
    """Lightning's way to write a checkpoint goes through $TMPDIR, from where it may have to be copied; this does not.

    Of a model that is cut over ranks each rank writes its part, while training goes on (`begin`).

    Args:
        group: of CPU tensors, which the ranks of a cut model have for this alone.

    Attributes:
        written: the last checkpoint, on the process that writes; None while it is being written.
        writing: what is being written beside training.
        spare: one that may go where the disk is too full for another.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.written: Path | None = None
        self.writing: Writing | None = None
        self.spare: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)

        def write() -> Path:
            return seal(path.parent, path.stem, path.suffix, lambda file: torch.save(checkpoint, file))

        try:
            self.written = write()
        except OSError as error:
            if error.errno not in FULL or self.spare is None:
                raise
            self.give_up_spare()
            self.written = write()

    def begin(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Write a checkpoint with sharded tensors; called on every rank. One before it must have been waited for."""
        path = Path(path)
        self.writing, self.written = Writing(path.parent, path.stem, path.suffix, checkpoint, self.group), None

    def wait(self) -> None:
        """Until what was begun is there.

        Raises:
            OSError: on every rank.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.wait()
            self.written = writing.path

    def give_up_spare(self) -> None:
        """Make room on a full disk."""
        if self.spare is not None:
            remove(self.spare)
            self.spare = None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """All of a checkpoint, whole, whoever has written it."""
        if Path(path).is_dir():
            return pieces.read(Path(path))
        # mapped, not read: the ranks of a machine share its pages
        return torch.load(path, map_location=map_location or "cpu", mmap=True, weights_only=weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


class Checkpoints(Checkpoint):
    """Keeps the best epoch's weights, and all that a stopped fit goes on from.

    The last two checkpoints are kept, so that a damaged one costs only what was done since the other. A signal is
    heeded at a step's end: the ranks agree on it, write a checkpoint and leave together. Lightning does not repeat a
    validation that was due when its checkpoint was written, so at the end of an epoch the checkpoint waits until
    held-out rows were scored, or is marked as of the middle of that; and none is written once training has decided to
    stop, because that decision is not part of a checkpoint.

    Args:
        folder: for the files.
        files: how they are written.
        seconds: between checkpoints; 0 writes one after every step.
        validates: there are held-out rows, whose loss chooses the best epoch.
        hold: begins with the first step; whoever made it ends it.

    Attributes:
        best: name of the best epoch's file, on the process that writes; None where no epoch is chosen.
    """

    def __init__(self, folder: Path, files: SealedFiles, seconds: float, validates: bool, hold: stops.Deferral):
        self.folder, self.files, self.seconds, self.validates, self.hold = folder, files, seconds, validates, hold
        self.written = time.perf_counter()
        self.score: float | None = None
        self.best: str | None = None
        self.kept: list[tuple[Path, str | None]] = []  # newest last, each with the best epoch's file at that time
        self.validating = False
        self._then: Callable[[], None] = lambda: None  # to do once what is being written is there
        self._full = False  # there was no room for the last one

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "best": self.best, "validating": self.validating}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.best = state["score"], state["best"]

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.hold.begin()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not (self.validates and trainer.is_last_batch):
            self._turn(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        _, stop = self._agreed(trainer, due=False)
        if stop:
            self._surely(lambda: self._write(trainer, validating=True))
            stops.leave(stop)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        score = float(trainer.callback_metrics["held_out_loss"])
        score = math.inf if math.isnan(score) else score
        if self.score is None or score < self.score:
            self.score = score
            name = f"best-{trainer.current_epoch:05d}.ckpt"
            self._surely(lambda: self._save(trainer, name, self._new_best, weights_only=True))

    def _new_best(self) -> None:
        self.best = None if self.files.written is None else self.files.written.name

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.validates and not trainer.should_stop:
            self._turn(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._settle()

    def _turn(self, trainer: L.Trainer) -> None:
        if self.files.writing is not None and self.files.writing.is_whole():
            self._settle()
        due, stop = self._agreed(trainer, time.perf_counter() - self.written >= self.seconds)
        if stop:
            self._surely(lambda: self._write(trainer))
            stops.leave(stop)
        if due:
            self._write(trainer)

    def _agreed(self, trainer: L.Trainer, due: bool) -> tuple[bool, int]:
        """Whether a checkpoint is due by rank 0's clock, and the signal that any rank has heard (0 for none)."""
        stop = stops.requested() or 0
        if trainer.world_size == 1:
            return due, stop
        due = due and trainer.is_global_zero
        # not by a collective, which would wait for the device at every step
        told = trainer.strategy.line.everyone((due, stop) if due or stop else None).values()
        return any(due for due, _ in told), max((stop for _, stop in told), default=0)

    def _write(self, trainer: L.Trainer, validating: bool = False) -> None:
        step = trainer.global_step
        self.validating, self.written = validating, time.perf_counter()
        self._save(trainer, f"fit-{step:09d}.ckpt", lambda: self._keep(trainer, step))

    def _save(self, trainer: L.Trainer, name: str, then: Callable[[], None], **options: Any) -> None:
        """Write a checkpoint, or begin to, and do something once it is there."""
        self._settle()
        self.files.spare = self.kept[0][0] if len(self.kept) > 1 else None
        trainer.save_checkpoint(self.folder / name, **options)
        if self.files.writing is None:
            then()
        else:
            self._then = then

    def _surely(self, begin: Callable[[], None]) -> None:
        """Do not go on before a checkpoint is there."""
        begin()
        if not self._settle():
            begin()
            self._settle()

    def _settle(self) -> bool:
        """Wait for what is being written, and say whether it is there. On a full disk the next one takes the place of
        an older one, and comes at once.

        Raises:
            OSError: it could not be written, on every rank; or there was no room a second time.
        """
        if self.files.writing is None:
            return True
        try:
            self.files.wait()
        except OSError as error:
            if error.errno not in FULL or self._full:
                raise
            self._full, self.written = True, -math.inf
            self.files.give_up_spare()
            return False
        self._full = False
        self._then()
        return True

    def _keep(self, trainer: L.Trainer, step: int) -> None:
        progress.kept(step)
        if trainer.is_global_zero:
            self.kept = [*(k for k in self.kept if k[0] != self.files.written), (self.files.written, self.best)][-2:]
            wanted = {file.name for file, _ in self.kept} | {best for _, best in self.kept} | {self.best}
            for file in [*self.folder.glob("fit-*.ckpt"), *self.folder.glob("best-*.ckpt")]:
                if file.name not in wanted:
                    with suppress(OSError):
                        remove(file)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.validating and "loops" in checkpoint:
            loop = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (loop["total"], loop["current"]):  # begun, so that it is begun again
                counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            loop["is_last_batch"] = False

    # -- from where ---------------------------------------------------------------------------------------------------

    def resumable(self, name: str) -> tuple[Path, int] | None:
        """The newest sound checkpoint of an unfinished fit, and its step; what is damaged is named and removed."""
        sweep(self.folder)
        newest, refused = None, {}
        for file in sorted(
            self.folder.glob("fit-*.ckpt"), key=lambda file: (file.name[:13], _time(file)), reverse=True
        ):
            wrong, best, step = unsound(file), None, 0
            if wrong is None:
                try:
                    checkpoint = pieces.rest_of(file) if file.is_dir() else self.files.load_checkpoint(file, None, True)
                    step, best = checkpoint["global_step"], checkpoint["callbacks"][self.state_key]["best"]
                except Exception as error:  # any unreadable file means the same
                    wrong = f"it cannot be read: {error}"
            if wrong is None and best is not None and (why := unsound(self.folder / best)):
                wrong = f"{best}, the weights of its best epoch: {why}"
            if wrong is None:
                newest = newest or (file, step)
                self.kept = [(file, best), *self.kept][-2:]
            else:
                refused[file] = f"the checkpoint {file.name} is damaged and removed: {wrong}"
        if (unhashed := self.folder / "resume.ckpt").exists():
            refused[unhashed] = "resume.ckpt is a checkpoint without a hash, which is not gone on from"
        for file, why in refused.items():
            log.warning("%s: %s", name, why)
            with suppress(OSError):
                remove(file)
        if newest is not None:
            log.info("%s: resumes at step %d, from %s", name, newest[1], self.folder.parent.name)
        elif refused:
            log.warning("%s: there is no other checkpoint; the stage starts afresh", name)
        return newest


def _time(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
