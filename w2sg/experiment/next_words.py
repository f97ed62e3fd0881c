"""What a language model would say next, of a few words: for labels in context, and for ratings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.data.loading import Examples
from w2sg.data.rows import ByPlace, cut_left
from w2sg.data.table import digest
from w2sg.data.tokens import beginning, ids_after, ids_of
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.experiment.context import Context
from w2sg.experiment.keys import key_of
from w2sg.experiment.replies import load_trained
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.training import foreseen
from w2sg.training.inputs import VERSION
from w2sg.training.stage_values import values_of
from w2sg.training.stages import ReadJob


def split_words(source: Source, words: Sequence[str], option: str) -> tuple[list[int], list[int]]:
    """The tokens that all words begin with (a space of its own, say), and the token by which each goes on.

    Raises:
        UserError: two words go on alike, so that they cannot be told apart.
    """
    ids = ids_after(source.tokenizer, "x:", words)
    common = 0
    while all(len(row) > common for row in ids) and len({row[common] for row in ids}) == 1:
        common += 1
    if any(len(row) <= common for row in ids) or len({row[common] for row in ids}) < len(ids):
        raise UserError(
            f"{option}: {list(words)} do not begin with different tokens for {source.spec.name}; choose other words"
        )
    return ids[0][:common], [row[common] for row in ids]


def next_words(
    run: Context, name: str, writer: Trained, prompts: Sequence[str], words: Sequence[str], option: str, rows: int
) -> Tensor:
    """Log-probability of each word after each plain text, [N, C]; a word counts by the token that sets it apart.

    A text that is longer than the model reads loses its start.

    Args:
        name: of the stage. option: that names the words. rows: read at once.
    """
    source = writer.source
    begin, targets = split_words(source, words, option)
    first = beginning(source.tokenizer)
    rows_of = ids_of(source.tokenizer, prompts, special=True)
    ids = [np.asarray(cut_left([*row, *begin], source.spec.max_length, first), np.int64) for row in rows_of]
    keys = [digest(str(k), str(row.tolist())) for k, row in enumerate(ids)]
    key = {
        "version": VERSION,
        "model": key_of(run, writer),
        "prompts": digest(*keys),
        "words": targets,
        "precision": run.precision,
    }

    def make() -> ReadJob:
        policy = load_trained(run, writer)

        def read(batch: dict[str, Tensor]) -> Tensor:
            logits = TransformersEngine(policy).start([ids[row] for row in batch["row"].tolist()])[0]
            return logits.float().log_softmax(-1)[:, targets]

        examples = Examples(
            ByPlace([len(row) for row in ids], counted=True), keys, torch.zeros(len(ids), dtype=torch.long)
        )
        found = partial(foreseen.numbers, len(ids), len(targets))
        read = torch.inference_mode()(read)
        return ReadJob(nn.ModuleList([policy]), read, examples, rows=rows, written=1, foreseen=found)

    return values_of(run.stages.read(name, key, make, whole=True), keys).float()
