"""Log-probabilities of chosen tokens, without logits of the whole vocabulary ever standing whole in memory.

The output layer is applied to a few positions at a time, and only to those whose token is asked for. Its logits and
log-softmax are in fp32 (fp64 for fp64 states), whatever the weights are. Under autocast on a GPU its products are of
bf16 numbers with sums and results in fp32, which is as quick as bf16 and rounds no logit; a CPU has no such product,
and multiplies what the weights are in.

Shapes: M positions, D width of the states, V tokens in the vocabulary, c positions in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from w2sg.errors import UserError

A = TypeVar("A", Tensor, np.ndarray)
CHUNK = 256  # on a CPU: 50 MB of fp32 logits for 49,000 tokens, 156 MB for 152,000
TABLE = 1.25 * 2**30  # bytes of fp32 logits at once on a GPU, whose products are slow if they are small
FLOOR = -1e4  # nats; a token that a model rules out counts as this unlikely to it, so that ratios stay numbers
WIDE_RESULTS = {"cuda"}  # devices that multiply bf16 into fp32 (torch.mm with out_dtype)


def chunk_for(vocabulary: int, device: str) -> int:
    """Positions whose logits are made at once.

    >>> [chunk_for(size, "cuda") for size in (50_257, 128_256, 262_144)], chunk_for(50_257, "cpu")
    ([4096, 2048, 1024], 256)
    """
    if device == "cpu":
        return CHUNK
    return min(4096, max(CHUNK, 1 << int(TABLE / (4 * vocabulary)).bit_length() - 1))


def _wide(x: Tensor) -> Tensor:
    """In the precision of logits."""
    return x if x.dtype == torch.float64 else x.float()


def _operands(weight: Tensor) -> torch.dtype:
    """The precision of what is multiplied: autocast's, where fp32 comes out all the same, else that of the weights."""
    device = weight.device.type
    if device in WIDE_RESULTS and torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def wide_results(x: Tensor) -> bool:
    """Whether products of a tensor can have fp32 results although its numbers have 16 bits."""
    return x.device.type in WIDE_RESULTS and x.dtype.itemsize == 2


def wide_logits(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., V] in fp32, of states [..., D] in the precision of the weights: rounded to bf16, a logit of 20 would be off
    by up to 0.06. For `wide_results`.
    """
    return _logits(states.flatten(0, -2), weight, bias).unflatten(0, states.shape[:-1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the precision of logits; of bf16 numbers it is rounded to bf16 only where a device cannot but do so."""
    if wide_results(a) and len(a):
        return _WideProduct.apply(a, b)
    return _wide(a @ b)


class _WideProduct(torch.autograd.Function):
    """A product of bf16 numbers in fp32; torch has no gradient of it."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.mm(a, b, out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        low = grad.to(a.dtype)
        return torch.mm(low, b.T) if ctx.needs_input_grad[0] else None, (
            torch.mm(a.T, low) if ctx.needs_input_grad[1] else None
        )


def _added(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in the precision of the total, which may be overwritten."""
    if wide_results(a) and a.shape[1]:
        return torch.addmm(total, a, b, out_dtype=torch.float32)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None) -> Tensor:
    """[c, V] in fp32, of states and weights in the precision of the weights."""
    logits = _product(hidden.to(weight.dtype), weight.T)
    if bias is not None:
        logits = logits + _wide(bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(h W^T + b)[target], chunk by chunk, with exact gradients.

    The gradient to a state is g (W[target] - p W). Where the output layer is frozen it is made in the forward pass,
    [M, D], so that no logits are needed again; where it is trained they are made again in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk, recorded, operands):
        given, weight = weight, weight.to(operands)
        chosen = torch.empty(len(hidden), dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # needs_input_grad says what requires a gradient, even where grad mode is off and nothing is recorded
        early = recorded and wants_hidden and not (wants_weight or wants_bias)
        slopes = torch.empty_like(hidden) if early else None
        for part in _parts(len(hidden), chunk):
            logits = _logits(hidden[part], weight, bias)
            norm = logits.logsumexp(-1, keepdim=True)
            chosen[part] = (logits.gather(1, targets[part, None]) - norm)[:, 0]
            if early:
                slopes[part] = _slopes(logits.sub_(norm), weight, targets[part]).to(slopes.dtype)
        ctx.chunk, ctx.early, ctx.operands = chunk, early, operands
        # the weights as they are given, which are there anyway, and not a copy in bf16
        ctx.save_for_backward(*((slopes,) if early else (hidden, given, bias, targets)))
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.early:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad[:, None].to(slopes.dtype)), None, None, None, None, None, None
        hidden, given, bias, targets = ctx.saved_tensors
        weight = given.to(ctx.operands)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight = torch.zeros_like(given, dtype=_wide(given[:0]).dtype) if wants_weight else None
        to_bias = torch.zeros_like(bias, dtype=_wide(bias[:0]).dtype) if wants_bias else None
        with _no_autocast(grad):  # backward may be called inside of autocast, where the logits would come out in bf16
            for part in _parts(len(hidden), ctx.chunk):
                logits = _logits(hidden[part], weight, bias)
                # -g p, and g more at the target: the gradient to the logits
                slope = logits.softmax(-1).mul_(-grad[part, None])
                slope.scatter_add_(1, targets[part, None], grad[part, None].to(slope.dtype))
                if to_bias is not None:
                    to_bias += slope.sum(0)
                low = slope.to(weight.dtype)
                if to_hidden is not None:
                    to_hidden[part] = _product(low, weight).to(hidden.dtype)
                if to_weight is not None:
                    # in fp32 where the device cannot add products of bf16 up in it
                    slope = low if slope.device.type in WIDE_RESULTS else slope
                    to_weight = _added(to_weight, slope.T, hidden[part].to(slope.dtype))
        back = [None if x is None else x.to(like.dtype) for x, like in ((to_weight, given), (to_bias, bias))]
        return to_hidden, *back, None, None, None, None


def _no_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _parts(count: int, chunk: int) -> Iterator[slice]:
    """Slices of at most ``chunk`` positions; one empty slice for no positions, so that dtypes and graph are as ever."""
    if chunk < 1:
        raise UserError(f"chunk: at least one position at a time (got {chunk})")
    for begin in range(0, max(count, 1), chunk):
        yield slice(begin, begin + chunk)


def _slopes(log_probabilities: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[c, D] gradients of target log-probabilities to the states; overwrites the log-probabilities."""
    expected = _product(log_probabilities.exp_().to(weight.dtype), weight)
    return weight[targets] - expected


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log-probabilities of given tokens, [M] in fp32, with gradients to the states and the output layer.

    Args:
        hidden: [M, D] states that predict the tokens.
        weight: [V, D] of the output layer; bias: [V].
        targets: [M] token ids.
        chunk: positions at a time; None is what suits the device (`chunk_for`).
        softcap: Gemma 2 bends its logits by ``c tanh(x / c)`` (arXiv 2408.00118, section 2).

    Returns:
        [M] nats, fp32 (fp64 for fp64 states), also under autocast; can be differentiated once.

    Raises:
        UserError: chunk is below 1.

    >>> states, layer = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> token_logprobs(states, layer, torch.tensor([0, 2]))
    tensor([-0.5514, -2.2395])
    """
    operands = _operands(weight)
    if chunk is None:
        chunk = chunk_for(len(weight), weight.device.type)
    with _no_autocast(hidden):
        if softcap is None:
            recorded = torch.is_grad_enabled()
            return _TokenLogProbs.apply(hidden, weight, bias, targets, chunk, recorded, operands)
        weight = weight.to(operands)

        def one(h: Tensor, t: Tensor) -> Tensor:
            logits = _logits(h, weight, bias, softcap)
            return (logits.gather(1, t[:, None]) - logits.logsumexp(-1, keepdim=True))[:, 0]

        parts = [
            checkpoint(one, hidden[part], targets[part], use_reentrant=False) for part in _parts(len(hidden), chunk)
        ]
        return torch.cat(parts)


@torch.no_grad()
def _by_chunk(hidden: Tensor, weight: Tensor, chunk: int | None, one: Callable[[slice], Tensor]) -> Tensor:
    chunk = chunk_for(len(weight), weight.device.type) if chunk is None else chunk
    with _no_autocast(hidden):
        return torch.cat([one(part) for part in _parts(len(hidden), chunk)])


def log_ratio(log_p: A, log_q: A) -> A:
    """log(p / q) of log-probabilities or logits, tensors or arrays, each of which counts as `FLOOR` at least: two of
    nothing have no ratio.
    """
    return log_p.clip(min=FLOOR) - log_q.clip(min=FLOOR)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, over their last axis; a token that p rules out counts nothing."""
    return torch.linalg.vecdot(log_p.exp(), (log_p - log_q).masked_fill_(log_p == -torch.inf, 0.0))


def position_kl(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Exact KL(p || q) of the next token at each position, over the whole vocabulary: [M] nats, without gradients.

    Args:
        hidden_p, hidden_q: [M, D] and [M, D'] states of the two models. weight, bias: of their output layers.
    """
    weight_p, weight_q = (weight.to(_operands(weight)) for weight in (weight_p, weight_q))

    def one(part: slice) -> Tensor:
        p = _logits(hidden_p[part], weight_p, bias_p, softcap)
        q = _logits(hidden_q[part], weight_q, bias_q, softcap)
        # some models fill their vocabulary up, each by its own amount: the law is over the tokens that both have
        least = min(p.shape[-1], q.shape[-1])
        return kl_divergence(p[:, :least].log_softmax(-1), q[:, :least].log_softmax(-1))

    return _by_chunk(hidden_p, weight_p, chunk, one)


def top_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """[M] the likeliest token at each position; a softcap does not change it."""
    low = weight.to(_operands(weight))
    return _by_chunk(hidden, low, chunk, lambda part: _logits(hidden[part], low, bias).argmax(-1))
