"""Answers that a strong model did not write: a dataset's, a file's, and the weak model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.config.options import PlainSampling
from w2sg.data.files import read_file
from w2sg.data.messages import Dialogue, Message
from w2sg.data.replies import Prompts, Replies, gold_pairs, prompt_id
from w2sg.data.table import Table, digest
from w2sg.errors import UserError
from w2sg.experiment.run import Run
from w2sg.methods.refine.prompts import instructed
from w2sg.models.trained import Trained


def gold_answers(table: Table) -> Replies:
    """The right answer to each prompt: that of a question, or the preferred reply; of several the first.

    Raises:
        UserError: the table has labels and no answers.
    """
    if table.kind == "pairs":
        return _once(gold_pairs(table).chosen)
    if table.kind != "answers":
        raise UserError(
            "dataset: method=refine trains on answers, and this dataset has labels; choose one with answers "
            "(dataset=questions, gsm8k, dolly, or preference pairs), or method.target=labels"
        )
    texts = [table.reply(row) for row in range(len(table))]
    return _once(as_replies([prompt_id(p) for p in table.prompts], table.prompts, texts, {"gold": table.label_hash()}))


def answers_to(
    run: Run, name: str, writer: Trained, prompts: Prompts, instruction: str | None, sampling: PlainSampling
) -> Replies:
    """What a model says when told so; the instruction is not part of the prompts that the replies name."""
    texts = [instructed(prompt, instruction) for prompt in prompts.texts]
    return _asked_as(run.generate(name, writer, Prompts(prompts.name, prompts.ids, texts), sampling), prompts)


def answers_of_file(path: str, prompts: Prompts, missing: bool = False) -> Replies | None:
    """Answers of a JSONL file {prompt, answer} to the prompts that it has one for, joined by the prompt's hash.

    A prompt may stand there as a question alone or as the dialogue that it is in the data.

    Args:
        missing: that there is no answer at all is no error, and gives None.

    Raises:
        UserError: no such file, a row without these columns, two answers to a prompt, or no prompt in common.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"method.answers: there is no file {file}; name one with a row {{prompt, answer}} a line")
    answers: dict[tuple[Message, ...], str] = {}
    for where, row in read_file(file):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "answer")):
            raise UserError(f"method.answers: {where} is no row {{prompt, answer}} of two texts")
        key = Dialogue.of_text(row["prompt"]).messages
        if answers.setdefault(key, row["answer"]) != row["answer"]:
            raise UserError(f"method.answers: {where} is a second answer to a prompt; keep one of them")
    rows = [k for k, prompt in enumerate(prompts.texts) if prompt.messages in answers]
    if not rows and missing:
        return None
    if not rows:
        raise UserError(
            f"method.answers: none of the {len(answers)} prompts of {file.name} is among the {len(prompts)} of the "
            f"{prompts.name} split; they are joined by their text, so the file must have been written for this data"
        )
    texts = [answers[prompts.texts[k].messages] for k in rows]
    ids = [prompts.ids[k] for k in rows]
    return as_replies(ids, [prompts.texts[k] for k in rows], texts, {"answers": digest(*ids, *texts)})


def spoken(run: Run, name: str, replies: Replies) -> Replies:
    """Replies that say something; the others are counted."""
    kept = [k for k, text in enumerate(replies.texts) if text.strip()]
    if lost := len(replies) - len(kept):
        run.dropped.setdefault(name, {})["empty answer"] = lost
    return replies.take(kept)


def as_replies(ids: Sequence[str], prompts: Sequence[Dialogue], texts: Sequence[str], key: dict[str, Any]) -> Replies:
    """Texts that no model of this run has tokens of as whole replies, one to each prompt."""
    zeros = np.zeros(len(ids), np.int64)
    return Replies(list(ids), list(prompts), list(texts), np.ones(len(ids), bool), zeros, zeros, key)


def _once(replies: Replies) -> Replies:
    first = {i: row for row, i in reversed(list(enumerate(replies.ids)))}
    return replies.take(sorted(first.values()))


def _asked_as(replies: Replies, prompts: Prompts) -> Replies:
    """The same replies, to the prompts as they stand in the data."""
    texts = dict(zip(prompts.ids, prompts.texts, strict=True))
    return replace(replies, prompts=[texts[i] for i in replies.ids])
