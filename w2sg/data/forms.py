"""What rows of a file mean, decided once for the whole file by its columns and what they hold."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from w2sg.data.examples import NO_PROMPT, Example, answered, labelled, pair
from w2sg.data.files import Notes, Row, Rows
from w2sg.data.messages import LAST_TURN, Dialogue, Message, transcript
from w2sg.data.turns import SPECIAL, kind_of, majority, messages_of, refuse_python
from w2sg.errors import UserError

SAMPLE = 1000  # rows by which a file's form is decided
EXPECTS = (
    "preference pairs {chosen, rejected} as 'Human: ... Assistant: ...' dialogues or lists of {role, content}, "
    "{prompt, chosen, rejected}, or classes {text, label} (docs/data.md has all forms; other names: "
    "dataset.columns={prompt: ..., chosen: ..., rejected: ...})"
)
PROMPTS = ("prompt", "question", "instruction", "query", "input", "history")
SYSTEMS = ("system", "system_prompt")
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_reward", "rejected_reward"),
)
TEMPLATED = (
    "rows hold special tokens of a chat template, as <|im_start|> or [INST]: a model with a template would read them "
    "twice; give the texts without them"
)
EQUAL, LOWER = "pairs with equal scores", "pairs whose chosen reply has the lower score"
Sample = list[Row]


@dataclass
class Form:
    """How the rows of one file are read.

    Attributes:
        words: what they are taken for, for the report. example: of one row. reads, needs: columns.
        counts: of what a reader should know, as rows are read. strict: by an example's id, why it is not to be trusted.
    """

    words: str
    example: Callable[[Row], Example]
    reads: set[str]
    needs: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    strict: dict[str, str] = field(default_factory=dict)


class Formed(dict):
    """A row that knows how it is read."""

    form: Form


def formed(rows: Rows, where: str, columns: dict[str, str] | None, notes: Notes, expects: str) -> Rows:
    """Rows of one file that know how they are read; what is not read is added to the notes when all have been.

    Args:
        where: the file, for messages. columns: field -> the name that it has in the file.

    Raises:
        UserError: the columns are of no form that is known.
    """
    rows = iter(rows)
    head = list(islice(rows, SAMPLE))
    sample = [row for _, row in head if isinstance(row, dict)]
    if not sample:
        yield from chain(head, rows)
        return
    if columns:
        sample = _renamed(sample, columns, where)
    form = form_of(sample, where, expects)
    form.example = _watched(form, form.example)
    if beside := [name for name in (*SYSTEMS, "history") if name in form.reads and f" {name}" not in form.words]:
        form.words += f", with {' and '.join(beside)}"
    seen: Counter[str] = Counter()
    read = 0
    everything: Iterator = chain(head, rows)
    if form.words == GROUPED:
        everything = _grouped(everything, form)
    for place, row in everything:
        if not isinstance(row, dict):
            yield place, row
            continue
        read += 1
        seen.update(key for key, value in row.items() if value is not None)
        own = Formed(row if not columns else row | {f: row.get(n) for f, n in columns.items()})
        own.form = form
        yield place, own
    if not read:
        return
    named = (set(columns.values()) if columns else form.reads) | notes.known
    unread = sorted(str(key) for key in seen if key not in named)
    notes.forms[where] = form.words
    if unread:
        notes.append(f"{where}: columns that are not read: {', '.join(unread)}")
    notes += [f"{where}: {count} of {read} {what}" for what, count in form.counts.items()]


def _watched(form: Form, inner: Callable[[Row], Example]) -> Callable[[Row], Example]:
    """Rows that were written by a chat template already are counted."""

    def example(row: Row) -> Example:
        found = inner(row)
        if any(SPECIAL.search(text) for text in found.texts):
            form.counts[TEMPLATED] += 1
        return found

    return example


def _renamed(sample: Sample, columns: dict[str, str], where: str) -> Sample:
    there = dict.fromkeys(key for row in sample for key in row)
    for name, column in columns.items():
        if column not in there:
            raise UserError(
                f"dataset.columns.{name}: {where} has no column {column!r}; it has {', '.join(map(str, there))}"
            )
    return [{name: row.get(column) for name, column in columns.items()} for row in sample]


def form_of(sample: Sample, where: str, expects: str) -> Form:
    """The form that rows of these columns have.

    Raises:
        UserError: none that is known; names the columns.
    """
    having = [[row for row in sample if all(row.get(key) is not None for key in needs)] for needs, _ in FORMS]
    best = next((k for k, rows in enumerate(having) if 2 * len(rows) >= len(sample)), None)
    if best is None:
        best = max(range(len(FORMS)), key=lambda k: len(having[k]))
    if rows := having[best]:
        needs, make = FORMS[best]
        form = make(rows, _common(rows), where)
        form.needs = needs if form.words != GROUPED else set()
        return form
    there = _common(sample)
    first = sample[0]
    remedy = next((words for needs, words in REMEDIES if needs <= there), "")
    names = ", ".join(map(str, there or first)) or "none"
    raise UserError(f"dataset.path: {where} has the columns {names}{remedy}. Expected {expects}")


def _common(sample: Sample) -> set[str]:
    """Columns that most rows have."""
    counts = Counter(key for row in sample for key, value in row.items() if value is not None)
    return {key for key, count in counts.items() if 2 * count >= len(sample)}


# -- prompts -----------------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """What comes before a reply, of one form for a whole file: the columns that say it, and how.

    Attributes:
        column: of the prompt; None where there is none. kind: of its cells. system, more, history: columns beside it.
    """

    column: str | None
    kind: str = "nothing"
    system: str | None = None
    more: str | None = None
    history: str | None = None

    @staticmethod
    def of(sample: Sample, there: set[str], where: str, names: tuple[str, ...] = PROMPTS) -> Asked:
        column = next((name for name in names if name in there), None)
        if column is None:
            return Asked(None)
        kind = majority(row.get(column) for row in sample)
        refuse_python(kind, column, where)
        keys = {key for row in sample for key in row}
        system = next((name for name in SYSTEMS if name in keys), None)
        more = "input" if column == "instruction" and "input" in keys else None
        return Asked(column, kind, system, more, "history" if column != "history" and "history" in keys else None)

    @property
    def columns(self) -> set[str]:
        return {name for name in (self.column, self.system, self.more, self.history) if name}

    def before(self, row: Row) -> tuple[Message, ...]:
        """The system message and earlier turns."""
        found = []
        if self.system and row.get(self.system):
            found.append(Message("system", text_of(row, self.system)))
        if self.history and row.get(self.history):
            found += _turns(row[self.history], self.history)
        return tuple(found)

    def text(self, row: Row) -> str:
        text = text_of(row, self.column)
        more = row.get(self.more) if self.more else None
        return f"{text}\n{more}" if isinstance(more, str) and more.strip() else text

    def messages(self, row: Row) -> tuple[Message, ...]:
        """The prompt as messages, with what stands before it."""
        if self.kind in ("messages", "json"):
            found = messages_of(row[self.column], self.column)
            if found[-1].role == "assistant":
                raise ValueError(f"{self.column} ends with the assistant")
        elif self.kind == "dialogue":
            found = Dialogue.of_text(self.text(row)).messages
        else:
            found = (Message("user", self.text(row)),)
        return (*self.before(row), *found)

    def dialogue(self, row: Row) -> Dialogue:
        if self.column is None:
            return NO_PROMPT
        if self.kind in ("messages", "json") or self.before(row):
            return Dialogue.of_messages(self.messages(row))
        text = self.text(row)
        if self.kind == "dialogue":
            if not BEGINS_TURN.match(text):
                raise ValueError(f"{self.column} is no dialogue ('Human: ... Assistant:'), as others of the file are")
            return Dialogue.of_text(text)
        return Dialogue(transcript([("user", text)]) + LAST_TURN, (Message("user", text.strip()),))

    def pair(self, row: Row, chosen: str, rejected: str) -> Example:
        """A pair of replies."""
        prompt = self.dialogue(row)
        if self.column is None or (self.kind == "dialogue" and not self.before(row)):
            return pair(prompt, prompt.text + chosen, prompt.text + rejected)
        texts = (f"{prompt.text} {reply}" for reply in (chosen, rejected))
        if self.kind in ("messages", "json") or self.before(row):
            return pair(prompt, *texts)
        spaced = f"{prompt.text} "  # by which such pairs were always known, so that splits stay
        return pair(prompt, *texts, known=spaced if prompt.plain else None)


BEGINS_TURN = re.compile(r"\s*(Human|Assistant|System):")


def text_of(row: Row, key: str) -> str:
    """A cell that is text."""
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {type(value).__name__}, not text")
    return value


def _turns(value: Any, name: str) -> list[Message]:
    """Earlier turns: messages, or pairs of a question and its answer."""
    if kind_of(value) in ("messages", "json"):
        return list(messages_of(value, name))
    if isinstance(value, list) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in value
    ):
        return [Message(role, said) for turn in value for role, said in zip(("user", "assistant"), turn, strict=True)]
    raise ValueError(f"{name} is neither a list of messages nor of pairs [question, answer]")


# -- preference pairs --------------------------------------------------------------------------------------------------


def _pairs(sample: Sample, there: set[str], where: str, names: tuple[str, str] = ("chosen", "rejected")) -> Form:
    """{chosen, rejected}, with a prompt or with dialogues that hold it."""
    kind = majority(row.get(name) for row in sample for name in names)
    refuse_python(kind, names[0], where)
    asked = Asked.of(sample, there, where)
    if kind == "dialogue" and asked.kind in ("text", "messages", "json"):
        within = sum(_within(row, asked, names[0]) for row in sample)
        kind = "dialogue" if 2 * within >= len(sample) else "text"
    form = Form("preference pairs", lambda row: Example, set(names) | asked.columns)
    if kind == "dialogue":
        form.words = "preference pairs of whole dialogues ('Human: ... Assistant: ...')"
        form.reads = set(names) | ({asked.column} if asked.kind == "text" or asked.kind == "dialogue" else set())
        form.example = lambda row: parse_transcript(row, names)
    elif kind in ("messages", "json"):
        form.words = f"preference pairs of messages{'' if asked.column is None else f', prompts from {asked.column}'}"
        form.example = lambda row: _of_messages(row, names, asked, form)
    else:
        form.words = "preference pairs of replies" + (
            f" to {asked.column}"
            if asked.column
            else ", whole texts without a prompt (name it: dataset.columns.prompt)"
        )
        begin = sum(_begins(row, asked, names) for row in sample)
        if asked.column and 2 * begin > len(sample):
            form.words += (
                f"; {begin} of {len(sample)} begin with their prompt's text, which is read as part of the reply (leave "
                "it out there if the prompt was written twice)"
            )
        form.example = lambda row: asked.pair(row, *(_reply(row, name, kind) for name in names))
    _scored(form, sample)
    return form


def _within(row: Row, asked: Asked, name: str) -> bool:
    """Whether a dialogue holds its prompt."""
    try:
        last = asked.messages(row)[-1].content.strip()
    except (ValueError, KeyError):
        return False
    return isinstance(row.get(name), str) and bool(last) and last in row[name].rpartition(LAST_TURN)[0]


def _begins(row: Row, asked: Asked, names: tuple[str, str]) -> bool:
    prompt = row.get(asked.column) if asked.column else None
    return isinstance(prompt, str) and bool(prompt) and all(str(row.get(name)).startswith(prompt) for name in names)


def _reply(row: Row, name: str, kind: str) -> str:
    value = row[name]
    if not isinstance(value, str) or kind_of(value) in ("json", "python"):
        raise ValueError(f"{name} is {kind_of(value)}, not text as in other rows")
    return value


def parse_transcript(row: Row, names: tuple[str, str] = ("chosen", "rejected")) -> Example:
    """Whole dialogues, which must agree up to the last "Assistant:"."""
    chosen, rejected = (text_of(row, name) for name in names)
    prompts = []
    for key, text in zip(names, (chosen, rejected), strict=True):
        start, turn, _ = text.rpartition(LAST_TURN)
        if not turn:
            raise ValueError(f"{key} has no {LAST_TURN!r}")
        prompts.append(start + turn)
    if prompts[0] != prompts[1]:
        raise ValueError("chosen and rejected answer different prompts")
    return pair(Dialogue.of_text(prompts[0]), chosen, rejected)


def _of_messages(row: Row, names: tuple[str, str], asked: Asked, form: Form) -> Example:
    """Replies as messages, after a prompt or with it."""
    sides = [messages_of(row[name], name) for name in names]
    for name, side in zip(names, sides, strict=True):
        if side[-1].role != "assistant":
            raise ValueError(f"{name} does not end with the assistant")
    if sides[0][:-1] != sides[1][:-1]:
        raise ValueError("chosen and rejected answer different prompts, or their replies are several messages")
    before, replies = sides[0][:-1], [side[-1].content for side in sides]
    prompt = asked.messages(row) if asked.column and row.get(asked.column) is not None else asked.before(row)
    if not before:
        if not prompt:
            raise ValueError("there is no prompt: neither a column nor a message before the reply")
        dialogue = asked.dialogue(row) if asked.kind == "dialogue" else Dialogue.of_messages(prompt)
    elif prompt and asked.kind in ("messages", "json") and before[: len(prompt)] != prompt:
        dialogue = Dialogue.of_messages((*prompt, *before))
    else:
        lead = asked.before(row)
        lead = lead if lead and before[: len(lead)] != lead else ()
        dialogue = Dialogue.of_messages((*lead, *before))
        if asked.kind == "text" and not any(_same(m.content, asked.text(row)) for m in before):
            form.counts[f"rows whose {asked.column} is not in their messages, which are read"] += 1
    return pair(dialogue, *(f"{dialogue.text} {reply}" for reply in replies))


def _same(one: str, other: str) -> bool:
    return one.split() == other.split()


def _scored(form: Form, sample: Sample) -> None:
    """Pairs whose scores do not say what their names say are counted."""
    keys = {key for row in sample for key in row}
    names = next((both for both in SCORES if set(both) <= keys), None)
    if names is None:
        return
    form.reads |= set(names)
    inner = form.example

    def example(row: Row) -> Example:
        found = inner(row)
        scores = [number(row.get(name)) for name in names]
        if None not in scores and scores[0] <= scores[1]:
            what = EQUAL if scores[0] == scores[1] else LOWER
            form.counts[what] += 1
            form.strict[found.id] = (
                f"{what.replace('pairs', 'a pair')} ({names[0]} {scores[0]:g}, {names[1]} {scores[1]:g})"
            )
        return found

    form.example = example


def number(value: Any) -> float | None:
    """A cell as a finite number, None where it is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return None if isinstance(value, bool) or not math.isfinite(found) else found


# -- replies that a column or a score chooses among --------------------------------------------------------------------


def _chosen_by(names: tuple[str, str], by: str, better: Callable[[Any], int | None]) -> Callable[..., Form]:
    """Two replies and a column that says which is the better one: 0 or 1; None for a tie."""

    def make(sample: Sample, there: set[str], where: str) -> Form:
        values = [better(row.get(by)) for row in sample]
        if all(value is None for value in values):
            raise UserError(
                f"dataset.path: {where}: the column {by} prefers no reply (its values are "
                f"{', '.join(map(repr, dict.fromkeys(row.get(by) for row in sample[:50])))[:80]}); mend it, or name "
                "columns by dataset.columns"
            )
        prompts = PROMPTS if "context" not in there else ("prompt", "context", *PROMPTS)
        asked = Asked.of(sample, there, where, prompts)
        kind = majority(row.get(name) for row in sample for name in names)
        refuse_python(kind, names[0], where)
        form = Form(
            f"preference pairs {names[0]} and {names[1]}, the better by {by}", None, {*names, by} | asked.columns
        )

        def example(row: Row) -> Example:
            which = better(row[by])
            if which is None:
                raise Tie(f"{by} is {row[by]!r}, which prefers no reply")
            ordered = (names[which], names[1 - which])
            if kind in ("messages", "json"):
                return _of_messages(row, ordered, asked, form)
            return asked.pair(row, *(_reply(row, name, kind) for name in ordered))

        form.example = example
        return form

    return make


class Tie(ValueError):
    """A row without a preference."""


def _place(value: Any) -> int | None:
    found = number(value)
    return int(found) if found in (0.0, 1.0) else None


def _first_if_one(value: Any) -> int | None:
    return None if _place(value) is None else 1 - _place(value)


def _strength(value: Any) -> int | None:
    """Below 0 the first reply is the better one, above 0 the second (HelpSteer)."""
    found = number(value)
    return None if not found else int(found > 0)


def _winner(value: Any) -> int | None:
    text = str(value).strip().lower().removeprefix("model_").removeprefix("response_")
    return {"a": 0, "b": 1}.get(text)


def _ranked(column: str, texts: tuple[str, ...], scores: tuple[tuple[str, int], ...]) -> Callable[..., Form]:
    """A list of replies with scores: the best against the worst."""

    def make(sample: Sample, there: set[str], where: str) -> Form:
        asked = Asked.of(sample, there, where)
        cells = [reply for row in sample if isinstance(row.get(column), list) for reply in row[column]]
        if not cells or not all(isinstance(reply, dict) for reply in cells):
            raise UserError(f"dataset.path: {where}: {column} is no list of replies with scores. Expected {EXPECTS}")
        said = next((name for name in texts if all(name in reply for reply in cells)), None)
        known = ((name, sign) for name, sign in scores if all(number(reply.get(name)) is not None for reply in cells))
        name, sign = next(known, (None, 1))
        if said is None or name is None or asked.column is None:
            keys = ", ".join(dict.fromkeys(key for reply in cells for key in reply))
            raise UserError(
                f"dataset.path: {where}: replies in {column} have the keys {keys}, and not a text ({', '.join(texts)}) "
                f"and a score in each ({', '.join(n for n, _ in scores)}), or there is no prompt. Expected {EXPECTS}"
            )
        form = Form(f"pairs of the best and the worst of {column} by {name}", None, {column} | asked.columns)

        def example(row: Row) -> Example:
            if not isinstance(row[column], list) or len(row[column]) < 2:
                raise ValueError(f"{column} has no two replies")
            order = sorted(row[column], key=lambda reply: sign * float(reply[name]))
            if float(order[0][name]) == float(order[-1][name]):
                raise Tie(f"all of {column} have {name} {order[0][name]}")
            return asked.pair(row, text_of(order[-1], said), text_of(order[0], said))

        form.example = example
        return form

    return make


GROUPED = "pairs of the best and the worst reply to each prompt by helpfulness"


def _helpful(sample: Sample, there: set[str], where: str) -> Form:
    """One reply a row with scores (HelpSteer)."""
    asked = Asked.of(sample, there, where)
    reads = {"response", "helpfulness", "chosen", "rejected"} | asked.columns
    return Form(GROUPED, lambda row: asked.pair(row, text_of(row, "chosen"), text_of(row, "rejected")), reads)


def _grouped(rows: Rows, form: Form) -> Rows:
    """Rows of one prompt as one row."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    asked = next(iter(name for name in PROMPTS if name in form.reads), None)
    for where, row in rows:
        if not isinstance(row, dict) or number(row.get("helpfulness")) is None:
            yield where, ValueError("helpfulness is no number") if isinstance(row, dict) else row
            continue
        groups.setdefault(str(row.get(asked)), []).append((where, row))
    for members in groups.values():
        order = sorted(members, key=lambda member: number(member[1]["helpfulness"]))
        (_, worst), (where, best) = order[0], order[-1]
        if len(order) < 2:
            yield where, Tie("the prompt has one reply")
        elif number(best["helpfulness"]) == number(worst["helpfulness"]):
            yield where, Tie("all replies to the prompt have one helpfulness")
        else:
            yield where, best | {"chosen": best.get("response"), "rejected": worst.get("response")}


# -- one text a row ----------------------------------------------------------------------------------------------------


def _classes(sample: Sample, there: set[str], where: str) -> Form:
    """{text, label}: label a class number from 0."""
    check_labels(sample, "label", where)
    return Form("texts with classes", parse_labelled, {"text", "label"})


def check_labels(sample: Sample, column: str, where: str) -> None:
    """Labels that are other names of classes, for all of a file.

    Raises:
        UserError: they are -1 and 1, or words.
    """
    values = [row.get(column) for row in sample]
    found = dict.fromkeys(map(str, values))
    numbers = [number(value) for value in values]
    known = {value for value in numbers if value is not None}
    if -1.0 in known and known <= {-1.0, 1.0}:
        raise UserError(f"dataset.path: {where}: labels are -1 and 1; write them 0 and 1")
    words = [
        value for value in values if isinstance(value, str) and number(value) is None and value.lower() not in TRUTH
    ]
    if 2 * len(words) > len(values):
        names = ", ".join(map(repr, sorted(found)[:6]))
        raise UserError(f"dataset.path: {where}: labels are words ({names}); write numbers from 0 instead of them")


TRUTH = {"true": 1, "false": 0}


def class_of(value: Any, name: str = "label") -> int:
    """A class number from 0."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.strip().lower() in TRUTH:
        return TRUTH[value.strip().lower()]
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+(\.0*)?\s*", value):
        value = int(value.split(".")[0])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}, not a class number from 0")
    return value


def parse_labelled(row: Row) -> Example:
    return labelled(text_of(row, "text"), class_of(row["label"]))


def _unpaired(sample: Sample, there: set[str], where: str) -> Form:
    """{prompt, completion, label}: whether a reply is a good one."""
    check_labels(sample, "label", where)
    asked = Asked.of(sample, there, where)
    form = Form("replies one by one, good (1) or not (0)", None, {"completion", "label"} | asked.columns)

    def example(row: Row) -> Example:
        prompt, label = asked.dialogue(row), class_of(row["label"])
        if label > 1:
            raise ValueError(f"label is {label}, not 0 or 1")
        return labelled(f"{prompt.text} {completion(row['completion'], 'completion').strip()}", label, prompt.text)

    form.example = example
    return form


def completion(value: Any, name: str) -> str:
    """A reply, as text or as the one message of the assistant."""
    if isinstance(value, str) and kind_of(value) not in ("json", "python"):
        return value
    found = messages_of(value, name)
    if len(found) != 1 or found[0].role != "assistant":
        raise ValueError(f"{name} is not one message of the assistant")
    return found[0].content


def _completions(sample: Sample, there: set[str], where: str) -> Form:
    """{prompt, completion}: the completion is the right answer."""
    asked = Asked.of(sample, there, where)
    form = Form("prompts with their right answers", None, {"completion"} | asked.columns)
    form.example = lambda row: answered(asked.dialogue(row), completion(row["completion"], "completion"))
    return form


def _dialogues(column: str) -> Callable[..., Form]:
    """{messages}: the assistant's last message is the right answer to what stands before it."""

    def make(sample: Sample, there: set[str], where: str) -> Form:
        refuse_python(majority(row.get(column) for row in sample), column, where)
        system = next((name for name in SYSTEMS if name in {key for row in sample for key in row}), None)
        form = Form("dialogues, the last reply as the right answer", None, {column} | ({system} if system else set()))

        def example(row: Row) -> Example:
            found = messages_of(row[column], column)
            if found[-1].role != "assistant" or len(found) < 2:
                raise ValueError(f"{column} is no dialogue that ends with the assistant")
            if system and row.get(system) and found[0].role != "system":
                found = (Message("system", text_of(row, system)), *found)
            return answered(Dialogue.of_messages(found[:-1]), found[-1].content)

        form.example = example
        return form

    return make


def _openai(sample: Sample, there: set[str], where: str) -> Form:
    """{input: {messages}, preferred_output, non_preferred_output}."""
    asked, names = Asked("input", "messages"), ("preferred_output", "non_preferred_output")
    form = Form("preference pairs of messages (preferred_output, non_preferred_output)", None, {"input", *names})

    def example(row: Row) -> Example:
        given = row["input"]
        if isinstance(given, dict) and given.get("tools"):
            raise ValueError("input has tools, which are not read")
        inner = given.get("messages") if isinstance(given, dict) else given
        return _of_messages({**row, "input": inner}, names, asked, form)

    form.example = example
    return form


FORMS: tuple[tuple[set[str], Callable[..., Form]], ...] = (
    ({"chosen", "rejected"}, _pairs),
    ({"preferred_output", "non_preferred_output", "input"}, _openai),
    (
        {"response_0", "response_1", "better_response_id"},
        _chosen_by(("response_0", "response_1"), "better_response_id", _place),
    ),
    (
        {"response_1", "response_2", "preference_strength"},
        _chosen_by(("response_1", "response_2"), "preference_strength", _strength),
    ),
    (
        {"response1", "response2", "overall_preference"},
        _chosen_by(("response1", "response2"), "overall_preference", _strength),
    ),
    ({"human_ref_A", "human_ref_B", "labels"}, _chosen_by(("human_ref_A", "human_ref_B"), "labels", _first_if_one)),
    (
        {"conversation_a", "conversation_b", "winner"},
        _chosen_by(("conversation_a", "conversation_b"), "winner", _winner),
    ),
    ({"response_a", "response_b", "winner"}, _chosen_by(("response_a", "response_b"), "winner", _winner)),
    (
        {"completions"},
        _ranked(
            "completions",
            ("response", "text", "content"),
            (("fine-grained_score", 1), ("overall_score", 1), ("score", 1)),
        ),
    ),
    ({"answers"}, _ranked("answers", ("answer", "text"), (("rank", -1), ("score", 1)))),
    ({"response", "helpfulness"}, _helpful),
    ({"completion", "label"}, _unpaired),
    ({"completion"}, _completions),
    ({"messages"}, _dialogues("messages")),
    ({"conversations"}, _dialogues("conversations")),
    ({"text", "label"}, _classes),
)
REMEDIES: tuple[tuple[set[str], str], ...] = (
    ({"chosen"}, ": a reply without its rejected one is no pair; add a column rejected"),
    (
        {"annotations", "data"},
        ": this is Label Studio's own export; export the rows as CSV or JSON-MIN and map its columns",
    ),
    ({"question", "answer"}, ": questions with answers are read by dataset=questions"),
    ({"prompt"}, ": prompts alone, with nothing to prefer; add columns chosen and rejected, or completion"),
    ({"text"}, ": texts alone, with nothing to learn from them; add a column label"),
)
