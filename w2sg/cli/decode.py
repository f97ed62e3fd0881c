"""One decoder, measured beside plain samples: ``w2sg decode decoder=search strong=... weak=...``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2sg.cli.launch import launch, readable_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: DictConfig) -> float | None:
    """Answer test prompts in one way, beside plain samples; returns the win rate over them, for sweepers."""
    with readable_errors():
        from hydra.core.hydra_config import HydraConfig

        from w2sg.config.check import check

        hydra_config = HydraConfig.get()
        config = check(cfg, hydra_config.runtime.choices)
        from w2sg.experiment.run import run_method

        report = run_method(config, hydra_config.runtime.output_dir, list(hydra_config.overrides.task))
        found = report.content["decoding"]
        own = found["systems"].get(found["decoder"]["kind"], {})
        return own.get("against", {}).get("plain", {}).get("win_rate", {}).get("value")


def main() -> None:
    """Every run that is typed."""
    launch(run, "decode")
