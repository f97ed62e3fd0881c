"""What may be typed to the commands that look at runs, or to evaluate.py where no decoder is measured."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import PositiveInt

from w2sg.config.option import Options, option
from w2sg.config.programs import command


class EvaluateConfig(Options):
    """What to look at, as composed from conf/evaluate.yaml."""

    runs: str | None = option(
        None, "a folder of finished runs: one table, one page, paired tests (summary.html, .csv, .json)"
    )
    store: Literal["list", "why", "prune", "verify"] | None = option(
        None,
        "list: what is in the store | why: what made a stage | prune: remove what no run uses | verify: compare every "
        "byte with what was written",
    )
    export: str | None = option(
        None,
        "a finished run, or a stage of the store: write a trained model as a folder for transformers",
    )
    harness: str | None = option(None, "the same, or a saved model: lm-evaluation-harness on it (pip install lm-eval)")
    annotations: str | None = option(
        None, "annotations.json of the alpaca_eval tool: its preferences as win rates (docs/decoding.md)"
    )
    of: str | None = option(
        None, "annotations: the run whose replies were judged; recognised by instruction and output"
    )
    known_answers: str | None = option(
        None, "all, or one by name: experiments whose answer theory knows (docs/known_answers.md)"
    )
    wandb_report: str | None = option(
        None, "a folder of finished runs: a workspace in W&B with their accuracies, PGR and curves (docs/wandb.md)"
    )
    project: str | None = option(None, "wandb_report: project in W&B; null is WANDB_PROJECT, or the runs' own, or w2sg")
    entity: str | None = option(None, "wandb_report: team or user in W&B; null is WANDB_ENTITY, or your default")
    # the beginning of a hash may read as a number
    key: str | int | float | None = option(
        None, "store=why: a stage, its name for the newest, or the beginning of its name or hash"
    )
    apply: bool = option(False, "store=prune: true removes; false is a dry run")
    system: str | None = option(
        None, "export, harness: which model of the run: student, weak, ceiling, base, cong, ..."
    )
    adapter: bool = option(False, "export: of a model with tune=lora, its adapters alone; false merges them")
    to: str | None = option(
        None, "export: the new folder; harness, annotations: where their file goes if not beside what is read"
    )
    tasks: list[str] = option([], "harness: its names of tasks or groups, as [arc_easy,gsm8k]")
    limit: PositiveInt | None = option(None, "harness: examples per task; null is all of them")
    fewshot: int | None = option(None, "harness: examples before each question; null is the task's own number", ge=0)
    batch_size: PositiveInt | Literal["auto"] = option(8, "harness: requests at a time; auto finds what fits on a GPU")
    chat: bool = option(False, "harness: ask through the model's chat template")
    include: str | None = option(
        None, "harness: a folder of task files (YAML) of your own; needs no network if its data is local"
    )
    baseline: bool = option(False, "harness: also evaluate the model before its training, and print the difference")
    out: str = option(
        "outputs",
        "store, export, harness: the folder that runs were written to; known_answers: the folder of their page",
    )
    root: str = option(..., "store, export, harness: the store itself, where it was given another place")

    def rules(self) -> list[str]:
        doing = ("runs", "store", "export", "harness", "annotations", "known_answers", "wandb_report")
        tasks = [name for name in doing if getattr(self, name) is not None]
        if not tasks:
            return [
                "runs: say what to do: runs=FOLDER gathers finished runs; store=list, =why, =prune or =verify looks at "
                "a store; export=RUN writes one of its models; harness=RUN evaluates one on downstream tasks; "
                "annotations=FILE reads what alpaca_eval judged; known_answers=all checks against theory; "
                "wandb_report=FOLDER saves a workspace in W&B"
            ]
        if len(tasks) > 1:
            return [f"{tasks[0]}: one thing at a time; leave out {', '.join(f'{other}=' for other in tasks[1:])}"]
        if self.store == "why" and self.key is None:
            why, every = command("store", "why", "key=STAGE"), command("store", "list")
            return [f"key: name the stage that is to be explained: `{why}`; `{every}` shows them all"]
        if self.export is not None and self.to is None:
            return ["to: say which folder the model is to be written to"]
        if self.adapter and self.export is None:
            return ["adapter: read only with export=RUN; leave it out"]
        if self.harness is not None and not self.tasks:
            return ["tasks: name the harness's tasks, as tasks=[arc_easy,gsm8k]"]
        if (self.project or self.entity) and self.wandb_report is None:
            return [f"{'project' if self.project else 'entity'}: read only with wandb_report=FOLDER; leave it out"]
        if self.of is not None and self.annotations is None:
            return ["of: read only with annotations=FILE; leave it out"]
        return []


def keys_read(job: str) -> dict[str, str]:
    """The keys that a job reads and what they mean, from the words before colons of their help.

    Args:
        job: the key that chooses it.

    >>> list(keys_read("store"))
    ['key', 'apply', 'out', 'root']
    """
    fields = {name: str(field.description) for name, field in EvaluateConfig.model_fields.items()}
    own = {}
    for name, words in fields.items():
        for part in re.split(r"; (?=[\w, ]+: )", words):
            readers, colon, rest = part.partition(": ")
            if colon and job in re.split(r", |=\w+", readers):
                own[name] = rest
    return own
