"""Questions to a device: each makes the host wait for all that was asked before, and the device then has nothing to do.

On a CPU they cost nothing, and are answered at once. Elsewhere what a batch is about is kept on the host. What only the
device knows, as which replies have ended, is copied to the host while the next step is at work, and looked at then.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FREE = {"cpu"}  # kinds of devices that answer at once
EVERY = 4  # steps between two looks at a device that does not


def free(device: torch.device) -> bool:
    """Whether asking costs nothing."""
    return device.type in FREE


class Copied:
    """Numbers on their way to the host.

    Args:
        numbers: of the device, as they are now.
    """

    def __init__(self, numbers: Tensor):
        self._event = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = numbers.detach().to("cpu", copy=True)

    def numpy(self) -> np.ndarray:
        """The numbers; where they have not come yet, this waits for them and for nothing after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


def sent(rows: np.ndarray, device: torch.device) -> Tensor:
    """Whole numbers of the host on a device, for which the host does not wait."""
    return torch.from_numpy(np.ascontiguousarray(rows, np.int64)).to(device, non_blocking=True)
