"""The LightningModules of language-model objectives: supervised fine-tuning, preferences, weak-to-strong targets.

A micro-batch of `w2sg.data.completions` goes through one forward, which returns the log-probabilities of its M reply
tokens. Means are over the global batch, however it is cut into micro-batches and devices.

Shapes: b examples, n replies in each (chosen first), M reply tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from w2sg.data.completions import per_reply
from w2sg.data.loading import Batch
from w2sg.losses import preferences as preference
from w2sg.training.label_modules import FitContext, FitModule, Watched
from w2sg.training.within_memory import read_batch


class ReplyModule(FitModule):
    """A loss per reply or per token of a language model's own log-probabilities. An objective is `losses`."""

    def __init__(self, fit: FitContext):
        super().__init__(fit)
        self._held_out: list[tuple[Tensor, ...]] = []
        self._watches: list[str] = []

    def losses(self, inputs: dict[str, Tensor], batch: Batch, part: Tensor) -> tuple[Tensor, Tensor, Watched]:
        """Losses of a micro-batch: [k] sums, [k] what they are divided by in the global batch, things to watch [b]."""
        raise NotImplementedError

    def backward_pass(self, batch: Batch, parts: tuple[Tensor, ...], progress: float) -> tuple[Tensor, Watched]:
        world = self.trainer.world_size
        total, watched = torch.zeros((), device=self.device), []
        for i, (inputs, part) in enumerate(zip(batch.micro, parts, strict=True)):
            with self._synchronised(i, len(parts)):
                sums, of, seen = self.losses(inputs, batch, part)
                loss = (sums / of).sum() * world
                self.manual_backward(loss)
            total += loss.detach()
            watched.append({k: (v.detach(), w) for k, (v, w) in seen.items()})
        return total, _joined(watched)

    def examine(self, batch: Batch) -> tuple[Tensor, ...]:
        """[2, k] losses and what they are divided by, and [n, 2] sums and weights of what is watched."""
        places = torch.arange(len(batch.ids), device=self.device)
        found = read_batch(self.reads, batch, lambda inputs, rows: self.losses(inputs, batch, places[rows]))
        sums, of = torch.stack([part for part, _, _ in found]).sum(0), found[0][1]
        of = torch.as_tensor(of, device=self.device, dtype=sums.dtype).expand_as(sums)
        watched = _joined([part for _, _, part in found])
        self._watches = list(watched)
        seen = [torch.stack([(v * w).sum(), w.sum()]) for v, w in watched.values()]
        means = torch.stack(seen) if seen else torch.zeros(0, 2, device=self.device)
        if self.trainer.world_size > 1:  # what a batch is divided by is known on every device
            sums, means = self.all_gather(sums).sum(0), self.all_gather(means).sum(0)
        return torch.stack([sums, of]), means

    def measures(self, seen: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """The loss, and the means of what is watched."""
        means = torch.stack([part for _, part in seen]).sum(0)
        values = (means[:, 0] / means[:, 1].clamp(min=1e-12)).tolist()
        return {"loss": float(_loss(seen)), **dict(zip(self._watches, values, strict=True))}

    def _evaluation_due(self) -> bool:
        # where an epoch ends, the same rows are read to choose the best one
        watched = getattr(self.trainer.datamodule, "watched", ())  # none where only batches were given
        ends = self.trainer.is_last_batch and "held_out" in watched
        return super()._evaluation_due() and not ends

    def validation_step(self, batch: Batch, _index: int) -> None:
        self._held_out.append(self.examine(batch))

    def on_validation_epoch_end(self) -> None:
        if not self._held_out:
            return
        self.log("held_out_loss", _loss(self._held_out), logger=False)
        self._point({f"held_out_{name}": value for name, value in self.measures(self._held_out).items()})
        self._held_out.clear()
        self.evaluated_at = self.global_step


def _divisors(like: Tensor, *numbers: float) -> Tensor:
    """[k] whole numbers beside a tensor: filled in on its device, because a copy from here would wait for it."""
    return torch.stack([torch.full((), number, dtype=torch.long, device=like.device) for number in numbers])


def _joined(parts: list[Watched]) -> Watched:
    """What is watched of all parts of a batch."""
    return {k: tuple(torch.cat(x) for x in zip(*(part[k] for part in parts), strict=True)) for k in parts[0]}


def _loss(seen: list[tuple[Tensor, ...]]) -> Tensor:
    """The mean loss over what `ReplyModule.examine` gave."""
    sums, of = torch.stack([part for part, _ in seen]).sum(0)
    return (sums / of).sum()


class SupervisedModule(ReplyModule):
    """Supervised fine-tuning on replies alone: the mean negative log-likelihood of all reply tokens of a batch.

    Args:
        confidence: weight of the model's own likeliest token against the given one, for Burns et al.'s auxiliary
            confidence loss (arXiv 2312.09390) on language-model tokens; 0 is plain fine-tuning.
    """

    def __init__(self, fit: FitContext, *, confidence: float = 0.0):
        super().__init__(fit)
        self.confidence = confidence

    def losses(self, inputs: dict[str, Tensor], batch: Batch, part: Tensor) -> tuple[Tensor, Tensor, Watched]:
        weight = batch.weight[part][inputs["owner"]]
        if self.confidence:
            given, likeliest = self.scorer(inputs, top=True).unbind(1)
            tokens = preference.auxiliary_confidence(given, likeliest, self.confidence)
        else:
            given = self.scorer(inputs)
            tokens = -given
        return (tokens * weight).sum()[None], _divisors(weight, sum(batch.sizes)), {}


class PreferenceModule(ReplyModule):
    """Direct preference optimisation (DPO) with any loss of `w2sg.losses.preferences`.

    Targets are the reference's sums [b, 2].

    Args:
        loss: ``(policy [b, 2], reference [b, 2], lengths [b, 2]) -> [b]``.
        beta: scale of the rewards that are watched.
        supervised: weight of the chosen replies' negative log-likelihood beside the loss.
        supervised_mean: ``sequence`` divides it by each reply's length, then by pairs (RPO); ``token`` by all tokens of
            chosen replies in the batch.
        reference_free: rewards are of the log-probabilities themselves. per_token: of their means over tokens.
    """

    def __init__(
        self,
        fit: FitContext,
        *,
        loss: Callable[..., Tensor],
        beta: float,
        supervised: float = 0.0,
        supervised_mean: str = "sequence",
        reference_free: bool = False,
        per_token: bool = False,
    ):
        super().__init__(fit)
        self.loss, self.beta, self.reference_free, self.per_token = loss, beta, reference_free, per_token
        self.supervised, self.supervised_mean = supervised, supervised_mean

    def losses(self, inputs: dict[str, Tensor], batch: Batch, part: Tensor) -> tuple[Tensor, Tensor, Watched]:
        sizes, weight, reference = inputs["sizes"], batch.weight[part], batch.targets[part]
        policy = per_reply(self.scorer(inputs), inputs["owner"], sizes)
        sums = [(self.loss(policy, reference, sizes) * weight).sum()]
        of = [batch.total]
        if self.supervised:
            each = preference.supervised(policy[:, 0], sizes[:, 0])
            if self.supervised_mean == "token":
                each, divisor = each * sizes[:, 0], batch.sizes[0]
            else:
                divisor = batch.total
            sums.append(self.supervised * (each * weight).sum())
            of.append(divisor)
        base = torch.zeros_like(reference) if self.reference_free else reference
        sums_now = policy.detach()
        over = sizes.clamp(min=1) if self.per_token else torch.ones_like(sizes)
        seen = preference.reward_metrics(sums_now / over, base / over, sizes, self.beta)
        seen |= {"logps/chosen": sums_now[:, 0], "logps/rejected": sums_now[:, 1]}
        watched = {name: (values.float(), weight) for name, values in seen.items()}
        return torch.stack(sums), _divisors(policy, *of), watched


class WeakTargetModule(ReplyModule):
    """WSPO (arXiv 2410.18640): the strong model's change is to be the weak model's, token by token.

    ``columns`` of the inputs: the log-probabilities of the strong model before training, and of the weak model after
    and before its alignment.

    Args:
        gamma: factor on the strong model's change.
    """

    def __init__(self, fit: FitContext, *, gamma: float):
        super().__init__(fit)
        self.gamma = gamma

    def losses(self, inputs: dict[str, Tensor], batch: Batch, part: Tensor) -> tuple[Tensor, Tensor, Watched]:
        strong, aligned, untuned = inputs["columns"].unbind(1)
        each = preference.wspo(
            self.scorer(inputs), strong, aligned, untuned, inputs["owner"], inputs["sizes"].numel(), gamma=self.gamma
        )
        return (each * batch.weight[part]).sum()[None], _divisors(each, batch.total), {}
