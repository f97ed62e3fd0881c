"""Rows of a table as questions that a language model answers with a label (strong.head=label_tokens).

A pair is one text that shows both replies; a text with a class is followed by the word after which the label stands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from w2sg.data.messages import Dialogue, instruction
from w2sg.data.table import Table, digest
from w2sg.data.tokens import ids_after
from w2sg.errors import UserError
from w2sg.models.source import Source

if TYPE_CHECKING:
    from jinja2 import Template

PAIR = "{% if prompt %}Question: {{ prompt }}\n\n{% endif %}Answer A: {{ first }}\n\nAnswer B: {{ second }}\n\nLabel:"
TEXT = "{{ text }}\n\nLabel:"
NAMES = {"pairs": ("prompt", "first", "second"), "classes": ("text",)}
TALKS = re.compile(r"(?:^|[-_. ])(?:chat|instruct|it)(?:$|[-_. ])", re.I)  # in the name of a model


@dataclass(frozen=True, eq=False)
class Questions:
    """How one model is asked for the labels of rows of one kind. Rows are put into words once.

    Args:
        source: the model. pairs: whether rows are pairs. classes: C, 2 for pairs.

    Attributes:
        answers: the labels, in the order of classes; of pairs the first one says that the first reply is better.
    """

    source: Source
    pairs: bool
    classes: int
    _asked: dict[tuple[str, bytes, bool], Table] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Before any work: the template shows what is asked about, and each label is one token.

        Raises:
            UserError: it does not, or one is not.
        """
        _ = self.template, self.tokens, self.end

    @cached_property
    def answers(self) -> list[str]:
        """Raises UserError where there are not as many as classes."""
        named = self.source.spec.label_tokens.labels
        if named is None:
            if self.pairs:
                return ["A", "B"]
            return ["False", "True"] if self.classes == 2 else [str(k) for k in range(self.classes)]
        if len(named) != self.classes:
            raise UserError(
                f"{self._key}.labels: {len(named)} labels are named for {self.classes} classes; name one for each"
            )
        return list(named)

    @cached_property
    def chat(self) -> bool:
        """Whether questions are turns of a dialogue in the model's chat template.

        Raises:
            UserError: they are to be, and it has no template.
        """
        wanted, source = self.source.spec.label_tokens.chat, self.source
        if wanted == "never":
            return False
        has = source.tokenizer.chat_template is not None
        if wanted == "always" and not has:
            raise UserError(f"{self._key}.chat: {source.spec.name} has no chat template; set chat=never")
        return has if wanted == "always" else has and TALKS.search(Path(source.spec.name).name) is not None

    @cached_property
    def reader(self) -> Source:
        """The model as it reads the questions: a dialogue brings its special tokens with it."""
        if not self.chat:
            return self.source
        return replace(self.source, templated=True)

    @cached_property
    def template(self) -> Template:
        """Of the question.

        Raises:
            UserError: its file cannot be read, is no template, or leaves out what is asked about.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        file, source = self.source.spec.label_tokens.question, PAIR if self.pairs else TEXT
        key = f"{self._key}.question"
        if file is not None:
            try:
                source = Path(file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{key}: {file} cannot be read ({error}); name a text file") from error
        names = NAMES["pairs" if self.pairs else "classes"]
        shown = {name: f"w2sg{name}w2sg" for name in names}
        try:
            template = ImmutableSandboxedEnvironment(keep_trailing_newline=False).from_string(source)
            text = template.render(**shown)
        except TemplateError as error:
            raise UserError(f"{key}: {file} is no jinja template ({error}); mend it") from error
        if missing := [name for name in names if shown[name] not in text and name != "prompt"]:
            raise UserError(f"{key}: {file} does not show {' and '.join(missing)}; write {{{{ {missing[0]} }}}} in it")
        return template

    def table(self, table: Table, swapped: bool = False) -> Table:
        """The rows as questions: one text each, whose class is the label; ids and labels stay.

        Args:
            swapped: pairs with the second reply in front; classes are then those of the other order.
        """
        name = f"{table.name}:{table.content_hash()}", table.first.tobytes(), swapped
        if name not in self._asked:
            self._asked[name] = self._as_questions(table, swapped)
        made = self._asked[name]
        return made if np.array_equal(made.labels, table.labels) else replace(made, labels=table.labels)

    def _as_questions(self, table: Table, swapped: bool) -> Table:
        texts = [self._text(table, row, swapped) for row in range(len(table))]
        if self.chat:
            form = self.source.chat.form
            texts = [form.prompt(Dialogue.of_messages([("user", text)]).messages) for text in texts]
        zeros = np.zeros(len(table), np.int64)
        return replace(table, kind="classes", classes=self.classes, texts=[(text,) for text in texts], first=zeros)

    def _text(self, table: Table, row: int, swapped: bool) -> str:
        if not self.pairs:
            return self.template.render(text=table.texts[row][0].strip())
        first = int(table.first[row]) ^ swapped
        prompt = table.prompts[row]
        shown = instruction(prompt) if prompt.text else ""
        replies = (table.reply(row, first), table.reply(row, 1 - first))
        return self.template.render(prompt=shown.strip(), first=replies[0], second=replies[1])

    # -- tokens --------------------------------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> list[int]:
        """The token of each label, as it goes on a question.

        Raises:
            UserError: a label is more than one token, or two are the same.
        """
        rows = ids_after(self.source.tokenizer, self._before, self._written)
        long = [label for label, ids in zip(self.answers, rows, strict=True) if len(ids) != 1]
        first = [ids[0] for ids in rows if ids]
        if long or len(set(first)) < len(rows):
            which = f"{long[0]!r} is not one token" if long else f"{self.answers} do not differ in their token"
            raise UserError(
                f"{self._key}.labels: {which} for {self.source.spec.name}; name labels of one token each, as [A,B]"
            )
        return first

    @cached_property
    def end(self) -> list[int]:
        """The token that ends the answer; none where the model has none."""
        if self.chat:
            return [self.source.chat.end]
        eos = self.source.tokenizer.eos_token_id
        return [] if eos is None else [int(eos)]

    @property
    def _before(self) -> str:
        """A question's end, which decides what tokens its answer has."""
        if not self.chat:
            return "x\n\nLabel:" if self.source.spec.label_tokens.question is None else self._shown[-40:]
        return self.source.chat.form.prompt(Dialogue.of_messages([("user", self._shown)]).messages)

    @property
    def _shown(self) -> str:
        names = NAMES["pairs" if self.pairs else "classes"]
        return self.template.render(**dict.fromkeys(names, "x"))

    @cached_property
    def _written(self) -> list[str]:
        return [f"{self.source.chat.form.lead}{a}" for a in self.answers] if self.chat else self.answers

    @property
    def _key(self) -> str:
        return f"{self.source.role}.label_tokens"

    def key(self) -> dict[str, object]:
        """What of it decides what a model learns or says, besides the texts it is asked, for cache keys."""
        options = self.source.spec.label_tokens
        return {"tokens": self.tokens, "end": self.end, "loss": options.loss}

    def notes(self) -> dict[str, str]:
        """What a report says of it."""
        how = "in its chat template" if self.chat else "as plain text"
        return {"label_tokens": f"{', '.join(self.answers)}; asked {how}"}


def likeliest(logits: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """[N] class that is shown as the answer of each row: the likeliest, and of those that tie one by the row's id.

    Args:
        logits: [N, C]. ids: [N].
    """
    best = logits >= logits.max(1, keepdims=True)
    chosen = best.argmax(1)
    for row in np.flatnonzero(best.sum(1) > 1):
        places = np.flatnonzero(best[row])
        chosen[row] = places[int(digest("label", ids[row]), 16) % len(places)]
    return chosen
