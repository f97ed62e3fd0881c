"""Look at what runs left behind: ``python evaluate.py store=list``."""

import json
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from w2sg.cli import readable_errors
from w2sg.config import CONF, register
from w2sg.errors import ConfigError

register()


def used_stages(out: Path) -> set[str]:
    """Stages that a report below ``out`` names."""
    used: set[str] = set()
    for file in out.glob("*/report.json"):
        used |= {stage["key"] for stage in json.loads(file.read_text())["stages"]}
    return used


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """List a store, explain one of its stages, or prune it."""
    with readable_errors():
        from rich.console import Console

        from w2sg import inventory

        action = None if OmegaConf.is_missing(cfg, "store") else cfg.store
        console, root = Console(), Path(cfg.root)
        if action == "list":
            inventory.print_list(root, console)
        elif action == "why":
            if cfg.key is None:
                raise ConfigError(["key: store=why explains one stage; name it, or list them with store=list"])
            inventory.print_why(root, str(cfg.key), console)
        elif action == "prune":
            inventory.prune(root, used_stages(Path(cfg.out)), bool(cfg.apply), console)
            if not cfg.apply:
                console.print("nothing was removed; add apply=true to do so")
        else:
            raise ConfigError([f"store: '{action}' is none of list, why, prune"])


if __name__ == "__main__":
    main()
