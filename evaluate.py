"""Look at what runs left behind: ``python evaluate.py store=list``."""

import json
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from w2sg.cli import readable_errors
from w2sg.config import CONF, check_evaluate, register
from w2sg.errors import UserError

register()


def used_stages(out: Path) -> set[str]:
    """Stages that a report below ``out`` names."""
    if not out.is_dir():
        raise UserError(
            f"out: there is no folder {out}, so nothing says which stages are in use; name the folder of the runs"
        )
    used: set[str] = set()
    for file in out.glob("*/report.json"):
        try:
            used |= {stage["key"] for stage in json.loads(file.read_text())["stages"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is no report of a run ({error!r}), so nothing says which stages it uses; mend or remove it"
            ) from error
    return used


def typed_key(key: object) -> str:
    """The stage as it was typed: the beginning of a hash such as 12e4 is read as a number."""
    if not isinstance(key, str):
        for override in reversed(HydraConfig.get().overrides.task):
            name, _, value = override.partition("=")
            if name.strip("+") == "key":
                return value.strip("'\"")
    return str(key)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """List a store, explain one of its stages, or prune it."""
    with readable_errors():
        config = check_evaluate(cfg)
        from rich.console import Console

        from w2sg import inventory

        console, root = Console(), Path(config.root)
        if config.store == "list":
            inventory.print_list(root, console)
        elif config.store == "why":
            inventory.print_why(root, typed_key(config.key), console)
        else:
            inventory.prune(root, used_stages(Path(config.out)), config.apply, console)
            if not config.apply:
                console.print("nothing was removed; add apply=true to do so")


if __name__ == "__main__":
    main()
