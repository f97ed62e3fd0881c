"""What models read in a run, checked for a few rows: that it is what was given; counted where it is cut; and shown."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.data.rows import cut_left
from w2sg.data.table import Table
from w2sg.data.thoughts import OPEN, split
from w2sg.data.tokens import ids_of
from w2sg.errors import UserError

if TYPE_CHECKING:
    from w2sg.models.source import Source

log = logging.getLogger(__name__)
LOST, DAMAGED = 0.5, 0.95  # share of a text's letters that must come back: below the first nothing runs, below the
# second it is said; a tokenizer may fold case or forms of characters, which is no loss
UNKNOWN = 0.05
CHECKED, EXAMPLES, SHOWN = 5, 2, 1600  # rows looked at, and shown; characters of an example
MARKUP = re.compile(r"[<\[|｜].*[>\]|｜]")  # what a special token looks like that no text has by chance


@dataclass
class Reading:
    """What the models of one run read.

    Attributes:
        cut: by model, split and length: texts, those that lose their start, and pairs that are then one text.
        examples: by model and kind, as the model reads them, special tokens visible.
        lines: what a user must know.
    """

    lines: list[str] = field(default_factory=list)
    cut: dict[tuple[str, str, int], dict[str, int]] = field(default_factory=dict)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """A warning, once."""
        if line not in self.lines:
            self.lines.append(line)
            log.warning("%s", line)

    # -- whole texts, of models that score -----------------------------------------------------------------------------

    def texts(self, source: Source, table: Table, ids: Sequence[Sequence[int]]) -> int:
        """Look at texts and their token ids; how many of them are cut is returned.

        Args:
            ids: [N * n] of all texts, before anything is cut.

        Raises:
            UserError: the tokenizer loses what most of a text says.
        """
        spec, flat = source.spec, [text for texts in table.texts for text in texts]
        lengths = np.array([len(row) for row in ids])
        count = int((lengths > spec.max_length).sum())
        alike = 0
        if table.kind == "pairs" and table.texts and len(table.texts[0]) > 1:
            for k in np.flatnonzero((lengths.reshape(-1, 2) > spec.max_length).any(1)):
                one, two = (list(cut_left(ids[2 * k + j], spec.max_length, source.first)) for j in (0, 1))
                alike += one == two
        self._cut(spec.name, table.name, spec.max_length, len(flat), count, alike)
        if spec.arch == "hf":
            self._unknown(source, flat, ids)
            for k in _some(lengths):
                bare = not source.templated  # then all special tokens are the tokenizer's own, and not of the text
                read = source.tokenizer.decode(list(ids[k]), skip_special_tokens=bare)
                quoted = [token * flat[k].count(token) for token in source.tokenizer.all_special_tokens if bare]
                self._came_back(spec.name, flat[k], read + "".join(quoted))  # those that the text itself holds are read
            if not source.templated:
                self._templated(source.tokenizer, spec.name, flat)
            for k in _some(lengths)[:EXAMPLES]:
                self._show(spec.name, "whole texts", source.tokenizer, cut_left(ids[k], spec.max_length, source.first))
        return count

    def _cut(self, model: str, split: str, most: int, texts: int, count: int, alike: int) -> None:
        if (model, split, most) in self.cut:
            return
        self.cut[model, split, most] = {"texts": texts, "cut": count, "alike": alike}
        if count:
            share = f"{count:,} of {texts:,} texts ({count / texts:.1%})"
            log.info("%s on %s: %s lose their start to max_length=%d", model, split, share, most)
        if alike:
            self.say(
                f"{model}: {alike:,} of {texts // 2:,} pairs of {split} are one text once they are cut to max_length="
                f"{most}, so that nothing can be learned or told of them; raise max_length"
            )
        elif count > 0.1 * texts:
            self.say(f"{model}: {count / texts:.0%} of the texts of {split} lose their start to max_length={most}")

    def _unknown(self, source: Source, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        unknown = source.tokenizer.unk_token_id
        if unknown is None:
            return
        total = sum(len(row) - len(source.first) for row in ids)
        unreadable = sum(int(np.count_nonzero(np.asarray(row[len(source.first) :]) == unknown)) for row in ids)
        share = unreadable / max(total, 1)
        words = f"{source.spec.name}: {share:.0%} of the tokens of the texts are unknown to its tokenizer"
        example = next((t for t, row in zip(texts, ids, strict=True) if unknown in row[len(source.first) :]), "")
        if share > LOST and source.tokenizer.unk_token not in example:
            raise UserError(
                f"{words}, so that it cannot read them, first {example.strip()[:60]!r}; look whether its tokenizer "
                "files are complete (tokenizer.json or tokenizer.model), or choose a model of this language"
            )
        if share > UNKNOWN:
            self.say(f"{words} and lost, first of {example.strip()[:60]!r}")

    def _came_back(self, model: str, given: str, read: str) -> None:
        share = kept(given, read)
        known = any(line.startswith(f"{model}: its tokenizer loses") for line in self.lines)
        if share < LOST:
            raise UserError(
                f"{model}: its tokenizer loses what a text says: given {_brief(given)}, read {_brief(read)}; look "
                "whether its tokenizer files are complete, or choose another model"
            )
        if share < DAMAGED and not known:
            self.say(
                f"{model}: its tokenizer loses {1 - share:.0%} of a text's letters: given {_brief(given)}, read "
                f"{_brief(read)}"
            )

    def _templated(self, tokenizer: Any, model: str, texts: Sequence[str]) -> None:
        known = [*tokenizer.all_special_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values())]
        special = sorted({t for t in known if MARKUP.fullmatch(t.strip()) and not OPEN.fullmatch(t)}, key=len)
        special = [token for token in special if not token.startswith("</think")]
        if not special:
            return
        pattern = re.compile("|".join(map(re.escape, reversed(special))))
        markup = [match[0] for text in texts if (match := pattern.search(text))]
        if markup:
            self.say(
                f"{model}: {len(markup):,} of {len(texts):,} texts hold special tokens of the model's own (first "
                f"{markup[0]!r}), as data do that a chat template was applied to before; the model reads them as such, "
                "and a template that is applied here comes on top: give the data as messages or plain text"
            )

    # -- prompts and replies, of models that write ---------------------------------------------------------------------

    def chats(
        self,
        chat: Chat,
        prompts: Sequence[Dialogue],
        prompt_ids: Sequence[np.ndarray],
        replies: Sequence[str] | None = None,
        reply_ids: Sequence[np.ndarray] | None = None,
        finished: Sequence[bool] | None = None,
    ) -> None:
        """Look at prompts, and at replies to them, with their token ids; prompts without ids were refused.

        Raises:
            UserError: a question or a reply is not in what the model reads.
        """
        for note in chat.notes:
            self.say(f"{chat.name}: {note}")
        if chat.end not in chat.stop:  # stop may be set by whoever holds the chat
            raise UserError(f"{chat.name}: the token that ends replies is none that decoding stops at")
        texts = [message.content for prompt in dict.fromkeys(prompts) for message in prompt.messages]
        self._templated(chat.tokenizer, chat.name, [*texts, *(replies or ())])
        filled = [k for k, row in enumerate(prompt_ids) if len(row)]
        for at in _some(np.array([len(prompt_ids[k]) for k in filled])):
            k = filled[at]
            read = _decoded(chat, prompt_ids[k])
            for role, content in prompts[k].messages:  # templates leave out what was thought in earlier turns
                self._came_back(chat.name, split(content).reply if role == "assistant" else content, read)
            ids = [*prompt_ids[k]]
            if replies is not None and len(reply_ids[k]):
                self._reply(chat, prompts[k], prompt_ids[k], replies[k], reply_ids[k])
                ids += [*reply_ids[k], *([chat.end] if finished is not None and finished[k] else [])]
            kind = "prompts" if replies is None else "prompts with replies"
            self._show(chat.name, kind, chat.tokenizer, ids)

    def _reply(self, chat: Chat, prompt: Dialogue, prompt_ids: np.ndarray, reply: str, reply_ids: np.ndarray) -> None:
        wanted = chat.to_teach(reply)
        self._came_back(chat.name, wanted, _decoded(chat, reply_ids))
        if chat.form is None or not chat.form.shows_replies or chat.thoughts == "keep":
            return
        text = chat.form.dialogue(prompt.messages, wanted)
        closed = chat.replies([reply], [True])[0]  # as a finished reply, whatever this one is
        ours = [*map(int, prompt_ids), *map(int, closed), chat.end]
        theirs = ids_of(chat.tokenizer, [text])[0]
        if ours == theirs[: len(ours)]:
            return
        read, expected = _squeezed(_decoded(chat, ours[:-1])), _squeezed(_decoded(chat, theirs))
        tail = _squeezed(chat.form.tail)
        read = read.removesuffix(tail) if tail else read
        if expected.startswith(read):
            return  # one token would span the boundary between prompt and reply
        if any(thought in _decoded(chat, prompt_ids) for thought in ("<think>", "[THINK]", "THINKING")):
            return  # the thought that is closed before a reply is not in the dialogue, which the notes say
        self.say(
            f"{chat.name}: prompt, reply and end are not what its chat template writes: read "
            f"{_brief(_decoded(chat, ours))}, template {_brief(text)}"
        )

    def thoughts(self, name: str, count: int, unclosed: int) -> None:
        """How many replies come with a thought that is left out, and how many of them end inside it."""
        if not count:
            return
        line = f"{name}: {count:,} replies begin with a thought, which is left out (thoughts=strip)"
        if unclosed:
            line += f"; {unclosed:,} of them end inside it and are empty, unfinished replies: raise max_new_tokens"
        self.say(line)

    # -- the report ---------------------------------------------------------------------------------------------------

    def _show(self, model: str, kind: str, tokenizer: Any, ids: Sequence[int]) -> None:
        shown = self.examples.setdefault((model, kind), [])
        if len(shown) < EXAMPLES:
            text = tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)
            if len(text) > SHOWN:
                text = f"{text[: SHOWN // 2]}\n[... {len(text) - SHOWN:,} characters ...]\n{text[-SHOWN // 2 :]}"
            if text not in shown:
                shown.append(text)

    def into(self, content: dict[str, Any]) -> None:
        """Add it to what report.json holds."""
        content["reading"] = {
            "cut": [
                {"model": model, "split": split, "max_length": most, **counts}
                for (model, split, most), counts in self.cut.items()
            ],
            "examples": [
                {"model": m, "kind": kind, "text": text} for (m, kind), texts in self.examples.items() for text in texts
            ],
        }


def kept(given: str, read: str) -> float:
    """The share of a text's letters and digits that can be read in another one, 0 to 1; 1 where it is in it whole."""
    one, two = _squeezed(given), _squeezed(read)
    if one in two:
        return 1.0
    wanted, present = (Counter(c for c in text if c.isalnum()) for text in (one, two))
    total = wanted.total()
    return (wanted & present).total() / total if total else 1.0


def _squeezed(text: str) -> str:
    """A text without whitespace and differences of case or of forms of characters."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _decoded(chat: Chat, ids: Sequence[int]) -> str:
    return chat.tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False)


def _some(lengths: np.ndarray) -> list[int]:
    """Places of a few rows: the first, the longest, and others in between."""
    if not len(lengths):
        return []
    spread = np.linspace(0, len(lengths) - 1, CHECKED).astype(int).tolist()
    return list(dict.fromkeys([0, int(lengths.argmax()), *spread]))[: CHECKED + 1]


def _brief(text: str, most: int = 120) -> str:
    text = text.strip()
    return repr(text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}")
