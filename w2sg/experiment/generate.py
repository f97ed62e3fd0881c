"""Replies that language models write: plain samples, and contrastive decoding of a pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.config.options import Sampling
from w2sg.data.loading import Examples
from w2sg.data.replies import Prompts, Replies
from w2sg.data.table import digest
from w2sg.decoding.contrastive import Decoded, ReplyRows
from w2sg.decoding.engine import Engine, Several
from w2sg.decoding.text_engine import TextEngine
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.experiment.context import Context
from w2sg.experiment.keys import key_of
from w2sg.experiment.positions import limit_of, say_ends, too_long
from w2sg.experiment.replies import load_trained
from w2sg.experiment.text_engines import text_engine
from w2sg.models.policy import padding
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.reports.words import counted
from w2sg.store.shards import Found
from w2sg.training import foreseen
from w2sg.training.foreseen import Foreseen
from w2sg.training.inputs import VERSION
from w2sg.training.stage_values import load_tensors
from w2sg.training.stages import ReadJob

log = logging.getLogger(__name__)


def generate(
    run: Context,
    name: str,
    model: Trained | Source,
    prompts: Prompts,
    sampling: Sampling,
    settings: Sequence[Sequence[float]] | None = None,
    contrast: Trained | Source | None = None,
    samples: int = 1,
) -> Replies:
    """Let a model write to prompts, or a pair of models by contrastive decoding (ConG, arXiv 2510.07884).

    Args:
        name: the stage.
        model: the one that writes.
        prompts: what is answered.
        sampling: lengths, batches and the engine; its own settings where none are given.
        settings: rows of `w2sg.decoding.sampling.Settings`; each prompt is answered with each of them.
        contrast: the model before its alignment, whose log-probabilities are subtracted.
        samples: replies to each prompt with each setting.

    Raises:
        UserError: no prompt fits into ``max_length``, or the engine cannot run the model.
    """
    writer, reference = run.as_trained(model), None if contrast is None else run.as_trained(contrast)
    source = writer.source
    # a pair is read by our own engine
    engine = None if reference is not None else text_engine(run, writer, getattr(sampling, "engine", None))
    columns = [sampling.columns()] if settings is None else [list(row) for row in settings]
    ids = source.chat.prompts(prompts.texts)
    run.reading.chats(source.chat, prompts.texts, ids)
    room = source.spec.max_length if engine is None else engine.max_length
    limit, shortest = limit_of([source] if reference is None else [source, reference.source])
    beyond = [] if limit is None else [p for p, row in enumerate(ids) if limit < len(row) < room]
    fits = [p for p, row in enumerate(ids) if 0 < len(row) < room and (limit is None or len(row) <= limit)]
    if len(fits) < len(ids):
        refused = sum(len(row) == 0 for row in ids)
        counts = {"prompt refused by the chat template": refused, "prompt longer than max_length": -refused}
        counts["prompt longer than max_length"] += len(ids) - len(fits) - len(beyond)
        if beyond:
            counts[too_long(limit, shortest)] = len(beyond)
        run.dropped[name] = {reason: count for reason, count in counts.items() if count}
        log.info("%s: left out %s", name, ", ".join(counted(n, reason) for reason, n in run.dropped[name].items()))
    if not fits:
        if beyond:
            raise UserError(f"{name}: no prompt fits: every {too_long(limit, shortest)}; choose another model for it")
        raise UserError(f"{name}: every prompt is longer than max_length={room}; raise it")
    each = len(columns) * samples
    rows = ReplyRows(
        prompts=[ids[p] for p in fits],
        prompt_ids=[prompts.ids[p] for p in fits],
        prompt_of=np.repeat(np.arange(len(fits)), each),
        sample=np.tile(np.repeat(np.arange(samples), len(columns)), len(fits)),
        settings=np.tile(np.array(columns, np.float64), (len(fits) * samples, 1)),
        max_new_tokens=sampling.max_new_tokens,
        seed=run.stage_seed(name),
    )
    group = np.tile(np.arange(len(columns)), len(fits) * samples)
    key = {
        "version": VERSION,
        "model": key_of(run, writer),
        **({} if reference is None else {"reference": key_of(run, reference)}),
        "prompts": {"rows": len(fits), "content": digest(*(str(row.tolist()) for row in rows.prompts))},
        "ids": digest(*rows.prompt_ids),
        "stop": source.chat.stop,
        **padding(source),
        "settings": columns,
        "samples": samples,
        "max_new_tokens": sampling.max_new_tokens,
        "precision": run.precision,
        "seed": rows.seed,
    }
    row_ids = [f"{rows.prompt_ids[p]}:{s}:{g}" for p, s, g in zip(rows.prompt_of, rows.sample, group, strict=True)]

    if engine is not None:
        key = {**key, **engine.key()}
        found = partial(_foreseen, source, rows, limit, sampling, 1)
        answer = partial(_by_engine, engine, rows, source.chat.stop)
        folder = run.stages.ask(name, key, row_ids, answer, engine, lambda _: replace(found(), ids=row_ids))
    else:
        found = partial(_foreseen, source, rows, limit, sampling, 1 if reference is None else 2)
        make = partial(_writing, run, writer, reference, rows, row_ids, sampling, found)
        folder = run.stages.read(name, key, make, whole=True)
    _, tensors = load_tensors(folder)
    # of each reply [T, 1 + m]: a token's id, and its log-probability by each of m models
    parts = np.split(tensors["values"].numpy(), np.cumsum(tensors["sizes"].numpy())[:-1])
    if limit is not None and engine is None:
        sizes, stopped = [len(part) for part in parts], tensors["flags"].numpy().astype(bool)
        rooms = [limit + 1 - len(rows.prompts[p]) for p in rows.prompt_of]
        full = [not end and n == r < rows.max_new_tokens for n, r, end in zip(sizes, rooms, stopped, strict=True)]
        say_ends(run, name, shortest, sum(full), len(parts))
    cut = [source.chat.cut(part[:, 0].astype(np.int64)) for part in parts]
    tokens = [row for row, _ in cut]
    parts = [part[: len(row)] for part, row in zip(parts, tokens, strict=True)]
    # what is taught and judged is the reply without its thought; one whose thought never ended is not finished
    begins = [source.chat.thought(row) for row in tokens]
    closed = np.array([not at or source.chat.said(row).closed for at, row in zip(begins, tokens, strict=True)], bool)
    run.reading.thoughts(name, sum(at > 0 for at in begins), int((~closed).sum()))
    tokens = [row[at:] for at, row in zip(begins, tokens, strict=True)]
    parts = [part[at:] for at, part in zip(begins, parts, strict=True)]
    return Replies(
        ids=[rows.prompt_ids[p] for p in rows.prompt_of],
        prompts=[prompts.texts[fits[p]] for p in rows.prompt_of],
        texts=[source.chat.text(row) for row in tokens],
        finished=closed & (tensors["flags"].numpy().astype(bool) | np.array([ended for _, ended in cut], bool)),
        sample=rows.sample,
        group=group,
        key={"stage": folder.name},
        tokens=tokens,
        log_probabilities=[part[:, 1:] for part in parts],
        fingerprint=source.chat.fingerprint,
    )


def _foreseen(source: Source, rows: ReplyRows, limit: int | None, sampling: Sampling, models: int) -> Foreseen:
    """What a plan takes for the replies."""
    most = rows.max_new_tokens
    return foreseen.replies(
        source.chat, rows.prompts, rows.prompt_of, most, limit, sampling.batch_size, models, rows.seed
    )


def _writing(
    run: Context,
    writer: Trained,
    reference: Trained | None,
    rows: ReplyRows,
    ids: list[str],
    sampling: Sampling,
    found: Callable[[], Foreseen],
) -> ReadJob:
    policies, engine = _engine(run, writer, reference)
    stop = writer.source.chat.stop

    def read(batch: dict[str, Tensor]) -> Found:
        written = rows.write(engine(), batch, stop)
        values, sizes, flags = (x.to(batch["row"].device) for x in _tensors(written))
        return Found(values, sizes, flags, written.useful, written.forwards)

    examples = Examples(rows, ids, torch.zeros(len(ids), dtype=torch.long))
    both = 1 if reference is None or len(policies) == 2 else 2  # one model's adapters, and its base beside them
    size = {"rows": sampling.batch_size, "written": both}
    return ReadJob(policies, read, examples, **size, verb="writing", unit="replies", foreseen=found)


def _by_engine(engine: TextEngine, rows: ReplyRows, stop: Sequence[int], places: np.ndarray) -> Found:
    written = engine.sample(rows.take(places), stop)
    return Found(*_tensors(written), written.useful, written.forwards)


def _engine(run: Context, writer: Trained, reference: Trained | None) -> tuple[nn.ModuleList, Any]:
    """The models that write, and what makes an engine of them once they are on their device."""
    adapters_of = reference is not None and reference.folder is None and reference.source is writer.source
    first = load_trained(run, writer)
    if adapters_of and first.adapted:
        return nn.ModuleList([first]), lambda: TransformersEngine(first, base_too=True)
    policies = nn.ModuleList([first] if reference is None else [first, load_trained(run, reference)])

    def engine() -> Engine:
        engines = [TransformersEngine(policy) for policy in policies]
        return engines[0] if len(engines) == 1 else Several(*engines)

    return policies, engine


def _tensors(written: Decoded) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and log-probabilities as one [T, 1 + m] table, tokens of each reply, and whether it was finished."""
    values = [
        np.concatenate([tokens[:, None].astype(np.float64), logs], 1)
        for tokens, logs in zip(written.tokens, written.log_probabilities, strict=True)
    ]
    # token ids are whole numbers far below 2^24, which fp32 holds exactly
    flat = torch.from_numpy(np.concatenate(values)).float()
    return flat, torch.tensor([len(v) for v in values]), torch.from_numpy(written.stopped.astype(np.int64))
