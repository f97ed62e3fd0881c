"""Look at what runs left behind: ``python evaluate.py runs=outputs``, ``python evaluate.py store=list``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from w2sg.cli import readable_errors
from w2sg.config import CONF, check_evaluate, register
from w2sg.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

register()


def used_stages(out: Path) -> set[str]:
    """Stages that a report below ``out`` names."""
    if not out.is_dir():
        raise UserError(
            f"out: there is no folder {out}, so nothing says which stages are in use; name the folder of the runs"
        )
    used: set[str] = set()
    for file in out.rglob("report.json"):
        try:
            used |= {stage["key"] for stage in json.loads(file.read_text())["stages"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is no report of a run ({error!r}), so nothing says which stages it uses; mend or remove it"
            ) from error
    return used


def gather(runs: Path, console: Console) -> None:
    """One table and one page over all finished runs below a folder."""
    from w2sg import collect_page
    from w2sg.collect import collect

    collection = collect(runs)
    collect_page.show(collection, console)
    files = collect_page.write(collection, runs)
    console.print("written: " + ", ".join(map(str, files)), soft_wrap=True)


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
    """Gather finished runs; or list a store, explain one of its stages, prune it."""
    with readable_errors():
        config = check_evaluate(cfg)
        from rich.console import Console

        console, root = Console(), Path(config.root)
        if config.runs is not None:
            gather(Path(config.runs), console)
            return
        from w2sg import inventory

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
