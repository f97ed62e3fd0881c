"""A language model that labels by writing a label token: its logits of these tokens after a question.

With the loss over the full vocabulary, cross entropy at the label is that over the label tokens plus minus the log of
the mass that they have together. The student of the automated weak-to-strong protocol (AAR, 2026) is trained so, by the
mean over the label and what ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2sg.data.masks import run_backbone, sight
from w2sg.data.rows import Rows
from w2sg.models.label_questions import Questions
from w2sg.models.policy import Policy, load_policy
from w2sg.models.scorer import gather


@dataclass(frozen=True)
class Answered:
    """Questions with their answers, for training: rows whose last tokens are the label and all but the last of its end.

    Attributes:
        rows: the texts with these tokens. tail: [N, T] the tokens that end each answer.
    """

    rows: Rows
    tail: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.rows.lengths

    @property
    def useful(self) -> np.ndarray:
        return self.rows.useful

    @property
    def sizes(self) -> np.ndarray:
        return self.rows.sizes

    def __len__(self) -> int:
        return len(self.rows)

    def notes(self, share: bool) -> dict[str, object]:
        """As of `Rows`."""
        return self.rows.notes(share)

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]:
        """As of `Rows`, and ``tail``: [b, T]."""
        return {**self.rows.collate(index), "tail": torch.from_numpy(self.tail[np.asarray(index)])}


class LabelTokenScorer(nn.Module):
    """A language model whose logits of the label tokens after a text are its class logits.

    Args:
        policy: the language model.
        tokens: of the C labels.
    """

    head: str | None = None

    def __init__(self, policy: Policy, tokens: Sequence[int]):
        super().__init__()
        self.policy, self.tokens = policy, list(tokens)

    @property
    def model(self) -> nn.Module:
        """The language model, with its adapters."""
        return self.policy.model

    @property
    def _plain(self) -> nn.Module:
        return self.policy.plain

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, n, D] final state at the last token of each text."""
        packed = batch["ends"].shape[1] > 1 and len(batch["ends"]) == len(batch["input_ids"])
        seen = sight(batch["segments"]) if packed else None
        return gather(run_backbone(self.policy.body, batch, seen).last_hidden_state, batch["ends"])

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """[b, C] logits of the labels, in fp32.

        Of `Answered` rows [b, C + 1]: the last column is what the loss over the full vocabulary has besides, in nats:
        minus the log of the labels' mass, and the cross entropy of the tokens that end the answer.
        """
        tail = batch.get("tail")
        if tail is None:
            return self._labels(self.policy.ready(self.hidden(batch)[:, 0]))
        hidden = run_backbone(self.policy.body, batch).last_hidden_state
        rows, ends = torch.arange(len(hidden), device=hidden.device), batch["ends"][:, 0]
        steps = torch.arange(tail.shape[1] + 1, device=hidden.device)
        places = ends[:, None] - tail.shape[1] + steps
        logits = self.policy.logits(self.policy.ready(hidden[rows[:, None], places])).float()  # [b, T + 1, V]
        labels = logits[:, 0, self.tokens]
        beside = logits[:, 0].logsumexp(-1) - labels.logsumexp(-1)
        if tail.shape[1]:
            beside = beside + F.cross_entropy(logits[:, 1:].transpose(1, 2), tail, reduction="none").sum(1)
        return torch.cat([labels, beside[:, None]], 1)

    def _labels(self, states: Tensor) -> Tensor:
        """[b, C] of the output layer's rows for the labels alone."""
        weight, bias = self.policy.head()
        weight = weight[self.tokens].float()
        with torch.autocast(states.device.type, enabled=False):
            logits = F.linear(states.float(), weight, None if bias is None else bias[self.tokens].float())
        cap = self.policy.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def sharded_parts(self) -> list[tuple[nn.Module, bool]]:
        """What FSDP cuts one by one: as of the language model."""
        *blocks, _ = self.policy.sharded_parts()
        return [*blocks, (self, False)]

    def save(self, folder: Path) -> None:
        """Write an ordinary folder of a language model (an adapter folder for LoRA)."""
        self.policy.save(folder)


def load_label_tokens(questions: Questions, saved: Path | None = None, trainable: bool = True) -> LabelTokenScorer:
    """A role's language model as one that labels, pretrained or from a finished stage.

    Args:
        trainable: False for one that is only read.

    Raises:
        UserError: it has no language head, or a label is no token of its own.
    """
    policy = load_policy(questions.source, saved, trainable)
    return LabelTokenScorer(policy, questions.tokens).eval()
