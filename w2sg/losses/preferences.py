"""The DPO family as pure functions of log-probabilities: one loss per pair, never reduced.

Every loss is ``(policy, reference, lengths, *, beta, ...) -> [B]``. B pairs; column 0 is the chosen reply, column 1 the
rejected one.

- ``policy``: [B, 2] sums of the log-probabilities (nats) of a reply's tokens by the model that is trained.
- ``reference``: [B, 2] the same by its reference, without gradient. `simpo` and `reference_free` do not read it.
- ``lengths``: [B, 2] tokens of each reply. Losses on means over tokens read it.
- ``beta``: strength of the pull towards the reference, above 0.

D = log(policy / reference)(chosen) - log(policy / reference)(rejected), and z = beta D. Another shape or a beta of 0 is
a `w2sg.errors.UserError`. `LOSSES` has all by the names that ``method.dpo.loss=`` takes, and
`w2sg.losses.logprobs.token_logprobs` gives log-probabilities of tokens.

>>> import torch
>>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
>>> round(float(sigmoid(policy, reference, torch.tensor([[10, 12]]), beta=0.1)), 4)
0.6072
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from w2sg.errors import UserError


def _check(policy: Tensor, other: Tensor, what: str, beta: float) -> None:
    """Refuse shapes that would be broadcast, and a beta that is no strength."""
    if policy.ndim != 2 or policy.shape[1] != 2 or other.shape != policy.shape:
        raise UserError(
            f"a loss of preferences takes [B, 2] sums, chosen and rejected; got policy {list(policy.shape)} and {what} "
            f"{list(other.shape)}"
        )
    if not beta > 0:
        raise UserError(f"beta: must be above 0 (got {beta})")


def _margin(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """[B] D: by how much more the policy has raised the chosen reply than the rejected one."""
    _check(policy, reference, "reference", beta)
    ratio = policy - reference
    return ratio[:, 0] - ratio[:, 1]


def _per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums / lengths.clamp(min=1)


def _check_smoothing(e: float) -> None:
    if not 0 <= e < 0.5:
        raise UserError(f"label_smoothing: must be at least 0 and below one half (got {e})")


def _smoothed(z: Tensor, e: float) -> Tensor:
    _check_smoothing(e)
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


def sigmoid(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, ``-log sigmoid(z)`` (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); smoothed, cDPO (Mitchell 2023).

    Args:
        label_smoothing: probability e that a pair is the wrong way round; the optimum is then z = log((1 - e) / e).

    >>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
    >>> sigmoid(policy, reference, torch.tensor([[10, 12]]), beta=0.5, label_smoothing=0.1)
    tensor([0.4312])
    """
    return _smoothed(beta * _margin(policy, reference, beta), label_smoothing)


def robust(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased where a share of the pairs is turned round.

    Args:
        label_smoothing: that share e, below one half.

    >>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
    >>> robust(policy, reference, torch.tensor([[10, 12]]), beta=0.5, label_smoothing=0.1)
    tensor([0.2287])
    """
    z, e = beta * _margin(policy, reference, beta), label_smoothing
    _check_smoothing(e)
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def hinge(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """``max(0, 1 - z)`` (Zhao et al. 2023, arXiv 2305.10425, with a reference).

    >>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
    >>> hinge(policy, reference, torch.tensor([[10, 12]]), beta=0.5)
    tensor([0.1000])
    """
    return F.relu(1 - beta * _margin(policy, reference, beta))


def ipo(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """IPO, ``(D - 1 / (2 beta))^2`` on sums over tokens, as in the paper (arXiv 2310.12036, eq. 17).

    >>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
    >>> ipo(policy, reference, torch.tensor([[10, 12]]), beta=0.5)
    tensor([0.6400])
    """
    return (_margin(policy, reference, beta) - 1 / (2 * beta)).square()


def ipo_mean(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """IPO on means over tokens, as its authors later advised and TRL does.

    >>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
    >>> ipo_mean(policy, reference, torch.tensor([[10, 12]]), beta=0.5)
    tensor([0.7028])
    """
    _check(policy, lengths, "lengths", beta)
    return ipo(_per_token(policy, lengths), _per_token(reference, lengths), lengths, beta=beta)


def sigmoid_norm(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """DPO on means over tokens (length-normalised DPO, Lambert et al. 2024, arXiv 2411.15124).

    >>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
    >>> sigmoid_norm(policy, reference, torch.tensor([[10, 12]]), beta=0.5)
    tensor([0.6535])
    """
    _check(policy, lengths, "lengths", beta)
    return sigmoid(_per_token(policy, lengths), _per_token(reference, lengths), lengths, beta=beta)


def simpo(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float, target_margin: float = 0.0) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): means over tokens, no reference.

    Args:
        target_margin: gamma / beta, by how much the chosen reply's mean log-probability should be ahead.

    >>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
    >>> simpo(policy, reference, torch.tensor([[10, 12]]), beta=2.0, target_margin=0.25)
    tensor([0.9392])
    """
    _check(policy, lengths, "lengths", beta)
    mean = _per_token(policy, lengths)
    return -F.logsigmoid(beta * (mean[:, 0] - mean[:, 1] - target_margin))


def reference_free(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """DPO against a uniform reference: ``-log sigmoid(beta (log policy(chosen) - log policy(rejected)))``.

    >>> policy, reference = torch.tensor([[-12.3, -15.1]]), torch.tensor([[-13.0, -14.0]])
    >>> reference_free(policy, reference, torch.tensor([[10, 12]]), beta=0.5)
    tensor([0.2204])
    """
    return sigmoid(policy, torch.zeros_like(policy), lengths, beta=beta)


LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss for loss in (sigmoid, robust, hinge, ipo, ipo_mean, sigmoid_norm, simpo, reference_free)
}
REFERENCE_FREE = {"simpo", "reference_free"}
PER_TOKEN = {"ipo_mean", "sigmoid_norm", "simpo"}  # their rewards are of means over tokens


def options_of(name: str) -> set[str]:
    """What a loss reads beside beta."""
    return set(inspect.signature(LOSSES[name]).parameters) - {"policy", "reference", "lengths", "beta"}


def supervised(policy_chosen: Tensor, lengths_chosen: Tensor) -> Tensor:
    """[B] negative log-likelihood per token of chosen replies (RPO, Pang et al. 2024, arXiv 2404.19733).

    Weighting each by its length and dividing by all tokens of the batch gives the token mean, which is another number.

    Args:
        policy_chosen: [B] sums of log-probabilities, nats. lengths_chosen: [B] tokens.

    >>> supervised(torch.tensor([-12.0, -3.0]), torch.tensor([10, 3]))
    tensor([1.2000, 1.0000])
    """
    return -_per_token(policy_chosen, lengths_chosen)


def auxiliary_confidence(given: Tensor, likeliest: Tensor, weight: float) -> Tensor:
    """[T] Burns et al.'s confidence loss (arXiv 2312.09390, eq. 1) on tokens of a language model.

    Args:
        given: [T] log-probabilities of the weak model's tokens.
        likeliest: [T] of the tokens that the model itself finds likeliest.
        weight: of the likeliest.

    >>> auxiliary_confidence(torch.tensor([-2.0]), torch.tensor([-1.0]), weight=0.25)
    tensor([1.7500])
    """
    return -(1 - weight) * given - weight * likeliest


def wspo(
    strong: Tensor,
    strong_reference: Tensor,
    weak: Tensor,
    weak_reference: Tensor,
    owner: Tensor,
    sequences: int,
    *,
    gamma: float,
) -> Tensor:
    """WSPO (Zhu et al. 2024, arXiv 2410.18640): the strong model's change is to be the weak model's.

    The mean over a reply's tokens of ``(gamma log(strong / its reference) - log(weak / its reference))^2``.

    Args:
        strong, strong_reference, weak, weak_reference: [T] log-probabilities of the same tokens.
        owner: [T] which reply each token is of. sequences: how many there are.

    Returns:
        [sequences]; 0 for a reply without tokens.

    >>> strong, weak, zero = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]), torch.zeros(2)
    >>> wspo(strong, zero, weak, zero, torch.tensor([0, 0]), 1, gamma=1.0)
    tensor([0.5000])
    """
    squares = (gamma * (strong - strong_reference) - (weak - weak_reference)).square()
    sums = squares.new_zeros(sequences).index_add(0, owner, squares)
    tokens = squares.new_zeros(sequences).index_add(0, owner, torch.ones_like(squares))
    return sums / tokens.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# What is watched
# ---------------------------------------------------------------------------------------------------------------------


def rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """[B, 2] implicit rewards, ``beta log(policy / reference)``."""
    return beta * (policy - reference)


def reward_metrics(policy: Tensor, reference: Tensor, lengths: Tensor, beta: float) -> dict[str, Tensor]:
    """What dashboards show of each pair, [B] each, under TRL's names.

    ``rewards/accuracies`` is strict: a tie, as before the first step, is not a win. ``logps`` are sums.
    ``gradient_weight`` is sigmoid(-z), DPO's weight of a pair. The mean of ``rewards/chosen`` is beta times the change
    of the chosen replies' log-probability: where it is negative they have become less likely than they were, the
    margin notwithstanding (likelihood displacement, Razin et al. 2024, arXiv 2410.08847).
    """
    reward = rewards(policy, reference, beta)
    margin = reward[:, 0] - reward[:, 1]
    return {
        "rewards/chosen": reward[:, 0],
        "rewards/rejected": reward[:, 1],
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).to(policy.dtype),
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
        "lengths/chosen": lengths[:, 0],
        "lengths/rejected": lengths[:, 1],
        "gradient_weight": torch.sigmoid(-margin),
    }


def displaced(first_chosen: float, now_chosen: float) -> bool:
    """Likelihood displacement: the chosen replies have become less likely than they were when training began.

    The loss may fall all the while: it only asks that the rejected replies fall further. What the chosen ones lose goes
    to replies that nobody has looked at. Both numbers must be of the same replies, or of samples large enough. Unlike
    the sign of ``rewards/chosen`` this holds for losses without a reference too, whose rewards are always negative.

    Args:
        first_chosen: mean ``logps/chosen`` at step 0.
        now_chosen: mean ``logps/chosen`` now.

    >>> displaced(-12.0, -12.5), displaced(-12.0, -12.0)
    (True, False)

    References:
        Razin et al. 2024, arXiv 2410.08847.
    """
    return now_chosen < first_chosen


def displacement(name: str, loss: str, last: Mapping[str, float]) -> list[str]:
    """What a report warns of, where the last logged batch of a fit shows `displaced` replies.

    Without a reference a reward is the log-probability itself, always negative, and those of the first and the last
    batch, which are of other replies, cannot be compared: nothing is said of such losses.

    Args:
        name: of the fit. loss: its loss's name. last: what was logged last.
    """
    if loss in REFERENCE_FREE or not last.get("rewards/chosen") or not displaced(0.0, last["rewards/chosen"]):
        return []
    how = "as the rejected ones did, further" if last["rewards/margins"] > 0 else "and no margin came of it"
    return [
        f"{name}: likelihood displacement: the chosen replies of the last logged batch are less likely than before "
        f"training (reward {last['rewards/chosen']:+.3f}), {how}"
    ]
