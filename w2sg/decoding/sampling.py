"""From the log-probabilities of two models to the next token.

Shapes: B rows, V tokens in the vocabulary, K candidates. Every setting has one value per row, so an alpha sweep is one
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.decoding import waits
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

    def known(self) -> Known:
        """The same numbers on the host; this asks the device."""
        return Known(torch.stack([getattr(self, f.name).double() for f in fields(self)], 1).cpu().numpy())


@dataclass(frozen=True)
class Known:
    """What the settings of a batch ask for, known before its first step: no step has to ask its device.

    Attributes:
        columns: [B, 6] as in `Settings.from_columns`.
    """

    columns: np.ndarray

    def take(self, rows: np.ndarray) -> Known:
        """Of some rows."""
        return Known(self.columns[rows])

    @property
    def greedy(self) -> bool:
        """Every row takes its likeliest token."""
        return bool((self.columns[:, 2] == 0).all())

    @property
    def cuts(self) -> bool:
        """A row leaves tokens out, by their number or by their probability."""
        return bool(((self.columns[:, 3] > 0) | (self.columns[:, 4] < 1)).any())

    @property
    def penalised(self) -> bool:
        """A row penalises what it has written."""
        return bool((self.columns[:, 5] != 1).any())

    def limit(self, vocabulary: int) -> int:
        """The most tokens that the number of tokens leaves to a row."""
        top_k = self.columns[:, 3]
        return int(np.where(top_k > 0, top_k, vocabulary).max(initial=1))

    def limited(self, vocabulary: int) -> bool:
        """The number of tokens leaves fewer than all to a row."""
        top_k = self.columns[:, 3]
        return bool(((top_k > 0) & (top_k < vocabulary)).any())


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
    if not written.shape[1] or (waits.free(penalty.device) and bool((penalty == 1).all())):
        return scores
    scores = nn.functional.pad(scores.log_softmax(-1), (0, 1))  # a column for what fills rows up
    return scores.scatter(1, written, scores.gather(1, written) * penalty[:, None])[:, :-1]


def nucleus(probabilities: Tensor, enough: Tensor) -> Tensor:
    """[B, V] whether each token is in the smallest set of likeliest tokens that has this probability together.

    Nothing is sorted and nothing is asked of the device: the least probability in the set is found by bisection over
    the bits of fp32, whose order is that of the numbers. Of equal tokens on the border the first are taken.

    Args:
        probabilities: [B, V] in fp32. enough: [B]; infinity keeps all.
    """
    bits = probabilities.view(torch.int32)
    low, high = torch.zeros_like(bits[:, 0]), bits.amax(-1)
    for _ in range(31):  # probabilities are below 2, whose bits are 2^30
        middle = low + (high - low) // 2
        reached = torch.where(bits > middle[:, None], probabilities, 0.0).sum(-1) >= enough
        low, high = torch.where(reached, middle + 1, low), torch.where(reached, high, middle)
    above = torch.where(bits > high[:, None], probabilities, 0.0).sum(-1)
    border = bits == high[:, None]
    place = border.cumsum(-1)  # of a token on the border, among those; the first is always taken
    fits = above[:, None] + (place - 1) * probabilities < enough[:, None]
    return (bits > high[:, None]) | (border & (fits | (place == 1)))


def candidates(
    scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, known: Known | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that may be taken and their probabilities, both [B, K], in the order of token ids.

    Temperature first, then the ``top_k`` best, then the smallest set whose probability reaches ``top_p``; probabilities
    are 0 for what was left out and sum to 1. Exact, though only as many tokens are sorted as the largest set has.
    A sum within `TIE` of ``top_p`` reaches it.

    Args:
        known: where asking the device costs time: then all that may be needed is sorted at once.
    """
    vocabulary = scores.shape[1]
    scaled = scores / temperature.clamp(min=1e-6)[:, None]
    norm = scaled.logsumexp(-1, keepdim=True)
    size = min(CANDIDATES, vocabulary) if known is None else min(known.limit(vocabulary), vocabulary)
    limited = bool(((top_k > 0) & (top_k < vocabulary)).any()) if known is None else known.limited(vocabulary)
    limit = torch.where(top_k > 0, top_k, vocabulary)
    enough = torch.where(top_p < 1, top_p - TIE, torch.inf)
    while True:
        best, ids = scaled.topk(size, -1)
        probabilities = (best - norm).exp()
        rank = torch.arange(size, device=scores.device)
        if limited:  # top_p is of what top_k leaves
            probabilities = probabilities.masked_fill(rank >= limit[:, None], 0.0)
            total = probabilities.sum(-1)
            probabilities = torch.where((limit < vocabulary)[:, None], probabilities / total[:, None], probabilities)
        mass = probabilities.cumsum(-1)
        # what top_k leaves is known, mass and all, only once it has all been seen
        whole = torch.where(limit < vocabulary, limit <= size, mass[:, -1] >= enough) | (best[:, -1] == -torch.inf)
        if known is not None or size == vocabulary or bool(whole.all()):
            break
        size = min(4 * size, vocabulary)
    kept = (mass - probabilities < enough[:, None]) | (rank == 0)
    probabilities = probabilities.masked_fill(~kept, 0.0).double()
    ids, order = ids.sort(-1)
    probabilities = probabilities.gather(1, order)
    return ids, probabilities / probabilities.sum(-1, keepdim=True)


def choose(scores: Tensor, settings: Settings, uniform: Tensor, known: Known | None = None) -> Tensor:
    """One token per row: the likeliest at temperature 0, else the one at which the distribution function passes u.

    Args:
        uniform: [B] numbers in [0, 1), one for each row of its own stream.
        known: the settings on the host, where they are there already.
    """
    known = settings.known() if known is None else known
    if known.greedy:
        return scores.argmax(-1)
    greedy = settings.temperature == 0
    asks = waits.free(scores.device)
    whole = not asks and not known.limited(scores.shape[1])  # looked at whole, where nothing may be asked
    if whole or not known.cuts:
        probabilities = (scores / settings.temperature.clamp(min=1e-6)[:, None]).softmax(-1)
        if known.cuts:
            enough = torch.where(settings.top_p < 1, settings.top_p - TIE, torch.inf)
            probabilities = probabilities.masked_fill(~nucleus(probabilities.float(), enough), 0.0)
        return torch.where(greedy, scores.argmax(-1), _drawn(probabilities, uniform))
    columns = settings.temperature, settings.top_k, settings.top_p
    ids, probabilities = candidates(scores, *columns, None if asks else known)
    passed = probabilities.cumsum(-1) > uniform.double()[:, None]
    # rounding may leave the last sum a little below a u close to 1
    last = (probabilities > 0).int() * torch.arange(1, ids.shape[1] + 1, device=ids.device)
    place = torch.where(passed.any(-1), passed.int().argmax(-1), last.argmax(-1))
    drawn = ids.gather(1, place[:, None])[:, 0]
    return torch.where(greedy, scores.argmax(-1), drawn)


def _drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """[B] where the distribution function of [B, V] passes u; probabilities need not sum to 1."""
    mass = probabilities.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(mass, uniform.double()[:, None] * mass[:, -1:], right=True)[:, 0]
    # rounding may bring a u close to 1 to the end, and NaN, which is looked for later, beyond it
    drawn = torch.minimum(drawn, torch.searchsorted(mass, mass[:, -1:].contiguous())[:, 0])
    return drawn.clamp(max=mass.shape[1] - 1)


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
    tokens, logs, sound = sampled(logits, settings, settings.known(), uniform, written, writable)
    if not bool(sound):
        raise UserError(nothing_left(name))
    return tokens, logs


def nothing_left(name: str) -> str:
    """What there is to say where a row of a model has no token to write."""
    return f"{name}: every token is ruled out, or a score is no number, so there is nothing to write"


def sampled(
    logits: Tensor,
    settings: Settings,
    known: Known,
    uniform: Tensor,
    written: Tensor | None = None,
    writable: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `next_tokens`, with nothing asked of a device that does not answer at once.

    Returns:
        [B] tokens, [m, B, V] log-probabilities, and whether every row had a token left (a tensor without dimensions).
    """
    logs = logits.log_softmax(-1)
    first, aligned = logits[0], logs[0]
    if writable is not None:
        first, aligned = (x.masked_fill(~writable, -torch.inf) for x in (first, aligned))
    scores = contrastive_scores(aligned, logs[1] if len(logs) > 1 else None, settings.alpha, settings.relative_top)
    if written is not None and known.penalised:
        scores = penalise(scores, written, settings.repetition_penalty)
    sound = (scores.amax(-1) > -torch.inf).all()
    tokens = choose(scores, settings, uniform, known)
    plain = (settings.temperature == 0) & (settings.repetition_penalty == 1)
    if len(logits) > 1:
        plain &= settings.alpha == 1
    return torch.where(plain, first.argmax(-1), tokens), logs, sound
