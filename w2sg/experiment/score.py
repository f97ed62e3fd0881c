"""Log-probabilities of replies, and divergences between models over them."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.data.loading import Examples
from w2sg.data.replies import Replies, ReplyPairs
from w2sg.data.table import digest
from w2sg.errors import TrainingError
from w2sg.experiment.context import Context
from w2sg.experiment.keys import key_of, reply_rules
from w2sg.experiment.replies import encode_replies, load_trained, packed
from w2sg.losses.logprobs import position_kl
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.store.shards import Found
from w2sg.training import foreseen
from w2sg.training.inputs import VERSION
from w2sg.training.stage_values import load_tensors, values_of
from w2sg.training.stages import ReadJob


def token_values(
    run: Context, stage: str, model: Trained | Source, data: Replies | ReplyPairs, name: str
) -> tuple[Tensor, Tensor, str]:
    """Log-probabilities of all reply tokens, [T], how many each example has, [N], and the stage's folder name."""
    writer = run.as_trained(model)
    source, rows = writer.source, encode_replies(run, writer.source, data, name)
    ids = [data.ids[i] for i in rows.kept]
    key = {
        "version": VERSION,
        "model": key_of(run, writer),
        "attention": "eager" if source.spec.attention == "eager" else "sdpa",  # all else differs by rounding
        "data": {"rows": len(ids), "content": rows.completions.content, "ids": digest(*ids)},
        "precision": run.precision,
        **reply_rules(source),
    }

    def make() -> ReadJob:
        policy = load_trained(run, writer)
        completions = packed(run, source, rows.completions, policy)

        def read(batch: dict[str, Tensor]) -> Found:
            return Found(policy(batch), batch["sizes"].sum(1))

        found = partial(foreseen.per_token, completions.sizes.sum(1))
        examples = Examples(completions, ids, torch.zeros(len(ids), dtype=torch.long))
        return ReadJob(policy, read, examples, foreseen=found)

    folder = run.stages.read(stage, key, make)
    stored_ids, tensors = load_tensors(folder)
    expected = torch.from_numpy(rows.completions.sizes.sum(1))
    if stored_ids != ids or not torch.equal(tensors["sizes"], expected):
        raise TrainingError(
            f"{stage}: the log-probabilities in {folder.name} are of other tokens than those asked for; delete "
            "that folder, and it is computed anew"
        )
    if not torch.isfinite(tensors["values"]).all():
        raise TrainingError(f"{stage}: a log-probability in {folder.name} is not finite; use dtype=float32")
    return tensors["values"], tensors["sizes"], folder.name


def score(
    run: Context, stage: str, model: Trained | Source, data: Replies | ReplyPairs, name: str
) -> tuple[Tensor, str]:
    """Summed log-probabilities of each example's replies, [N, n] in the order of its encoded rows.

    Args:
        stage: its name.
        model: the one that reads.
        data: replies (n = 1) or pairs (n = 2, the chosen one first).
        name: of the rows, under which dropped ones are counted.

    Returns:
        The sums, and the name of the stage's folder for cache keys.
    """
    values, _, folder = token_values(run, stage, model, data, name)
    sizes = torch.from_numpy(encode_replies(run, run.as_trained(model).source, data, name).completions.sizes)
    owner = torch.repeat_interleave(torch.arange(sizes.numel()), sizes.flatten())
    sums = torch.zeros(sizes.numel(), dtype=torch.float64).index_add(0, owner, values.double())
    return sums.view(sizes.shape).float(), folder


def divergence(run: Context, name: str, writer: Trained, base: Trained, replies: Replies) -> np.ndarray:
    """Exact KL(writer || base) of the next token at every position of replies, averaged over each reply: [N].

    Both models must have one tokenizer. Over a model's own replies the mean estimates its divergence per token, of
    texts as they were sampled: a temperature or nucleus shifts it.
    """
    source = writer.source
    rows = encode_replies(run, source, replies, name)
    ids = [f"{replies.ids[i]}:{replies.sample[i]}" for i in rows.kept]
    key = {
        "version": VERSION,
        "model": key_of(run, writer),
        "base": key_of(run, base),
        "data": {"rows": len(ids), "content": rows.completions.content},
        "precision": run.precision,
        **reply_rules(source),
    }

    def make() -> ReadJob:
        policies = nn.ModuleList([load_trained(run, writer), load_trained(run, base)])
        completions = packed(run, source, rows.completions, policies[0])

        def read(batch: dict[str, Tensor]) -> Tensor:
            (p, q), heads = (policy.states(batch) for policy in policies), [policy.head() for policy in policies]
            tokens = position_kl(p, heads[0][0], q, heads[1][0], heads[0][1], heads[1][1], softcap=policies[0].softcap)
            sums = torch.zeros(batch["sizes"].numel(), device=tokens.device).index_add(0, batch["owner"], tokens)
            return sums / batch["sizes"].flatten()

        examples = Examples(completions, ids, torch.zeros(len(ids), dtype=torch.long))
        return ReadJob(policies, read, examples, foreseen=partial(foreseen.numbers, len(ids)))

    return values_of(run.stages.read(name, key, make, whole=True), ids).double().numpy()
