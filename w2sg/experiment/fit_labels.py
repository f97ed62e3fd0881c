"""Fits on labels: weak models, students, ceilings, reward models."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from w2sg import losses
from w2sg.config.build import fit_options, function_identity
from w2sg.config.schema import FitOptions
from w2sg.data import noise
from w2sg.data.labels import Labels
from w2sg.data.loading import Examples, Features
from w2sg.data.table import Table, digest
from w2sg.errors import UserError
from w2sg.experiment.asking import as_read, questions_of, scorer_of
from w2sg.experiment.context import Context
from w2sg.experiment.keys import label_key, label_rules
from w2sg.experiment.predict import asked
from w2sg.models.attention import in_words
from w2sg.models.heads import LinearHead, MixtureHead, load_head
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.training.inputs import VERSION, content_key
from w2sg.training.keeping import Keep
from w2sg.training.label_modules import SoftLabelModule
from w2sg.training.label_token_module import LabelTokenModule
from w2sg.training.stages import FitJob

log = logging.getLogger(__name__)


def fit(
    run: Context,
    name: str,
    source: Source,
    table: Table,
    labels: Labels,
    loss: partial | None = None,
    rows: np.ndarray | None = None,
    like: str | None = None,
    evaluated: bool = True,
) -> Trained:
    """Train a model on labels.

    Args:
        name: the stage. It seeds the stage together with the run's seed, so runs that differ in their loss alone
            start from the same weights and see the same batches: their differences are paired.
        source: the model.
        table: the rows.
        labels: of the rows.
        loss: the run's loss, for the student; None is cross entropy on ground truth.
        rows: places of the rows that are learned, some of them perhaps more than once; None for all.
        like: the stage by whose name it is seeded, to be paired with it.
        evaluated: its accuracy on the test split is measured over training steps, where ``logger.eval_every`` says so.

    Raises:
        UserError: labels are no numbers.
    """
    if lost := labels.without_probabilities():
        raise UserError(
            f"run.fit: the labels of {name!r} have logits in {lost:,} of {len(labels.logits):,} rows that are no "
            "numbers (NaN, or all infinite); look at whatever gave them"
        )
    options = fit_options(run.config, source.spec)
    layer = run.inputs.layer(source) if source.spec.train == "head" else None
    key = fit_key(run, name, source, table, labels, loss, options, layer)
    if rows is not None:
        key["rows"] = digest(*(table.ids[row] for row in rows))
    experts: list[Trained] = []
    if source.spec.head == "mixture":
        experts = _experts(run, name, source, table, labels, layer, rows, like)
        key["experts"] = [expert.folder.name for expert in experts]
    if like is not None:
        key["like"] = like
    watch = run.data.test if evaluated and run.evaluates(layer is not None or source.spec.arch == "bow") else None
    make = partial(_fit_job, run, like or name, source, labels, loss, options, layer, experts, rows, watch)
    folder = run.stages.fit(name, key, make, watch is not None, Keep.of(source.spec, source.role))
    return Trained(name, source, folder, layer)


def ceiling(run: Context, split: str) -> Trained:
    """The strong model trained on the ground truth of a split, ``transfer`` or ``weak_train``."""
    table = {"transfer": run.data.transfer, "weak_train": run.data.ground_truth}[split]
    return fit(run, "ceiling", run.strong, table, run.gold(table))


def fit_key(
    run: Context,
    name: str,
    source: Source,
    table: Table,
    labels: Labels,
    loss: partial | None,
    options: FitOptions,
    layer: int | None,
) -> dict[str, Any]:
    """Everything that decides the weights of a fit on labels, which its stage in the store is found by."""
    training = run.config.training
    questions = questions_of(run, source)
    source, table = as_read(run, source, table)
    objective: dict[str, Any] = {"loss": "cross_entropy"}
    if loss is not None:
        objective = {
            "loss": function_identity(run.config.loss),
            "label_smoothing": training.label_smoothing,
            "hard_label_clamp": training.hard_label_clamp,
        }
        if options.validation > 0:
            objective["select_on"] = training.select_on
    return {
        "version": VERSION,
        "model": {**source.identity, **label_key(source.spec, layer), **label_rules(source, table)},
        **Keep.of(source.spec, source.role).key,
        "data": {**content_key(table), "kind": table.kind, "classes": table.classes},
        "orientation": hashlib.sha256(table.first.tobytes()).hexdigest()[:16],
        "labels": labels.key,
        "objective": objective,
        "optimization": options.key(),
        "precision": run.scoring_precision,
        "seed": run.seed,
        **({} if questions is None else {"label_tokens": questions.key()}),
        **run.inputs.read(source, table),
    }


def _fit_job(
    run: Context,
    name: str,
    source: Source,
    labels: Labels,
    loss: partial | None,
    options: FitOptions,
    layer: int | None,
    experts: list[Trained],
    rows: np.ndarray | None = None,
    watch: Table | None = None,
) -> FitJob:
    questions = questions_of(run, source)
    found, (source, table) = source, as_read(run, source, labels.table)
    if watch is not None:
        watch = as_read(run, found, watch)[1]
    seed = run.stage_seed(name)
    targets, notes = targets_of(run, labels, loss)
    states = run.inputs.features(source, table, layer) if layer is not None else None
    seen, whole = None, None
    if layer is not None and watch is not None:
        with run.inputs.aside():
            seen = Features(run.inputs.features(source, watch, layer, asked(run, source, watch)))
    # after everything that may or may not be in the store, so that the first weights do not depend on it
    L.seed_everything(seed, workers=True, verbose=False)
    if states is not None:
        inputs, scorer = Features(states), _new_head(run, states, experts)
        notes["head"] = "drawn at random" if not experts else "a mixture of trained ones"
    else:
        scorer = scorer_of(run, found)
        if head := getattr(scorer, "head", None):
            notes["head"] = head
            log.log(logging.INFO if head == "drawn at random" else logging.WARNING, "%s: its head is %s", name, head)
        inputs = run.inputs.tokens(source, table, scorer)
        notes |= inputs.notes(source.spec.share_prompt)
        if source.spec.arch == "hf":
            notes["attention"] = in_words(source.spec.attention, run.devices.fabric.device)
        if watch is not None:
            with run.inputs.aside():
                seen = run.inputs.tokens(source, watch, scorer)
    if questions is not None:
        notes |= questions.notes()
        whole = run.inputs.answered(source, table, questions, targets)
        inputs = whole or inputs
    examples = Examples(inputs, table.ids, torch.as_tensor(table.first), targets, torch.as_tensor(table.labels))
    if rows is not None:
        examples = examples.take(rows)
    examples, held_out = run.hold_out(examples, options.validation)
    if held_out is not None:
        notes["held_out"] = len(held_out)
    gold = loss is not None and run.config.training.select_on == "gold"
    module = SoftLabelModule if whole is None else LabelTokenModule
    module = partial(module, loss=loss or losses.cross_entropy, select_on_gold=gold)
    watched = {}
    if watch is not None:
        watched["test"] = Examples(seen, watch.ids, torch.as_tensor(watch.first), gold=torch.as_tensor(watch.labels))
        if held_out is not None:
            watched["held_out"] = held_out
    micro = source.spec.micro_batch, notes, watched, source.spec.micro_tokens, source.role
    return FitJob(scorer, module, examples, held_out, options, seed, *micro)


def _new_head(run: Context, states: Tensor, experts: list[Trained]) -> LinearHead:
    if not experts:
        head = LinearHead(states.shape[-1], run.pairs, run.classes)
        head.standardise(states)
        return head
    mixture = MixtureHead(states.shape[-1], run.pairs, run.classes, len(experts))
    mixture.set_experts([load_head(expert.saved) for expert in experts])
    return mixture


def _experts(
    run: Context,
    name: str,
    source: Source,
    table: Table,
    labels: Labels,
    layer: int,
    learned: np.ndarray | None,
    like: str | None,
) -> list[Trained]:
    """The fixed experts of a mixture head: linear heads trained by cross entropy on disjoint parts of the rows."""
    linear = replace(source, spec=source.spec.model_copy(update={"head": "linear"}))
    options = fit_options(run.config, linear.spec)
    count, keep = source.spec.experts, Keep.of(source.spec, source.role)
    fold = np.array([int(noise.draw(run.seed, f"expert:{i}") * count) for i in table.ids])
    experts = []
    for k in range(count):
        stage = f"{name}-expert{k}"
        key = fit_key(run, stage, linear, table, labels, None, options, layer) | {"fold": [k, count]}
        rows = np.flatnonzero(fold == k) if learned is None else learned[fold[learned] == k]
        if learned is not None:
            key["rows"] = digest(*(table.ids[row] for row in rows))
        if like is not None:
            key["like"] = like
        make = partial(_fit_job, run, f"{like or name}-expert{k}", linear, labels, None, options, layer, [], rows)
        experts.append(Trained(stage, linear, run.stages.fit(stage, key, make, keep=keep), layer))
    return experts


def targets_of(run: Context, labels: Labels, loss: partial | None) -> tuple[Tensor, dict[str, Any]]:
    """What the loss sees: smoothed, and clamped where hard. Ground truth under cross entropy stays as it is."""
    logits, notes = labels.logits.float(), {}
    if loss is None:
        return logits, notes
    training = run.config.training
    if training.label_smoothing:
        logits = losses.smooth(logits, training.label_smoothing)
    if training.hard_label_clamp is not None:
        logits, clamped = losses.clamp_hard(logits, training.hard_label_clamp)
        notes["hard_labels_clamped"] = int(clamped.sum())
        if clamped.any():
            low = training.hard_label_clamp
            log.info(
                "%d hard labels are clamped to [%g, %g] (optim.hard_label_clamp)",
                int(clamped.sum()),
                low,
                1 - low,
            )
    return logits, notes
