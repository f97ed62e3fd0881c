"""One weak-to-strong experiment: ``w2sg train loss=rkl weak=gpt2 strong=gpt2-xl``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2sg.cli.launch import launch, readable_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: DictConfig) -> float | None:
    """Check the configuration, run its method, write its report; returns the student's accuracy for sweepers."""
    with readable_errors():
        from w2sg.experiment.run import run_composed

        report = run_composed(cfg)
        return report.content["metrics"].get("student", {}).get("accuracy")


def main() -> None:
    """Every run that is typed."""
    launch(run, "train")
