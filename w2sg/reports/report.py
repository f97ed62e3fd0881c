"""What a run leaves behind: report.json, predictions.parquet, a table on the terminal and one HTML page."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2sg import __version__
from w2sg.config.check import fit_options
from w2sg.config.schema import TrainConfig
from w2sg.config.unread import unread
from w2sg.data import audit
from w2sg.data.splits import Tables
from w2sg.data.table import Table
from w2sg.errors import UserError
from w2sg.metrics import intervals as statistics
from w2sg.metrics import labels as metrics
from w2sg.metrics import theory as diagnostics
from w2sg.metrics.intervals import Bootstrap
from w2sg.reports.html import LEVEL, p_text
from w2sg.reports.pages.labels import ROLES, pgr_sentence, run_page, tested, title
from w2sg.store.store import read_json, write_json
from w2sg.training.stages import Stages

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "torchmetrics", "datasets", "peft")
NOTES = (
    "head",
    "layer",
    "accuracy",
    "steps",
    "best_epoch",
    "held_out",
    "hard_labels_clamped",
    "examples",
    "truncated_texts",
    "rows",
)


@dataclass(frozen=True)
class Report:
    """A finished run's findings.

    Attributes:
        content: what report.json holds.
        predictions: columns of predictions.parquet.
        curves: points of each fit's loss curve.
        page: makes report.html of content and curves. title: says in one line what was run.
        replies: rows of samples.parquet, where models wrote; None where none did.
        table: of content, for the terminal; None is that of accuracies.
    """

    content: dict[str, Any]
    predictions: dict[str, list]
    curves: dict[str, list[dict[str, float]]]
    page: Callable[[dict[str, Any], dict[str, list[dict[str, float]]]], str] = run_page
    title: Callable[[dict[str, Any]], str] = title
    replies: list[dict[str, Any]] | None = None
    table: Callable[[dict[str, Any]], Any] | None = None

    def write(self, out: Path) -> list[Path]:
        """Write the three files into a folder, each whole or not at all, and print the table.

        Raises:
            UserError: the folder cannot be written (a full disk, say). Every stage is in the store by then, so the same
                command only has the report left to do.
        """
        try:
            files = self._write(out)
        except OSError as error:
            raise UserError(
                f"the report cannot be written to {out} ({error.strerror or error}); free space or choose another "
                "folder with out=, and run the same command: all stages are in the store"
            ) from error
        self.show(out)
        return files

    def _write(self, out: Path) -> list[Path]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        out.mkdir(parents=True, exist_ok=True)
        parquet = out / "predictions.parquet"
        with open(out / "predictions.parquet.tmp", "wb") as file:  # pyarrow takes no path that is not UTF-8
            pq.write_table(pa.table(self.predictions), file)
        (out / "predictions.parquet.tmp").replace(parquet)
        page = out / "report.html"
        (out / "report.html.tmp").write_text(self.page(self.content, self.curves), encoding="utf-8")
        (out / "report.html.tmp").replace(page)
        files = [out / "report.json", parquet, page]
        if self.replies is not None:
            columns = dict.fromkeys(key for row in self.replies for key in row)  # not all have all
            samples = {key: [row.get(key) for row in self.replies] for key in columns}
            with open(out / "samples.parquet.tmp", "wb") as file:
                pq.write_table(pa.table(samples), file)
            (out / "samples.parquet.tmp").replace(out / "samples.parquet")
            files.append(out / "samples.parquet")
        write_json(out / "report.json", self.content)
        return files

    def show(self, out: Path) -> None:
        """Print what was found."""
        from w2sg.console import Plain

        content, console = self.content, Plain()
        console.print(self._accuracies() if self.table is None else self.table(content))
        if "pgr" in content:
            console.print(pgr_sentence(content["pgr"]))
        for line in (*content["warnings"], *content.get("unread", ())):
            console.say(f": {line}", "note", "yellow")
        console.say(f"report: {out / 'report.html'}")

    def _accuracies(self) -> Any:
        from rich.table import Table as Grid

        content = self.content
        grid = Grid(title=self.title(content), title_justify="left")
        for column in ("", "accuracy", "95 % interval", "AUROC", "NLL"):
            grid.add_column(column, justify="left" if not column else "right")
        for name, values in content["metrics"].items():
            low, high = values["intervals"]["accuracy"]
            auroc = "-" if values["auroc"] is None else f"{values['auroc']:.3f}"
            row = [f"{values['accuracy']:.3f}", f"{low:.3f} to {high:.3f}", auroc, f"{values['nll']:.3f}"]
            grid.add_row(ROLES.get(name, name), *row)
        length = content["data"]["length_only"]
        grid.add_row("length alone", f"{length['accuracy']:.3f}", f"{length['low']:.3f} to {length['high']:.3f}")
        return grid


def make_report(
    config: TrainConfig,
    typed: list[str],
    data: Tables,
    predictions: dict[str, Tensor],
    transfer: tuple[Table, Tensor, Tensor] | None,
    stages: Stages,
    notes: dict[str, Any],
) -> Report:
    """Measure predictions on the test split, and what the student made of its labels on the transfer split.

    Args:
        predictions: name -> [N, C] logits on ``data.test``, in its order.
        transfer: the rows that the student was trained on, the label logits that it saw, and its own.
        notes: facts of the method.
    """
    test, bootstrap = data.test, Bootstrap(len(data.test), clusters=data.test.clusters)
    labels = torch.as_tensor(test.labels)
    loss = config.loss["_target_"].rpartition(".")[2]
    content = {**heading(config, typed, loss), **measured(predictions, labels, bootstrap)}
    content["diagnostics"] = _diagnose(config, loss, predictions, labels, transfer, bootstrap)
    rule, credit = audit.length_rule(data.ground_truth, test)
    length = bootstrap.share(credit)
    content["data"] = {
        **audit.summary(data),
        "length_only": {"rule": rule, "accuracy": length.value, "low": length.low, "high": length.high},
        "label_noise": notes.pop("noise", {}),
    }
    content["training"] = _training(config, stages, notes)
    content["stages"] = [record.as_dict() for record in stages.records]
    content["versions"] = versions()
    content["config"] = config.model_dump(by_alias=True)
    content["warnings"] = [*said(stages), *_warnings(config, content), *content["data"].get("notes", [])]
    return Report(content, columns(test, predictions), curves(stages))


def heading(config: TrainConfig, typed: list[str], loss: str) -> dict[str, Any]:
    """What was run."""
    return {
        "method": config.method["_target_"].rpartition(".")[2],
        "dataset": config.dataset.name,
        "weak": config.weak.name,
        "strong": config.strong.name,
        "loss": loss,
        "seed": config.seed,
        "command": " ".join(["python train.py", *typed]),
        "unread": unread(config, typed),
    }


def measured(predictions: dict[str, Tensor], labels: Tensor, bootstrap: Bootstrap) -> dict[str, Any]:
    """Metrics of each model's label logits, the student's tests against the others, and the PGR."""
    right = {name: metrics.correct(logits, labels).numpy() for name, logits in predictions.items()}
    found: dict[str, Any] = {
        "metrics": {
            name: {**metrics.measure(logits, labels), "intervals": metrics.intervals(logits, labels, bootstrap)}
            for name, logits in predictions.items()
        },
        "tests": _tests(right, bootstrap.codes),
    }
    if {"weak", "student", "ceiling"} <= right.keys():
        found["pgr"] = statistics.performance_gap_recovered(
            right["weak"], right["student"], right["ceiling"], bootstrap
        )
    return found


def _tests(right: dict[str, np.ndarray], prompts: np.ndarray | None) -> dict[str, Any]:
    """The student against every other model on the same rows: difference with interval, and the exact test over
    prompts.

    Args:
        right: [N] of each model. prompts: [N] the prompt of each row; None where each has its own.
    """
    found = {}
    for other in right.keys() - {"student"} if "student" in right else ():
        a, b = right["student"], right[other]
        difference = statistics.paired_difference(a[None], b[None], prompts)
        found[f"student - {other}"] = {
            **{k: difference[k] for k in ("difference", "low", "high")},
            **{
                k.replace("_a", "_student").replace("_b", "_other"): v
                for k, v in statistics.mcnemar(a, b, prompts).items()
            },
        }
    return dict(sorted(found.items()))


def _diagnose(
    config: TrainConfig,
    loss: str,
    predictions: dict[str, Tensor],
    labels: Tensor,
    transfer: tuple[Table, Tensor, Tensor] | None,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "certainty": {name: diagnostics.certainty(logits) for name, logits in predictions.items()},
        "reliability": {name: metrics.reliability(logits, labels) for name, logits in predictions.items()},
    }
    if not {"weak", "student"} <= predictions.keys():
        return found
    student, weak = predictions["student"], predictions["weak"]
    found["test"] = diagnostics.identity(student, weak, labels, bootstrap)
    found |= diagnostics.agreement(student, weak, labels, bootstrap)
    found["theorem_conditions"] = diagnostics.theorem_conditions(
        loss, config.strong.train == "head", config.strong.head == "mixture"
    )
    if transfer is not None:
        table, teacher, own = transfer
        gold = torch.as_tensor(table.labels)
        resampled = Bootstrap(len(table), clusters=table.clusters)
        found["transfer"] = diagnostics.identity(own, teacher, gold, resampled)
        found["transfer"] |= diagnostics.agreement(own, teacher, gold, resampled)
        noiseless = config.dataset.noise.kind == "none"  # noise hits the labels of transfer alone
        on = [metrics.correct(x, y).numpy() for x, y in ((teacher, gold), (weak, labels))]
        leak = diagnostics.leak(*on, resampled.codes, bootstrap.codes)
        found["teacher_transfer_minus_test"] = leak if noiseless else None
    return found


def columns(test: Any, predictions: dict[str, Tensor]) -> dict[str, list]:
    """One row per test example: its id, a hash of its prompt, its label, and each model's logits.

    C = 2: the logit of the first reply (or class 0); C > 2: all logits.
    """
    columns: dict[str, list] = {"id": list(test.ids), "prompt": test.clusters, "label": test.labels.tolist()}
    for name, logits in predictions.items():
        columns[name] = (logits[:, 0] - logits[:, 1]).tolist() if logits.shape[1] == 2 else logits.tolist()
    return columns


def curves(stages: Stages) -> dict[str, list[dict[str, float]]]:
    curves = {}
    for record in stages.records:
        file = stages.store.root / record.key / "curve.json"
        if file.exists():
            curves[record.name] = read_json(file)
    return curves


def _training(config: TrainConfig, stages: Stages, notes: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = dict(notes)
    selects = False
    for role in ("weak", "strong"):
        spec = getattr(config, role)
        options = fit_options(config, spec)
        selects = selects or options.validation > 0
        facts[f"{role}_model"] = (
            f"{spec.name}, train={spec.train}, lr {options.lr:g}, {options.epochs} epochs, batch {options.batch_size}, "
            f"{options.optimizer}, {options.schedule}, weight decay {options.weight_decay:g}"
        )
    facts["epochs_selected_on"] = f"{config.training.select_on} labels" if selects else "nothing: the last epoch counts"
    for record in stages.records:
        found = {k: record.info[k] for k in NOTES if record.info.get(k)}
        if "-on-" in record.name:  # its numbers are those of the fit
            found = {"rows": found["rows"]} if "rows" in found else {}
        if found:
            facts[record.name] = found
    return facts


def _warnings(config: TrainConfig, content: dict[str, Any]) -> list[str]:
    """What a reader must know before believing a number."""
    lines = []
    found = content["diagnostics"]
    if config.training.select_on == "gold":
        lines.append("the student was selected on GOLD labels (training.select_on=gold): its accuracy is optimistic")
    if (pgr := content.get("pgr")) and not pgr["resolved"]:
        worse = pgr["gap_high"] is not None and pgr["gap_high"] < 0
        lines.append(
            "the ceiling is worse than the weak model: nothing is there to recover"
            if worse
            else "the gap between weak and ceiling is within noise: no PGR is claimed"
        )
    if student := content["metrics"].get("student"):
        low, high = student["intervals"]["accuracy"]
        if high - low > 0.06:
            lines.append(
                f"{tested(content['data'])} know an accuracy to about {(high - low) / 2:.3f} only; smaller "
                "differences cannot be seen, and most published ones are smaller"
            )
        if student["intervals"]["overconfidence"][0] > 0:
            lines.append(
                f"the student is overconfident: its mean confidence exceeds its accuracy by "
                f"{student['overconfidence']:.3f} [{student['intervals']['overconfidence'][0]:.3f}, "
                f"{student['intervals']['overconfidence'][1]:.3f}]"
            )
    untrained = content["tests"].get("student - zero_shot")
    if untrained and not (untrained["p"] < LEVEL and untrained["difference"] > 0):
        resolved = untrained["p"] < LEVEL
        how = "more accurate than the student" if resolved else "not told apart from the student by accuracy"
        lines.append(
            f"the strong model without any training is {how} ({untrained['difference']:+.3f} "
            f"[{untrained['low']:+.3f}, {untrained['high']:+.3f}] for the student, {untrained['test']} p "
            f"{p_text(untrained['p'])}): "
            + (
                "what the student can do, it need not have learnt from its teacher"
                if resolved
                else "whether the student learnt anything from its teacher is not known from accuracy"
            )
        )
    leak = found.get("teacher_transfer_minus_test")
    if leak and leak["low"] > 0:
        lines.append(
            f"the teacher is better on transfer than on test by {leak['value']:.3f} [{leak['low']:.3f}, "
            f"{leak['high']:.3f}]: it may have seen transfer rows, and its labels then carry ground truth"
        )
    within = content["data"]["prompts_within_test"]
    if within["prompts"] < within["rows"]:
        lines.append(
            f"{within['rows that share a prompt']:,} of {within['rows']:,} test rows share their prompt with others "
            f"({within['prompts']:,} prompts): intervals and tests are over prompts, not rows"
        )
    shared = {k: v for k, v in content["data"]["overlaps"].items() if v}
    if shared:
        lines.append("prompts shared between splits: " + ", ".join(f"{k} {v}" for k, v in shared.items()))
    return lines


def said(stages: Stages) -> list[str]:
    """What was found about the models of a run, when they were looked for and when they were loaded."""
    heads = [
        f"{record.name}: its head is {head}"
        for record in stages.records
        if (head := record.info.get("head")) and ":" in head
    ]
    return list(dict.fromkeys([*stages.said, *heads]))


def versions() -> dict[str, str]:
    """What this ran on."""
    found = {"w2sg": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
