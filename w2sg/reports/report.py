"""What a run leaves behind: report.json, predictions.parquet, a table on the terminal and one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from w2sg.config.schema import TrainConfig
from w2sg.config.unread import unread
from w2sg.errors import UserError
from w2sg.metrics import intervals as statistics
from w2sg.metrics import labels as metrics
from w2sg.metrics.bootstrap import Bootstrap
from w2sg.reports.assemble import said_of_models as said  # noqa: F401
from w2sg.reports.assemble import versions  # noqa: F401
from w2sg.reports.label_runs import columns_of as columns  # noqa: F401
from w2sg.reports.pages.labels import ROLES, pgr_sentence, title
from w2sg.store.files import read_json, write_json
from w2sg.training.stages import Stages


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
    page: Callable[[dict[str, Any], dict[str, list[dict[str, float]]]], str] = None
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


def curves(stages: Stages) -> dict[str, list[dict[str, float]]]:
    curves = {}
    for record in stages.records:
        file = stages.store.root / record.key / "curve.json"
        if file.exists():
            curves[record.name] = read_json(file)
    return curves
