"""Forms of preference pairs: two replies by name, or the better and the worse one by a column or a score."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from w2sg.data.examples import Example, pair
from w2sg.data.files import Row, Rows
from w2sg.data.messages import LAST_TURN, Dialogue, Message
from w2sg.data.prompt_columns import EXPECTS, OTHER_SYSTEM, PROMPTS, Form, PromptColumns, Sample, Tie, number, text_of
from w2sg.data.turns import kind_of, majority, messages_of, refuse_kinds, refuse_loose
from w2sg.errors import UserError

SCORE = re.compile(r"score|rating|reward")  # in names of columns, beside "chosen"; keys of messages have no more
EQUAL, LOWER = "pairs with equal scores", "pairs whose chosen reply has the lower score"


def pairs_of(sample: Sample, common: set[str], where: str, names: tuple[str, str] = ("chosen", "rejected")) -> Form:
    """{chosen, rejected}, with a prompt or with dialogues that hold it."""
    kind = majority(row.get(name) for row in sample for name in names)
    refuse_kinds(kind, names[0], where)
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
    _scored(form, sample, names)
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
            if any(message.role == "system" and not _same(message.content, before[0].content) for message in lead):
                form.counts[OTHER_SYSTEM.format(prompts.system)] += 1
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


def _scored(form: Form, sample: Sample, names: tuple[str, str]) -> None:
    """Pairs whose scores do not say what their names say are counted.

    Args:
        names: of the two replies.
    """
    keys = dict.fromkeys(str(key) for row in sample for key in row)
    both = ((key, key.replace(*names)) for key in keys if names[0] in key and SCORE.search(key.lower()))
    columns = next((pair for pair in both if pair[1] in keys), None)
    if columns is not None:
        form.reads |= set(columns)
        _compare(form, columns, lambda row, made: [row.get(column) for column in columns])
    elif any(_own_score(row.get(names[0])) is not None for row in sample):
        form.within |= {key for key in ("score", "rating", "reward")}
        _compare(form, names, lambda row, made: [_own_score(row.get(name)) for name in names])


def _own_score(side: Any) -> Any:
    """What the last message of a reply says of it."""
    last = side[-1] if isinstance(side, list) and side else side
    if not isinstance(last, dict):
        return None
    return next((held for key, held in last.items() if SCORE.fullmatch(str(key)) and held is not None), None)


def _compare(form: Form, names: tuple[str, ...], scores_of: Callable[[Row, Example], list[Any]]) -> None:
    """Count pairs whose preferred reply has no higher score.

    Args:
        names: of the scores, for messages. scores_of: a row's, the preferred reply's first.
    """

    def compare(row: Row, made: Example) -> None:
        given = scores_of(row, made)
        scores = [number(score) for score in given]
        if None in scores and any(score not in (None, "") for score in given):
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


# of columns that choose: what says that no reply is the better one
TIE = -1
TIES = {"", "none", "null", "nan", "tie", "tied", "draw", "both", "neither", "equal", "same", "0.5", "-1", "both_bad"}


def chosen_by(names: tuple[str, str], by: str, better: Callable[[Any], int | None], values: str) -> Callable[..., Form]:
    """Two replies and a column that says which is the better one.

    Args:
        better: a cell as 0 or 1, `TIE`, or None for what it does not know. values: those that it knows, for messages.
    """

    def which_of(value: Any) -> int:
        """What is no verdict at all is not taken for a tie."""
        which = better(value)
        if which is None and re.sub(r"\.0$|\s*\(.*\)$", "", str(value).strip().lower()) not in TIES:
            raise ValueError(f"{by} is {value!r}, which prefers no reply ({values} would)")
        return TIE if which is None else which

    def make(sample: Sample, common: set[str], where: str) -> Form:
        counts: Counter[int | None] = Counter()
        for row in sample:
            try:
                counts[which_of(row.get(by))] += 1
            except ValueError:
                counts[None] += 1
        if 20 * counts[None] > len(sample) or counts[TIE] == len(sample):
            shown = ", ".join(map(repr, dict.fromkeys(row.get(by) for row in sample[:50])))[:80]
            raise UserError(
                f"dataset.path: {where}: the column {by} prefers no reply in {counts[None] or len(sample)} of "
                f"{len(sample)} rows (its values are {shown}; {values} would); mend it, or name columns by "
                "dataset.columns"
            )
        prompt_names = PROMPTS if "context" not in common else ("prompt", "context", *PROMPTS)
        prompts = PromptColumns.of(sample, common, where, prompt_names)
        kind = majority(row.get(name) for row in sample for name in names)
        refuse_kinds(kind, names[0], where)
        form = Form(
            f"preference pairs {names[0]} and {names[1]}, the better by {by}", None, {*names, by} | prompts.columns
        )

        def example(row: Row) -> Example:
            which = which_of(row[by])
            if which == TIE:
                raise Tie(f"{by} is {row[by]!r}, which prefers no reply")
            ordered = (names[which], names[1 - which])
            if kind in ("messages", "json"):
                return _of_messages(row, ordered, prompts, form)
            return prompts.pair(row, *(_reply(row, name, kind) for name in ordered))

        form.example = example
        scores = tuple(f"score_{name.rpartition('_')[2]}" for name in names)
        if set(scores) <= common:
            form.reads |= set(scores)
            _compare(form, scores, lambda row, made: [row[name] for name in scores[:: 1 - 2 * which_of(row[by])]])
        return form

    return make


def place_of(value: Any) -> int | None:
    place = number(int(value) if isinstance(value, bool) else value)
    return int(place) if place in (0.0, 1.0) else None


def first_if_one(value: Any) -> int | None:
    return None if place_of(value) is None else 1 - place_of(value)


def by_sign(value: Any) -> int | None:
    """Below 0 the first reply is the better one, above 0 the second (HelpSteer); -100 stands for no verdict there."""
    strength = number(value)
    if strength is None or abs(strength) >= 100:
        return None
    return int(strength > 0) if strength else TIE


def winner_of(value: Any) -> int | None:
    text = str(value).strip().lower().removeprefix("model_").removeprefix("response_")
    return {"a": 0, "b": 1, "a>b": 0, "a>>b": 0, "b>a": 1, "b>>a": 1}.get(text.replace(" ", ""))


def label_of(value: Any) -> int | None:
    """A or 0: the first reply is the better one; B or 1: the second (the automated weak-to-strong protocol, 2026)."""
    letter = {"a": 0, "b": 1}.get(value.strip().lower()) if isinstance(value, str) else None
    return place_of(value) if letter is None else letter


# the columns, and how to read them: two replies, the column that chooses between them, and how its values do
CHOSEN = tuple(
    ({one, other, by}, chosen_by((one, other), by, better, values))
    for one, other, by, better, values in (
        ("response_0", "response_1", "better_response_id", place_of, "0 or 1"),
        ("response_0", "response_1", "safer_response_id", place_of, "0 or 1"),
        ("response_1", "response_2", "preference_strength", by_sign, "-3 to 3"),
        ("response1", "response2", "overall_preference", by_sign, "-3 to 3"),
        ("human_ref_A", "human_ref_B", "labels", first_if_one, "0 or 1"),
        ("conversation_a", "conversation_b", "winner", winner_of, "model_a or model_b"),
        ("response_a", "response_b", "winner", winner_of, "model_a or model_b"),
        ("response_A", "response_B", "label", winner_of, "A>B or B>A"),
        ("first", "second", "label", label_of, "A or B, 0 or 1"),
    )
)


def ranked(column: str, texts: tuple[str, ...], scores: dict[str, int]) -> Callable[..., Form]:
    """A list of replies with scores: the best against the worst (1: the highest is the best, -1: the lowest)."""

    def make(sample: Sample, common: set[str], where: str) -> Form:
        prompts = PromptColumns.of(sample, common, where)
        cells = [reply for row in sample if isinstance(row.get(column), list) for reply in row[column]]
        if not cells or not all(isinstance(reply, dict) for reply in cells):
            steps = " (steps with labels, as in stepwise supervision, are not read)" if "labels" in common else ""
            raise UserError(
                f"dataset.path: {where}: {column} is no list of replies with scores{steps}. Expected {EXPECTS}"
            )
        # by most of them: one reply without a score must not give all others another
        text = next((name for name in texts if _most(isinstance(reply.get(name), str) for reply in cells)), None)
        name = next((name for name in scores if _most(number(reply.get(name)) is not None for reply in cells)), None)
        if text is None or name is None or prompts.column is None:
            keys = ", ".join(dict.fromkeys(key for reply in cells for key in reply))
            raise UserError(
                f"dataset.path: {where}: replies in {column} have the keys {keys}, and not a text ({', '.join(texts)}) "
                f"and a score in each ({', '.join(scores)}), or there is no prompt. Expected {EXPECTS}"
            )

        def example(row: Row) -> Example:
            if not isinstance(row[column], list) or len(row[column]) < 2:
                raise ValueError(f"{column} has no two replies")
            if any(not isinstance(reply, dict) or number(reply.get(name)) is None for reply in row[column]):
                raise ValueError(f"a reply in {column} has no {name}, as others have")
            order = sorted(row[column], key=lambda reply: scores[name] * float(reply[name]))
            if float(order[0][name]) == float(order[-1][name]):
                raise Tie(f"all of {column} have {name} {order[0][name]}")
            return prompts.pair(row, text_of(order[-1], text), text_of(order[0], text))

        return Form(f"pairs of the best and the worst of {column} by {name}", example, {column} | prompts.columns)

    return make


def _most(held: Iterable[bool]) -> bool:
    held = list(held)
    return 2 * sum(held) > len(held)


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
