"""Small models: heads over frozen features, and a bag of words."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from w2sg.data.rows import PADDING, PREFIX
from w2sg.models.mixed import in_fp32
from w2sg.store.files import write_json

# ---------------------------------------------------------------------------------------------------------------------
# Heads over frozen features
# ---------------------------------------------------------------------------------------------------------------------


class LinearHead(nn.Module):
    """A linear head without bias over frozen features, which it standardises with the training split's moments.

    Reads ``batch["features"]`` [B, n, D]; returns rewards [B, 2] (pairs) or class logits [B, C], in fp32.
    """

    def __init__(self, width: int, pairs: bool, classes: int):
        super().__init__()
        self.pairs = pairs
        self.score = nn.Linear(width, 1 if pairs else classes, bias=False)
        # Features are standardised, so this gives logits near 0 and lets labels speak first; not 0 itself, where every
        # example ties and a confidence threshold has nothing to choose by.
        nn.init.normal_(self.score.weight, std=1e-3)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def standardise(self, features: Tensor) -> None:
        """Take the moments of the training features [N, n, D]."""
        flat = features.flatten(0, 1)
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0).clamp_min(1e-6))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        scores = self._scores(batch["features"])
        return scores.squeeze(-1) if self.pairs else scores.squeeze(1)

    def _scores(self, features: Tensor) -> Tensor:
        with in_fp32(features):
            return self.score((features - self.mean) / self.std)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "head.safetensors")
        write_json(folder / "head.json", {"kind": type(self).__name__, "pairs": self.pairs, **self._shape()})

    def _shape(self) -> dict[str, Any]:
        return {"width": self.score.in_features, "classes": max(2, self.score.out_features)}


class MixtureHead(LinearHead):
    """A convex mixture of K fixed linear experts: P(class) = sum_k a_k softmax(expert_k), a on the simplex.

    Only the weights ``a`` are trained, so the class of functions is convex in probabilities, which is what the
    reverse-KL Pythagorean inequality (arXiv 2502.11107, Theorem 2) asks for and a linear head in logits is not.
    The experts are linear heads trained beforehand (`w2sg.experiment.run.Run.fit`). Returns log-probabilities
    [B, C] as logits.
    """

    def __init__(self, width: int, pairs: bool, classes: int, experts: int):
        super().__init__(width, pairs, classes)
        outputs = 1 if pairs else classes
        self.score = nn.Linear(width, experts * outputs, bias=False)
        self.score.weight.requires_grad_(False)
        self.outputs = outputs
        self.weights = nn.Parameter(torch.zeros(experts))  # softmax of these is a: starts at the uniform mixture

    def set_experts(self, heads: Sequence[LinearHead]) -> None:
        """Fix the experts. They must have been trained on features standardised with the same moments."""
        with torch.no_grad():
            self.score.weight.copy_(torch.cat([head.score.weight for head in heads]))
        self.mean.copy_(heads[0].mean)
        self.std.copy_(heads[0].std)

    def standardise(self, features: Tensor) -> None:
        """The experts brought their moments with them."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        scores = self._scores(batch["features"])  # [B, n, K * outputs]
        per_expert = scores.unflatten(-1, (-1, self.outputs))  # [B, n, K, outputs]
        logits = per_expert[..., 0].transpose(1, 2) if self.pairs else per_expert[:, 0]  # [B, K, C]
        return (F.log_softmax(logits, -1) + F.log_softmax(self.weights, 0)[:, None]).logsumexp(1)

    def _shape(self) -> dict[str, Any]:
        classes = 2 if self.pairs else self.outputs
        return {"width": self.score.in_features, "classes": classes, "experts": len(self.weights)}


def load_head(folder: Path) -> LinearHead:
    """A head saved by a finished stage."""
    shape = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    head = {"LinearHead": LinearHead, "MixtureHead": MixtureHead}[shape.pop("kind")](**shape)
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head


# ---------------------------------------------------------------------------------------------------------------------
# A bag of words
# ---------------------------------------------------------------------------------------------------------------------


class HashedWords:
    """Text to ids of its lower-cased words, hashed into ``buckets``: a tokenizer that needs no vocabulary."""

    def __init__(self, buckets: int):
        self.buckets = buckets

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        words = (re.findall(r"\w+|[^\w\s]", text.lower()) or [""] for text in texts)
        return [[zlib.crc32(word.encode()) % self.buckets for word in text] for text in words]


class BagOfWords(nn.Module):
    """The weakest supervisor: the score of a text is the mean of its words' weights, times a fixed scale.

    Args:
        buckets: rows of the weight table, as in `HashedWords`.
        scale: brings the mean of many small weights to the size of a logit, so one learning rate fits all lengths.
    """

    def __init__(self, buckets: int, pairs: bool, classes: int, scale: float = 10.0):
        super().__init__()
        self.pairs = pairs
        self.words = nn.Embedding(buckets, 1 if pairs else classes)
        nn.init.normal_(self.words.weight, std=0.02)
        self.scale = scale

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        segments, n = batch["segments"], batch["ends"].shape[1]
        numbers = torch.arange(1, n + 1, device=segments.device)[None, :, None]
        seen = (segments[:, None] == numbers) | (segments[:, None] == PREFIX)  # [B, n, L]
        seen = (seen & (segments[:, None] != PADDING)).float()
        with in_fp32(seen):
            scores = seen @ self.words(batch["input_ids"]) * self.scale / seen.sum(-1, keepdim=True).clamp_min(1.0)
        return scores.squeeze(-1) if self.pairs else scores.squeeze(1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
