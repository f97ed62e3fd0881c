"""What a run has to know of a loss before it uses it: whether it needs the whole batch, and whether soft labels.

Losses from outside w2sg take the same marks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps

from torch import Tensor

from w2sg.losses.probabilities import refuse_hard


def whole_batch(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Marks a loss in which an example's value depends on the others: it must see the global batch, not a part."""
    loss.whole_batch = True
    return loss


def needs_whole_batch(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss, perhaps with options bound by `functools.partial`, must see the global batch.

    >>> from w2sg.losses import confidence, cross_entropy
    >>> needs_whole_batch(partial(confidence, alpha=0.75)), needs_whole_batch(cross_entropy)
    (True, False)
    """
    return getattr(_unbound(loss), "whole_batch", False)


def needs_soft_labels(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Marks a loss that is infinite on hard labels, and lets it refuse them.

    Losses from outside w2sg take the same mark. A run whose labels would be hard is then refused before it starts.

    Raises:
        UserError: from the marked loss, where a weak logit is infinite.
    """

    @wraps(loss)
    def soft_labels_only(logits: Tensor, weak_logits: Tensor, *args: object, **options: object) -> Tensor:
        refuse_hard(weak_logits)
        return loss(logits, weak_logits, *args, **options)

    soft_labels_only.soft_labels_only = True
    return soft_labels_only


def takes_hard_labels(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss, perhaps with options bound by `functools.partial`, is without the mark `needs_soft_labels`.

    >>> from w2sg.losses import confidence, reverse_kl
    >>> takes_hard_labels(partial(confidence, alpha=0.75)), takes_hard_labels(reverse_kl)
    (True, False)
    """
    return not getattr(_unbound(loss), "soft_labels_only", False)


def _unbound(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    while isinstance(loss, partial):
        loss = loss.func
    return loss
