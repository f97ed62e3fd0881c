"""Log-probabilities of tokens that are given to a model's rows.

Shapes: m models, B rows, L most new tokens of a row, D width of a state, V tokens in the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from w2sg.decoding import waits
from w2sg.losses.logprobs import token_logprobs
from w2sg.models.policy import Policy


def given_values(policy: Policy, states: Tensor, before: Tensor, ids: Tensor, counts: np.ndarray) -> list[np.ndarray]:
    """[B] of [n, m] log-probabilities of given tokens, the first by the logits before them.

    Args:
        states: [m, B, L, D] at these tokens.
        before: [m, B, V] logits of the first.
        ids: [B, L], filled on the right. counts: [B] tokens of each row.
    """
    models, later = len(states), ids.shape[1] - 1
    places = waits.sent(np.flatnonzero(np.arange(1, later + 1) < counts[:, None]), ids.device)
    logprobs = torch.empty((models, *ids.shape), device=ids.device)
    logprobs[:, :, 0] = before.log_softmax(-1).gather(2, ids[:, :1].expand(models, -1, -1))[..., 0]
    weight, bias = policy.head()
    targets = ids[:, 1:].flatten()[places]
    for model in range(models):
        ready = states[model, :, :-1].flatten(0, 1)[places]
        values = token_logprobs(ready, weight, targets, bias, softcap=policy.softcap)
        after = logprobs.new_zeros(len(ids) * later)
        after[places] = values.float()
        logprobs[model, :, 1:] = after.view(len(ids), later)
    values = logprobs.permute(1, 2, 0).cpu().numpy()
    return [row[:n] for row, n in zip(values, counts.tolist(), strict=True)]
