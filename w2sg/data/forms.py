"""What rows of a file mean, decided once for the whole file by its columns and what they hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice

from w2sg.data.examples import Example
from w2sg.data.files import Notes, Rows
from w2sg.data.preferences import CHOSEN, GROUPED, grouped, helpful, openai, pairs_of, ranked
from w2sg.data.prompt_columns import SYSTEMS, Form, Sample
from w2sg.data.singles import choices, classes, completions, dialogues, judged, unpaired
from w2sg.data.turns import LIST, SPECIAL, unread
from w2sg.errors import UserError

ASIDE = {"subset"}  # read beside any form
SAMPLE = 1000  # rows by which a file's form is decided
TEMPLATED = (
    "rows hold special tokens of a chat template, as <|im_start|> or [INST]: a model with a template would read them "
    "twice; give the texts without them"
)
TURNS = re.compile(
    r"\s*\W*(?:user|human|question|q|instruction|prompt)\W*:.*\n\W*(?:assistant|answer|a|response|bot|ai|gpt)\W*:",
    re.I | re.S,
)
UNTOLD = (
    "texts look like dialogues whose turns are not told apart (they begin with 'User:' or the like); write "
    "'\\n\\nHuman: ...\\n\\nAssistant: ...', or give the prompt in a column of its own"
)
SPACED = "pairs whose replies differ in whitespace at their ends alone, which chat templates leave out"
LISTED = "prompts or replies are lists written as text (['...']), and are read as they stand"
ASKING = re.compile(
    r"\n\W*(?i:assistant|response|answer|ai|bot|gpt)\W*$|\nA:\s*$|\b(?:ASSISTANT|GPT4 Correct Assistant):\s*$"
)
ASKED = (
    "prompts end in 'Assistant:' or the like, and are read as one message of the user; give the question without what "
    "stands around it"
)


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
    form = form_of(sample, where, expects if not columns else f"{expects}; with dataset.columns nothing else is read")
    if idle := [name for name in columns or () if name not in form.reads]:
        raise UserError(
            f"dataset.columns.{idle[0]}: {where} is read as {form.words}, which needs no {idle[0]}; leave it out, or "
            "map the columns that belong to it too"
        )
    form.watch(lambda _, made: _count(form, made))
    if beside := [name for name in (*SYSTEMS, "history") if name in form.reads and f" {name}" not in form.words]:
        form.words += f", with {' and '.join(beside)}"
    seen: Counter[str] = Counter()
    keys: set[str] = set()
    read = 0
    everything: Iterator = chain(head, rows)
    if form.words == GROUPED:
        everything = grouped(everything, form)
    for place, row in everything:
        if not isinstance(row, dict):
            yield place, row
            continue
        read += 1
        seen.update(key for key, value in row.items() if value is not None)
        keys |= {key for name in form.reads for key in unread(row.get((columns or {}).get(name, name)))}
        known = Formed(row if not columns else row | {f: row.get(n) for f, n in columns.items()})
        known.form = form
        yield place, known
    if not read:
        return
    named = (set(columns.values()) if columns else form.reads) | notes.known | ASIDE
    beside = sorted(str(key) or "(without a name)" for key in seen if key not in named)
    notes.forms[where] = form.words
    if beside:
        notes.append(f"{where}: columns that are not read: {', '.join(beside)}")
    if keys := keys - form.within:
        notes.append(f"{where}: keys of messages that are not read: {', '.join(sorted(keys))}")
    if 2 * form.counts[LISTED] <= read:  # some texts are lists
        del form.counts[LISTED]
    notes += [f"{where}: {count} of {read} {what}" for what, count in form.counts.items()]


def _count(form: Form, made: Example) -> None:
    """Count what was written by a chat template already, or as a list."""
    question = made.prompt.messages[-1].content
    parts = (question, *(text[len(made.prompt.text) :] for text in made.texts))
    if made.kind == "pairs" and len({part.strip() for part in parts[1:]}) == 1:
        form.counts[SPACED] += 1
    form.counts.update([TEMPLATED] * any(SPECIAL.search(text) for text in made.texts))
    form.counts.update([UNTOLD] * (made.kind == "pairs" and not made.prompt.text and bool(TURNS.match(made.texts[0]))))
    form.counts.update([ASKED] * bool(ASKING.search(question)))
    form.counts.update([LISTED] * any(LIST.fullmatch(part) for part in parts))


def _renamed(sample: Sample, columns: dict[str, str], where: str) -> Sample:
    names = dict.fromkeys(key for row in sample for key in row)
    if twice := [column for column, count in Counter(columns.values()).items() if count > 1]:
        fields = " and ".join(name for name, column in columns.items() if column == twice[0])
        raise UserError(f"dataset.columns: {fields} are both read from {twice[0]!r}; give each a column of its own")
    for name, column in columns.items():
        if column not in names:
            raise UserError(
                f"dataset.columns.{name}: {where} has no column {column!r}; it has {', '.join(map(str, names))}"
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
    common = _common(sample)
    columns = list(dict.fromkeys(str(key) for row in sample for key in row))
    remedy = _remedy(common, columns)
    raise UserError(f"dataset.path: {where} has the columns {', '.join(columns) or 'none'}{remedy}. Expected {expects}")


def _remedy(common: set[str], columns: list[str]) -> str:
    """What to do with columns that are of no form."""
    if remedy := next((words for needs, words in REMEDIES if needs <= common), ""):
        return remedy
    known = {name.strip().lower(): name for name in columns}
    needs = next((needs for needs, _ in FORMS if needs <= known.keys()), set())
    if needs and (others := [known[name] for name in sorted(needs) if known[name] != name]):
        return f": names are read to the letter; rename {others[0]!r} to {others[0].strip().lower()!r}, and so on"
    alone = next(((name, words) for name, words in ALONE if name in common), None)
    if alone is None:
        return ""
    beside = [name for name in columns if name != alone[0]]
    return f": {alone[1]}" if not beside else f": {alone[1]}, or name them by dataset.columns if they are there"


def _common(sample: Sample) -> set[str]:
    """Columns that most rows have."""
    counts = Counter(key for row in sample for key, value in row.items() if value is not None and str(value).strip())
    return {key for key, count in counts.items() if 2 * count >= len(sample)}


SCORED = {"fine-grained_score": 1, "overall_score": 1, "score": 1}
RANKED = {"rank": -1, "score": 1, "pm_score": 1}
FORMS: tuple[tuple[set[str], Callable[..., Form]], ...] = (
    ({"chosen", "rejected"}, pairs_of),
    ({"preferred_output", "non_preferred_output", "input"}, openai),
    *CHOSEN,
    ({"completions"}, ranked("completions", ("response", "text", "content"), SCORED)),
    ({"answers"}, ranked("answers", ("answer", "text"), RANKED)),
    ({"response", "helpfulness"}, helpful),
    ({"completion", "label"}, unpaired),
    ({"completion"}, completions("completion")),
    ({"question", "choice", "label"}, choices),
    ({"instruction", "output"}, completions("output")),
    *(({column, by}, judged(column, by)) for column in ("messages", "conversations") for by in ("label", "kto_tag")),
    ({"messages"}, dialogues("messages")),
    ({"conversations"}, dialogues("conversations")),
    ({"text", "label"}, classes),
)
REMEDIES: tuple[tuple[set[str], str], ...] = (
    ({"chosen"}, ": a reply without its rejected one is no pair; add a column rejected"),
    (
        {"annotations", "data"},
        ": this is Label Studio's own export; export the rows as CSV or JSON-MIN and map its columns",
    ),
    ({"question", "answer"}, ": questions with answers are read by dataset=questions"),
    (
        {"message_id", "parent_id"},
        ": OpenAssistant's messages one by one; write a row {prompt, chosen, rejected} for two replies to a message",
    ),
    (
        {"message_tree_id"},
        ": OpenAssistant's trees; write a row {prompt, chosen, rejected} for two replies to a message",
    ),
)
ALONE: tuple[tuple[str, str], ...] = (
    ("prompt", "prompts alone, with nothing to prefer; add columns chosen and rejected, or completion"),
    ("text", "texts alone, with nothing to learn from them; add a column label"),
)
