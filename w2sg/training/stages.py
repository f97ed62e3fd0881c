"""The units of work: fit a model, or read rows with one. Cached by content, resumable, on one device or many."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import save_file
from torch import nn

from w2sg import progress, stops
from w2sg.data.loading import StageData
from w2sg.errors import UserError
from w2sg.memory import Budget
from w2sg.models.mixed import hold_in_bf16
from w2sg.models.once import read_by_each
from w2sg.models.spread import placed
from w2sg.models.tensor_parallel import parallel
from w2sg.store.files import write_json
from w2sg.store.keys import REFERENCE, folder_name
from w2sg.store.shards import Found, Shards
from w2sg.store.soundness import SCRATCH
from w2sg.store.store import Claim, Store
from w2sg.training.asking import Asked, ask_rows
from w2sg.training.checkpoints import Checkpoints, SealedFiles
from w2sg.training.counting import Counting
from w2sg.training.devices import Devices
from w2sg.training.evaluating import Point, curve_of, interval, is_evaluation, on_rows, on_test, replay
from w2sg.training.foreseen import Foreseen
from w2sg.training.jobs import FitJob, ReadJob, StageRecord
from w2sg.training.keeping import FULL, Keep, Kept
from w2sg.training.label_modules import FitContext
from w2sg.training.reading_module import ReadingModule
from w2sg.training.sharding import large, load_weights, unshard
from w2sg.training.shared import check_shared, see
from w2sg.training.stage_values import load_tensors
from w2sg.training.within_memory import least_of, tokens_at_once

log = logging.getLogger(__name__)


class Stages:
    """Runs stages through a store and keeps the list of what was done.

    Args:
        store: where outputs live.
        devices: who works.
        logger: ``stage name -> Lightning logger or None``.
        checkpoint_minutes: between checkpoints inside a fit; 0 writes one every step.
        curve_every: optimizer steps between points of a loss curve.
        eval_every: optimizer steps between measurements on watched rows; None spreads a few over each fit.
        test_rows: the run's test rows, as `w2sg.training.evaluating.rows_of` names them.
    """

    def __init__(
        self,
        store: Store,
        devices: Devices,
        logger: Callable[[str], Any],
        checkpoint_minutes: float,
        curve_every: int,
        eval_every: int | None = None,
        test_rows: str | None = None,
    ):
        self.store, self.devices, self.logger = store, devices, logger
        self.checkpoint_minutes, self.curve_every, self.eval_every = checkpoint_minutes, curve_every, eval_every
        self.test_rows = test_rows
        self.unmeasured: list[str] = []  # fits from the store whose accuracy over steps is wanted and not there
        self.records: list[StageRecord] = []
        self.notes: list[str] = []  # of the run's models, what the report has to repeat
        self.kept = Kept(store if devices.main else None, self.notes)
        self.make_room: list[Callable[[], None]] = []  # called before a model is loaded in this process
        self._walked: set[str] = set()  # stages that this run has asked for before
        self._making: list[dict[str, None]] = []  # of each stage that is being made: those it has asked for
        check_shared(store, devices)

    # -- fit ----------------------------------------------------------------------------------------------------------

    def fit(
        self, name: str, key: dict[str, Any], make: Callable[[], FitJob], evaluated: bool = False, keep: Keep = FULL
    ) -> Path:
        """Train a model, or find it trained. Returns the stage's folder, which holds ``model/`` and ``curve.json``.

        Args:
            evaluated: its job has rows to watch; a trained one that was not measured on them is noted.
            keep: what of its weights stays in the store.
        """
        folder = self._stage(name, key, lambda part, hold: self._fit(name, make, part, hold, keep), keep.whole)
        self.kept.add(name, folder, keep)
        if evaluated and name not in self.unmeasured:
            whole, kept = curve_of(folder), self.curve(folder)
            if not any(map(is_evaluation, kept)) or on_test(whole) != on_test(kept):
                self.unmeasured.append(name)
        return folder

    def _fit(
        self, name: str, make: Callable[[], FitJob], part: Path, hold: stops.Deferral, keep: Keep
    ) -> dict[str, Any]:
        self._make_room()
        with self.devices.reading_once():
            job = make()
        options = job.options
        budget = Budget.of_role(job.role, job.micro_tokens, job.micro_batch)
        data = StageData(
            train=job.train,
            held_out=job.held_out,
            batch_size=options.batch_size,
            budget=budget,
            eval_tokens=partial(tokens_at_once, self.devices, job.scorer),
            seed=job.seed,
            watched=job.watched,
        )
        steps = -(-len(job.train) // options.batch_size) * options.epochs
        eval_every = interval(self.eval_every, steps) if job.watched else 0
        module = job.module(FitContext(job.scorer, options, steps, self.curve_every, eval_every, budget))
        cut = self.devices.shards and large(job.scorer)
        files = SealedFiles(self.devices.group_beside() if cut else None)
        kept = Checkpoints(part / SCRATCH, files, 60.0 * self.checkpoint_minutes, job.held_out is not None, hold)
        callbacks: list[L.Callback] = [kept, Counting(steps)]
        if job.held_out is not None and options.patience is not None:
            callbacks.append(EarlyStopping("held_out_loss", patience=options.patience, min_delta=0.0))
        if self.devices.shards and not cut:
            log.info("%s: too small to be cut over the devices; each holds all of it", name)
        if self.devices.mixed and not cut:  # FSDP casts as it gathers
            hold_in_bf16(job.scorer, trained=False)
        trainer = self.devices.trainer(
            large(job.scorer),
            files,
            max_epochs=options.epochs,
            callbacks=callbacks,
            logger=self.logger(name) or False,
            limit_val_batches=None if job.held_out is not None else 0,
            enable_checkpointing=True,
        )
        resumed = self.devices.first(lambda: kept.resumable(name))
        self.devices.wait()  # a rank may take longer to load its model
        try:
            trainer.fit(module, data, ckpt_path=None if resumed is None else str(resumed[0]), weights_only=True)
        except UserError as error:
            raise type(error)(f"{name}: {error}") from error
        module._check_now()
        chosen = None
        if (best := self.devices.agree(kept.best)) is not None and (cut or self.devices.main):
            see(part / SCRATCH / best, self.devices)
            state = trainer.strategy.load_checkpoint(part / SCRATCH / best, weights_only=True)
            load_weights(module, state["state_dict"])
            chosen = state["epoch"] + 1
        if cut:
            unshard(job.scorer)
        tokens, padded, examples = (self.devices.total(module.counts[k]) for k in ("useful", "padded", "examples"))
        left = self.devices.first(lambda: save(job.scorer, module.curve, part, keep))
        return {
            "seconds": module.seconds_so_far,
            "tokens": int(tokens),
            "padded_tokens": int(padded),
            "examples": int(examples),
            "steps": trainer.global_step,
            **least_of(self.devices, budget, name),
            "best_epoch": chosen,
            "best_step": None if chosen is None else chosen * -(-len(job.train) // options.batch_size),
            **left,
            **job.notes,
        }

    # -- read ---------------------------------------------------------------------------------------------------------

    def read(self, name: str, key: dict[str, Any], make: Callable[[], ReadJob], whole: bool = False) -> Path:
        """Run a frozen model over rows, or find it done. The folder holds ``values.safetensors`` and ``ids.json``.

        Args:
            whole: each device holds all of the model, however the fits are cut; or its part of one with ``tp_plan``.
        """
        return self._stage(name, key, lambda part, _: self._read(make, part, whole))

    def _read(self, make: Callable[[], ReadJob], part: Path, whole: bool) -> dict[str, Any]:
        self._make_room()
        with self.devices.reading_once():
            job = make()
        together = self.devices.world > 1 and parallel(job.model)  # all ranks read the same rows, and one keeps them
        whole = whole or together
        self.notes += [line for line in placed(job.model) if line not in self.notes]
        scratch = part / SCRATCH
        if job.beside is not None:  # shards of a reading without it, which was stopped, lack these values
            scratch = scratch / "beside"
        done = self.devices.first(lambda: Shards.done(scratch))
        todo = np.setdiff1d(np.arange(len(job.examples)), done)
        if len(done):
            log.info("%d of %d rows were read before", len(done), len(job.examples))
        writer = Shards(scratch, self.devices.rank, todo)
        self.devices.wait()  # a rank may take longer to load its model
        if len(todo):
            budget = Budget() if job.rows is None else Budget.of_replies()
            module = ReadingModule(job.model, job.read, budget, together)
            cut = large(job.model) and not whole
            if self.devices.mixed and not (self.devices.shards and cut):
                hold_in_bf16(job.model)
            told = Counting(rows=len(job.examples), read=len(done), verb=job.verb, unit=job.unit)
            callbacks = [told, writer] if self.devices.main or not together else [told]
            trainer = self.devices.trainer(cut, callbacks=callbacks, logger=False, enable_checkpointing=False)
            score = job.examples.take(todo)
            tokens = partial(tokens_at_once, self.devices, job.model, job.rows, job.written, score.inputs.lengths.max())
            data = StageData(score=score, eval_tokens=tokens, eval_rows=job.rows, together=together)
            trainer.predict(module, data, return_predictions=False)
            if together and len(set(self.devices.everyone(module.found.hexdigest()))) > 1:
                raise RuntimeError(f"{part.name}: devices that hold a model together did not find the same")
            least_of(self.devices, budget, part.name)
        files = [file for written in self.devices.everyone(writer.files) for file in written]

        def join() -> dict[str, Any]:
            tensors, counts = Shards.join(scratch, len(job.examples), 1 if together else self.devices.world, files)
            if job.beside is not None:
                tensors[job.beside] = tensors.pop("beside")
            save_file(tensors, part / "values.safetensors")
            write_json(part / "ids.json", job.examples.ids)
            return counts

        return {"examples": len(job.examples), **self.devices.first(join), **job.notes}

    def ask(
        self,
        name: str,
        key: dict[str, Any],
        ids: Sequence[str],
        answer: Callable[[np.ndarray], Found],
        engine: Asked,
        foreseen: Callable[[Path], Foreseen] | None = None,
        verb: str = "writing",
        unit: str = "replies",
    ) -> Path:
        """Rows that an engine beside this process answers, or find them answered. The folder is as of `read`.

        Args:
            ids: of the rows. answer: what is found for some of them, by their places.
            engine: what ``answer`` asks.
            foreseen: what a plan takes for the values.
        """

        def work(part: Path, _: stops.Deferral) -> dict[str, Any]:
            found = ask_rows(self.devices, part / SCRATCH, len(ids), answer, engine.ready, engine.share, verb, unit)

            def write() -> dict[str, Any]:
                tensors, counts = found
                save_file(tensors, part / "values.safetensors")
                write_json(part / "ids.json", list(ids))
                return {"examples": len(ids), **counts}

            return self.devices.first(write)

        return self._stage(name, key, work)

    def copy(self, name: str, key: dict[str, Any], folder: Path) -> Path:
        """A reading whose values stand beside those of another one (`ReadJob.beside`), as a stage like any other."""
        stage = folder_name(name, key)

        def work(part: Path) -> dict[str, Any]:
            ids, tensors = load_tensors(folder)
            save_file({"values": tensors[stage]}, part / "values.safetensors")
            write_json(part / "ids.json", ids)
            return {"examples": len(ids), "read_with": folder.name}

        return self.compute(name, key, work)

    def _make_room(self) -> None:
        for make_room in self.make_room:
            make_room()

    # -- any stage ----------------------------------------------------------------------------------------------------

    def compute(
        self,
        name: str,
        key: dict[str, Any],
        work: Callable[[Path], dict[str, Any]],
        foreseen: Callable[[Path], Foreseen] | None = None,
    ) -> Path:
        """Anything small and deterministic: ``work(folder)`` writes files (on rank 0) and returns its info.

        Args:
            foreseen: writes files that a plan takes for these.
        """

        def timed(part: Path, _: stops.Deferral) -> dict[str, Any]:
            begun = time.perf_counter()
            info = self.devices.first(lambda: work(part))
            return {"seconds": time.perf_counter() - begun, **info}

        return self._stage(name, key, timed)

    def _stage(self, name: str, key: dict[str, Any], work: Callable[..., dict[str, Any]], whole: bool = False) -> Path:
        with contextlib.ExitStack() as stack:
            stack.enter_context(read_by_each())
            stack.enter_context(stops.heard())
            shown = stack.enter_context(progress.stage(name))
            hold = stack.enter_context(stops.Deferral())
            claim = Claim(self.store, name, key)  # of which the other ranks use the names

            def take() -> bool:
                nonlocal claim
                claim = stack.enter_context(self.store.claim(name, key, whole))
                return claim.cached

            def seal() -> dict[str, Any]:
                if not cached:
                    claim.seal({**info, "rests_on": needs} if needs else info)
                return claim.info

            cached = self.devices.first(take)
            path, part = claim.path, claim.part
            if not cached:
                see(part, self.devices)
                shown.begin(self._why(name, key, path) if self.devices.main else "")
                self._making.append({})
                try:
                    info = work(part, hold)
                finally:
                    needs = list(self._making.pop())
                hold.begin()  # what is done is sealed before a signal is heeded
                self.devices.wait()
            info = self.devices.first(seal)
            see(path, self.devices)
            self._record(name, path, cached, info, shown)
        return path

    def _record(self, name: str, path: Path, cached: bool, info: dict[str, Any], shown: progress.Stage) -> None:
        for making in self._making:
            making |= dict.fromkeys([*info.get("rests_on", ()), path.name])
        tokens, padded = info.get("tokens", 0), info.get("padded_tokens", 0)
        fraction = tokens / padded if padded else None
        seconds = float(info.get("seconds", 0.0))
        if path.name in self._walked:
            return
        for other in info.get("rests_on", ()):
            self._recall(other)
        self._walked.add(path.name)
        self.records.append(StageRecord(name, path.name, cached, seconds, tokens, fraction, info))
        if cached:
            self._replay(name, path)
        shown.finish(len(self.records), cached)

    def _recall(self, folder: str) -> None:
        """A stage that one from the store was made from, while it is there itself: the run rests on it, too."""
        if folder in self._walked or not (self.store.root / folder).is_dir():
            return
        self._walked.add(folder)
        name = folder.rpartition("-")[0]
        self.records.append(StageRecord(name, folder, True, 0.0, 0, None, {}))
        self._replay(name, self.store.root / folder)

    def curve(self, folder: Path) -> list[Point]:
        """The curve of a finished fit, without what was measured on other test rows than this run's."""
        return on_rows(curve_of(folder), self.test_rows)

    def _replay(self, name: str, folder: Path) -> None:
        """Give the run's logger the curve of a fit from the store."""
        if self.devices.main and (curve := self.curve(folder)) and (logger := self.logger(name)) is not None:
            logger.log_hyperparams({"cached": True})
            replay(logger, curve)
            logger.finalize("success")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Stages that are asked for inside are not what the stage in the making rests on."""
        making, self._making = self._making, []
        try:
            yield
        finally:
            self._making = making

    def _why(self, name: str, key: dict[str, Any], path: Path) -> str:
        """The folder of a stage that is made, and in what the nearest one in the store differs."""
        near = self.store.nearest(name, key)
        why = ""
        if near is not None:
            other, differences = near
            # what hangs on another stage differs with it, and that one has said why
            differences = [d for d in differences if not all(REFERENCE.fullmatch(str(value)) for value in d[1:])]
            shown = ", ".join(f"{k}: {theirs} -> {ours}" for k, theirs, ours in differences[:3])
            if shown:
                why = f" ({other} differs in {shown}{', ...' if len(differences) > 3 else ''})"
        return f"{path.name}{why}"


def save(model: nn.Module, curve: list[Point], folder: Path, keep: Keep) -> dict[str, Any]:
    """Write what was trained, and how its training went, into a stage's folder; what its info says of the weights."""
    model.save(folder / "model")
    write_json(folder / "curve.json", curve)
    return keep.seal(folder)
