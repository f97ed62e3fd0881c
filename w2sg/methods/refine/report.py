"""Refinement, measured: systems on two axes, what their labels were like before any training, and who was trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from w2sg.config.options import PlainSampling
from w2sg.data.replies import Prompts, Replies
from w2sg.evaluation.comparisons import Comparisons
from w2sg.experiment.run import Run
from w2sg.methods.refine.axes import Axes
from w2sg.methods.refine.options import Improve, InContext, Refine, RefineEvaluation, Unrefined
from w2sg.methods.refine.provenance import Refined, revision_of, write_refined
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.metrics.intervals import performance_gap_recovered
from w2sg.models.trained import Trained
from w2sg.reports.assemble import Report
from w2sg.reports.section import Story
from w2sg.reports.sections.answers import Answers
from w2sg.reports.sections.axes import Axes as AxesSection
from w2sg.reports.sections.identities import Identities
from w2sg.reports.sections.judge import JudgeFacts
from w2sg.reports.sections.labels_before_training import LabelsBeforeTraining
from w2sg.reports.sections.training import FitTraining
from w2sg.reports.sections.won_and_lost import WonAndLost
from w2sg.reports.words import short
from w2sg.store.files import read_json
from w2sg.store.soundness import KEY

NAMES = {
    "weak": "weak model",
    "naive": "naive fine-tuning",
    "student": "student (refined)",
    "icl": "in context, not trained",
    "self": "trained on its own answers",
    "self_cot": "… step by step",
    "base": "strong, untrained",
    "shuffled": "shuffled exemplars",
    "gold_exemplars": "gold exemplars",
    "ceiling": "ceiling (gold answers)",
}
KINDS = {"icl": "ICL refinement", "iar": "infer and respond", "improve": "improvement", "none": "no refinement"}
OTHERS = ("base", "weak", "naive", "self", "icl", "shuffled", "gold_exemplars", "self_cot", "ceiling")


class Findings:
    """What a run of refinement gathers.

    Args:
        strong: the model as it was found.

    Attributes:
        labels: on the transfer split, what each student was taught; ``weak`` are the weak answers.
        replies: on the test split, by system. trained: models, by system. refined: the student's labels.
    """

    def __init__(self, run: Run, axes: Axes, options: Refine, strong: Trained):
        self.run, self.axes, self.options, self.strong = run, axes, options, strong
        self.labels: dict[str, Replies] = {}
        self.replies: dict[str, Replies] = {}
        self.trained: dict[str, Trained] = {"base": strong}
        self.refined: Refined | None = None
        self.left_out: list[str] = []

    def applies(self, baseline: str) -> bool:
        """Whether a baseline says something of this kind of refinement; why not is kept for the report."""
        reason = None
        if isinstance(self.options, Unrefined) and baseline in ("naive", "icl"):
            reason = "the student is naive fine-tuning itself" if baseline == "naive" else "there is no context"
        elif not isinstance(self.options, InContext) and baseline in ("shuffled", "gold_exemplars"):
            reason = "there are no exemplars"
        elif isinstance(self.options, Improve) and baseline == "icl" and "weak" not in self.replies:
            reason = "there are no weak answers to test prompts to improve"
        if reason:
            self.left_out.append(f"{baseline}: {reason} (refine={self.options.kind})")
        return reason is None

    def train(self, name: str, writer: Trained, learned: Replies) -> None:
        """Note a model and what it was taught."""
        self.trained[name] = writer
        if name != "naive":  # the weak answers themselves
            self.labels[name] = learned

    def sample(self, name: str, writer: Trained, prompts: Prompts, sampling: PlainSampling) -> None:
        """Let a model answer the test prompts as they are."""
        self.replies[name] = self.run.generate(f"{writer.name}-on-test", writer, prompts, sampling)

    # -- the report ---------------------------------------------------------------------------------------------------

    def report(self, test: Prompts, evaluation: RefineEvaluation) -> Report:
        """Measure, and write the report and refined.parquet."""
        run, axes = self.run, self.axes
        order = [n for n in ("weak", "naive", "student", "icl", "self", "self_cot", "base") if n in self.replies]
        names = [*order, *(n for n in self.replies if n not in order)]
        replies = self._common({name: self.replies[name] for name in names}, test)
        first = next(iter(replies.values()))
        scores = {axis: self._scores(axis, replies) for axis in axes.measured}
        systems: dict[str, Any] = {
            "kind": self.options.kind,
            "options": self.options.model_dump(),
            "axes": {name: axis.model_dump() for name, axis in axes.axes.items()},
            "prompts": len(first),
            "systems": self._systems(replies, scores),
            "differences": self._differences(scores),
            "left_out": self.left_out,
        }
        labels = {"labels": self._labels(), "retention": self._retention(), "counts": self.refined.counts}
        judge, won = None, []
        if axes.judge is not None:
            known = next((scores[axis] for axis in scores if axes.axes[axis].kind == "reward"), None)
            compared = Comparisons(axes.judge, "answers-on-test", replies, rewards=known)
            systems["wins"] = {other: compared.over("student", other) for other in OTHERS if other in replies}
            other = "weak" if "weak" in systems["wins"] else next(iter(systems["wins"]), None)
            if other is not None:
                won = [
                    WonAndLost.measure(
                        ("student", other), compared.preferred("student", other), replies["student"], replies[other]
                    )
                ]
            if run.data.test.kind == "pairs":  # else nobody knows what people prefer
                judge = axes.judge.accuracy()
        if "content" in scores and {"weak", "ceiling"} <= scores["content"].keys():
            trio = [scores["content"][name] for name in ("weak", "student", "ceiling")]
            known = ~np.isnan(np.stack(trio)).any(0)
            if known.any():
                trio = [column[known] for column in trio]
                systems["pgr"] = performance_gap_recovered(*trio, Bootstrap(int(known.sum())))
        count = evaluation.examples
        shown = {name: written.texts[:count] for name, written in replies.items()}
        sections = [
            AxesSection(content={"refinement": systems}, warnings=self._judge_that_chose()),
            JudgeFacts("refinement", judge),
            LabelsBeforeTraining(content={"refinement": labels}),
            *won,
            Answers([prompt.text for prompt in first.prompts[:count]], shown, self.refined.rows[:count]),
            FitTraining("refinement", run.stages, run.dropped),
            Identities(content={"refinement": {"trained": self._identities()}}),
        ]
        columns = {"id": first.ids}
        columns |= {f"{axis}_{name}": values.tolist() for axis, each in scores.items() for name, values in each.items()}
        files = [lambda out: [write_refined(out, self.refined.rows)]]
        rows = self._rows(replies, scores)
        return run.report(self._story(), sections, columns=columns, samples=rows, files=files)

    def _story(self) -> Story:
        """Title, names of systems, and what each split is for."""
        options, config = self.options.model_dump(), self.run.config
        size = f", batches of {options['batch_size']}" if "batch_size" in options else ""
        how = f"{KINDS[self.options.kind]}{size}, seed {config.seed}"
        file = config.method["answers"]
        whose = short(config.weak.name) if file is None else f"the answers of {short(file)}"
        trained = "the weak model is trained on its answers" if config.method["train_weak"] else "not trained on"
        return Story(
            f"{short(config.strong.name)} refines {whose} on {config.dataset.name}: {how}",
            names=NAMES,
            uses_of_splits={
                "ground_truth": trained,
                "transfer": "questions whose weak answers are refined and learned",
                "test": "questions that all systems answered",
            },
        )

    def _judge_that_chose(self) -> list[str]:
        """That ground truth took part in choosing what the student learned."""
        accept = getattr(self.options, "accept", None)
        tested = accept is not None and accept.concept is not None and self.axes.axes["concept"].kind == "reward"
        if not tested or not self.axes.judge.trained:
            return []
        return [
            "refine.accept.concept asks a judge that learned the transfer split's preferences: ground truth took part "
            "in choosing what the student learned"
        ]

    def _common(self, replies: dict[str, Replies], test: Prompts) -> dict[str, Replies]:
        """The same prompts for all, in one order: one that a system had no room for is left out everywhere."""
        answered = set.intersection(*(set(answers.ids) for answers in replies.values()))
        kept = [i for i in test.ids if i in answered]
        if lost := len(test) - len(kept):
            self.run.dropped["test prompts"] = {"prompt that not all systems answered": lost}
        places = {name: {i: k for k, i in enumerate(answers.ids)} for name, answers in replies.items()}
        return {name: answers.take([places[name][i] for i in kept]) for name, answers in replies.items()}

    def _scores(self, axis: str, replies: dict[str, Replies]) -> dict[str, np.ndarray]:
        return {name: self.axes.score(axis, f"{name}-{axis}-on-test", answers) for name, answers in replies.items()}

    def _systems(self, replies: dict[str, Replies], scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
        systems: dict[str, Any] = {}
        for name, answers in replies.items():
            characters = np.array([len(text) for text in answers.texts])
            systems[name] = {axis: _mean(values[name]) for axis, values in scores.items()}
            systems[name] |= {"characters": float(characters.mean()), "cut_off": float((~answers.finished).mean())}
        return systems

    def _differences(self, scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
        """The student against every other system on the same prompts."""
        gaps: dict[str, Any] = {}
        for other in OTHERS:
            for axis, values in scores.items():
                if other not in values:
                    continue
                known = ~np.isnan(values["student"] - values[other])
                if known.any():
                    a, b = values["student"][known], values[other][known]
                    gap = comparisons.reward_gap(a, b, Bootstrap(len(a))).as_dict()
                    gaps.setdefault(f"student - {other}", {})[axis] = gap | {"p": comparisons.paired_test(a, b)}
        return gaps

    # -- labels before training ---------------------------------------------------------------------------------------

    def _labels(self) -> dict[str, Any]:
        """What each student was taught, on both axes, a question's several answers as one."""
        taught: dict[str, Any] = {}
        self.by_prompt: dict[str, dict[str, dict[str, float]]] = {}
        for name, answers in self.labels.items():
            taught[name] = {"answers": len(answers), "questions": len(set(answers.ids))}
            for axis in self.axes.measured:
                values = self.axes.score(axis, f"{name}-{axis}-labels", answers)
                each: dict[str, list[float]] = {}
                for i, value in zip(answers.ids, values, strict=True):
                    each.setdefault(i, []).append(float(value))
                means = {i: float(np.mean(v)) for i, v in each.items()}
                self.by_prompt.setdefault(axis, {})[name] = means
                taught[name][axis] = _mean(np.array(list(means.values())))
        for key in ("copy_rate", "exemplar_copy_rate", "log_probability"):
            by_question: dict[str, list[float]] = {}
            for row in self.refined.rows:
                if row["used"] and row.get(key) is not None:
                    by_question.setdefault(row["id"], []).append(row[key])
            if by_question:
                taught["student"][key] = _mean(np.array([np.mean(v) for v in by_question.values()]))
        sizes = [len(row["exemplar_ids"]) for row in self.refined.rows if row.get("prompt_hash")]
        if sizes and isinstance(self.options, InContext):
            taught["student"]["exemplars"] = {
                "mean": float(np.mean(sizes)),
                "least": min(sizes),
                "asked": self.options.count,
            }
        return taught

    def _retention(self) -> dict[str, Any]:
        """How much of the weak answers' concept the refined ones have, question by question, before any training."""
        retention: dict[str, Any] = {}
        for axis, each in self.by_prompt.items():
            for name in ("student", "shuffled", "self"):
                ids = [i for i in each.get(name, {}) if not np.isnan(each[name][i] + each["weak"].get(i, np.nan))]
                if not ids:
                    continue
                learned, weak = (np.array([each[who][i] for i in ids]) for who in (name, "weak"))
                bootstrap = Bootstrap(len(ids))
                kept = {"questions": len(ids), "change": bootstrap.mean(learned - weak).as_dict()}
                if self.axes.axes[axis].kind != "reward" and weak.sum() > 0:  # a reward has no zero to take shares of
                    kept["share"] = bootstrap.ratio(learned, weak).as_dict()
                retention.setdefault(axis, {})[name] = kept
        return retention

    # -- provenance ---------------------------------------------------------------------------------------------------

    def _identities(self) -> dict[str, Any]:
        """Which model each system is, from the key of the stage that trained it, not from what was asked for."""
        models: dict[str, Any] = {}
        refiner = self.run.key_of(self.strong)
        for name, writer in self.trained.items():
            start = refiner if writer.folder is None else read_json(writer.folder / KEY)["start"]
            models[name] = {
                "model": writer.source.spec.name,
                "revision": revision_of(start),
                "train": None if writer.folder is None else writer.source.spec.train,
                "stage": None if writer.folder is None else writer.folder.name,
                "is_the_refiner": start == refiner,
            }
        return models

    def _rows(self, replies: dict[str, Replies], scores: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        rows = []
        for name, answers in replies.items():
            for k in range(len(answers)):
                row = {
                    "system": name,
                    "prompt_id": answers.ids[k],
                    "prompt": answers.prompts[k].text,
                    "reply": answers.texts[k],
                }
                row["finished"] = bool(answers.finished[k])
                rows.append(row | {axis: float(values[name][k]) for axis, values in scores.items()})
        return rows


def _mean(values: np.ndarray) -> dict[str, float | None]:
    """The mean of the numbers that are known, with its interval."""
    known = values[~np.isnan(values)]
    return Bootstrap(len(known)).mean(known).as_dict() if len(known) else {"value": None, "low": None, "high": None}
