"""How far a decoder's replies are from the strong model, in nats of a Kullback-Leibler divergence, where there is one.

Both laws are of whole replies and of the same sampling: what a decoder writes at a temperature is held against what the
strong model writes at it. Shapes: N replies, M tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.data.completions import Completions
from w2sg.data.loading import Examples
from w2sg.decoding.decoders import Decoder
from w2sg.losses.logprobs import kl_divergence, log_ratio
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.models.policy import padding
from w2sg.training import foreseen
from w2sg.training.inputs import VERSION
from w2sg.training.stage_values import values_of
from w2sg.training.stages import ReadJob

if TYPE_CHECKING:
    from w2sg.data.replies import Replies
    from w2sg.experiment.decode import Pair
    from w2sg.experiment.run import Run
    from w2sg.models.trained import Trained

CHUNK = 512  # tokens whose logits are held at a time


def next_token_kl(base: Tensor, pair: Tensor | None, direct: Tensor | None, beta: float, temperature: float) -> Tensor:
    """Exact KL of the next token at a temperature: [M] nats.

    Args:
        base: [M, V] logits of the strong model, which the other law is held against.
        pair: [2, M, V] of the small model tuned and untuned: the other law is base + beta (tuned - untuned).
        direct: [M, V] of a model that is the other law by itself; one of the two is given.
    """
    other = base + beta * log_ratio(pair[0], pair[1]) if direct is None else direct
    q, p = (logits.double().div(temperature).log_softmax(-1) for logits in (other, base))
    return kl_divergence(q, p)


def why_no_law(sampled: Decoder, server: bool, stops: bool) -> str | None:
    """Why the divergence of what samples token by token cannot be worked out; None where it can.

    Args:
        sampled: how. server: whether a server writes. stops: whether strings end a reply (``method.style``).
    """
    if server:
        return "a server of texts gives no logits"
    if sampled.temperature == 0:
        return "at temperature 0 each prompt has one reply"
    if sampled.top_k or sampled.top_p < 1:
        return "top_k or top_p leaves out tokens that the other law may take, so that it is infinite"
    if stops:
        return "a reply ends where a string begins whose tokens are not kept, so a part of it would be left out"
    return None


def divergence(
    run: Run, name: str, strong: Trained, other: Pair | Trained, beta: float, temperature: float, replies: Replies
) -> np.ndarray:
    """[N] of which the mean estimates KL(other || strong) of whole replies, over what the other wrote.

    By the chain rule the divergence of replies is the mean over replies of the sum of those of each next token; the sum
    of log-ratios has the same mean (it is one draw from each), and more noise.

    Args:
        name: of the stage. other: the small pair, whose tilted logits wrote (Eft), or a model that did.
    """
    pair = None if hasattr(other, "source") else other
    writers = [strong, *([other] if pair is None else [pair.tuned, pair.untuned])]
    prompts = strong.source.chat.prompts(replies.prompts)
    answered = [k for k, row in enumerate(replies.tokens) if len(row)]  # what ends a reply may have been all of it
    rows = Completions([prompts[k] for k in answered], [(replies.tokens[k],) for k in answered])
    ids = [f"{replies.ids[k]}:{replies.sample[k]}" for k in answered]
    key = {
        "version": VERSION,
        "models": [run.key_of(writer) for writer in writers],
        "beta": beta if pair is not None else None,
        "temperature": temperature,
        "data": {"rows": len(ids), "content": rows.content},
        "precision": run.precision,
    }
    unwritable = [padding(writer.source).get("unwritable") for writer in writers]
    if any(unwritable):
        key["unwritable"] = unwritable

    def make() -> ReadJob:
        policies = nn.ModuleList([run.load(writer) for writer in writers])
        inputs = Completions(rows.prompts, rows.replies, packed=False)

        def read(batch: dict[str, Tensor]) -> Tensor:
            states = [policy.states(batch) for policy in policies]
            # the same tokens of each model, [at most CHUNK, D]: logits of all at once would not fit
            parts = zip(*(s.split(CHUNK) for s in states), strict=True)
            logits = ([policy.logits(s) for policy, s in zip(policies, part, strict=True)] for part in parts)
            # the law is of what may be written, the same ids of each
            writable = policies[0].writable
            writable = None if writable is None else writable.to(batch["source"].device)
            tokens = torch.cat([_kl(part, writable) for part in logits]).float()
            return torch.zeros(batch["sizes"].numel(), device=tokens.device).index_add(0, batch["owner"], tokens)

        examples = Examples(inputs, ids, torch.zeros(len(ids), dtype=torch.long))
        return ReadJob(policies, read, examples, foreseen=partial(foreseen.numbers, len(ids)))

    def _kl(logits: list[Tensor], writable: Tensor | None) -> Tensor:
        least = min(x.shape[-1] for x in logits)  # some models pad their vocabulary
        kept = slice(least) if writable is None else writable[:least].nonzero()[:, 0]
        base, *small = (x[..., kept] for x in logits)
        if pair is None:
            return next_token_kl(base, None, small[0], 0.0, temperature)
        return next_token_kl(base, torch.stack(small), None, beta, temperature)

    values = np.zeros(len(replies))
    values[answered] = values_of(run.stages.read(name, key, make, whole=True), ids).double().numpy()
    return values


def frontier(
    run: Run,
    strong: Trained,
    pair: Pair | None,
    decoder: Decoder,
    replies: dict[str, Replies],
    server: bool,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The divergence of each system from the strong model in nats per reply, and why others have none.

    Args:
        replies: of each system, as `w2sg.evaluation.decoders.Comparison` has them.

    Returns:
        By system ``value``, ``low``, ``high`` and ``how``: "itself", "exact" (for the replies drawn) or "at most".
    """
    divergences: dict[str, dict[str, Any]] = {"plain": {"value": 0.0, "low": 0.0, "high": 0.0, "how": "itself"}}
    without: dict[str, str] = {}
    stops = bool(strong.source.chat.stop_strings)
    if "guide" in replies:
        reason = why_no_law(decoder, server, stops)
        if reason is None and replies["guide"].fingerprint != strong.source.chat.fingerprint:
            reason = "its tokenizer or template is another, so its replies have no law in the strong model's tokens"
        if reason is not None:
            without["guide"] = reason
        else:
            values = divergence(run, "guide-kl", strong, pair.tuned, 0.0, decoder.temperature, replies["guide"])
            divergences["guide"] = Bootstrap(len(values)).mean(values).as_dict() | {"how": "exact"}
    law = decoder.law()
    if law.how == "itself":
        return divergences, without
    reason = law.why or (why_no_law(decoder, server, stops) if law.how == "exact" else None)
    if reason is not None:
        without[decoder.kind] = reason
    elif law.how == "at most":
        divergences[decoder.kind] = {"value": law.bound, "low": None, "high": None, "how": law.how}
    else:
        texts = replies[decoder.kind]
        values = divergence(run, f"{decoder.stage}-kl", strong, pair, law.tilt, decoder.temperature, texts)
        divergences[decoder.kind] = Bootstrap(len(values)).mean(values).as_dict() | {"how": law.how}
    return divergences, without
