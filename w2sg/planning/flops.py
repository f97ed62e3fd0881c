"""Floating-point operations of a forward and of a step, from the shapes of a model's layers.

A product with a matrix of N numbers is 2 N operations a token: N multiplications, N additions. A backward pass makes
two such products, for the gradient to what came in and for that to the matrix (Kaplan et al. 2020, arXiv 2001.08361).
So a trained matrix is 6 N a token. One that is frozen, under low-rank adapters, is 4 N. Attention multiplies queries by
keys and weights by values: 4 K d operations a token and layer, K keys and d numbers in all heads (PaLM, arXiv
2204.02311, appendix B). It has no matrix, so a step is three times a forward. Of a row of L tokens K is taken as L,
without the half that a causal kernel may leave out, as is usual; within a window K is the window.

Norms, activations, softmax and embeddings are left out: they are under one in a hundred of a model worth a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

LINEAR = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")


@dataclass(frozen=True)
class Work:
    """What goes through a model: its padded tokens, and what depends on more than their number.

    Attributes:
        tokens: padded. squares: sum over rows of the square of their padded length. asked: tokens whose log-probability
            over the vocabulary is asked for. examples: of heads on frozen features.
    """

    tokens: float = 0.0
    squares: float = 0.0
    asked: float = 0.0
    examples: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(a * factor for a in vars(self).values()))


@dataclass(frozen=True)
class Shape:
    """What a model multiplies.

    Attributes:
        trained, frozen: numbers in the matrices of its body that a token goes through; of experts those that it is sent
            to. head: numbers in its output layer. head_trained: whether that is trained.
        attention: width of all heads, summed over layers. windows: (width, window) of layers with one, which
            ``attention`` leaves out.
        recomputed: activations are made again in the backward pass.
        body: whether anything but a head is there to be read.
    """

    trained: float
    frozen: float
    head: float = 0.0
    head_trained: bool = False
    attention: float = 0.0
    windows: tuple[tuple[float, int], ...] = ()
    recomputed: bool = False

    def forward(self, work: Work) -> float:
        """Operations of reading."""
        matrices = 2.0 * (self.trained + self.frozen) * max(work.tokens, work.examples)
        return matrices + self._attention(work) + 2.0 * self.head * work.asked

    def step(self, work: Work) -> float:
        """Operations of a forward and a backward pass."""
        tokens, attention = max(work.tokens, work.examples), self._attention(work)
        frozen = 4.0 if self.attention or self.windows else 2.0  # a head on frozen features hands no gradient on
        total = (6.0 * self.trained + frozen * self.frozen) * tokens + 3.0 * attention
        if self.recomputed:
            total += 2.0 * (self.trained + self.frozen) * tokens + attention
        # the logits of a trained output layer are made twice; of a frozen one the gradient comes with them
        return total + (8.0 if self.head_trained else 4.0) * self.head * work.asked

    def _attention(self, work: Work) -> float:
        """Keys of a token are those of its row, or of its window."""
        mean = work.squares / work.tokens if work.tokens else 0.0
        near = sum(width * min(mean, window) for width, window in self.windows)
        return 4.0 * (self.attention * work.squares + near * work.tokens)


def shape_of(model: nn.Module, config: Any = None, recomputed: bool = False) -> Shape:
    """What a model multiplies, from its layers; it needs no weights.

    Args:
        model: a scorer, a policy or a head. config: of its backbone, None where there is none.
    """
    plain = getattr(model, "plain", None) or getattr(model, "_plain", None)
    ends = plain.get_output_embeddings() if plain is not None and hasattr(plain, "get_output_embeddings") else None
    ends = ends if isinstance(ends, nn.Module) and getattr(plain, "score", None) is None else None
    sums = {True: 0.0, False: 0.0}
    for module in model.modules():
        if module is ends or hasattr(module, "base_layer"):  # of an adapter the layers inside are counted
            continue
        if type(module).__name__ in LINEAR:
            sums[module.weight.requires_grad] += module.weight.numel()
        else:  # experts keep their matrices stacked, and a token goes through few of them
            for weight in (p for p in module.parameters(recurse=False) if p.dim() == 3):
                sums[weight.requires_grad] += weight.numel() * _share(config, len(weight))
    head = 0.0 if ends is None else float(ends.weight.numel())
    attention, windows = _attention(config)
    trained = ends is not None and ends.weight.requires_grad
    return Shape(sums[True], sums[False], head, trained, attention, windows, recomputed)


def _share(config: Any, experts: int) -> float:
    """The part of stacked experts that a token goes through."""
    chosen = next((n for key in ("num_experts_per_tok", "moe_k", "top_k") if (n := getattr(config, key, None))), None)
    return 1.0 if chosen is None else min(1.0, chosen / experts)


def _attention(config: Any) -> tuple[float, tuple[tuple[float, int], ...]]:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):  # none, or another number in each layer
        return 0.0, ()
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    kinds = kinds[: config.num_hidden_layers]
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    near = [kind for kind in kinds if window and ("sliding" in kind or "chunked" in kind)]
    full = [kind for kind in kinds if "full" in kind] if window else [kind for kind in kinds if "attention" in kind]
    return float(width * len(full)), tuple((float(width), int(window)) for _ in near)
