"""What a run leaves behind: report.json, predictions.parquet, a table on the terminal and one HTML page."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2sg import __version__, metrics
from w2sg.config import TrainConfig, fit_options
from w2sg.data import audit
from w2sg.data.splits import Tables
from w2sg.errors import UserError
from w2sg.stages import Stages
from w2sg.store import read_json, write_json

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "torchmetrics", "datasets", "peft")
ROLES = {"weak": "weak supervisor", "student": "strong student", "ceiling": "strong ceiling"}


@dataclass(frozen=True)
class Report:
    """A finished run's findings.

    Attributes:
        content: what report.json holds.
        predictions: columns of predictions.parquet.
        curves: points of each fit's loss curve.
    """

    content: dict[str, Any]
    predictions: dict[str, list]
    curves: dict[str, list[dict[str, float]]]

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
        pq.write_table(pa.table(self.predictions), out / "predictions.parquet.tmp")
        (out / "predictions.parquet.tmp").replace(parquet)
        page = out / "report.html"
        (out / "report.html.tmp").write_text(self.page(), encoding="utf-8")
        (out / "report.html.tmp").replace(page)
        write_json(out / "report.json", self.content)
        return [out / "report.json", parquet, page]

    def show(self, out: Path) -> None:
        """Print what was found."""
        from rich.console import Console
        from rich.table import Table

        content = self.content
        console = Console()
        table = Table(title=title(content), title_justify="left")
        for column in ("", "accuracy", "95 % interval", "AUROC", "NLL"):
            table.add_column(column, justify="left" if not column else "right")
        for name, values in content["metrics"].items():
            low, high = values["accuracy_interval"]
            auroc = "-" if values["auroc"] is None else f"{values['auroc']:.3f}"
            table.add_row(
                ROLES.get(name, name),
                f"{values['accuracy']:.3f}",
                f"{low:.3f} to {high:.3f}",
                auroc,
                f"{values['nll']:.3f}",
            )
        length = content["data"].get("length_only", {}).get("accuracy")
        if length is not None:
            table.add_row("length alone", f"{length:.3f}", "", "", "")
        console.print(table)
        if "pgr" in content:
            console.print(pgr_sentence(content["pgr"]))
        for line in content["warnings"]:
            console.print(f"[yellow]note[/]: {line}")
        console.print(f"report: {out / 'report.html'}", soft_wrap=True)

    # -- the page -----------------------------------------------------------------------------------------------------

    def page(self) -> str:
        """One self-contained HTML page."""
        content = self.content
        sections = [
            f"<h1>{html.escape(title(content))}</h1>",
            f"<p class=command>{html.escape(content['command'])}</p>",
            *(f"<p class=warning>{html.escape(line)}</p>" for line in content["warnings"]),
            f"<p>{html.escape(pgr_sentence(content['pgr']))}</p>" if "pgr" in content else "",
            accuracy_figure(content),
            _metrics_table(content),
            "<h2>Data</h2>",
            _facts(content["data"]),
            "<h2>Training</h2>",
            curves_figure(self.curves),
            _facts(content["training"]),
            "<h2>Stages</h2>",
            _stages_table(content["stages"]),
            "<h2>Versions</h2>",
            _facts(content["versions"]),
            f"<details><summary>Configuration</summary><pre>{html.escape(_yaml(content['config']))}</pre></details>",
        ]
        return PAGE.format(title=html.escape(title(content)), body="\n".join(sections))


def make_report(
    config: TrainConfig,
    typed: list[str],
    data: Tables,
    predictions: dict[str, Tensor],
    stages: Stages,
    notes: dict[str, Any],
) -> Report:
    """Measure predictions on the test split.

    Args:
        predictions: name -> [N, C] logits on ``data.test``, in its order.
        notes: facts of the method.
    """
    test = data.test
    labels = torch.as_tensor(test.labels)
    weights = metrics.bootstrap_weights(len(test))
    right = {name: metrics.correct(logits, labels) for name, logits in predictions.items()}
    measured = {}
    for name, logits in predictions.items():
        samples = weights @ right[name].numpy().astype(np.float32)
        measured[name] = {**metrics.measure(logits, labels), "accuracy_interval": list(metrics.interval(samples))}
    content: dict[str, Any] = {
        "method": config.method["_target_"].rpartition(".")[2],
        "dataset": config.dataset.name,
        "weak": config.weak.name,
        "strong": config.strong.name,
        "loss": config.loss["_target_"].rpartition(".")[2],
        "seed": config.seed,
        "command": " ".join(["python train.py", *typed]),
        "metrics": measured,
    }
    if {"weak", "student", "ceiling"} <= right.keys():
        content["pgr"] = metrics.performance_gap_recovered(right["weak"], right["student"], right["ceiling"], weights)
    noise_notes = notes.pop("noise", {})
    content["data"] = {**audit.summary(data), "label_noise": noise_notes}
    content["training"] = _training(config, stages, notes)
    content["stages"] = [record.as_dict() for record in stages.records]
    content["versions"] = versions()
    content["warnings"] = _warnings(config, content)
    content["config"] = config.model_dump(by_alias=True)
    return Report(content, _columns(test, predictions), _curves(stages))


def _columns(test: Any, predictions: dict[str, Tensor]) -> dict[str, list]:
    """One row per test example. C = 2: the logit of the first reply (or class 0); C > 2: all logits."""
    columns: dict[str, list] = {"id": list(test.ids), "label": test.labels.tolist()}
    for name, logits in predictions.items():
        columns[name] = (logits[:, 0] - logits[:, 1]).tolist() if logits.shape[1] == 2 else logits.tolist()
    return columns


def _curves(stages: Stages) -> dict[str, list[dict[str, float]]]:
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
    shown = (
        "layer",
        "accuracy",
        "steps",
        "best_epoch",
        "held_out",
        "hard_labels_clamped",
        "examples",
        "truncated_texts",
    )
    for record in stages.records:
        found = {k: record.info[k] for k in shown if record.info.get(k)}
        if found and "-on-" not in record.name:
            facts[record.name] = found
    return facts


def _warnings(config: TrainConfig, content: dict[str, Any]) -> list[str]:
    lines = []
    if config.training.select_on == "gold":
        lines.append("the student was selected on GOLD labels (training.select_on=gold): its accuracy is optimistic")
    if (pgr := content.get("pgr")) and not pgr["resolved"]:
        worse = pgr["gap_high"] < 0
        lines.append(
            "the ceiling is worse than the weak model: nothing is there to recover"
            if worse
            else "the gap between weak and ceiling is within noise: no PGR is claimed"
        )
    student = content["metrics"].get("student")
    if student and student["overconfidence"] > 0.1:
        lines.append(
            f"the student is overconfident: mean confidence exceeds accuracy by {student['overconfidence']:.2f}"
        )
    overlaps = content["data"].get("overlaps") or {}
    shared = {k: v for k, v in overlaps.items() if isinstance(v, int) and v}
    if shared:
        lines.append("prompts shared between splits: " + ", ".join(f"{k} {v}" for k, v in shared.items()))
    return lines


def versions() -> dict[str, str]:
    """What this ran on."""
    found = {"w2sg": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Wording, tables and figures
# ---------------------------------------------------------------------------------------------------------------------


def title(content: dict[str, Any]) -> str:
    """What was run, in one line."""
    short = {k: content[k].rstrip("/").rpartition("/")[2] for k in ("weak", "strong")}
    what = f"{content['loss']}, seed {content['seed']}"
    return f"{short['weak']} supervises {short['strong']} on {content['dataset']}: {what}"


def pgr_sentence(pgr: dict[str, Any]) -> str:
    """The performance gap recovered, or that there is no gap to speak of."""
    gap = f"gap {pgr['gap']:+.3f} [{pgr['gap_low']:+.3f}, {pgr['gap_high']:+.3f}]"
    if not pgr["resolved"]:
        return f"performance gap recovered: {'no gap' if pgr['gap_high'] < 0 else 'gap not resolved'} ({gap})"
    return f"performance gap recovered: {pgr['value']:.2f} [{pgr['low']:.2f}, {pgr['high']:.2f}] ({gap})"


def accuracy_figure(content: dict[str, Any]) -> str:
    """Bars of accuracy with 95 % intervals, and the length-only rule as a line."""
    figure, axes = _figure(6.4, 2.2)
    names = list(content["metrics"])
    for row, name in enumerate(names):
        values = content["metrics"][name]
        low, high = values["accuracy_interval"]
        accuracy = values["accuracy"]
        axes.barh(
            row,
            accuracy,
            color={"weak": "#b0b7c3", "student": "#2563eb", "ceiling": "#334155"}.get(name, "#777"),
            height=0.62,
        )
        axes.errorbar(accuracy, row, xerr=[[accuracy - low], [high - accuracy]], color="black", capsize=3, lw=1)
        axes.text(high + 0.008, row, f"{accuracy:.3f}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [ROLES.get(n, n) for n in names])
    axes.invert_yaxis()
    lowest = min(v["accuracy_interval"][0] for v in content["metrics"].values())
    axes.set_xlim(min(0.45, lowest - 0.05), 1.02)
    length = content["data"].get("length_only", {}).get("accuracy")
    if length is not None:
        axes.axvline(length, color="#dc2626", ls=":", lw=1, label=f"length alone, {length:.3f}")
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axes.set_xlabel("accuracy on test, with 95 % bootstrap interval (the axis does not begin at 0)")
    return _svg(figure)


def curves_figure(curves: dict[str, list[dict[str, float]]]) -> str:
    """Training loss (and held-out loss) of every fit over its steps."""
    curves = {name: points for name, points in curves.items() if points and "expert" not in name}
    if not curves:
        return ""
    figure, axes = _figure(3.0 * len(curves), 2.2, len(curves))
    for axis, (name, points) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        for key, style in (("loss", {"color": "#2563eb"}), ("held_out_loss", {"color": "#dc2626", "marker": "."})):
            xy = [(p["step"], p[key]) for p in points if key in p]
            if xy:
                axis.plot(*zip(*xy, strict=True), lw=1, label=key.replace("_", "-", 1).replace("_", " "), **style)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.legend(frameon=False, fontsize=7)
    return _svg(figure)


def _figure(width: float, height: float, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f'<img src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _metrics_table(content: dict[str, Any]) -> str:
    keys = ("accuracy", "auroc", "nll", "brier", "ece", "overconfidence")
    head = "".join(f"<th>{k.upper() if k in ('auroc', 'nll', 'ece') else k}</th>" for k in keys)
    rows = [
        f"<tr><td>{ROLES.get(name, name)}</td>"
        + "".join(f"<td>{'-' if values[k] is None else format(values[k], '.3f')}</td>" for k in keys)
        + "</tr>"
        for name, values in content["metrics"].items()
    ]
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _stages_table(stages: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{c}</th>" for c in ("stage", "key", "from the store", "seconds", "tokens", "useful tokens"))
    rows = []
    for stage in stages:
        fraction = stage["useful_token_fraction"]
        rows.append(
            f"<tr><td>{html.escape(stage['name'])}</td><td><code>{html.escape(stage['key'])}</code></td>"
            f"<td>{'yes' if stage['cached'] else 'no'}</td><td>{stage['seconds']:.1f}</td>"
            f"<td>{stage['tokens']:,}</td><td>{'-' if fraction is None else format(fraction, '.1%')}</td></tr>"
        )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _yaml(value: Any) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(value))


def _facts(facts: dict[str, Any]) -> str:
    rows = []
    for key, value in facts.items():
        if value in (None, {}, []):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict):
            text = ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in value.items())
        rows.append(f"<tr><td>{html.escape(key.replace('_', ' '))}</td><td>{html.escape(text)}</td></tr>")
    return f"<table class=facts>{''.join(rows)}</table>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1e293b }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse; margin: .5rem 0 }}
td, th {{ padding: .2rem .7rem; text-align: right; font-size: .9rem }}
td:first-child, th:first-child, .facts td {{ text-align: left }} tr {{ border-bottom: 1px solid #e2e8f0 }}
.facts td {{ vertical-align: top; overflow-wrap: anywhere }}
.command {{ font-family: ui-monospace, monospace; background: #f1f5f9; padding: .5rem .8rem; overflow-wrap: anywhere }}
pre {{ font-size: .8rem; overflow-x: auto }} code {{ font-size: .85em }}
.warning {{ background: #fef3c7; padding: .4rem .8rem }} img {{ max-width: 100% }}
</style></head><body>
{body}
</body></html>
"""
