"""What runs left behind: ``w2sg compare``, ``store``, ``export``, ``harness`` and others, or evaluate.py's keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from w2sg.cli.launch import launch, readable_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from w2sg.config.evaluate_schema import EvaluateConfig
    from w2sg.console import Plain


def downstream(config: EvaluateConfig, console: Plain) -> None:
    """The harness's table of one model."""
    from w2sg.cli.harness import run_harness
    from w2sg.evaluation.lm_harness import Options

    include, to = (None if name is None else Path(name) for name in (config.include, config.to))
    options = Options(config.tasks, config.limit, config.fewshot, config.batch_size, config.chat, include)
    out, root = Path(config.out), Path(config.root)
    run_harness(Path(config.harness), config.system, options, config.baseline, to, out, root, console)


def inventory(config: EvaluateConfig, console: Plain) -> None:
    """What a store holds, why, and what can go."""
    from w2sg.cli.store import print_list, print_why, prune, used_stages, verify
    from w2sg.config.programs import command

    root = Path(config.root)
    if config.store == "list":
        print_list(root, console)
    elif config.store == "why":
        print_why(root, str(config.key), console)
    elif config.store == "verify":
        if not verify(root, console):
            sys.exit(1)
    else:
        prune(root, used_stages(Path(config.out)), config.apply, console)
        if not config.apply:
            console.say(f"nothing was removed; `{command('store', 'prune', 'apply=true')}` does so")


def run(cfg: DictConfig) -> None:
    """Gather finished runs; look at a store or prune it; export or evaluate a model; read annotations; check theory."""
    with readable_errors():
        from w2sg.config.check import check_evaluate
        from w2sg.console import Plain
        from w2sg.store.digests import remember_in

        config, console = check_evaluate(cfg), Plain()
        remember_in(config.root)
        if config.runs is not None:
            from w2sg.cli.compare import gather

            gather(Path(config.runs), console)
        elif config.export is not None:
            from w2sg.cli.export import print_export

            root, out = Path(config.root), Path(config.out)
            to = Path(config.to)
            print_export(Path(config.export), to, config.system, out, root, console, config.adapter)
        elif config.harness is not None:
            downstream(config, console)
        elif config.annotations is not None:
            from w2sg.evaluation.alpaca_eval import print_annotations

            of, to = (None if name is None else Path(name) for name in (config.of, config.to))
            print_annotations(Path(config.annotations), of, to, console)
        elif config.wandb_report is not None:
            from w2sg.cli.wandb_report import write_report

            write_report(Path(config.wandb_report), config.project, config.entity, console)
        elif config.known_answers is not None:
            from w2sg.known_answers.suite import run_known_answers

            if not run_known_answers(config.known_answers, Path(config.out), console):
                sys.exit(1)
        else:
            inventory(config, console)


def decodes(arguments: list[str]) -> bool:
    """Whether a decoder is to be measured.

    >>> decodes(["-m", "decoder=search,eft"]), decodes(["runs=outputs"])
    (True, False)
    """
    return any(argument.partition("=")[0].lstrip("+-") in ("decoder", "experiment") for argument in arguments)


def look() -> None:
    """What is typed in keys of conf/evaluate.yaml."""
    launch(run, "evaluate")


def main() -> None:
    """evaluate.py: a decoder where one is named, else what runs left behind."""
    if decodes(sys.argv[1:]):
        from w2sg.cli.decode import main as decode

        decode()
    else:
        look()
