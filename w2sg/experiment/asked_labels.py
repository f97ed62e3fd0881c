"""Label log-probabilities that another engine than ours gives: a judge on a server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from w2sg.data.messages import Dialogue
from w2sg.data.table import digest
from w2sg.experiment.context import Context
from w2sg.experiment.text_engines import text_engine
from w2sg.models.trained import Trained
from w2sg.store.files import write_json
from w2sg.training import foreseen
from w2sg.training.inputs import VERSION
from w2sg.training.stage_values import values_of


def ask_labels(
    run: Context, stage: str, model: Trained, prompts: Sequence[Dialogue], ids: Sequence[str], labels: Sequence[str]
) -> np.ndarray | None:
    """[N, K] log-probabilities of K labels as replies to prompts; NaN for a prompt that is too long.

    None where no server stands in for the model, which is then read in this process.

    Args:
        stage: its name. ids: of the prompts. labels: they differ in one token alone.
    """
    engine = text_engine(run, model, "transformers")
    if engine is None:
        return None
    chat = model.source.chat
    rows, words = chat.prompts(prompts), [row.tolist() for row in chat.replies(labels)]
    fits = [k for k, row in enumerate(rows) if 0 < len(row) <= engine.max_length - len(words[0])]
    key = {
        "version": VERSION,
        "prompts": digest(*(str(rows[k].tolist()) for k in fits)),
        "ids": digest(*(ids[k] for k in fits)),
        "labels": words,
        **engine.key(),
    }

    def work(part: Path) -> dict[str, Any]:
        found = engine.label_log_probabilities([rows[k] for k in fits], words)
        save_file({"values": torch.from_numpy(found)}, part / "values.safetensors")
        write_json(part / "ids.json", [ids[k] for k in fits])
        return {"examples": len(fits)}

    shape = partial(foreseen.numbers, len(fits), len(words))
    folder = run.stages.compute(stage, key, work, lambda _: shape()) if fits else None
    values = np.full((len(rows), len(words)), np.nan)
    if folder is not None:
        values[fits] = values_of(folder, [ids[k] for k in fits]).double().numpy()
    return values
