"""Many finished runs whose models write as one table: settings side by side, means over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2sg.compare import table as side_by_side
from w2sg.compare.runs import read

COLUMNS = {
    "implicit_gap": "implicit reward over plain",
    "explicit_gap": "judge's reward over plain",
    "reward": "student's reward",
    "win_base": "wins over untrained",
    "win_base_controlled": "length controlled",
    "win_weak_sft": "wins over weak SFT",
    "win_ceiling": "wins over ceiling",
    "kl_per_token": "KL per token",
    "perplexity": "perplexity",
    "length": "tokens",
    "accuracy": "preference accuracy",
}


def collect(root: Path) -> list[dict[str, Any]]:
    """A row per setting, as `w2sg.compare.table.rows_of` has them."""
    return side_by_side.rows_of([run for run in read(root)[0] if run.writes], _numbers, list(COLUMNS))


def _numbers(content: dict[str, Any]) -> dict[str, dict[str, float | None] | None]:
    """What one run's report says, as estimates."""
    text, student = content["text"], content["text"]["systems"]["cong"]
    found: dict[str, Any] = {name: student.get(name) for name in ("reward", "kl_per_token", "perplexity")}
    sweep = text.get("alphas", {})
    for name in ("implicit", "explicit"):
        if name in sweep:
            found[f"{name}_gap"] = sweep[name]["over_plain"][sweep["chosen"]]["gap"]
    for other in ("base", "weak_sft", "ceiling"):
        if other in student.get("against", {}):
            found[f"win_{other}"] = student["against"][other]["win_rate"]
    if "base" in student.get("against", {}):
        found["win_base_controlled"] = student["against"]["base"]["length_controlled"]
    found["length"] = {"value": student["length"]["mean"]}
    measured = content["metrics"]["student"]
    low, high = measured["intervals"]["accuracy"]
    found["accuracy"] = {"value": measured["accuracy"], "low": low, "high": high}
    return found


def show(rows: list[dict[str, Any]], console: Any) -> None:
    """Print the columns that say most; the page has them all."""
    shown = ("implicit_gap", "explicit_gap", "win_base", "win_base_controlled")
    title = "Contrastive samples over plain ones, and the student"
    side_by_side.show(rows, {name: COLUMNS[name] for name in shown}, title, console)


def write(rows: list[dict[str, Any]], root: Path) -> list[Path]:
    """Write summary_text.html, .csv and .json beside the runs.

    Raises:
        UserError: the folder cannot be written.
    """
    title = "Contrastive weak-to-strong generalization, settings side by side"
    note = "Gaps are of contrastive samples over plain ones of the aligned weak model at the alpha that was trained on."
    return side_by_side.write(rows, COLUMNS, root, "summary_text", title, note)
