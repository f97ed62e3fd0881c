"""Replies as rows of samples.parquet."""

from __future__ import annotations

from typing import Any

import numpy as np

from w2sg.data.replies import Replies


def sample_rows(system: str, replies: Replies, columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each reply of a system, with what was measured of it, [N] by column."""
    return [
        {
            "system": system,
            "prompt_id": replies.ids[k],
            "prompt": replies.prompts[k].text,
            "reply": replies.texts[k],
            "finished": bool(replies.finished[k]),
            "tokens": int(replies.lengths[k]) if replies.tokens is not None else None,
            **{name: None if np.isnan(values[k]) else float(values[k]) for name, values in columns.items()},
        }
        for k in range(len(replies))
    ]
