"""A saved workspace of Weights & Biases over finished runs: ``w2sg wandb-report outputs``.

Its panels show accuracies, PGR and curves, each a mean over the runs of one group, which is a setting without its seed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w2sg.compare.runs import read_runs
from w2sg.console import Plain
from w2sg.errors import UserError
from w2sg.printable import printable
from w2sg.store.files import write_json
from w2sg.training.wandb_run import summary_of

FILE = "wandb_report.json"
WIDTH, HEIGHT, ACROSS = 8, 6, 3  # of a panel, in the columns and rows of W&B's grid; panels beside each other
OF_MODELS = {"accuracy": "Accuracy", "nll": "NLL", "auroc": "AUROC"}
OF_REPLIES = {"reward": "Reward", "kl_per_token": "KL per token", "perplexity": "Perplexity"}
OF_CURVES = ("test_accuracy", "held_out_accuracy", "test_nll", "held_out_nll")


@dataclass(frozen=True)
class Panel:
    """One panel: bars over summary keys where ``x`` is None, else lines of curves over x."""

    section: str
    title: str
    keys: list[str]
    x: str | None = None


def panels_of(reports: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The panels for runs with these reports; each has only keys that one of the runs writes."""
    written = dict.fromkeys(key for report in reports for key in summary_of(report))
    panels = []
    for measures, section in ((OF_MODELS, "Models on the test split"), (OF_REPLIES, "Replies")):
        for measure, title in measures.items():
            if keys := [key for key in written if key.rpartition("/")[2] == measure]:
                panels.append(Panel(section, title, keys))
    if wins := [key for key in written if "/wins_over_" in key]:
        panels.append(Panel("Replies", "Win rates", wins))
    for key, title in (("pgr/estimate", "Performance gap recovered (PGR)"), ("pgr/gap", "Gap of weak and ceiling")):
        if key in written:
            panels.append(Panel("Performance gap recovered", title, [key]))
    fits: dict[str, dict[str, None]] = {}
    for report in reports:
        for name, fit in report.get("accuracy_over_steps", {}).get("fits", {}).items():
            fits.setdefault(name, {}).update(dict.fromkeys(key for point in fit["points"] for key in point))
        for name, fit in report.get("text", {}).get("training", {}).items():
            fits.setdefault(name, {}).update(
                dict.fromkeys([*fit["last"], *(k for p in fit.get("held_out", ()) for k in p)])
            )
    for curve in OF_CURVES:
        for name in (name for name, keys in fits.items() if curve in keys):
            words = curve.replace("held_out", "held-out").replace("_", " ")
            panels.append(Panel("Curves over training steps", f"{name}: {words}", [f"{name}/{curve}"], f"{name}/step"))
    for name, keys in fits.items():
        curves = [f"{name}/{key}" for key in ("loss", "held_out_loss") if key in keys or key == "loss"]
        panels.append(Panel("Losses over training steps", f"{name}: loss", curves, f"{name}/step"))
        if "rewards/accuracies" in keys:
            rewards = [f"{name}/{key}" for key in ("rewards/accuracies", "held_out_rewards/accuracies") if key in keys]
            title = f"{name}: accuracy of implicit rewards"
            panels.append(Panel("Curves over training steps", title, rewards, f"{name}/step"))
    return panels


def workspace_of(panels: Sequence[Panel], name: str, project: str, entity: str) -> Any:
    """The panels as a ``wandb_workspaces.workspaces.Workspace``, whose runs are grouped by setting.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its models are in pydantic's older form
        import wandb_workspaces.reports.v2 as parts
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces import expr

        sections = []
        for title in dict.fromkeys(panel.section for panel in panels):
            own = [panel for panel in panels if panel.section == title]
            drawn = []
            for place, panel in enumerate(own):
                row, column = divmod(place, ACROSS)
                layout = parts.Layout(x=column * WIDTH, y=row * HEIGHT, w=WIDTH, h=HEIGHT)
                if panel.x is None:
                    look = {"orientation": "h", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
                    drawn.append(parts.BarPlot(title=panel.title, metrics=panel.keys, layout=layout, **look))
                else:
                    look = {"x": panel.x, "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
                    drawn.append(parts.LinePlot(title=panel.title, y=panel.keys, layout=layout, **look))
            sections.append(workspaces.Section(name=title, panels=drawn, is_open=True))
        pinned = [
            f"summary:{key}" for key in ("student/accuracy", "pgr/estimate") if any(key in p.keys for p in panels)
        ]
        runs = workspaces.RunsetSettings(groupby=[expr.Metric("Group")], pinned_columns=pinned)
        return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=runs)


def write_report(folder: Path, project: str | None, entity: str | None, console: Plain) -> Path:
    """Save the workspace in W&B; what would be saved is written to the folder as well, whatever W&B says.

    Args:
        folder: of finished runs, which W&B has or will have.
        project: in W&B; None is WANDB_PROJECT, or the one that the runs name, or w2sg.
        entity: None is WANDB_ENTITY, or your default.

    Raises:
        UserError: no finished run is below the folder, or the file cannot be written.
    """
    runs, left_out = read_runs(folder)
    if not runs:
        raise UserError(
            f"wandb_report: there is no finished run below {folder}; name the folder that runs were written to"
        )
    for line in left_out:
        console.say(line, "left out: ", "yellow")
    loggers = [run.content["config"].get("logger", {}) for run in runs]
    if others := sum(logger.get("kind") != "wandb" for logger in loggers):
        console.say(f"{others} of {len(runs)} runs had no logger=wandb, so W&B has nothing of them", "note: ", "yellow")
    named = next((logger["project"] for logger in loggers if logger.get("project")), None)
    project = project or os.environ.get("WANDB_PROJECT") or named or "w2sg"
    entity = entity or os.environ.get("WANDB_ENTITY") or next((g["entity"] for g in loggers if g.get("entity")), None)
    panels = panels_of([run.content for run in runs])
    title = f"w2sg: {printable(folder.resolve().name)}"
    content: dict[str, Any] = {"name": title, "project": project, "entity": entity, "grouped_by": "group"}
    content["panels"] = [asdict(panel) for panel in panels]
    try:
        workspace = workspace_of(panels, title, project, entity or _default_entity())
        content["workspace"] = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
        refused = _save(workspace)
    except ImportError:
        refused = "the package wandb-workspaces is not installed; pip install wandb-workspaces"
    file = folder / FILE
    try:
        write_json(file, content)
    except OSError as error:
        raise UserError(f"wandb_report: {file} cannot be written ({error.strerror})") from error
    count = f"{len(panels)} panels over {len(runs)} runs"
    if refused is None:
        console.say(f"saved in W&B: {workspace.url} ({count}; also written: {file})")
    else:
        console.say(f"not saved in W&B: {refused}. The same command saves it then.", "note: ", "yellow")
        console.say(f"written: {file} ({count})")
    return file


def _default_entity() -> str:
    """The user's own, where W&B can be asked; else empty."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return ""
    try:
        import wandb

        return wandb.Api().default_entity or ""
    except Exception:  # not logged in or no network, which saving says
        return ""


def _save(workspace: Any) -> str | None:
    """Why W&B did not take it, in words; None where it did."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={mode}; unset it"
    if not workspace.entity:
        return "W&B cannot be reached or does not know you; `wandb login`, or give entity="
    try:
        workspace.save()
    except Exception as error:  # wandb raises its own, requests' and plain errors
        words = " ".join(printable(str(error)).split())[:200] or type(error).__name__
        return f"{words}; `wandb login` first, and send offline runs by `wandb sync`"
    return None
