"""Forms of one text a row: with a class, as a good or a bad reply, or as the right answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from w2sg.data.examples import Example, answered, labelled
from w2sg.data.files import Row
from w2sg.data.messages import Dialogue, Message
from w2sg.data.prompt_columns import OTHER_SYSTEM, Form, PromptColumns, Sample, number, system_of, text_of
from w2sg.data.turns import kind_of, majority, messages_of, refuse_kinds
from w2sg.errors import UserError


def classes(sample: Sample, common: set[str], where: str) -> Form:
    """{text, label}: label a class number from 0."""
    check_labels(sample, "label", where)
    return Form("texts with classes", parse_labelled, {"text", "label"})


def check_labels(sample: Sample, column: str, where: str) -> None:
    """Labels that are other names of classes, for all of a file.

    Raises:
        UserError: they are -1 and 1, or words.
    """
    values = [row.get(column) for row in sample]
    known = {number(value) for value in values} - {None}
    if known == {-1.0}:
        raise UserError(
            f"dataset.path: {where}: all labels are -1, as in tests whose labels are held back; give rows with labels"
        )
    if -1.0 in known and known <= {-1.0, 1.0}:
        raise UserError(f"dataset.path: {where}: labels are -1 and 1; write them 0 and 1")
    words = [
        value for value in values if isinstance(value, str) and number(value) is None and value.lower() not in TRUTH
    ]
    if 2 * len(words) > len(values):
        names = ", ".join(map(repr, sorted(set(map(str, values)))[:6]))
        raise UserError(f"dataset.path: {where}: labels are words ({names}); write numbers from 0 instead of them")
    # to drop a few rows is one thing, to drop a class another
    others = [value for value in values if number(value) is not None and not _is_class(value)]
    if len(others) > 1 and 20 * len(others) > len(values):
        names = ", ".join(map(str, dict.fromkeys(others[:50])))[:60]
        raise UserError(
            f"dataset.path: {where}: {len(others)} of {len(values)} labels are numbers, but no classes ({names}); "
            "write classes as 0, 1, ... and leave out rows without one"
        )


def _is_class(value: Any) -> bool:
    try:
        return class_of(value) >= 0
    except ValueError:
        return False


TRUTH = {"true": 1, "false": 0}


def class_of(value: Any, name: str = "label") -> int:
    """A class number from 0."""
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in TRUTH):
        return TRUTH[str(value).strip().lower()]
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+(\.0*)?\s*", value):
        value = int(value.split(".")[0])
    if isinstance(value, float | Decimal) and value == value // 1:
        value = int(value)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}, not a class number from 0")
    return value


def parse_labelled(row: Row) -> Example:
    return labelled(text_of(row, "text"), class_of(row["label"]))


def unpaired(sample: Sample, common: set[str], where: str) -> Form:
    """{prompt, completion, label}: whether a reply is a good one."""
    check_labels(sample, "label", where)
    prompts = PromptColumns.of(sample, common, where)

    def example(row: Row) -> Example:
        value = row["completion"]
        if prompts.column is None and kind_of(value) in ("messages", "json"):  # they hold their prompt
            prompt, reply = answered_of(value, "completion")
        else:
            prompt, reply = prompts.dialogue(row), completion(value, "completion")
        return _judged(prompt, reply, row["label"])

    return Form("replies one by one, good (1) or not (0)", example, {"completion", "label"} | prompts.columns)


def choices(sample: Sample, common: set[str], where: str) -> Form:
    """{question, choice, label}: whether the answer that is shown is right (the automated weak-to-strong protocol)."""
    check_labels(sample, "label", where)

    def example(row: Row) -> Example:
        question, label = text_of(row, "question").strip(), class_of(row["label"])
        if label > 1:
            raise ValueError(f"label is {label}, not 0 or 1")
        return labelled(f"Question: {question}\n\nAnswer: {text_of(row, 'choice').strip()}", label, question)

    return Form("answers to questions one by one, right (1) or not (0)", example, {"question", "choice", "label"})


def _judged(prompt: Dialogue, reply: str, verdict: Any, name: str = "label") -> Example:
    label = class_of(verdict, name)
    if label > 1:
        raise ValueError(f"{name} is {label}, not 0 or 1")
    return labelled(f"{prompt.text} {reply.strip()}", label, prompt.text)


def judged(column: str, verdict: str) -> Callable[..., Form]:
    """{messages, label}: whether the last reply of a dialogue is a good one."""

    def make(sample: Sample, common: set[str], where: str) -> Form:
        check_labels(sample, verdict, where)
        inner = dialogues(column)(sample, common, where)
        read = inner.example

        def example(row: Row) -> Example:
            made = read(row)
            return _judged(made.prompt, made.texts[0][len(made.prompt.text) :], row[verdict], verdict)

        words = f"replies one by one, good (1) or not (0) by {verdict}"
        return Form(words, example, inner.reads | {verdict}, counts=inner.counts)

    return make


def answered_of(value: Any, name: str) -> tuple[Dialogue, str]:
    """A dialogue of messages up to its last reply, and that.

    Raises:
        ValueError: it does not end with a reply that is to be learned.
    """
    turns = messages_of(value, name)
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise ValueError(f"{name} is no dialogue that ends with the assistant")
    last = value[-1] if isinstance(value, list) else None
    if isinstance(last, dict) and last.get("weight") == 0:
        raise ValueError(f"the last reply of {name} has weight 0, so it is not to be learned")
    return Dialogue.of_messages(turns[:-1]), turns[-1].content


def completion(value: Any, name: str) -> str:
    """A reply, as text or as the one message of the assistant."""
    if isinstance(value, str) and kind_of(value) not in ("json", "python"):
        return value
    turns = messages_of(value, name)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise ValueError(f"{name} is not one message of the assistant")
    return turns[0].content


def completions(column: str) -> Callable[..., Form]:
    """{prompt, completion}: the completion is the right answer."""

    def make(sample: Sample, common: set[str], where: str) -> Form:
        prompts = PromptColumns.of(sample, common, where)
        if prompts.column is None:
            raise UserError(
                f"dataset.path: {where}: completions without a prompt that they answer; add a column prompt, or name "
                "it by dataset.columns.prompt"
            )
        return Form(
            "prompts with their right answers",
            lambda row: answered(prompts.dialogue(row), completion(row[column], column)),
            {column} | prompts.columns,
        )

    return make


def dialogues(column: str) -> Callable[..., Form]:
    """{messages}: the assistant's last message is the right answer to what stands before it."""

    def make(sample: Sample, common: set[str], where: str) -> Form:
        refuse_kinds(majority(row.get(column) for row in sample), column, where)
        system = system_of(sample)
        form = Form("dialogues, the last reply as the right answer", None, {column} | ({system} if system else set()))

        def example(row: Row) -> Example:
            prompt, reply = answered_of(row[column], column)
            turns = prompt.messages
            if system and row.get(system) and turns[0].role == "system":
                if text_of(row, system).strip() != turns[0].content.strip():
                    form.counts[OTHER_SYSTEM.format(system)] += 1
            elif system and row.get(system):
                turns = (Message("system", text_of(row, system)), *turns)
            return answered(Dialogue.of_messages(turns), reply)

        form.example = example
        return form

    return make
