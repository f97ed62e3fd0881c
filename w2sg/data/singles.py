"""Forms of one text a row: with a class, as a good or a bad reply, or as the right answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from w2sg.data.examples import Example, answered, labelled
from w2sg.data.files import Row
from w2sg.data.messages import Dialogue, Message
from w2sg.data.prompt_columns import Form, PromptColumns, Sample, number, system_of, text_of
from w2sg.data.turns import kind_of, majority, messages_of, refuse_python
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
    if -1.0 in known and known <= {-1.0, 1.0}:
        raise UserError(f"dataset.path: {where}: labels are -1 and 1; write them 0 and 1")
    words = [
        value for value in values if isinstance(value, str) and number(value) is None and value.lower() not in TRUTH
    ]
    if 2 * len(words) > len(values):
        names = ", ".join(map(repr, sorted(set(map(str, values)))[:6]))
        raise UserError(f"dataset.path: {where}: labels are words ({names}); write numbers from 0 instead of them")


TRUTH = {"true": 1, "false": 0}


def class_of(value: Any, name: str = "label") -> int:
    """A class number from 0."""
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in TRUTH):
        return TRUTH[str(value).strip().lower()]
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+(\.0*)?\s*", value):
        value = int(value.split(".")[0])
    if isinstance(value, float) and value.is_integer():
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
        prompt, label = prompts.dialogue(row), class_of(row["label"])
        if label > 1:
            raise ValueError(f"label is {label}, not 0 or 1")
        return labelled(f"{prompt.text} {completion(row['completion'], 'completion').strip()}", label, prompt.text)

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


def completion(value: Any, name: str) -> str:
    """A reply, as text or as the one message of the assistant."""
    if isinstance(value, str) and kind_of(value) not in ("json", "python"):
        return value
    turns = messages_of(value, name)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise ValueError(f"{name} is not one message of the assistant")
    return turns[0].content


def completions(sample: Sample, common: set[str], where: str) -> Form:
    """{prompt, completion}: the completion is the right answer."""
    prompts = PromptColumns.of(sample, common, where)
    if prompts.column is None:
        raise UserError(
            f"dataset.path: {where}: completions without a prompt that they answer; add a column prompt, or name it by "
            "dataset.columns.prompt"
        )
    return Form(
        "prompts with their right answers",
        lambda row: answered(prompts.dialogue(row), completion(row["completion"], "completion")),
        {"completion"} | prompts.columns,
    )


def dialogues(column: str) -> Callable[..., Form]:
    """{messages}: the assistant's last message is the right answer to what stands before it."""

    def make(sample: Sample, common: set[str], where: str) -> Form:
        refuse_python(majority(row.get(column) for row in sample), column, where)
        system = system_of(sample)
        form = Form("dialogues, the last reply as the right answer", None, {column} | ({system} if system else set()))

        def example(row: Row) -> Example:
            turns = messages_of(row[column], column)
            if turns[-1].role != "assistant" or len(turns) < 2:
                raise ValueError(f"{column} is no dialogue that ends with the assistant")
            if system and row.get(system) and turns[0].role == "system":
                if text_of(row, system).strip() != turns[0].content.strip():
                    form.counts[f"rows whose {system} is not the system message of their dialogue, which is read"] += 1
            elif system and row.get(system):
                turns = (Message("system", text_of(row, system)), *turns)
            return answered(Dialogue.of_messages(turns[:-1]), turns[-1].content)

        form.example = example
        return form

    return make
