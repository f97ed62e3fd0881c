"""Measure a decoder, ``python evaluate.py decoder=search strong=... weak=...``, or look at what runs left behind.

``runs=outputs`` gathers finished runs, ``store=list`` looks at their store, ``export=RUN`` writes a model of theirs,
``annotations=FILE`` reads what the alpaca_eval tool judged, ``known_answers=all`` runs experiments with known answers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from w2sg import stops
from w2sg.cli.launch import launch, readable_errors
from w2sg.config.check import check, check_evaluate
from w2sg.config.evaluate_schema import EvaluateConfig
from w2sg.errors import UserError

if TYPE_CHECKING:
    from w2sg.console import Plain


def used_stages(out: Path) -> set[str]:
    """Stages that a report below ``out`` names."""
    if not out.is_dir():
        raise UserError(
            f"out: there is no folder {out}, so nothing says which stages are in use; name the folder of the runs"
        )
    from w2sg.store.store import read_json

    used: set[str] = set()
    for file in out.rglob("report.json"):
        try:
            used |= {stage["key"] for stage in read_json(file)["stages"]}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{file} is no report of a run ({error!r}), so nothing says which stages it uses; mend or remove it"
            ) from error
    return used


def gather(runs: Path, console: Plain) -> None:
    """One page and one table over all finished runs below a folder; what cannot be used is named with the reason."""
    from w2sg.compare.collect import collect

    summary = collect(runs)
    files = summary.write(runs)
    summary.show(console)
    console.say("written: " + ", ".join(map(str, files)))


def downstream(config: EvaluateConfig, console: Plain) -> None:
    """The harness's table of one model."""
    from w2sg.cli.harness import run_harness
    from w2sg.evaluation.lm_harness import Options

    include, to = (None if name is None else Path(name) for name in (config.include, config.to))
    options = Options(config.tasks, config.limit, config.fewshot, config.batch_size, config.chat, include)
    out, root = Path(config.out), Path(config.root)
    run_harness(Path(config.harness), config.system, options, config.baseline, to, out, root, console)


def decode(cfg: DictConfig) -> float | None:
    """Answer test prompts in one way, beside plain samples; returns the win rate over them, for sweepers."""
    with readable_errors():
        hydra_config = HydraConfig.get()
        config = check(cfg, hydra_config.runtime.choices)
        from w2sg.experiment.run import run_method

        report = run_method(config, hydra_config.runtime.output_dir, list(hydra_config.overrides.task))
        found = report.content["decoding"]
        own = found["systems"].get(found["decoder"]["kind"], {})
        return own.get("against", {}).get("plain", {}).get("win_rate", {}).get("value")


def decodes(arguments: list[str]) -> bool:
    """Whether a decoder is to be measured.

    >>> decodes(["-m", "decoder=search,eft"]), decodes(["runs=outputs"])
    (True, False)
    """
    return any(argument.partition("=")[0].lstrip("+-") in ("decoder", "experiment") for argument in arguments)


def look(cfg: DictConfig) -> None:
    """Gather finished runs; look at a store or prune it; export or evaluate a model; read annotations; check theory."""
    with readable_errors():
        config = check_evaluate(cfg)
        from w2sg.console import Plain

        console, root = Plain(), Path(config.root)
        if config.runs is not None:
            gather(Path(config.runs), console)
            return
        if config.export is not None:
            from w2sg.cli.export import print_export

            to, out = Path(config.to), Path(config.out)
            print_export(Path(config.export), to, config.system, out, root, console, config.adapter)
            return
        if config.harness is not None:
            downstream(config, console)
            return
        if config.annotations is not None:
            from w2sg.evaluation.alpaca_eval import print_annotations

            of, to = (None if name is None else Path(name) for name in (config.of, config.to))
            print_annotations(Path(config.annotations), of, to, console)
            return
        if config.known_answers is not None:
            from w2sg.known_answers.suite import run_known_answers

            if not run_known_answers(config.known_answers, Path(config.out), console):
                sys.exit(1)
            return
        from w2sg.cli import store as inventory

        if config.store == "list":
            inventory.print_list(root, console)
        elif config.store == "why":
            inventory.print_why(root, str(config.key), console)
        else:
            inventory.prune(root, used_stages(Path(config.out)), config.apply, console)
            if not config.apply:
                console.print("nothing was removed; add apply=true to do so")


def main() -> None:
    """A decoder where one is named, else what runs left behind."""
    if decodes(sys.argv[1:]):
        launch(decode, "decode", check)
    else:
        launch(look, "evaluate", lambda cfg, _: check_evaluate(cfg))


if __name__ == "__main__":
    with stops.command(last=True):
        main()
