"""Labels of a table: what a model or ground truth says of each row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2sg.data.table import Table


@dataclass(frozen=True)
class Labels:
    """Label distributions of a table, joined by id.

    Attributes:
        table: the rows they belong to.
        logits: [N, C] in the table's order, the first reply in front; hard labels are 0 and -inf.
        key: where they came from, for the cache key of whoever trains on them.
        notes: what was done to them.
    """

    table: Table
    logits: Tensor
    key: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)

    def without_probabilities(self) -> int:
        """How many rows have logits that no probabilities come of: NaN, a positive infinity, or no finite one."""
        return int((~torch.isfinite(self.logits.double().logsumexp(1))).sum())

    def take(self, rows: np.ndarray) -> Labels:
        """Of some rows alone."""
        return Labels(self.table.take(rows), self.logits[torch.from_numpy(rows)], self.key, self.notes)
