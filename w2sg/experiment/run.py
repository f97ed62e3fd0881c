"""A run: one configuration, its data and models, and the verbs that methods are written in.

Each verb is a stage of the store, or some of them: what was computed once under the same inputs is found again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from w2sg import losses
from w2sg.config.check import build
from w2sg.config.options import FineTuning, PreferenceTuning, Sampling
from w2sg.config.schema import TrainConfig
from w2sg.config.unread import unread
from w2sg.data.completions import Encoded
from w2sg.data.labels import Labels
from w2sg.data.replies import Prompts, Replies, ReplyPairs
from w2sg.data.table import Table
from w2sg.experiment import fit_labels, fit_text, generate, keys, predict, replies, score
from w2sg.experiment.context import Context
from w2sg.metrics.theory import GAMMA
from w2sg.models.policy import Policy
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.reports.report import Report, make_report

log = logging.getLogger(__name__)


class Run(Context):
    """One experiment's verbs; `w2sg.experiment.context.Context` says what it holds.

    Wherever a verb takes a trained model, a role's model as it was found (``run.strong``) does as well.
    """

    # -- models of labels ---------------------------------------------------------------------------------------------

    def fit(
        self,
        name: str,
        source: Source,
        table: Table,
        labels: Labels,
        loss: partial | None = None,
        rows: np.ndarray | None = None,
        like: str | None = None,
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
        """
        return fit_labels.fit(self, name, source, table, labels, loss, rows, like)

    def ceiling(self, split: str) -> Trained:
        """The strong model trained on the ground truth of a split, ``transfer`` or ``ground_truth``."""
        table = {"transfer": self.data.transfer, "ground_truth": self.data.ground_truth}[split]
        return self.fit("ceiling", self.strong, table, self.gold(table))

    def predict(self, model: Trained, table: Table) -> Labels:
        """The model's label logits for every row of a table."""
        return predict.predict(self, model, table)

    def zero_shot(self, source: Source, table: Table) -> Labels | None:
        """What the untrained model answers to ``dataset.zero_shot``; None where it has none (the notes say why)."""
        return predict.zero_shot(self, source, table)

    # -- models of text -----------------------------------------------------------------------------------------------

    def generate(
        self,
        name: str,
        model: Trained | Source,
        prompts: Prompts,
        sampling: Sampling,
        settings: Sequence[Sequence[float]] | None = None,
        contrast: Trained | Source | None = None,
        samples: int = 1,
    ) -> Replies:
        """Let a model write to prompts, or a pair of models by contrastive decoding.

        Args:
            name: the stage.
            model: the one that writes.
            prompts: what is answered.
            sampling: lengths, batches and the engine; its own settings where none are given.
            settings: rows of `w2sg.decoding.sampling.Settings`; each prompt is answered with each of them.
            contrast: the model before its alignment, whose log-probabilities are subtracted.
            samples: replies to each prompt with each setting.

        Raises:
            UserError: no prompt fits into ``max_length``, or vLLM cannot serve the model.
        """
        engine = getattr(sampling, "engine", "transformers") if contrast is None else "transformers"
        reference = None if contrast is None else self.as_trained(contrast)
        return generate.generate(
            self, name, self.as_trained(model), prompts, sampling, settings, reference, samples, engine
        )

    def sft(
        self, name: str, start: Trained | Source, replies: Replies, options: FineTuning, confidence: float = 0.0
    ) -> Trained:
        """Supervised fine-tuning (SFT) on replies.

        Args:
            name: the stage.
            start: the model that training starts from.
            replies: what is learned.
            options: of the optimisation.
            confidence: weight of the auxiliary confidence loss (Burns et al. 2023); 0 leaves it out.
        """
        return fit_text.sft(self, name, self.as_trained(start), replies, options, confidence)

    def dpo(self, name: str, start: Trained | Source, pairs: ReplyPairs, options: PreferenceTuning) -> Trained:
        """Direct preference optimisation (DPO), or the objective that ``options.loss`` names.

        Args:
            name: the stage.
            start: the model that training starts from, which is the reference as well.
            pairs: chosen and rejected replies.
            options: of the optimisation and the objective.
        """
        return fit_text.dpo(self, name, self.as_trained(start), pairs, options)

    def wspo(
        self,
        name: str,
        start: Trained | Source,
        weak: tuple[Trained, Trained],
        replies: Replies,
        options: FineTuning,
        gamma: float,
    ) -> Trained:
        """Weak-to-strong preference optimisation (WSPO, arXiv 2410.18640).

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
        return fit_text.wspo(self, name, self.as_trained(start), weak, replies, options, gamma)

    def score(self, stage: str, model: Trained | Source, data: Replies | ReplyPairs, name: str) -> tuple[Tensor, str]:
        """Summed log-probabilities of each example's replies, [N, n] in the order of its encoded rows.

        Args:
            stage: its name.
            model: the one that reads.
            data: replies (n = 1) or pairs (n = 2, the chosen one first).
            name: of the rows, under which dropped ones are counted.

        Returns:
            The sums, and the name of the stage's folder for cache keys.
        """
        return score.read_replies(self, stage, self.as_trained(model), data, name)

    def token_values(
        self, stage: str, model: Trained | Source, data: Replies | ReplyPairs, name: str
    ) -> tuple[Tensor, Tensor, str]:
        """Log-probabilities of all reply tokens, [T], how many each example has, [N], and the stage's folder name."""
        return score.token_values(self, stage, self.as_trained(model), data, name)

    def divergence(self, name: str, model: Trained, base: Trained, replies: Replies) -> np.ndarray:
        """Exact KL(model || base) of the next token at every position of replies, averaged over each reply: [N]."""
        return score.divergence(self, name, model, base, replies)

    # -- what verbs of other packages are made of ---------------------------------------------------------------------

    def key_of(self, model: Trained) -> dict[str, Any]:
        """A language model as part of a cache key."""
        return keys.key_of(self, model)

    def load(self, model: Trained, trainable: bool = False) -> Policy:
        """A language model in memory."""
        return replies.load(self, model, trainable)

    def encode(self, source: Source, data: Replies | ReplyPairs, name: str) -> Encoded:
        """Replies or pairs as rows of a model's tokens; what had to be dropped is counted under ``name``."""
        return replies.encode(self, source, data, name)

    # -- report -------------------------------------------------------------------------------------------------------

    def report(
        self, notes: dict[str, Any] | None = None, taught: tuple[Labels, Labels] | None = None, **predictions: Labels
    ) -> Report:
        """Measure predictions on the test split and write the report.

        Args:
            notes: facts of the method, for the report.
            taught: the labels that the student was trained on, and its own predictions for the same rows.
            predictions: by name, all on the same table; ``weak``, ``student`` and ``ceiling`` give a PGR. The strong
                model's zero-shot score joins them where it has one.
        """
        if (untrained := self.zero_shot(self.strong, self.data.test)) is not None:
            predictions["zero_shot"] = untrained
        transfer = None
        if taught is not None:
            labels, student = taught
            seen, _ = fit_labels.targets_of(self, labels, self.loss)
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
