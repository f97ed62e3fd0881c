"""Refinement, measured: systems on two axes, what their labels were like before any training, and who was trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from w2sg.config.options import PlainSampling
from w2sg.data import audit
from w2sg.data.replies import Prompts, Replies
from w2sg.evaluation.comparisons import Comparisons
from w2sg.experiment.run import Run
from w2sg.methods.refine.axes import Axes
from w2sg.methods.refine.options import Improve, InContext, Refine, RefineEvaluation, Unrefined
from w2sg.methods.refine.refiner import Refined, revision_of, write_refined
from w2sg.metrics import replies as comparisons
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.metrics.intervals import performance_gap_recovered
from w2sg.models.trained import Trained
from w2sg.reports import report
from w2sg.reports.pages.refinement import refinement_page, terminal_table, title
from w2sg.reports.sections.training import last_numbers as training_of
from w2sg.reports.words import position_warning
from w2sg.store.files import read_json
from w2sg.store.soundness import KEY

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

    def report(self, test: Prompts, evaluation: RefineEvaluation) -> report.Report:
        """Measure, and write report.json, samples.parquet, refined.parquet and the page."""
        run = self.run
        order = [n for n in ("weak", "naive", "student", "icl", "self", "self_cot", "base") if n in self.replies]
        names = [*order, *(n for n in self.replies if n not in order)]
        replies = self._common({name: self.replies[name] for name in names}, test)
        scores = {axis: self._scores(axis, replies) for axis in self.axes.measured}
        found: dict[str, Any] = {
            "kind": self.options.kind,
            "options": self.options.model_dump(),
            "axes": {name: axis.model_dump() for name, axis in self.axes.axes.items()},
            "prompts": len(next(iter(replies.values()))),
            "systems": self._systems(replies, scores),
            "differences": self._differences(scores),
            "labels": self._labels(),
            "counts": self.refined.counts,
            "trained": self._identities(),
            "left_out": self.left_out,
            "dropped": run.dropped,
            "examples": self._examples(replies, evaluation.examples),
            "training": training_of(run.stages),
        }
        found["retention"] = self._retention(found["labels"])
        if self.axes.judge is not None:
            known = next((scores[axis] for axis in scores if self.axes.axes[axis].kind == "reward"), None)
            compared = Comparisons(self.axes.judge, "answers-on-test", replies, rewards=known)
            found["wins"] = {other: compared.over("student", other) for other in OTHERS if other in replies}
        if self.axes.judge is not None and run.data.test.kind == "pairs":  # else nobody knows what people prefer
            found["judge"] = self.axes.judge.accuracy()
        if "content" in scores and {"weak", "ceiling"} <= scores["content"].keys():
            trio = [scores["content"][name] for name in ("weak", "student", "ceiling")]
            known = ~np.isnan(np.stack(trio)).any(0)
            if known.any():
                trio = [column[known] for column in trio]
                found["pgr"] = performance_gap_recovered(*trio, Bootstrap(int(known.sum())))
        content = report.heading(run.config, run.typed, "none")
        content |= {"refinement": found, "metrics": {}, "diagnostics": {}}
        splits = {name: getattr(run.data, name) for name in ("ground_truth", "transfer", "test")}
        content["data"] = {
            "sizes": {name: len(table) for name, table in splits.items()},
            "overlaps": audit.overlaps(splits),
            **run.data.report,
        }
        content["stages"] = [record.as_dict() for record in run.stages.records]
        content["versions"] = report.versions()
        content["config"] = run.config.model_dump(by_alias=True)
        content["warnings"] = [*report.said(run.stages), *self._warnings(found, content["data"])]
        content["warnings"] += content["data"].get("notes", [])
        run.reading.into(content)
        rows = self._rows(replies, scores)
        columns = {"id": next(iter(replies.values())).ids}
        columns |= {f"{axis}_{name}": values.tolist() for axis, each in scores.items() for name, values in each.items()}
        made = report.Report(
            content,
            columns,
            report.curves(run.stages),
            page=refinement_page,
            title=title,
            replies=rows,
            table=terminal_table,
        )
        if run.devices.main:
            files = made.write(run.out)
            run.loggers.summarise(
                made.content, made.predictions, [*files, write_refined(run.out, self.refined.rows)], rows
            )
        run.devices.wait()
        return made

    def _common(self, replies: dict[str, Replies], test: Prompts) -> dict[str, Replies]:
        """The same prompts for all, in one order: one that a system had no room for is left out everywhere."""
        there = set.intersection(*(set(r.ids) for r in replies.values()))
        kept = [i for i in test.ids if i in there]
        if lost := len(test) - len(kept):
            self.run.dropped["test prompts"] = {"prompt that not all systems answered": lost}
        found = {}
        for name, own in replies.items():
            place = {i: k for k, i in enumerate(own.ids)}
            found[name] = own.take([place[i] for i in kept])
        return found

    def _scores(self, axis: str, replies: dict[str, Replies]) -> dict[str, np.ndarray]:
        return {name: self.axes.score(axis, f"{name}-{axis}-on-test", own) for name, own in replies.items()}

    def _systems(self, replies: dict[str, Replies], scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, own in replies.items():
            characters = np.array([len(text) for text in own.texts])
            found[name] = {axis: _mean(values[name]) for axis, values in scores.items()}
            found[name] |= {"characters": float(characters.mean()), "cut_off": float((~own.finished).mean())}
        return found

    def _differences(self, scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
        """The student against every other system on the same prompts."""
        found: dict[str, Any] = {}
        for other in OTHERS:
            for axis, values in scores.items():
                if other not in values:
                    continue
                known = ~np.isnan(values["student"] - values[other])
                if known.any():
                    a, b = values["student"][known], values[other][known]
                    gap = comparisons.reward_gap(a, b, Bootstrap(len(a))).as_dict()
                    found.setdefault(f"student - {other}", {})[axis] = gap | {"p": comparisons.paired_test(a, b)}
        return found

    # -- labels before training ---------------------------------------------------------------------------------------

    def _labels(self) -> dict[str, Any]:
        """What each student was taught, on both axes, a question's several answers as one."""
        found: dict[str, Any] = {}
        self.by_prompt: dict[str, dict[str, dict[str, float]]] = {}
        for name, own in self.labels.items():
            found[name] = {"answers": len(own), "questions": len(set(own.ids))}
            for axis in self.axes.measured:
                values = self.axes.score(axis, f"{name}-{axis}-labels", own)
                each: dict[str, list[float]] = {}
                for i, value in zip(own.ids, values, strict=True):
                    each.setdefault(i, []).append(float(value))
                means = {i: float(np.mean(v)) for i, v in each.items()}
                self.by_prompt.setdefault(axis, {})[name] = means
                found[name][axis] = _mean(np.array(list(means.values())))
        for key in ("copy_rate", "exemplar_copy_rate", "log_probability"):
            by_question: dict[str, list[float]] = {}
            for row in self.refined.rows:
                if row["used"] and row.get(key) is not None:
                    by_question.setdefault(row["id"], []).append(row[key])
            if by_question:
                found["student"][key] = _mean(np.array([np.mean(v) for v in by_question.values()]))
        sizes = [len(row["exemplar_ids"]) for row in self.refined.rows if row.get("prompt_hash")]
        if sizes and isinstance(self.options, InContext):
            found["student"]["exemplars"] = {
                "mean": float(np.mean(sizes)),
                "least": min(sizes),
                "asked": self.options.count,
            }
        return found

    def _retention(self, labels: dict[str, Any]) -> dict[str, Any]:
        """How much of the weak answers' concept the refined ones have, question by question, before any training."""
        found: dict[str, Any] = {}
        for axis, each in self.by_prompt.items():
            for name in ("student", "shuffled", "self"):
                ids = [i for i in each.get(name, {}) if not np.isnan(each[name][i] + each["weak"].get(i, np.nan))]
                if not ids:
                    continue
                own, weak = (np.array([each[who][i] for i in ids]) for who in (name, "weak"))
                bootstrap = Bootstrap(len(ids))
                kept = {"questions": len(ids), "change": bootstrap.mean(own - weak).as_dict()}
                if self.axes.axes[axis].kind != "reward" and weak.sum() > 0:  # a reward has no zero to take shares of
                    kept["share"] = bootstrap.ratio(own, weak).as_dict()
                found.setdefault(axis, {})[name] = kept
        return found

    # -- provenance ---------------------------------------------------------------------------------------------------

    def _identities(self) -> dict[str, Any]:
        """Which model each system is, from the key of the stage that trained it, not from what was asked for."""
        found: dict[str, Any] = {}
        refiner = self.run.key_of(self.strong)
        for name, writer in self.trained.items():
            start = refiner if writer.folder is None else read_json(writer.folder / KEY)["start"]
            found[name] = {
                "model": writer.source.spec.name,
                "revision": revision_of(start),
                "train": None if writer.folder is None else writer.source.spec.train,
                "stage": None if writer.folder is None else writer.folder.name,
                "is_the_refiner": start == refiner,
            }
        return found

    def _rows(self, replies: dict[str, Replies], scores: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        rows = []
        for name, own in replies.items():
            for k in range(len(own)):
                row = {"system": name, "prompt_id": own.ids[k], "prompt": own.prompts[k].text, "reply": own.texts[k]}
                row["finished"] = bool(own.finished[k])
                rows.append(row | {axis: float(values[name][k]) for axis, values in scores.items()})
        return rows

    def _examples(self, replies: dict[str, Replies], count: int) -> list[dict[str, Any]]:
        """The first test prompts in the order of their hashes, and the first refined labels."""
        shown = [
            {"prompt": own.prompts[k].text, "answers": {name: r.texts[k] for name, r in replies.items()}}
            for own in [next(iter(replies.values()))]
            for k in range(min(count, len(own)))
        ]
        keys = ("prompt", "weak_answer", "refined", "source", "used", "concept", "copy_rate", "concept_score")
        labels = [{key: row.get(key) for key in keys} for row in self.refined.rows[:count]]
        return [{"test": shown, "labels": labels}]

    # -- what a reader must know --------------------------------------------------------------------------------------

    def _warnings(self, found: dict[str, Any], data: dict[str, Any]) -> list[str]:
        lines, differences = [], found["differences"]
        untrained = differences.get("student - base", {}).get("content")
        if untrained and untrained["low"] is not None and untrained["low"] <= 0:
            how = "worse than" if untrained["high"] < 0 else "not told apart from"
            lines.append(
                f"on content the student is {how} the strong model without any training "
                f"({untrained['value']:+.3f} [{untrained['low']:+.3f}, {untrained['high']:+.3f}]): there is nothing on "
                "this axis that it need have learnt from the weak one"
            )
        own = differences.get("student - self", {})
        if own and all(gap["low"] is not None and gap["low"] <= 0 <= gap["high"] for gap in own.values()):
            lines.append(
                "the student cannot be told from one trained on the strong model's own answers without exemplars: the "
                "weak answers may have done nothing"
            )
        kept = found["retention"].get("concept", {}).get("student")
        if kept and kept["change"]["high"] is not None and kept["change"]["high"] < 0:
            share = f", {kept['share']['value']:.0%} of it" if "share" in kept else ""
            lines.append(
                f"the refined labels have less of the concept than the weak ones before any training "
                f"({kept['change']['value']:+.3f}{share}): what they lack no training can bring back"
            )
        judge = found.get("judge", {})
        lines += [*judge.get("notes", []), *position_warning(judge.get("on_test_pairs", {}))]
        accept = getattr(self.options, "accept", None)
        tested = accept is not None and accept.concept is not None and self.axes.axes["concept"].kind == "reward"
        if tested and self.axes.judge.trained:
            lines.append(
                "refine.accept.concept asks a judge that learned the transfer split's preferences: ground truth took "
                "part in choosing what the student learned"
            )
        copies = found["labels"]["student"].get("copy_rate")
        if copies and found["kind"] != "none" and copies["value"] > 0.8:
            lines.append(f"refined answers copy the weak ones (copy rate {copies['value']:.2f})")
        shown = found["labels"]["student"].get("exemplars")
        if shown and shown["mean"] < shown["asked"]:
            lines.append(
                f"contexts have {shown['mean']:.1f} exemplars on average and {shown['least']} at least, "
                f"{shown['asked']} were asked for: raise strong.max_length, or lower refine.max_new_tokens"
            )
        cut = {name: s["cut_off"] for name, s in found["systems"].items() if s["cut_off"] > 0.2}
        if cut:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in cut.items())
            lines.append(f"answers cut off at max_new_tokens: {shares}")
        if strangers := [name for name, who in found["trained"].items() if not who["is_the_refiner"]]:
            lines.append(f"trained from another model than the one that refined: {', '.join(strangers)}")
        for name, counts in found["dropped"].items():
            if counts:
                lines.append(f"{name}: " + ", ".join(f"{n} {reason}" for reason, n in counts.items()))
        lines += [f"left out: {reason}" for reason in self.left_out]
        if shared := {k: v for k, v in data["overlaps"].items() if v}:
            lines.append("prompts shared between splits: " + ", ".join(f"{k} {v}" for k, v in shared.items()))
        return lines


def _mean(values: np.ndarray) -> dict[str, float | None]:
    """The mean of the numbers that are known, with its interval."""
    known = values[~np.isnan(values)]
    return Bootstrap(len(known)).mean(known).as_dict() if len(known) else {"value": None, "low": None, "high": None}
