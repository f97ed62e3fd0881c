"""Fits of language models on replies: supervised fine-tuning, preference optimisation (DPO and its kin), WSPO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from w2sg.config.options import DPO, SFT
from w2sg.data.completions import Completions
from w2sg.data.loading import Examples
from w2sg.data.replies import Replies, ReplyPairs
from w2sg.data.table import digest
from w2sg.errors import UserError
from w2sg.experiment.context import Context
from w2sg.experiment.keys import key_of, reply_rules
from w2sg.experiment.replies import encode_replies, load_trained, packed
from w2sg.experiment.score import score, token_values
from w2sg.losses import preferences
from w2sg.models.attention import in_words
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.training.inputs import VERSION
from w2sg.training.keeping import Keep
from w2sg.training.stages import FitJob
from w2sg.training.text_modules import PreferenceModule, SupervisedModule, WeakTargetModule


def _fit(
    run: Context,
    name: str,
    start: Trained | Source,
    data: Replies | ReplyPairs,
    options: SFT,
    key: dict[str, Any],
    module: Any,
    targets: Tensor | None = None,
    columns: list[np.ndarray] | None = None,
) -> Trained:
    start = run.as_trained(start)
    source = start.source
    spec = source.spec
    rows = encode_replies(run, source, data, name)
    fit_options = options.fit_options(spec.train)
    ids, keep = [data.ids[i] for i in rows.kept], Keep.of(spec, source.role)
    full_key = {
        "version": VERSION,
        "start": key_of(run, start),
        "train": {"mode": spec.train, **({"lora": spec.lora.key()} if spec.train == "lora" else {})},
        "dropout": spec.dropout,
        "data": {"rows": len(ids), "content": rows.completions.content, "ids": digest(*ids)},
        "from": data.key,
        "optimization": fit_options.key(),
        "precision": run.precision,
        "seed": run.seed,
        **reply_rules(source),
        **keep.key,
        **key,
    }

    def make() -> FitJob:
        seed = run.stage_seed(name)
        L.seed_everything(seed, workers=True, verbose=False)  # adapters are drawn from the stage's own seed
        policy = load_trained(run, start, trainable=True)
        completions = packed(run, source, rows.completions, policy)
        completions = Completions(completions.prompts, completions.replies, columns, completions.packed)
        examples = Examples(completions, ids, torch.zeros(len(ids), dtype=torch.long), targets)
        examples, held_out = run.hold_out(examples, fit_options.validation)
        notes = {"dropped": run.dropped.get(name, {}), "packed": completions.packed}
        notes["attention"] = in_words(spec.attention, run.devices.fabric.device)
        watched = {"held_out": held_out} if run.evaluates(cheap=False) and held_out is not None else {}
        micro = spec.micro_batch, notes, watched, spec.micro_tokens, source.role
        return FitJob(policy, module, examples, held_out, fit_options, seed, *micro)

    evaluated = run.evaluates(cheap=False) and fit_options.validation > 0
    if run.evaluates(cheap=False) and not evaluated:
        line = f"{name}: not measured over its steps (logger.eval_every), since no rows are held out; set its "
        line += "validation_fraction above 0"
        run.stages.notes += [line] if line not in run.stages.notes else []
    folder = run.stages.fit(name, full_key, make, evaluated, keep)
    if name in run.stages.unmeasured:
        line = f"{name}: comes from the store, from a run that did not measure it over its steps (logger.eval_every)"
        run.stages.notes += [line] if line not in run.stages.notes else []
    return Trained(name, source, folder)


def sft(
    run: Context, name: str, start: Trained | Source, replies: Replies, options: SFT, confidence: float = 0.0
) -> Trained:
    """Supervised fine-tuning (SFT) on replies.

    Args:
        name: the stage.
        start: the model that training starts from.
        replies: what is learned.
        options: of the optimisation.
        confidence: weight of the auxiliary confidence loss (Burns et al. 2023); 0 leaves it out.
    """
    goal = {"objective": {"loss": "supervised", **({"confidence": confidence} if confidence else {})}}
    return _fit(run, name, start, replies, options, goal, partial(SupervisedModule, confidence=confidence))


def dpo(run: Context, name: str, start: Trained | Source, pairs: ReplyPairs, options: DPO) -> Trained:
    """Direct preference optimisation (DPO, arXiv 2305.18290), or the objective that ``options.loss`` names.

    Args:
        name: the stage.
        start: the model that training starts from, which is the reference as well.
        pairs: chosen and rejected replies.
        options: of the optimisation and the objective.
    """
    start, goal = run.as_trained(start), options.objective()
    parameters = {k: v for k, v in goal.items() if k in preferences.options_of(options.loss)}
    free = options.loss in preferences.REFERENCE_FREE
    targets, key = torch.zeros(len(encode_replies(run, start.source, pairs, name).kept), 2), {"objective": goal}
    if not free:
        values, stage = score(run, f"{name}-reference", start, pairs, name)
        targets, key["reference"] = values, stage
    module = partial(
        PreferenceModule,
        loss=partial(preferences.LOSSES[options.loss], beta=options.beta, **parameters),
        beta=options.beta,
        supervised=options.supervised,
        supervised_mean=options.supervised_mean,
        reference_free=free,
        per_token=options.loss in preferences.PER_TOKEN,
    )
    return _fit(run, name, start, pairs, options, key, module, targets)


def wspo(
    run: Context,
    name: str,
    start: Trained | Source,
    weak: tuple[Trained, Trained],
    replies: Replies,
    options: SFT,
    gamma: float,
) -> Trained:
    """Weak-to-strong preference optimisation (WSPO, arXiv 2410.18640).

    The strong model's change is to be that of the weak pair, token by token.

    Args:
        name: the stage.
        start: the model that training starts from.
        weak: the weak model after and before its alignment.
        replies: on whose tokens the change of the weak pair is imitated.
        options: of the optimisation.
        gamma: factor on the strong model's change.

    Raises:
        UserError: the tokenizers differ, so that there are no common tokens.
    """
    start = run.as_trained(start)
    one_tokenizer([writer.source for writer in (start, *weak)])
    parts, stages = [], []
    for writer in (start, *weak):
        values, sizes, stage = token_values(run, f"{name}-{writer.name}", writer, replies, name)
        parts.append(values)
        stages.append(stage)
    columns = list(torch.stack(parts, 1).split(sizes.tolist()))
    key = {"objective": {"loss": "wspo", "gamma": gamma}, "targets": stages}
    module = partial(WeakTargetModule, gamma=gamma)
    return _fit(run, name, start, replies, options, key, module, columns=[c.numpy() for c in columns])


def one_tokenizer(sources: Sequence[Source]) -> None:
    """What WSPO needs.

    Raises:
        UserError: tokenizers, templates or lengths differ, so that there are no common tokens.
    """
    if len({source.chat.fingerprint for source in sources}) > 1:
        raise UserError(
            "method.baselines: wspo compares the models token by token, which needs one tokenizer and chat template "
            "for weak and strong; leave wspo out"
        )
    if len({source.spec.max_length for source in sources}) > 1:
        raise UserError(
            "method.baselines: wspo compares the models token by token, so they must read the same length; set "
            "weak.max_length and strong.max_length to one number, or leave wspo out"
        )


def one_vocabulary(tuned: Source, untuned: Source) -> None:
    """What every log-ratio of a model after and before its alignment needs.

    Raises:
        UserError: a token id stands for different texts in the two.
    """
    if tuned.chat.vocabulary != untuned.chat.vocabulary:
        raise UserError(
            f"weak.before_alignment: {untuned.spec.name} has another vocabulary than {tuned.spec.name}, so it is not "
            "that model before its alignment; name the one that it was tuned from"
        )
