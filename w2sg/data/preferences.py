"""Forms of preference pairs: two replies by name, or the better and the worse one by a column or a score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from w2sg.data.examples import Example, pair
from w2sg.data.files import Row, Rows
from w2sg.data.messages import LAST_TURN, Dialogue, Message
from w2sg.data.prompt_columns import EXPECTS, PROMPTS, Form, PromptColumns, Sample, Tie, number, text_of
from w2sg.data.turns import kind_of, majority, messages_of, refuse_loose, refuse_python
from w2sg.errors import UserError

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_reward", "rejected_reward"),
)
EQUAL, LOWER = "pairs with equal scores", "pairs whose chosen reply has the lower score"


def pairs_of(sample: Sample, common: set[str], where: str, names: tuple[str, str] = ("chosen", "rejected")) -> Form:
    """{chosen, rejected}, with a prompt or with dialogues that hold it."""
    kind = majority(row.get(name) for row in sample for name in names)
    refuse_python(kind, names[0], where)
    prompts = PromptColumns.of(sample, common, where)
    if kind == "text" and prompts.column is None:
        refuse_loose((row.get(names[0]) for row in sample), names[0], where)
    if kind in ("messages", "json") and prompts.column is None:
        prompts = PromptColumns.beside(sample)
    apart = False
    if kind == "dialogue" and prompts.kind in ("text", "messages", "json"):
        within = sum(_within(row, prompts, names[0]) for row in sample)
        kind = "dialogue" if 2 * within >= len(sample) else "text"
        apart = kind == "text"
    form = Form("preference pairs", lambda row: Example, set(names) | prompts.columns)
    if kind == "dialogue":
        form.words = "preference pairs of whole dialogues ('Human: ... Assistant: ...')"
        form.reads = set(names) | ({prompts.column} if prompts.kind in ("text", "dialogue") else set())
        form.example = lambda row: parse_transcript(row, names)
    elif kind in ("messages", "json"):
        form.words = "preference pairs of messages" + (f", prompts from {prompts.column}" if prompts.column else "")
        form.example = lambda row: _of_messages(row, names, prompts, form)
    else:
        nameless = ", whole texts without a prompt (name it: dataset.columns.prompt)"
        form.words = "preference pairs of replies" + (f" to {prompts.column}" if prompts.column else nameless)
        if apart:
            form.words += "; they are whole dialogues that do not hold the prompt, and are read as they stand"
        begin = sum(_begins(row, prompts, names) for row in sample)
        if prompts.column and 2 * begin > len(sample):
            form.words += (
                f"; {begin} of {len(sample)} begin with their prompt's text, which is read as part of the reply (leave "
                "it out there if the prompt was written twice)"
            )
        form.example = lambda row: prompts.pair(row, *(_reply(row, name, kind) for name in names))
    _scored(form, sample)
    return form


def _within(row: Row, prompts: PromptColumns, name: str) -> bool:
    """Whether a dialogue holds its prompt."""
    try:
        last = prompts.messages(row)[-1].content.strip()
    except (ValueError, KeyError):
        return False
    return isinstance(row.get(name), str) and bool(last) and last in row[name].rpartition(LAST_TURN)[0]


def _begins(row: Row, prompts: PromptColumns, names: tuple[str, str]) -> bool:
    prompt = row.get(prompts.column) if prompts.column else None
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
        start, turn, reply = text.rpartition(LAST_TURN)
        if not turn:
            raise ValueError(f"{key} has no {LAST_TURN!r}")
        if "\n\nHuman:" in reply:
            raise ValueError(f"{key} does not end with the assistant")
        prompts.append(start + turn)
    if prompts[0] != prompts[1]:
        raise ValueError("chosen and rejected answer different prompts")
    return pair(Dialogue.of_text(prompts[0]), chosen, rejected)


def _of_messages(row: Row, names: tuple[str, str], prompts: PromptColumns, form: Form) -> Example:
    """Replies as messages, after a prompt or with it."""
    sides = [messages_of(row[name], name) for name in names]
    for name, side in zip(names, sides, strict=True):
        if side[-1].role != "assistant":
            raise ValueError(f"{name} does not end with the assistant")
    if sides[0][:-1] != sides[1][:-1]:
        raise ValueError("chosen and rejected answer different prompts, or their replies are several messages")
    before, replies = sides[0][:-1], [side[-1].content for side in sides]
    prompt = prompts.messages(row) if prompts.column and row.get(prompts.column) is not None else ()
    if not before:
        if not prompt:
            raise ValueError("there is no prompt: neither a column nor a message before the reply")
        dialogue = prompts.dialogue(row) if prompts.kind == "dialogue" else Dialogue.of_messages(prompt)
    elif prompt and prompts.kind != "text":
        dialogue = Dialogue.of_messages(_followed(prompt, before, prompts.column))
    else:
        lead = prompts.before(row)
        if before[0].role == "system":
            lead = tuple(message for message in lead if message.role != "system")
        lead = lead if before[: len(lead)] != lead else ()
        dialogue = Dialogue.of_messages((*lead, *before))
        if prompt and not any(_same(m.content, prompts.text(row)) for m in before):
            form.counts[f"rows whose {prompts.column} is not in their messages, which are read"] += 1
    return pair(dialogue, *(f"{dialogue.text} {reply}" for reply in replies))


def _followed(prompt: tuple[Message, ...], before: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """A prompt and the messages before a reply, which may hold it or the end of it once more."""

    def equal(some: tuple[Message, ...], others: tuple[Message, ...]) -> bool:
        return all(a.role == b.role and _same(a.content, b.content) for a, b in zip(some, others, strict=True))

    if _same(*("\n".join(message.content for message in some) for some in (prompt, before))):
        return before  # neighbouring turns of one speaker are one message in a transcript
    most = min(len(prompt), len(before))
    shared = next((k for k in range(most, 0, -1) if equal(prompt[-k:], before[:k])), 0)
    questions = {" ".join(m.content.split()) for m in prompt if m.role == "user"}
    if not shared and any(m.role == "user" and " ".join(m.content.split()) in questions for m in before):
        raise ValueError(f"{name} and the messages before the reply share a question, but differ otherwise")
    return (*prompt[: len(prompt) - shared], *before)


def _same(one: str, other: str) -> bool:
    return one.split() == other.split()


def _scored(form: Form, sample: Sample) -> None:
    """Pairs whose scores do not say what their names say are counted."""
    keys = {key for row in sample for key in row}
    names = next((both for both in SCORES if set(both) <= keys), None)
    if names is None:
        return
    form.reads |= set(names)

    def compare(row: Row, made: Example) -> None:
        scores = [number(row.get(name)) for name in names]
        if None in scores and any(row.get(name) not in (None, "") for name in names):
            form.counts["pairs whose scores are not two numbers, so that they are not compared"] += 1
        if None not in scores and scores[0] <= scores[1]:
            what = EQUAL if scores[0] == scores[1] else LOWER
            form.counts[what] += 1
            both = f"{names[0]} {scores[0]:g}, {names[1]} {scores[1]:g}"
            form.strict[made.id] = f"{what.replace('pairs', 'a pair')} ({both})"

    form.watch(compare)


def openai(sample: Sample, common: set[str], where: str) -> Form:
    """{input: {messages}, preferred_output, non_preferred_output}."""
    prompts, names = PromptColumns("input", "messages"), ("preferred_output", "non_preferred_output")
    form = Form("preference pairs of messages (preferred_output, non_preferred_output)", None, {"input", *names})

    def example(row: Row) -> Example:
        given = row["input"]
        if isinstance(given, dict) and given.get("tools"):
            raise ValueError("input has tools, which are not read")
        inner = given.get("messages") if isinstance(given, dict) else given
        return _of_messages({**row, "input": inner}, names, prompts, form)

    form.example = example
    return form


# -- replies that a column or a score chooses among --------------------------------------------------------------------


def chosen_by(names: tuple[str, str], by: str, better: Callable[[Any], int | None]) -> Callable[..., Form]:
    """Two replies and a column that says which is the better one: 0 or 1; None for a tie."""

    def make(sample: Sample, common: set[str], where: str) -> Form:
        values = [better(row.get(by)) for row in sample]
        if all(value is None for value in values):
            raise UserError(
                f"dataset.path: {where}: the column {by} prefers no reply (its values are "
                f"{', '.join(map(repr, dict.fromkeys(row.get(by) for row in sample[:50])))[:80]}); mend it, or name "
                "columns by dataset.columns"
            )
        prompt_names = PROMPTS if "context" not in common else ("prompt", "context", *PROMPTS)
        prompts = PromptColumns.of(sample, common, where, prompt_names)
        kind = majority(row.get(name) for row in sample for name in names)
        refuse_python(kind, names[0], where)
        form = Form(
            f"preference pairs {names[0]} and {names[1]}, the better by {by}", None, {*names, by} | prompts.columns
        )

        def example(row: Row) -> Example:
            which = better(row[by])
            if which is None:
                raise Tie(f"{by} is {row[by]!r}, which prefers no reply")
            ordered = (names[which], names[1 - which])
            if kind in ("messages", "json"):
                return _of_messages(row, ordered, prompts, form)
            return prompts.pair(row, *(_reply(row, name, kind) for name in ordered))

        form.example = example
        return form

    return make


def place_of(value: Any) -> int | None:
    place = number(int(value) if isinstance(value, bool) else value)
    return int(place) if place in (0.0, 1.0) else None


def first_if_one(value: Any) -> int | None:
    return None if place_of(value) is None else 1 - place_of(value)


def by_sign(value: Any) -> int | None:
    """Below 0 the first reply is the better one, above 0 the second (HelpSteer)."""
    strength = number(value)
    return int(strength > 0) if strength else None


def winner_of(value: Any) -> int | None:
    text = str(value).strip().lower().removeprefix("model_").removeprefix("response_")
    return {"a": 0, "b": 1}.get(text)


def label_of(value: Any) -> int | None:
    """A or 0: the first reply is the better one; B or 1: the second (the automated weak-to-strong protocol, 2026)."""
    letter = {"a": 0, "b": 1}.get(value.strip().lower()) if isinstance(value, str) else None
    return place_of(value) if letter is None else letter


# the columns, and how to read them: two replies, the column that chooses between them, and how its values do
CHOSEN = tuple(
    ({one, other, by}, chosen_by((one, other), by, better))
    for one, other, by, better in (
        ("response_0", "response_1", "better_response_id", place_of),
        ("response_1", "response_2", "preference_strength", by_sign),
        ("response1", "response2", "overall_preference", by_sign),
        ("human_ref_A", "human_ref_B", "labels", first_if_one),
        ("conversation_a", "conversation_b", "winner", winner_of),
        ("response_a", "response_b", "winner", winner_of),
        ("first", "second", "label", label_of),
    )
)


def ranked(column: str, texts: tuple[str, ...], scores: dict[str, int]) -> Callable[..., Form]:
    """A list of replies with scores: the best against the worst (1: the highest is the best, -1: the lowest)."""

    def make(sample: Sample, common: set[str], where: str) -> Form:
        prompts = PromptColumns.of(sample, common, where)
        cells = [reply for row in sample if isinstance(row.get(column), list) for reply in row[column]]
        if not cells or not all(isinstance(reply, dict) for reply in cells):
            raise UserError(f"dataset.path: {where}: {column} is no list of replies with scores. Expected {EXPECTS}")
        text = next((name for name in texts if all(name in reply for reply in cells)), None)
        name = next((name for name in scores if all(number(reply.get(name)) is not None for reply in cells)), None)
        if text is None or name is None or prompts.column is None:
            keys = ", ".join(dict.fromkeys(key for reply in cells for key in reply))
            raise UserError(
                f"dataset.path: {where}: replies in {column} have the keys {keys}, and not a text ({', '.join(texts)}) "
                f"and a score in each ({', '.join(scores)}), or there is no prompt. Expected {EXPECTS}"
            )

        def example(row: Row) -> Example:
            if not isinstance(row[column], list) or len(row[column]) < 2:
                raise ValueError(f"{column} has no two replies")
            order = sorted(row[column], key=lambda reply: scores[name] * float(reply[name]))
            if float(order[0][name]) == float(order[-1][name]):
                raise Tie(f"all of {column} have {name} {order[0][name]}")
            return prompts.pair(row, text_of(order[-1], text), text_of(order[0], text))

        return Form(f"pairs of the best and the worst of {column} by {name}", example, {column} | prompts.columns)

    return make


GROUPED = "pairs of the best and the worst reply to each prompt by helpfulness"


def helpful(sample: Sample, common: set[str], where: str) -> Form:
    """One reply a row with scores (HelpSteer)."""
    prompts = PromptColumns.of(sample, common, where)
    reads = {"response", "helpfulness", "chosen", "rejected"} | prompts.columns
    return Form(GROUPED, lambda row: prompts.pair(row, text_of(row, "chosen"), text_of(row, "rejected")), reads)


def grouped(rows: Rows, form: Form) -> Rows:
    """Rows of one prompt as one row."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    prompt = next(iter(name for name in PROMPTS if name in form.reads), None)
    for where, row in rows:
        if not isinstance(row, dict) or number(row.get("helpfulness")) is None:
            yield where, ValueError("helpfulness is no number") if isinstance(row, dict) else row
            continue
        groups.setdefault(str(row.get(prompt)), []).append((where, row))
    for members in groups.values():
        order = sorted(members, key=lambda member: number(member[1]["helpfulness"]))
        (_, worst), (where, best) = order[0], order[-1]
        if len(order) < 2:
            yield where, Tie("the prompt has one reply")
        elif number(best["helpfulness"]) == number(worst["helpfulness"]):
            yield where, Tie("all replies to the prompt have one helpfulness")
        else:
            yield where, best | {"chosen": best.get("response"), "rejected": worst.get("response")}
