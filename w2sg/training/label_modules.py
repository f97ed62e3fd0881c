"""The LightningModules: what every fit has in common, and a scorer trained on soft labels.

Optimization is manual so that one Lightning step is one optimizer step over one global batch, however it is cut into
micro-batches and spread over devices. Only so can a loss that needs the whole batch (the confidence threshold) see it.

Shapes: b examples on this device, B in the global batch, C classes (2 for pairs).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from w2sg.config.schema import FitOptions
from w2sg.data.loading import Batch
from w2sg.errors import TrainingError
from w2sg.losses import cross_entropy, hard_logits, needs_whole_batch
from w2sg.losses.probabilities import soft_labels
from w2sg.memory import Budget
from w2sg.metrics.labels import correct
from w2sg.training.evaluating import Point, evaluate, on_rows, replay, test_rows
from w2sg.training.loss_values import values_of, with_zeros
from w2sg.training.optimizers import make_optimizer
from w2sg.training.random_state import random_state, set_random_state
from w2sg.training.schedule import learning_rate_factor
from w2sg.training.sharding import leave, place
from w2sg.training.within_memory import WithinMemory, read_batch


def oriented(scores: Tensor, first: Tensor) -> Tensor:
    """Rewards of a pair's texts [b, 2] as logits with the first reply in front; class logits pass through.

    Args:
        first: [b] which text is the first reply; all zeros for classification.
    """
    if scores.shape[-1] != 2:
        return scores
    return scores.gather(1, torch.stack([first, 1 - first], 1))


Watched = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FitContext:
    """What every objective is given beside its own settings.

    Attributes:
        scorer: the model that is trained; it is called with the inputs of a micro-batch.
        options: optimiser, schedule, clipping.
        total_steps: optimizer steps of the whole stage, for schedules and warm-ups.
        every: optimizer steps between points of the loss curve.
        eval_every: optimizer steps between measurements on watched rows (`StageData.watched`); 0 makes none.
        budget: what goes through the model at once.
    """

    scorer: nn.Module
    options: FitOptions
    total_steps: int
    every: int = 10
    eval_every: int = 0
    budget: Budget = field(default_factory=Budget)


class FitModule(WithinMemory):
    """What every fit has in common: optimizer, steps, the curve, checkpoints. An objective is `backward_pass`.

    Raises:
        TrainingError: the loss is not finite; names the step and the example ids.
    """

    def __init__(self, fit: FitContext):
        super().__init__(fit.budget)
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained, not what is frozen
        self.scorer, self.options, self.total_steps, self.every = fit.scorer, fit.options, fit.total_steps, fit.every
        self.eval_every, self.evaluated_at = fit.eval_every, -1
        self.curve: list[Point] = []
        self.counts = {"useful": 0, "padded": 0, "examples": 0}  # of this device
        self.seconds = 0.0
        self._unchecked: list[tuple[int, list[str], Tensor]] = []
        # Dropout rates are 0 in the configuration; training mode is what makes gradient checkpointing act at all.
        self.train()

    # -- optimizer ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        place(self.scorer, self.trainer)

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.options
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = make_optimizer(options, options.lr, parameters)
        factor = learning_rate_factor(options.schedule, options.warmup, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, factor)}

    # -- one optimizer step -------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self._clock = time.perf_counter()
        if self.curve:  # of a fit that continues: the logger may be new
            replay(self.logger, on_rows(self.curve, test_rows(self.trainer.datamodule)))
        elif self.eval_every:
            self._evaluate()

    def on_train_end(self) -> None:
        if self.eval_every and self.evaluated_at != self.global_step:  # stopped early
            self._evaluate()
        leave(self.scorer, self.trainer)

    def backward_pass(self, batch: Batch, parts: tuple[Tensor, ...], progress: float) -> tuple[Tensor, Watched]:
        """Add the gradient of this device's share of a global batch, times the number of devices (which average).

        Args:
            parts: the places in the batch of each micro-batch.
            progress: of the whole fit, from 0 to 1.

        Returns:
            The loss whose gradient it was, and other numbers to watch: name -> ([b] values, [b] weights).
        """
        raise NotImplementedError

    def training_step(self, batch: Batch, _index: int) -> None:
        optimizer = self.optimizers()
        progress = self.global_step / max(1, self.total_steps)
        batch, loss, watched = self.backward_within_memory(batch, progress)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if self.options.clip is not None:
            trained = [p for p in self.parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(trained, self.options.clip, norm)
        if isinstance(norm, DTensor):  # of all parts together
            norm = norm.full_tensor()
        self._check_finite(batch, loss)
        optimizer.step()
        optimizer.zero_grad()
        rate = optimizer.param_groups[0]["lr"]
        self.lr_schedulers().step()
        self._record(batch, loss, norm, rate, watched)
        if self._evaluation_due():
            self._evaluate()

    # -- what is watched ----------------------------------------------------------------------------------------------

    def _check_finite(self, batch: Batch, loss: Tensor) -> None:
        """Stop at a loss that is not finite. On a GPU the check waits for nothing and comes a few steps late."""
        self._unchecked.append((self.global_step, batch.ids, torch.isfinite(loss)))
        if self.device.type == "cpu" or len(self._unchecked) >= 16:
            self._check_now()

    def _check_now(self) -> None:
        for step, ids, finite in self._unchecked:
            if not bool(finite):
                shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
                raise TrainingError(
                    f"the loss is not finite at step {step + 1} of {self.total_steps}, on examples {shown}. "
                    f"{self.remedy()} Finished stages are kept."
                )
        self._unchecked.clear()

    def remedy(self) -> str:
        """What to do about a loss that is not finite."""
        return (
            "Lower the learning rate (strong.lr=, weak.lr=, or method.<stage>.lr.<mode>=), clip gradients "
            "(optim.<mode>.max_grad_norm=1.0) or train in float32."
        )

    def _record(self, batch: Batch, loss: Tensor, norm: Tensor, rate: float, watched: Watched) -> None:
        self.counts["useful"] += batch.useful
        self.counts["padded"] += batch.padded
        self.counts["examples"] += len(batch.ids)
        step = self.global_step
        if step % self.every and step != self.total_steps:
            return
        mean = loss
        if self.trainer.world_size > 1:
            mean = self.all_gather(loss).mean()
        means = {}
        if watched:
            sums = torch.stack([torch.stack([(v * w).sum(), w.sum()]) for v, w in watched.values()]).double()
            if self.trainer.world_size > 1:
                sums = self.all_gather(sums).sum(0)
            means = dict(zip(watched, (sums[:, 0] / sums[:, 1].clamp(min=1e-12)).tolist(), strict=True))
        self._point({"loss": float(mean), "grad_norm": float(norm), "lr": rate, **means})

    def _point(self, values: dict[str, float], rows: str | None = None) -> None:
        """One point of the curve: for the report and the logger.

        The logger is told directly: Lightning would repeat the last values at every step in between.
        ``rows``: which test rows the values were measured on.
        """
        self.curve.append({"step": self.global_step, **values, **({"rows": rows} if rows is not None else {})})
        if self.logger is not None:
            self.logger.log_metrics(values, step=self.global_step)

    # -- measurements during training ---------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        step = self.global_step
        return self.eval_every > 0 and (step % self.eval_every == 0 or step == self.total_steps)

    def _evaluate(self) -> None:
        self.evaluated_at = self.global_step
        if values := evaluate(self, self.trainer.datamodule):
            self._point(values, test_rows(self.trainer.datamodule))

    def examine(self, batch: Batch) -> tuple[Tensor, ...]:
        """What `measures` needs of a batch of rows that are not trained on, from all devices."""
        raise NotImplementedError

    def measures(self, seen: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """Measures over what `examine` gave of every batch."""
        raise NotImplementedError

    # -- checkpoints inside a stage -----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_now()  # never keep weights that a bad step has touched
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        frozen = {name for name, p in self.named_parameters()} - trained
        counts = torch.tensor(list(self.counts.values()), device=self.device)
        counts = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        state = checkpoint["state_dict"]  # of weights in few bits, what belongs to them stands below their names
        below = {k for k in state if any(k[: m.start()] in frozen for m in re.finditer(r"\.", k))}
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in frozen | below}
        checkpoint["w2sg"] = {
            "curve": self.curve,
            "evaluated_at": self.evaluated_at,
            "counts": dict(zip(self.counts, counts, strict=True)),
            "seconds": self.seconds_so_far,
            "random": random_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["w2sg"]
        self.curve, self.seconds = kept["curve"], kept["seconds"]
        self.evaluated_at = kept.get("evaluated_at", -1)
        if self.global_rank == 0:  # they are of all devices, which may have been more or fewer
            self.counts = kept["counts"]
        set_random_state(kept["random"])

    @property
    def seconds_so_far(self) -> float:
        """Seconds of training, over every process that worked on this stage."""
        return self.seconds + time.perf_counter() - getattr(self, "_clock", time.perf_counter())


class SoftLabelModule(FitModule):
    """Trains a scorer on label distributions with any loss of `w2sg.losses`.

    Args:
        fit: its scorer maps the inputs of a micro-batch to scores, [b, 2] rewards or [b, C] logits.
        loss: ``(logits[B, C], label_logits[B, C], progress) -> [B]``.
        select_on_gold: whether held-out rows are judged by their gold labels.
    """

    def __init__(self, fit: FitContext, *, loss: Callable[..., Tensor], select_on_gold: bool = False):
        super().__init__(fit)
        self.loss, self.select_on_gold = loss, select_on_gold
        self._held_out: list[tuple[Tensor, Tensor, Tensor]] = []
        self._soft = False  # whether all labels were looked at, and none is hard
        self._infinite_on_hard: Tensor | bool = False  # kept on the device: reading it at each step would wait for it

    def on_train_start(self) -> None:
        train = getattr(getattr(self.trainer, "datamodule", None), "train", None)  # none where only batches were given
        self._soft = train is not None and not train.targets.isinf().any()
        super().on_train_start()

    def backward_pass(self, batch: Batch, parts: tuple[Tensor, ...], progress: float) -> tuple[Tensor, Watched]:
        if len(batch.micro) > 1 and needs_whole_batch(self.loss):
            return self._two_passes(batch, parts, progress), {}
        return self._one_pass(batch, parts, progress), {}

    def _one_pass(self, batch: Batch, parts: tuple[Tensor, ...], progress: float) -> Tensor:
        total = torch.zeros((), device=self.device)
        for i, (inputs, rows) in enumerate(zip(batch.micro, batch.parts, strict=True)):
            with self._synchronised(i, len(parts)):
                logits = oriented(self.scorer(inputs), batch.first[rows])
                loss = self._objective(logits, batch, rows, progress)
                self.manual_backward(loss)
            total += loss.detach()
        return total

    def _two_passes(self, batch: Batch, parts: tuple[Tensor, ...], progress: float) -> Tensor:
        """A whole-batch loss over micro-batches: first all logits, then each micro-batch's share of the gradient."""
        states = []
        logits = []
        with torch.no_grad():
            for inputs, part in zip(batch.micro, parts, strict=True):
                states.append(random_state())  # with dropout, both passes must draw the same masks
                logits.append(oriented(self.scorer(inputs), batch.first[part]))
        leaf = torch.cat(logits).requires_grad_()
        loss = self._objective(leaf, batch, slice(0, len(leaf)), progress)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for i, (inputs, part) in enumerate(zip(batch.micro, parts, strict=True)):
            with self._synchronised(i, len(parts)):
                set_random_state(states[i])
                again = oriented(self.scorer(inputs), batch.first[part])
                self.manual_backward((again * gradient[part]).sum())
        return loss.detach()

    def _objective(self, logits: Tensor, batch: Batch, rows: slice, progress: float) -> Tensor:
        """This device's share of the mean loss over the global batch, times the number of devices (which average)."""
        world, targets, weight = self.trainer.world_size, batch.targets[rows], batch.weight[rows]
        if world > 1 and needs_whole_batch(self.loss):
            per_example = self._loss_over_all_devices(logits, targets, batch.total, progress)
        else:
            own = min(max(batch.real - rows.start, 0), len(logits))
            per_example = with_zeros(self._values(logits[:own], targets[:own], progress), len(logits))
        self._watch_hard_labels(logits.detach(), targets, per_example.detach())
        return (per_example * weight).sum() * world / batch.total

    def _values(self, logits: Tensor, targets: Tensor, progress: float) -> Tensor:
        """[b] in fp32. Nothing here waits for the device: which rows are real and which labels soft is known."""
        with soft_labels() if self._soft else nullcontext():
            return values_of(self.loss, logits, targets, progress).float()

    def _watch_hard_labels(self, logits: Tensor, targets: Tensor, per_example: Tensor) -> None:
        """Note whether the loss is infinite although the logits are finite, which only its form can bring about."""
        by_its_form = ~per_example.isfinite() & logits.isfinite().all(-1) & targets.isinf().any(-1)
        self._infinite_on_hard = self._infinite_on_hard | by_its_form.any()

    def remedy(self) -> str:
        if not bool(self._infinite_on_hard):
            return super().remedy()
        return (
            "This loss is infinite on hard labels (0 or 1), whatever the learning rate: mark it "
            "@w2sg.losses.needs_soft_labels, and set optim.hard_label_clamp=0.001 or optim.label_smoothing=0.01."
        )

    def _loss_over_all_devices(self, logits: Tensor, targets: Tensor, total: int, progress: float) -> Tensor:
        if self._everyone is None:  # others do not take part again where a step is done again
            self._everyone = [self.all_gather(x) for x in (logits.detach(), targets)]  # [world, b, ...]
        (all_logits, all_targets), mine = self._everyone, self.global_rank
        own = [len(range(r, total, len(all_logits))) for r in range(len(all_logits))]  # rows of each, without repeats
        everyone = torch.cat([(logits if r == mine else all_logits[r])[:n] for r, n in enumerate(own)])
        values = self._values(everyone, torch.cat([all_targets[r][:n] for r, n in enumerate(own)]), progress)
        return with_zeros(values.split(own)[mine], len(logits))

    # -- held-out rows: early stopping and model selection ------------------------------------------------------------

    def examine(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits [B, C], the labels' logits [B, C], and weights [B]."""
        logits = self._logits(batch)
        targets = batch.targets if batch.targets is not None else hard_logits(batch.gold, logits.shape[1])
        return self._gathered(logits, targets, batch.weight)

    def measures(self, seen: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """Accuracy against the likeliest label, and NLL (nats; the cross entropy of soft labels)."""
        logits, targets, weight = (torch.cat(x) for x in zip(*seen, strict=True))
        logits, targets = logits[weight > 0].double(), targets[weight > 0].double()
        hit = correct(logits, targets.argmax(-1))
        return {"accuracy": float(hit.double().mean()), "nll": float(cross_entropy(logits, targets).mean())}

    def _gathered(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rows of all devices."""
        if self.trainer.world_size == 1:
            return tensors
        return tuple(self.all_gather(x).flatten(0, 1) for x in tensors)

    def _logits(self, batch: Batch) -> Tensor:
        """[b, C] of rows that are not trained on."""
        return torch.cat(
            read_batch(self.reads, batch, lambda inputs, rows: oriented(self.scorer(inputs), batch.first[rows]))
        )

    def validation_step(self, batch: Batch, _index: int) -> None:
        logits = self._logits(batch)
        targets = batch.targets
        if self.select_on_gold:
            targets = hard_logits(batch.gold, logits.shape[1])
        self._held_out.append(self._gathered(logits, targets, batch.weight))

    def on_validation_epoch_end(self) -> None:
        if not self._held_out:
            return
        logits, targets, weight = (torch.cat(x) for x in zip(*self._held_out, strict=True))
        self._held_out.clear()
        loss = cross_entropy if self.select_on_gold else self.loss
        held_out = values_of(loss, logits[weight > 0], targets[weight > 0], 1.0).mean()
        self.log("held_out_loss", held_out, logger=False)  # for early stopping and selection
        self._point({"held_out_loss": float(held_out)})
