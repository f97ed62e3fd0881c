"""A run: one configuration, its data and models, and the verbs that methods are written in.

Each verb is a stage of the store, or some of them: what was computed once under the same inputs is found again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2sg import losses, progress
from w2sg.config.build import build
from w2sg.config.check import check
from w2sg.config.hydra import sweep_of
from w2sg.config.schema import TrainConfig
from w2sg.config.unread import unread
from w2sg.console import Plain
from w2sg.data.labels import Labels
from w2sg.errors import UserError
from w2sg.experiment import alignment, asked_labels, fit_labels, fit_text, keys, replies
from w2sg.experiment import decode as decoding
from w2sg.experiment import generate as generation
from w2sg.experiment import predict as predictions
from w2sg.experiment import score as scores
from w2sg.experiment.also import on_other_tests
from w2sg.experiment.context import Context
from w2sg.experiment.plan import planned, remember
from w2sg.metrics.theory import GAMMA
from w2sg.reports.assemble import MakeFiles, Report, Rows, assemble
from w2sg.reports.closing import show_closing
from w2sg.reports.label_runs import check_names, columns_of, label_sections, label_story
from w2sg.reports.section import Section, Story
from w2sg.training.line import Elsewhere

log = logging.getLogger(__name__)


class Run(Context):
    """One experiment's verbs; `w2sg.experiment.context.Context` says what it holds.

    Each verb is a function of a run in a file of its own, which says what it takes and gives. Wherever one takes a
    language model, a role's model as it was found (``run.strong``) does as well.
    """

    # models of labels
    fit = fit_labels.fit
    ceiling = fit_labels.ceiling
    predict = predictions.predict
    zero_shot = predictions.zero_shot
    # models of text
    generate = generation.generate
    sft = fit_text.sft
    dpo = fit_text.dpo  # direct preference optimisation: its formula is in w2sg/losses/preferences.py
    wspo = fit_text.wspo
    ask_labels = asked_labels.ask_labels
    score = scores.score
    token_values = scores.token_values
    divergence = scores.divergence
    align = alignment.align
    decode = decoding.decode
    # what verbs of other packages are made of
    key_of = keys.key_of
    load = replies.load_trained
    encode = replies.encode_replies
    all_empty = replies.all_empty

    # -- measure and report -------------------------------------------------------------------------------------------

    def measure(
        self,
        predictions: Mapping[str, Labels],
        taught: tuple[Labels, Labels] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> tuple[list[Section], dict[str, list]]:
        """Sections on what label models predict of the test split, and their columns of predictions.parquet.

        What models write is measured by `w2sg.evaluation.systems.measure_systems`.

        Args:
            predictions: by name; ``weak``, ``student`` and ``ceiling`` give a PGR. The strong model's zero-shot score
                joins them where it has one.
            taught: the labels that the student was trained on, and its own predictions for the same rows.
            notes: facts of the method.

        Raises:
            UserError: predictions are not of the test split, are no numbers, or have the name of a column.
        """
        check_names(predictions, "run.report")
        for name, labels in predictions.items():
            if not isinstance(labels, Labels) or labels.table.ids != self.data.test.ids:
                what = f"of {labels.table.name}" if isinstance(labels, Labels) else type(labels).__name__
                raise UserError(f"run.report: {name} is {what}; give run.predict(model, run.data.test)")
            if lost := labels.without_probabilities():
                raise UserError(
                    f"run.report: {name} predicts no numbers (NaN, or infinite logits) in {lost:,} of "
                    f"{len(labels.logits):,} rows; look at its training, or at whatever gave these labels"
                )
        if (untrained := self.zero_shot(self.strong, self.data.test)) is not None:
            if "zero_shot" in predictions:
                raise UserError("run.report: 'zero_shot' is the strong model's own score; give the model another name")
            predictions = {**predictions, "zero_shot": untrained}
        progress.between("measuring")
        transfer = None
        if taught is not None:
            labels, student = taught
            seen, _ = fit_labels.targets_of(self, labels, self.loss)
            transfer = (labels.table, losses.clamp_hard(seen, GAMMA)[0], student.logits)
        others = on_other_tests(self, predictions)
        logits = {name: labels.logits for name, labels in predictions.items()}
        models = {name: self.labelled.get(labels.key.get("stage")) for name, labels in predictions.items()}
        sections = label_sections(self, logits, transfer, {**self.notes, **(notes or {})}, models, others)
        return sections, columns_of(self.data.test, logits, self.config.report.texts)

    def report(
        self,
        story: Story | None = None,
        sections: Sequence[Section] = (),
        notes: dict[str, Any] | None = None,
        taught: tuple[Labels, Labels] | None = None,
        columns: Mapping[str, list] | None = None,
        samples: Rows | None = None,
        files: Sequence[MakeFiles] = (),
        **predictions: Labels,
    ) -> Report:
        """Write the report; what label models predict on the test split is measured first.

        Args:
            story: title, verdict and names of systems; label methods have one.
            sections: of the method, below those of `measure`; data, what models read, stages, versions and
                configuration follow.
            notes: as in `measure`.
            taught: as in `measure`.
            columns: of predictions.parquet, where no label models predict.
            samples: rows of samples.parquet, where models wrote.
            files: makers of other files, each of the run's folder.
            predictions: as in `measure`.

        Raises:
            UserError: there are neither predictions nor a story, predictions are not of the test split, two sections
                give the same, one cannot be shown, or the folder cannot be written.
        """
        if story is None and not predictions:
            raise UserError(
                "run.report: nothing was given to tell of; give what label models predict on test (student=…), or a "
                "w2sg.reports.section.Story"
            )
        if predictions and columns is not None:
            raise UserError("run.report: columns would not be written beside predictions; leave one of them out")
        measured: list[Section] = []
        if not predictions and self.data.also:
            self.reading.say("dataset.also: no model here labels rows, so nothing was measured on other test sets")
        if predictions:
            measured, columns = self.measure(predictions, taught, notes)
        return assemble(self, story or label_story(self.config), [*measured, *sections], columns or {}, samples, files)


def run_composed(cfg: Any) -> Report:
    """Run what Hydra composed for the job that it is at, in the job's folder.

    Args:
        cfg: the configuration, without its ``hydra`` node.

    Raises:
        UserError: the configuration does not hold, or as `run_method`.
    """
    from hydra.core.hydra_config import HydraConfig

    job = HydraConfig.get()
    config = check(cfg, job.runtime.choices)
    return run_method(config, job.runtime.output_dir, list(job.overrides.task), sweep_of(job))


def run_method(config: TrainConfig, out: str | Path, typed: list[str], sweep: progress.Sweep | None = None) -> Report:
    """Run the configured method in the folder ``out``; dashboards are closed whatever happens.

    Args:
        typed: what the user typed. sweep: the run's place in a sweep.

    Raises:
        UserError: the method returns no report, or a plan was asked for in its place.
    """
    if config.plan.only:
        raise UserError("plan.only: a plan is made by the commands train and decode, where plan=true is typed")
    begun = time.monotonic()
    method = build(config.method)
    run = Run(config, Path(out), typed)
    with progress.showing(config.trainer.progress, sweep, run.devices.main, begun):
        for line in unread(config, typed):
            log.warning("%s", line)
        progress.expect(planned(config))
        failed = True
        try:
            report = method(run)
            if not hasattr(report, "content"):
                raise UserError(
                    f"{config.method['_target_']} returned {type(report).__name__} and no report; let it return what "
                    "run.report gives"
                )
            failed = False
        except UserError as error:
            if run.devices.echoes(error):
                raise Elsewhere from None
            raise
        finally:
            run.text_engines.close()
            run.loggers.finish(failed)
        if run.devices.main:
            run.stages.kept.end()
            remember(config, len(run.stages.records))
            show_closing(report.content, run.out, typed, Plain())
        return report
