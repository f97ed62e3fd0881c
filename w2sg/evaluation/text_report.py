"""The report of a method whose models write: what was measured, the samples, and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from w2sg.data import audit
from w2sg.losses.preferences import displacement
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports import report
from w2sg.reports.pages.cong import text_page, title
from w2sg.reports.pages.labels import ROLES
from w2sg.store.files import read_json

if TYPE_CHECKING:
    from w2sg.data.replies import Prompts
    from w2sg.experiment.run import Run

STUDENT = "cong"
SHOWN = 6  # prompts whose replies stand on the page
NAMES = {STUDENT: "student"}  # in predictions.parquet and metrics, as in the main job's report


def write_report(
    run: Run, logits: dict[str, Tensor], text: dict[str, Any], rows: list[dict[str, Any]], prompts: Prompts
) -> report.Report:
    """Put everything that was measured into report.json, predictions.parquet, samples.parquet and the page.

    Args:
        logits: of the test split's pairs by implicit reward, [N, 2], by system.
        text: what was measured of replies; see `w2sg.evaluation.systems`.
        rows: replies of all systems and settings.
        prompts: test prompts that the systems answered.
    """
    config, data, stages = run.config, run.data, run.stages
    predictions = {NAMES.get(name, name): values for name, values in logits.items()}
    labels = torch.as_tensor(data.test.labels)
    bootstrap = Bootstrap(len(data.test), clusters=data.test.clusters)
    content = report.heading(config, run.typed, config.method["dpo"]["loss"])
    content |= report.measured(predictions, labels, bootstrap)
    content["text"] = text | {"examples": _examples(rows, prompts), "training": training_of(stages)}
    rule, credit = audit.length_rule(data.ground_truth, data.test)
    length = bootstrap.share(credit)
    content["data"] = {
        **audit.summary(data),
        "length_only": {"rule": rule, "accuracy": length.value, "low": length.low, "high": length.high},
        "label_noise": {},
    }
    content["diagnostics"] = {}
    content["stages"] = [record.as_dict() for record in stages.records]
    content["versions"] = report.versions()
    content["config"] = config.model_dump(by_alias=True)
    content["warnings"] = [*report.said(stages), *_warnings(content)]
    content["warnings"] += content["data"].get("notes", [])
    run.reading.into(content)
    found = report.Report(
        content,
        report.columns(data.test, predictions),
        report.curves(stages),
        page=text_page,
        title=title,
        replies=rows,
    )
    if run.devices.main:
        run.loggers.summarise(found.content, found.predictions, found.write(run.out), rows)
    run.devices.wait()
    return found


def _examples(rows: list[dict[str, Any]], prompts: Prompts) -> list[dict[str, Any]]:
    """The replies of every system to a few prompts, chosen by their place in the hash order and nothing else."""
    shown = []
    for i, prompt in list(zip(prompts.ids, prompts.texts, strict=True))[:SHOWN]:
        replies = [row for row in rows if row["prompt_id"] == i]
        shown.append(
            {"prompt": prompt.text, "replies": [{k: v for k, v in r.items() if k != "prompt"} for r in replies]}
        )
    return shown


def training_of(stages: Any) -> dict[str, dict[str, Any]]:
    """Of each fit: the last point of its curve, and what was dropped on the way."""
    found = {}
    for record in stages.records:
        file = stages.store.root / record.key / "curve.json"
        if file.exists():
            points = [p for p in read_json(file) if "loss" in p]
            found[record.name] = {
                "steps": record.info.get("steps"),
                "examples": record.info.get("examples"),
                "packed": record.info.get("packed"),
                "best_epoch": record.info.get("best_epoch"),
                "first": points[0] if points else {},
                "last": points[-1] if points else {},
            }
    return found


def _warnings(content: dict[str, Any]) -> list[str]:
    """What a reader must know before believing a number."""
    lines, text = [], content["text"]
    for name, fit in text["training"].items():
        tuning = content["config"]["method"]["alignment" if name in ("weak", "ceiling") else "dpo"]
        lines += displacement(name, tuning["loss"], fit["last"])
    cut_off = {name: s["length"]["truncated"] for name, s in text["systems"].items() if s["length"]["truncated"] > 0.2}
    if cut_off:
        shares = ", ".join(f"{ROLES.get(name, name)} {share:.0%}" for name, share in cut_off.items())
        lines.append(f"replies cut off at max_new_tokens, so that rewards are of unfinished text: {shares}")
    sweep = text.get("alphas")
    if sweep and (cut := sweep["length"][sweep["chosen"]]["truncated"]) > 0.2:
        lines.append(
            f"contrastive decoding: {cut:.0%} of its replies were cut off at max_new_tokens; the student is not taught "
            "to end there"
        )
    judge = text.get("judge")
    if judge and judge["accuracy"]["low"] is not None and judge["accuracy"]["low"] <= 0.5:
        lines.append(
            "the judge cannot be told from a coin on the test split's own pairs, so its rewards and win rates say "
            "little"
        )
    for name, counts in text["dropped"].items():
        if cut := counts.get("cut to max_length (kept)"):
            lines.append(f"{name}: {cut} examples are longer than max_length and were cut, ends of replies included")
        if lost := [f"{n} {reason}" for reason, n in counts.items() if "(kept)" not in reason]:
            lines.append(f"{name}: left out {', '.join(lost)}")
    student = text["systems"].get(STUDENT, {}).get("against", {}).get("base")
    if student and student["length_controlled"]["low"] is not None:
        raw, controlled = student["win_rate"], student["length_controlled"]
        if raw["low"] > 0.5 and controlled["low"] <= 0.5:
            lines.append(
                f"the student's win rate over the untrained model ({raw['value']:.3f}) is not resolved once length is "
                f"controlled ({controlled['value']:.3f} [{controlled['low']:.3f}, {controlled['high']:.3f}])"
            )
    return lines
