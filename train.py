"""Run one weak-to-strong experiment: ``python train.py loss=rkl weak=gpt2 strong=gpt2-xl``."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from w2sg import stops
from w2sg.cli import readable_errors
from w2sg.config import CONF, check, register

register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Check the configuration, run its method, write its report; returns the student's accuracy for sweepers."""
    with readable_errors():
        hydra_config = HydraConfig.get()
        config = check(cfg, hydra_config.runtime.choices)
        from w2sg.run import run_method  # nothing is read or fetched before the configuration holds

        report = run_method(config, hydra_config.runtime.output_dir, list(hydra_config.overrides.task))
        return report.content["metrics"].get("student", {}).get("accuracy")


if __name__ == "__main__":
    with stops.command(last=True):
        main()
