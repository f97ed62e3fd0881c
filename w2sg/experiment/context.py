"""What every stage of a run shares: its configuration, data, models, devices and store."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from w2sg import losses
from w2sg.config.build import build
from w2sg.config.model_schema import ModelConfig
from w2sg.config.schema import TrainConfig
from w2sg.data import noise, splits
from w2sg.data.completions import Encoded
from w2sg.data.labels import Labels
from w2sg.data.loading import Examples
from w2sg.data.replies import Prompts, prompts_of
from w2sg.data.table import Table
from w2sg.decoding.text_engine import Kept
from w2sg.errors import ConfigError, UserError
from w2sg.models.label_questions import Questions
from w2sg.models.reading import Reading
from w2sg.models.source import Source, find
from w2sg.models.tensor_parallel import plan_of
from w2sg.models.trained import Trained
from w2sg.store.digests import remember_in
from w2sg.store.keys import stage_seed
from w2sg.store.store import Store
from w2sg.training import precision
from w2sg.training.devices import Devices
from w2sg.training.evaluating import rows_of
from w2sg.training.inputs import InputMaker
from w2sg.training.loggers import Loggers
from w2sg.training.stages import Stages

log = logging.getLogger(__name__)

BY_VLLM = (
    "engine=vllm: vLLM writes plain samples alone; judges, zero-shot scores, search, best of n, contrasts and whatever "
    "reads given replies stay with our own engine"
)
NOISE_OPTIONS = {
    "none": [],
    "flip": ["rate"],
    "shrink": ["rate", "shrink"],
    "hard_flip": ["rate"],
    "class_conditional": ["rates"],
}


class Context:
    """One experiment's configuration, data, models and store.

    Args:
        config: as checked by `w2sg.config.check.check`; the run's has the precision of its devices in it.
        out: the run's folder.
        typed: what the user typed, for the report.

    Attributes:
        weak, strong: the two models. untuned: the weak one before its alignment, where it is given.
        data: ``ground_truth``, ``transfer`` and ``test``. loss: the student's objective.
        dropped: stage -> reason -> how many examples were left out.
        encoded, packs: what was encoded and probed before, by what decides it.
        questions: by a model's id, how it is asked for labels that it answers with a token.
        labelled: the stage that labels were read in -> the model that gave them.
        text_engines: of models that other engines than ours run.
    """

    def __init__(self, config: TrainConfig, out: Path, typed: list[str] | None = None):
        self.out, self.typed = Path(out), typed or []
        remember_in(config.store, make=not config.plan.only)
        # Whatever can be found missing is looked for before any work is done.
        self.weak = self.find(config.weak, "weak")
        self.strong = self.find(config.strong, "strong", weights=not _served(config))
        self.untuned = None
        if config.weak.untuned is not None:
            before = config.weak.model_copy(update={"name": config.weak.untuned, "revision": None})
            self.untuned = self.find(before, "weak")
        self.data = self._tables(config)
        if problems := noise.problems(config.dataset.noise.model_dump(), self.data.test.classes):
            raise ConfigError(problems)
        for source in filter(None, (self.weak, self.strong, self.untuned)):
            source.check_texts()
        self.pairs, self.classes = self.data.test.kind == "pairs", self.data.test.classes
        asked = [source for source in (self.weak, self.strong) if source.spec.head == "label_tokens"]
        self.questions = {id(source): Questions(source, self.pairs, self.classes) for source in asked}
        for questions in self.questions.values():
            questions.check()
        self.loss = build(config.loss)
        self.devices = self._devices(config)
        cut = [source for source in (self.weak, self.strong) if source.spec.tp_plan is not None]
        # refuses what cannot be cut
        self.devices.first(lambda: [plan_of(one.config, one.role, self.devices.world) for one in cut])
        self.config = config = config.model_copy(update={"trainer": self.devices.config})
        self.precision = precision.key_of(self.devices.config)
        self._begin()
        notes = [*self.devices.notes, *([BY_VLLM] if config.engine.name == "vllm" else [])]
        for line in notes:
            log.warning("%s", line)
        self.stages.notes += notes
        for source in filter(None, (self.weak, self.strong, self.untuned)):
            self.stages.notes += [line for line in source.notes if line not in self.stages.notes]
        self.reading = Reading(self.stages.notes)
        self.inputs = InputMaker(self.stages, self.data.ground_truth, self.precision, config.seed, self.reading)
        self.notes: dict[str, Any] = {}
        self.seed = config.seed
        self.dropped: dict[str, dict[str, int]] = {}
        self.encoded: dict[tuple[str, ...], Encoded] = {}
        self.packs: dict[tuple, bool] = {}
        self.labelled: dict[str, Trained] = {}
        self.text_engines = Kept()
        self.stages.make_room.append(self.text_engines.sleep)

    @property
    def scoring_precision(self) -> str:
        """`precision` in the keys of what scores: heads compute in fp32 whatever it is, and once did not."""
        return f"{self.precision}, fp32 heads" if self.devices.mixed else self.precision

    # what a plan does otherwise, which works on no device and writes nothing

    def find(self, spec: ModelConfig, role: str, weights: bool = True) -> Source:
        """Locate a model, as `w2sg.models.source.find`; a plan does without weights that are not there."""
        return find(spec, role, weights)

    def _tables(self, config: TrainConfig) -> splits.Tables:
        return splits.load_tables(config.dataset.model_dump(by_alias=True), config.seed)

    def _devices(self, config: TrainConfig) -> Devices:
        return Devices(config.trainer)

    def _begin(self) -> None:
        """Start the loggers and the list of stages."""
        config = self.config
        self.loggers = Loggers(config, self.out, self.devices.main, self.typed)
        self.stages = Stages(
            Store(config.store),
            self.devices,
            self.loggers.stage,
            config.trainer.checkpoint_minutes,
            config.logger.every,
            config.logger.eval_every,
            rows_of(self.data.test.ids, self.data.test.labels.tolist()),
        )

    def evaluates(self, cheap: bool) -> bool:
        """Whether a fit is measured over its steps: by default only where reading the rows costs next to nothing."""
        every = self.config.logger.eval_every
        return cheap if every is None else every > 0

    def stage_seed(self, name: str) -> int:
        """The seed of a stage: runs that differ elsewhere draw the same numbers in it, so that they are paired."""
        return stage_seed(self.seed, name)

    def hold_out(self, examples: Examples, part: float) -> tuple[Examples, Examples | None]:
        """Examples to learn, and the part held out to choose the best epoch; None where none is.

        They are drawn by id, so that the same rows are held out whatever the loss and the noise.
        """
        if part <= 0 or len(examples) < 2:
            return examples, None
        draws = np.array([noise.draw(self.seed, f"held-out:{i}") for i in examples.ids])
        order = np.argsort(draws, kind="stable")
        count = min(len(order) - 1, max(1, round(part * len(order))))
        return examples.take(np.sort(order[count:])), examples.take(np.sort(order[:count]))

    def as_trained(self, model: Trained | Source) -> Trained:
        """A language model as it was found, by its role's name.

        Raises:
            UserError: it is none.
        """
        if isinstance(model, Trained):
            return model
        if model.spec.arch != "hf":
            raise UserError("weak, strong: a bag of words cannot write; choose a language model")
        roles = {"strong": self.strong, "untuned": self.untuned, "weak": self.weak}
        return Trained(next((role for role, source in roles.items() if source is model), model.spec.name), model)

    def prompts(self, split: str, limit: int | None = None) -> Prompts:
        """The prompts of a split (``ground_truth``, ``transfer`` or ``test``), the first ``limit`` of them."""
        return prompts_of(getattr(self.data, split)).first(limit)

    def gold(self, table: Table) -> Labels:
        """Ground truth as hard labels.

        Raises:
            UserError: the rows are questions with answers, which have none.
        """
        table.needs_labels()
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


def _served(config: TrainConfig) -> bool:
    """Whether a server writes in place of the strong model, of which the tokenizer alone is read."""
    decoder = config.method.get("decoder")
    server = decoder.get("server") if isinstance(decoder, dict) else None
    return isinstance(server, dict) and server.get("url") is not None
