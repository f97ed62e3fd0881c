"""A run: one configuration, its data and models, and the verbs that methods are written in."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from w2sg import losses
from w2sg.config.check import build, fit_options, function_identity
from w2sg.config.schema import FitOptions, ModelConfig, TrainConfig
from w2sg.config.unread import unread
from w2sg.data import noise, splits
from w2sg.data.loading import Examples, Features
from w2sg.data.table import Table, digest
from w2sg.errors import ConfigError, TrainingError, UserError
from w2sg.metrics.theory import GAMMA
from w2sg.models.heads import LinearHead, MixtureHead, load_head
from w2sg.models.loading import Source, find, load_scorer
from w2sg.models.packing import rules_key
from w2sg.models.reading import Reading
from w2sg.models.zero_shot import answers_key, load_zero_shot, questioned, why_not
from w2sg.reports.report import Report, make_report
from w2sg.store.store import Store
from w2sg.training.devices import Devices
from w2sg.training.inputs import VERSION, InputMaker, content_key
from w2sg.training.label_modules import SoftLabelModule, oriented
from w2sg.training.loggers import Loggers
from w2sg.training.stages import FitJob, ReadJob, Stages, load_values

log = logging.getLogger(__name__)
NOISE_OPTIONS = {
    "none": [],
    "flip": ["rate"],
    "shrink": ["rate", "shrink"],
    "hard_flip": ["rate"],
    "class_conditional": ["rates"],
}


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

    def take(self, rows: np.ndarray) -> Labels:
        """Of some rows alone."""
        return Labels(self.table.take(rows), self.logits[torch.from_numpy(rows)], self.key, self.notes)


@dataclass(frozen=True)
class Model:
    """A finished fit: where it lies and what it reads.

    Attributes:
        folder: of the stage; None for a reward model that is used as it was found.
        layer: of the frozen features it reads; None when it reads tokens.
    """

    name: str
    folder: Path | None
    source: Source
    layer: int | None


def _served(config: TrainConfig) -> bool:
    """Whether a server writes in place of the strong model, of which the tokenizer alone is read."""
    decoder = config.method.get("decoder")
    server = decoder.get("server") if isinstance(decoder, dict) else None
    return isinstance(server, dict) and server.get("url") is not None


class Run:
    """One experiment.

    Args:
        config: as checked by `w2sg.config.check`.
        out: the run's folder.
        typed: what the user typed, for the report.

    Attributes:
        weak, strong: the two models. untuned: the weak one before its alignment, where it is given.
        data: ``ground_truth``, ``transfer`` and ``test``. loss: the student's objective.
    """

    def __init__(self, config: TrainConfig, out: Path, typed: list[str] | None = None):
        self.config, self.out, self.typed = config, Path(out), typed or []
        # Whatever can be found missing is looked for before any work is done.
        self.weak = find(config.weak, "weak")
        self.strong = find(config.strong, "strong", weights=not _served(config))
        self.untuned = None
        if config.weak.untuned is not None:
            before = config.weak.model_copy(update={"name": config.weak.untuned, "revision": None})
            self.untuned = find(before, "weak")
        self.data = splits.load_tables(config.dataset.model_dump(by_alias=True), config.seed)
        if problems := noise.problems(config.dataset.noise.model_dump(), self.data.test.classes):
            raise ConfigError(problems)
        if self.data.test.kind == "answers" and not _reads_answers(config):
            raise UserError(
                f"dataset: {config.dataset.name} has questions with answers and no labels, which "
                f"{config.method['_target_'].rpartition('.')[2]} needs; use method=refine, or a dataset with "
                "preference pairs or classes"
            )
        for source in filter(None, (self.weak, self.strong, self.untuned)):
            source.check_texts()
        self.pairs, self.classes = self.data.test.kind == "pairs", self.data.test.classes
        self.loss = build(config.loss)
        self.devices = Devices(config.trainer)
        self.loggers = Loggers(config, self.out, self.devices.main)
        self.stages = Stages(
            Store(config.store),
            self.devices,
            self.loggers.stage,
            config.trainer.checkpoint_minutes,
            config.logger.every,
        )
        for source in filter(None, (self.weak, self.strong, self.untuned)):
            self.stages.said += [line for line in source.notes if line not in self.stages.said]
        self.reading = Reading(self.stages.said)
        self.inputs = InputMaker(
            self.stages, self.data.ground_truth, config.trainer.precision, config.seed, self.reading
        )
        self.notes: dict[str, Any] = {}

    # -- labels -------------------------------------------------------------------------------------------------------

    def gold(self, table: Table) -> Labels:
        """Ground truth as hard labels."""
        logits = losses.hard_logits(torch.as_tensor(table.labels), table.classes)
        return Labels(table, logits, {"gold": table.label_hash()})

    def noisy(self, labels: Labels) -> Labels:
        """Labels with the noise of ``dataset.noise``; unchanged for kind none."""
        options = self.config.dataset.noise.model_dump()
        gold = torch.as_tensor(labels.table.labels)
        logits, self.notes["noise"] = noise.apply_noise(
            labels.logits, labels.table.ids, gold, options, self.config.seed
        )
        key = labels.key
        if options["kind"] != "none":
            used = {k: options[k] for k in ["kind", *NOISE_OPTIONS[options["kind"]]]}
            key = {**key, "noise": {**used, "seed": self.config.seed}}
        return Labels(labels.table, logits, key)

    # -- fit ----------------------------------------------------------------------------------------------------------

    def fit(
        self,
        name: str,
        source: Source,
        table: Table,
        labels: Labels,
        loss: partial | None = None,
        rows: np.ndarray | None = None,
        like: str | None = None,
    ) -> Model:
        """Train a model on labels.

        Args:
            name: the stage. It seeds the stage together with the run's seed, so runs that differ in their loss alone
                start from the same weights and see the same batches: their differences are paired.
            loss: the run's loss, for the student; None is cross entropy on ground truth.
            rows: places of the rows that are learned, some of them perhaps more than once; None for all.
            like: the stage by whose name it is seeded, to be paired with it.
        """
        options = fit_options(self.config, source.spec)
        layer = self.inputs.layer(source) if source.spec.train == "head" else None
        key = self._fit_key(name, source, table, labels, loss, options, layer)
        if rows is not None:
            key["rows"] = digest(*(table.ids[row] for row in rows))
        experts: list[Model] = []
        if source.spec.head == "mixture":
            experts = self._experts(name, source, table, labels, layer, rows, like)
            key["experts"] = [expert.folder.name for expert in experts]
        if like is not None:
            key["like"] = like
        make = partial(self._fit_job, like or name, source, labels, loss, options, layer, experts, rows)
        folder = self.stages.fit(name, key, make)
        return Model(name, folder, source, layer)

    def _fit_key(
        self,
        name: str,
        source: Source,
        table: Table,
        labels: Labels,
        loss: partial | None,
        options: FitOptions,
        layer: int | None,
    ) -> dict[str, Any]:
        training = self.config.training
        objective: dict[str, Any] = {"loss": "cross_entropy"}
        if loss is not None:
            objective = {
                "loss": function_identity(self.config.loss),
                "label_smoothing": training.label_smoothing,
                "hard_label_clamp": training.hard_label_clamp,
            }
            if options.validation > 0:
                objective["select_on"] = training.select_on
        return {
            "version": VERSION,
            "model": {**source.identity, **_model_key(source.spec, layer), **_rules(source, table)},
            "data": {**content_key(table), "kind": table.kind, "classes": table.classes},
            "orientation": hashlib.sha256(table.first.tobytes()).hexdigest()[:16],
            "labels": labels.key,
            "objective": objective,
            "optimization": options.model_dump(),
            "precision": self.config.trainer.precision,
            "seed": self.config.seed,
            **self.inputs.read(source, table),
        }

    def _fit_job(
        self,
        name: str,
        source: Source,
        labels: Labels,
        loss: partial | None,
        options: FitOptions,
        layer: int | None,
        experts: list[Model],
        rows: np.ndarray | None = None,
    ) -> FitJob:
        table = labels.table
        seed = int.from_bytes(hashlib.sha256(f"{self.config.seed}:{name}".encode()).digest()[:4], "big")
        targets, notes = self._targets(labels, loss)
        states = self.inputs.features(source, table, layer) if layer is not None else None
        # after everything that may or may not be in the store, so that the first weights do not depend on it
        L.seed_everything(seed, workers=True, verbose=False)
        if states is not None:
            inputs, scorer = Features(states), self._new_head(states, experts)
            notes["head"] = "drawn at random" if not experts else "a mixture of trained ones"
        else:
            scorer = load_scorer(source, self.pairs, self.classes)
            if head := getattr(scorer, "head", None):
                notes["head"] = head
                log.log(
                    logging.INFO if head == "drawn at random" else logging.WARNING, "%s: its head is %s", name, head
                )
            inputs = self.inputs.tokens(source, table, scorer)
            notes |= inputs.notes(source.spec.share_prompt)
        examples = Examples(inputs, table.ids, torch.as_tensor(table.first), targets, torch.as_tensor(table.labels))
        if rows is not None:
            examples = examples.take(rows)
        held_out = None
        if options.validation > 0:
            # by id, so that the same rows are held out whatever the loss and the noise
            draws = np.array([noise.draw(self.config.seed, f"held-out:{i}") for i in examples.ids])
            order = np.argsort(draws, kind="stable")
            count = min(len(order) - 1, max(1, round(options.validation * len(order))))
            held_out, examples = examples.take(np.sort(order[:count])), examples.take(np.sort(order[count:]))
            notes["held_out"] = len(held_out)
        gold = loss is not None and self.config.training.select_on == "gold"
        module = partial(SoftLabelModule, loss=loss or losses.cross_entropy, select_on_gold=gold)
        return FitJob(scorer, module, examples, held_out, options, seed, source.spec.micro_batch, notes)

    def _new_head(self, states: Tensor, experts: list[Model]) -> LinearHead:
        if not experts:
            head = LinearHead(states.shape[-1], self.pairs, self.classes)
            head.standardise(states)
            return head
        mixture = MixtureHead(states.shape[-1], self.pairs, self.classes, len(experts))
        mixture.set_experts([load_head(expert.folder / "model") for expert in experts])
        return mixture

    def _targets(self, labels: Labels, loss: partial | None) -> tuple[Tensor, dict[str, Any]]:
        """What the loss sees: smoothed, and clamped where hard. Ground truth under cross entropy stays as it is."""
        logits, notes = labels.logits.float(), {}
        if loss is None:
            return logits, notes
        training = self.config.training
        if training.label_smoothing:
            logits = losses.smooth(logits, training.label_smoothing)
        if training.hard_label_clamp is not None:
            logits, clamped = losses.clamp_hard(logits, training.hard_label_clamp)
            notes["hard_labels_clamped"] = int(clamped.sum())
            if clamped.any():
                low = training.hard_label_clamp
                log.info(
                    "%d hard labels are clamped to [%g, %g] (training.hard_label_clamp)",
                    int(clamped.sum()),
                    low,
                    1 - low,
                )
        return logits, notes

    def _experts(
        self,
        name: str,
        source: Source,
        table: Table,
        labels: Labels,
        layer: int,
        learned: np.ndarray | None,
        like: str | None,
    ) -> list[Model]:
        """The fixed experts of a mixture head: linear heads trained by cross entropy on disjoint parts of the rows."""
        linear = replace(source, spec=source.spec.model_copy(update={"head": "linear"}))
        options = fit_options(self.config, linear.spec)
        count = source.spec.experts
        fold = np.array([int(noise.draw(self.config.seed, f"expert:{i}") * count) for i in table.ids])
        experts = []
        for k in range(count):
            stage = f"{name}-expert{k}"
            key = self._fit_key(stage, linear, table, labels, None, options, layer) | {"fold": [k, count]}
            rows = np.flatnonzero(fold == k) if learned is None else learned[fold[learned] == k]
            if learned is not None:
                key["rows"] = digest(*(table.ids[row] for row in rows))
            if like is not None:
                key["like"] = like
            make = partial(self._fit_job, f"{like or name}-expert{k}", linear, labels, None, options, layer, [], rows)
            experts.append(Model(stage, self.stages.fit(stage, key, make), linear, layer))
        return experts

    # -- predict ------------------------------------------------------------------------------------------------------

    def predict(self, model: Model, table: Table) -> Labels:
        """The model's label logits for every row of a table."""
        key: dict[str, Any] = {"version": VERSION, "data": content_key(table)}
        if model.folder is not None:
            key["model"] = model.folder.name
        else:
            spec = model.source.spec
            key["model"] = {**model.source.identity, "max_length": spec.max_length, "dtype": spec.dtype}
            key["model"] |= _rules(model.source, table)
            key["precision"] = self.config.trainer.precision
        key |= self.inputs.read(model.source, table)
        folder = self.stages.read(f"{model.name}-on-{table.name}", key, lambda: self._read_job(model, table))
        return self._labels(folder, model.name, table)

    @staticmethod
    def _labels(folder: Path, name: str, table: Table) -> Labels:
        """The scores of a finished reading, joined by id, the first reply in front."""
        ids, values = load_values(folder)
        place = {i: row for row, i in enumerate(ids)}
        scores = values[[place[i] for i in table.ids]]
        bad = [i for i, ok in zip(table.ids, torch.isfinite(scores).all(-1).tolist(), strict=True) if not ok]
        if bad:
            raise TrainingError(
                f"{name}: the scores of {len(bad)} examples are not finite, first that of {bad[0]}; train it "
                "with a lower learning rate, clipping, or in float32"
            )
        return Labels(table, oriented(scores, torch.as_tensor(table.first)), {"stage": folder.name})

    def zero_shot(self, source: Source, table: Table) -> Labels | None:
        """What the untrained model answers to ``dataset.zero_shot``; None where it has none (the notes say why)."""
        asked = self.config.dataset.zero_shot
        if reason := why_not(source, table, asked):
            self.notes["zero_shot"] = f"none: {reason}"
            return None
        self.notes["zero_shot"] = f"{asked.question!r}, {' or '.join(map(repr, asked.answers))}"
        asking, spec = questioned(table, asked.question), source.spec
        key = {
            "version": VERSION,
            "model": {
                **source.identity,
                "max_length": spec.max_length,
                "dtype": spec.dtype,
                **_rules(source, asking),
            },
            "answers": asked.answers,
            "question": asked.question,
            "data": content_key(asking),
            "precision": self.config.trainer.precision,
            **answers_key(source, asked.answers),
            **self.inputs.read(source, asking),
        }

        def make() -> ReadJob:
            scorer = load_zero_shot(source, self.pairs, asked.answers)
            inputs = self.inputs.tokens(source, asking, scorer)
            examples = Examples(inputs, table.ids, torch.zeros(len(table), dtype=torch.long))
            return ReadJob(scorer, scorer, examples, inputs.notes(spec.share_prompt))

        return self._labels(self.stages.read(f"zero-shot-on-{table.name}", key, make), "zero-shot", table)

    def _read_job(self, model: Model, table: Table) -> ReadJob:
        notes: dict[str, Any] = {}
        if model.layer is not None:
            scorer = load_head(model.folder / "model")
            inputs = Features(self.inputs.features(model.source, table, model.layer))
        else:
            saved = None if model.folder is None else model.folder / "model"
            scorer = load_scorer(model.source, self.pairs, self.classes, saved, as_it_is=model.folder is None)
            inputs = self.inputs.tokens(model.source, table, scorer)
            notes |= inputs.notes(model.source.spec.share_prompt)
        examples = Examples(inputs, table.ids, torch.zeros(len(table), dtype=torch.long))
        return ReadJob(scorer, scorer, examples, notes)

    # -- report -------------------------------------------------------------------------------------------------------

    def report(
        self, notes: dict[str, Any] | None = None, taught: tuple[Labels, Labels] | None = None, **predictions: Labels
    ) -> Report:
        """Measure predictions on the test split and write the report.

        Args:
            predictions: by name, all on the same table; ``weak``, ``student`` and ``ceiling`` give a PGR. The strong
                model's zero-shot score joins them where it has one.
            taught: the labels that the student was trained on, and its own predictions for the same rows.
            notes: facts of the method, for the report.
        """
        if (untrained := self.zero_shot(self.strong, self.data.test)) is not None:
            predictions["zero_shot"] = untrained
        transfer = None
        if taught is not None:
            labels, student = taught
            seen, _ = self._targets(labels, self.loss)
            transfer = (labels.table, losses.clamp_hard(seen, GAMMA)[0], student.logits)
        report = make_report(
            self.config,
            self.typed,
            self.data,
            {name: labels.logits for name, labels in predictions.items()},
            transfer,
            self.stages,
            {**self.notes, **(notes or {})},
        )
        self.reading.into(report.content)
        if self.devices.main:
            self.loggers.summarise(report.content, report.predictions, report.write(self.out))
        self.devices.wait()
        return report


def _reads_answers(config: TrainConfig) -> bool:
    """Whether the method trains on answers, so that it needs no labels."""
    return config.method["_target_"] == "w2sg.methods.refine.refine" and config.method["target"] == "answers"


def _rules(source: Source, table: Table) -> dict[str, Any]:
    """Windows and the like that a model has within the texts of a table; they were once read otherwise."""
    return rules_key(source.config, source.spec.max_length, table.kind == "pairs")


def _model_key(spec: ModelConfig, layer: int | None) -> dict[str, Any]:
    """The settings of a model that change what it learns (not how its batches are cut)."""
    if spec.arch == "bow":
        return {"train": spec.train, "max_length": spec.max_length}
    key = {
        "train": spec.train,
        "max_length": spec.max_length,
        "dtype": spec.dtype,
        "layers": spec.layers,
        "dropout": spec.dropout,
        "random_init": spec.random_init,
    }
    if spec.head_weights != "kept":
        key["head_weights"] = spec.head_weights
    if spec.train == "lora":
        key["lora"] = spec.lora.model_dump()
    if spec.train == "head":
        key |= {"head": spec.head, "layer": layer}
    return key


def run_method(config: TrainConfig, out: str | Path, typed: list[str]) -> Report:
    """Run the configured method in the folder ``out``; dashboards are closed whatever happens."""
    method = build(config.method)
    run = Run(config, Path(out), typed)
    for line in unread(config, typed):
        log.warning("%s", line)
    failed = True
    try:
        report = method(run)
        failed = False
        return report
    finally:
        run.loggers.finish(failed)
