"""The commands by name, and what a user types for one: ``w2sg train``, or ``python train.py`` in a clone."""

from __future__ import annotations

import re
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
STORE = ("list", "why", "prune", "verify")  # what `w2sg store` does
SCRIPTS = ("train", "evaluate")  # train.py and evaluate.py of a clone
_jobs: list[str] = []  # the verb of a job that was typed


def job_is(verb: str) -> None:
    """Remember which job runs, so that errors name it and not its key."""
    _jobs[:] = [verb]


def command(verb: str, *words: str) -> str:
    """What is to be typed for a verb, in the form in which the running program was started.

    Args:
        verb: ``train``, ``decode`` or one of `JOBS`.
        words: what follows it; of a job, first the value of its key.

    >>> command("store", "prune") in ("w2sg store prune", "python evaluate.py store=prune")
    True
    """
    if not _script():
        return " ".join(["w2sg", verb, *(word.removeprefix("key=") for word in words)])
    if verb in JOBS:
        words = (f"{JOBS[verb]}={words[0] if words else '...'}", *words[1:])
    elif verb == "decode" and not any(word.startswith(("decoder=", "experiment=", "-")) for word in words):
        words = ("decoder=...", *words)
    return " ".join(["python", "train.py" if verb == "train" else "evaluate.py", *words])


def as_started(text: str) -> str:
    """A message in the form in which the running program was started: no key stands for a verb that was typed.

    A page is named by the command that shows it, since a wheel has no folder docs/.

    >>> as_started("x; type runs=outputs. docs/data.md says more") if not _script() else ""
    'x; type `w2sg compare outputs`. `w2sg docs data` says more'
    """
    if _script():
        return text
    for verb in _jobs:
        text = re.sub(rf"^{JOBS[verb]}: ", f"{verb}: ", text, flags=re.M)
    return with_verbs(re.sub(r"\bdocs/([\w/]+)\.md\b", r"`w2sg docs \1`", text))


def with_verbs(text: str) -> str:
    """Each ``key=value`` of a job in words of the command ``w2sg``."""
    for verb, key in JOBS.items():
        value = f"({'|'.join(STORE)})" if key == "store" else r"(\w[\w./]*\w)"
        text = re.sub(rf"(?<![\w/.,`]){key}={value}", rf"`w2sg {verb} \1`", text)
    return text


def _script() -> bool:
    return Path(sys.argv[0]).stem in SCRIPTS
