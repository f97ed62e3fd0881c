"""One decoder, measured beside plain samples: ``w2sg decode decoder=search strong=... weak=...``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2sg.cli.launch import launch, readable_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: DictConfig) -> float | None:
    """Answer test prompts in one way, beside plain samples; returns the win rate over them, for sweepers."""
    with readable_errors():
        from w2sg.experiment.run import run_composed

        report = run_composed(cfg)
        found = report.content["decoding"]
        own = found["systems"].get(found["decoder"]["kind"], {})
        return own.get("against", {}).get("plain", {}).get("win_rate", {}).get("value")


def main() -> None:
    """Every run that is typed."""
    launch(run, "decode")
