"""``plan=true`` in the place of the runs that are typed."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path

from w2sg.config.schema import TrainConfig
from w2sg.console import Plain
from w2sg.planning.table import as_dict, of_run, of_sweep
from w2sg.planning.walk import Shared, plan

WIDTH = 80


def plan_runs(configs: Sequence[TrainConfig], words: Sequence[Sequence[str]]) -> None:
    """Print what runs would do; nothing else is done.

    Args:
        configs: of each run. words: what was typed for each.

    Raises:
        UserError: what a run would end with before its first stage.
    """
    console, shared = Plain(), Shared()
    logging.getLogger("w2sg").setLevel(logging.ERROR)  # what a run would say of its rows, the notes say
    try:
        plans = [plan(config, list(typed), shared) for config, typed in zip(configs, words, strict=True)]
    finally:
        shared.foresight.close()
    for line in of_run(plans[0]) if len(plans) == 1 else of_sweep(plans):
        prose = line.startswith(("note:", "more stages", "some runs", "time is", "?:", "<:"))
        for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ") if prose else [line]:
            console.say(part)
    if file := configs[0].plan.file:
        Path(file).expanduser().write_text(json.dumps(as_dict(plans), indent=1) + "\n", encoding="utf-8")
        console.say(f"written to {file}")
