"""From the log-probabilities of two models to the next token.

Shapes: B rows, V tokens in the vocabulary, K candidates. Every setting has one value per row, so an alpha sweep is one
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from w2sg.errors import UserError
from w2sg.losses.logprobs import FLOOR

TIE = 1e-6  # nats, and of probabilities: numbers in fp32 that are equal on paper differ by no more
CANDIDATES = 64  # looked at first when a nucleus is cut out; more where it is larger


@dataclass(frozen=True)
class Settings:
    """How each row samples; [B] each.

    Attributes:
        alpha: weight of the aligned model against the contrast: 1 is the aligned model alone, 0 the implicit reward.
        relative_top: tokens less likely than this share of the likeliest one are never taken; 0 keeps all.
        temperature: 0 takes the likeliest token.
        top_k: tokens to choose from; 0 is all.
        top_p: probability that the tokens to choose from have together.
        repetition_penalty: factor on the log-probability of tokens that the reply has already.
    """

    alpha: Tensor
    relative_top: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    repetition_penalty: Tensor

    @classmethod
    def from_columns(cls, columns: Tensor) -> Settings:
        """From [B, 6], in the order of the attributes."""
        return cls(*columns.unbind(1))

    @classmethod
    def alike(cls, columns: Sequence[float], rows: int, device: torch.device) -> Settings:
        """The same six numbers, in the order of the attributes, for each of some rows."""
        return cls.from_columns(torch.tensor([list(columns)]).expand(rows, -1).to(device))

    def take(self, rows: Tensor) -> Settings:
        """The settings of some rows."""
        return Settings(*(getattr(self, f.name)[rows] for f in fields(self)))


def head_mask(log_aligned: Tensor, relative_top: Tensor) -> Tensor:
    """[B, V] the tokens that the aligned model finds plausible, V_head in ConG: within log(relative_top) of the best.

    The best token is always one of them, and so is one that lies on the border, within `TIE`. Only the aligned model
    decides, before temperature and contrast (Li et al. 2023, arXiv 2210.15097).
    """
    best = log_aligned.amax(-1, keepdim=True)
    return (log_aligned >= best + relative_top.log()[:, None] - TIE) | (log_aligned == best)


def contrastive_scores(
    log_aligned: Tensor, log_reference: Tensor | None, alpha: Tensor, relative_top: Tensor
) -> Tensor:
    """ConG's score (arXiv 2510.07884): ``log pi_r - (1 - alpha) log pi_0`` on V_head, -inf elsewhere.

    Args:
        log_aligned, log_reference: [B, V] normalised log-probabilities in fp32; without a reference, alpha is 1.
        alpha: [B] in [0, 1]; it weighs against the contrast, unlike in most code for contrastive decoding.
        relative_top: [B].

    A token that the aligned model rules out (minus infinity) is never taken, whatever the reference says of it.
    """
    scores = log_aligned
    if log_reference is not None:
        scores = log_aligned - (1 - alpha)[:, None] * log_reference.clamp(min=FLOOR)
    return scores.masked_fill(~head_mask(log_aligned, relative_top), -torch.inf)


def penalise(scores: Tensor, written: Tensor, penalty: Tensor) -> Tensor:
    """Lower the scores of tokens that the reply has already (Keskar et al. 2019, arXiv 1909.05858).

    The rule multiplies what is negative and divides what is positive, so it depends on where 0 lies; here it is applied
    to normalised log-probabilities, which a constant added to all scores does not change. Prompt tokens are not meant.

    Args:
        scores: [B, V]. written: [B, t] tokens so far, filled up with V where a row has fewer. penalty: [B], 1 for none.
    """
    if not written.shape[1] or bool((penalty == 1).all()):
        return scores
    scores = nn.functional.pad(scores.log_softmax(-1), (0, 1))  # a column for what fills rows up
    return scores.scatter(1, written, scores.gather(1, written) * penalty[:, None])[:, :-1]


def candidates(scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that may be taken and their probabilities, both [B, K], in the order of token ids.

    Temperature first, then the ``top_k`` best, then the smallest set whose probability reaches ``top_p``; probabilities
    are 0 for what was left out and sum to 1. Exact, though only as many tokens are sorted as the largest set has.
    A sum within `TIE` of ``top_p`` reaches it.
    """
    vocabulary = scores.shape[1]
    scaled = scores / temperature.clamp(min=1e-6)[:, None]
    norm = scaled.logsumexp(-1, keepdim=True)
    size = min(CANDIDATES, vocabulary)
    limit = torch.where(top_k > 0, top_k, vocabulary)
    enough = torch.where(top_p < 1, top_p - TIE, torch.inf)
    while True:
        best, ids = scaled.topk(size, -1)
        probabilities = (best - norm).exp()
        rank = torch.arange(size, device=scores.device)
        if bool((limit < vocabulary).any()):  # top_p is of what top_k leaves
            probabilities = probabilities.masked_fill(rank >= limit[:, None], 0.0)
            total = probabilities.sum(-1)
            probabilities = torch.where((limit < vocabulary)[:, None], probabilities / total[:, None], probabilities)
        mass = probabilities.cumsum(-1)
        # what top_k leaves is known, mass and all, only once it has all been seen
        whole = torch.where(limit < vocabulary, limit <= size, mass[:, -1] >= enough) | (best[:, -1] == -torch.inf)
        if size == vocabulary or bool(whole.all()):
            break
        size = min(4 * size, vocabulary)
    kept = (mass - probabilities < enough[:, None]) | (rank == 0)
    probabilities = probabilities.masked_fill(~kept, 0.0).double()
    ids, order = ids.sort(-1)
    probabilities = probabilities.gather(1, order)
    return ids, probabilities / probabilities.sum(-1, keepdim=True)


def choose(scores: Tensor, settings: Settings, uniform: Tensor) -> Tensor:
    """One token per row: the likeliest at temperature 0, else the one at which the distribution function passes u.

    Args:
        uniform: [B] numbers in [0, 1), one for each row of its own stream.
    """
    greedy = settings.temperature == 0
    if bool(greedy.all()):
        return scores.argmax(-1)
    if not bool(((settings.top_k > 0) | (settings.top_p < 1)).any()):  # nothing is cut off, so nothing need be sorted
        mass = (scores / settings.temperature.clamp(min=1e-6)[:, None]).softmax(-1).cumsum(-1, dtype=torch.float64)
        drawn = torch.searchsorted(mass, uniform.double()[:, None] * mass[:, -1:], right=True)[:, 0]
        # rounding may bring a u close to 1 to the end
        drawn = torch.minimum(drawn, torch.searchsorted(mass, mass[:, -1:].contiguous())[:, 0])
        return torch.where(greedy, scores.argmax(-1), drawn)
    ids, probabilities = candidates(scores, settings.temperature, settings.top_k, settings.top_p)
    passed = probabilities.cumsum(-1) > uniform.double()[:, None]
    # rounding may leave the last sum a little below a u close to 1
    last = (probabilities > 0).int() * torch.arange(1, ids.shape[1] + 1, device=ids.device)
    place = torch.where(passed.any(-1), passed.int().argmax(-1), last.argmax(-1))
    drawn = ids.gather(1, place[:, None])[:, 0]
    return torch.where(greedy, scores.argmax(-1), drawn)


def next_tokens(
    logits: Tensor,
    settings: Settings,
    uniform: Tensor,
    written: Tensor | None = None,
    writable: Tensor | None = None,
    name: str = "the model",
) -> tuple[Tensor, Tensor]:
    """The next token of each row, and what the models think of all of them.

    At temperature 0 a model without a reference, or at alpha 1, writes the first of its likeliest tokens by its logits
    as they are: normalising rounds, and may bring two of them together.

    Args:
        logits: [m, B, V] of the aligned model and, for a contrast, its reference.
        uniform: [B] numbers in [0, 1). written: [B, t] tokens so far, for a repetition penalty.
        writable: [V] tokens that may be written; None for all. Log-probabilities are over the whole vocabulary.
        name: of the model, for errors.

    Returns:
        [B] tokens, and [m, B, V] log-probabilities.

    Raises:
        UserError: no token is left to a row, or a score is no number.
    """
    logs = logits.log_softmax(-1)
    first, aligned = logits[0], logs[0]
    if writable is not None:
        first, aligned = (x.masked_fill(~writable, -torch.inf) for x in (first, aligned))
    scores = contrastive_scores(aligned, logs[1] if len(logs) > 1 else None, settings.alpha, settings.relative_top)
    if written is not None:
        scores = penalise(scores, written, settings.repetition_penalty)
    if not bool((scores.amax(-1) > -torch.inf).all()):
        raise UserError(f"{name}: every token is ruled out, or a score is no number, so there is nothing to write")
    tokens = choose(scores, settings, uniform)
    plain = (settings.temperature == 0) & (settings.repetition_penalty == 1)
    if len(logits) > 1:
        plain &= settings.alpha == 1
    return torch.where(plain, first.argmax(-1), tokens), logs
