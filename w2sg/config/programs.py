"""The commands by name, and what a user types for one: ``w2sg train``, or ``python train.py`` in a clone."""

from __future__ import annotations

import sys
from pathlib import Path

# Verb -> the key of conf/evaluate.yaml that it sets. `train` and `decode` run experiments, from files of their names.
JOBS = {
    "compare": "runs",
    "store": "store",
    "export": "export",
    "harness": "harness",
    "annotations": "annotations",
    "check-theory": "known_answers",
    "wandb-report": "wandb_report",
}
SCRIPTS = ("train", "evaluate")  # train.py and evaluate.py of a clone


def command(verb: str, *words: str) -> str:
    """What is to be typed for a verb, in the form in which the running program was started.

    Args:
        verb: ``train``, ``decode`` or one of `JOBS`.
        words: what follows it; of a job, first the value of its key.

    >>> command("store", "prune") in ("w2sg store prune", "python evaluate.py store=prune")
    True
    """
    if Path(sys.argv[0]).stem not in SCRIPTS:
        return " ".join(["w2sg", verb, *words])
    if verb in JOBS:
        words = (f"{JOBS[verb]}={words[0] if words else '...'}", *words[1:])
    elif verb == "decode" and not any(word.startswith(("decoder=", "experiment=", "-")) for word in words):
        words = ("decoder=...", *words)
    return " ".join(["python", "train.py" if verb == "train" else "evaluate.py", *words])
