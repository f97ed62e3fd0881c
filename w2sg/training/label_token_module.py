"""Fine-tuning a language model to answer with a label token, by the loss over its whole vocabulary."""

from __future__ import annotations

from torch import Tensor

from w2sg.data.loading import Batch
from w2sg.training.label_modules import SoftLabelModule


class LabelTokenModule(SoftLabelModule):
    """The mean over the label and the tokens that end the answer: any loss of `w2sg.losses` on the label tokens, minus
    the log of their mass among all tokens, and the cross entropy of the end.

    With cross entropy this is next-token training on the answer alone, as in the automated weak-to-strong protocol.

    Args:
        fit: its scorer gives [b, C + 1] of `w2sg.models.label_tokens.Answered` rows, [b, C] of others.
    """

    def _objective(self, logits: Tensor, batch: Batch, rows: slice, progress: float) -> Tensor:
        loss = super()._objective(logits[:, :-1], batch, rows, progress)
        world, weight = self.trainer.world_size, batch.weight[rows]
        beside = (logits[:, -1] * weight).sum() * world / batch.total
        return (loss + beside) / (1 + batch.micro[0]["tail"].shape[1])

    def _logits(self, batch: Batch) -> Tensor:
        logits = super()._logits(batch)
        return logits[:, :-1] if "tail" in batch.micro[0] else logits
