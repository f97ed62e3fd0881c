"""Values of a loss, looked at: one number for each example, with a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from w2sg.errors import UserError, calling, path_of


def values_of(loss: Callable[..., Tensor], logits: Tensor, targets: Tensor, progress: float) -> Tensor:
    """A loss's values, [B].

    Raises:
        UserError: they are not one number per example, or have no gradient where the logits have one.
    """
    with calling(loss):
        values = loss(logits, targets, progress)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        what = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"{path_of(loss)}: gave {what} for {len(logits)} examples; give one number each, [B]")
    if logits.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
        raise UserError(f"{path_of(loss)}: its values have no gradient; compute them from logits that are not detached")
    return values


def with_zeros(values: Tensor, size: int) -> Tensor:
    """Values of a device's own rows, and 0 for each row that is repeated to give every device as many."""
    return torch.cat([values, values.new_zeros(size - len(values))]) if size > len(values) else values
