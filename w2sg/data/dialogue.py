"""Messages and replies as the token ids of one model's chat template."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from w2sg.data.messages import Dialogue, Message, transcript
from w2sg.data.template import DATE as DATE
from w2sg.data.template import REPLY, Template
from w2sg.data.thoughts import TAGS, Said, Thoughts, left_open, split
from w2sg.data.tokens import beginning, ids_after, ids_of, sliced
from w2sg.errors import UserError

log = logging.getLogger(__name__)
BARE = "\n\nHuman: w2sg question\n\nAssistant:"


class Chat:
    """How one model writes dialogues: its tokenizer with its chat template.

    Prompt, reply and end are together the template's own text, and their tokens the template's own tokens but where one
    of them would span the boundary between prompt and reply. A model without a template reads the dialogue as
    "Human: ... Assistant:" text.

    Args:
        tokenizer: of the model.
        variables: of the template, besides messages.
        thoughts: of reasoning models: ``strip``, ``keep`` or ``refuse``; see docs/chat.md.
        name: of the model, for messages.

    Attributes:
        end: the token that closes a reply; training writes it after replies that are known to be finished.
        stop: tokens that end generation.
        stop_strings: what ends a reply where it appears, for models that do not end their turns by themselves.
        notes: what a user must know of the template.

    Raises:
        UserError: the template shows no question, or thinks where that is refused; or nothing ends a reply.
    """

    stop_strings: tuple[str, ...] = ()

    def __init__(
        self, tokenizer: Any, variables: Mapping[str, Any] | None = None, thoughts: Thoughts = "strip", name: str = ""
    ):
        self.tokenizer, self.thoughts = tokenizer, thoughts
        self.name = name or tokenizer.name_or_path or "the model"
        self.template = tokenizer.chat_template is not None
        self.form = Template(tokenizer, variables, thoughts, name) if self.template else None
        self.notes = list(self.form.notes) if self.form else []
        self.end = self._end_of_turn()
        self.stop = sorted({self.end, tokenizer.eos_token_id} - {None})
        self._context = self.form.before if self.form else BARE
        self._lead = self.form.lead if self.form else " "
        self._after = self.form.tail if self.form else ""

    def _end_of_turn(self) -> int:
        tokenizer = self.tokenizer
        if self.form is not None and self.form.end is not None:
            return self.form.specials[self.form.end]
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.name}: its tokenizer has no token that ends a reply (eos_token)")
        return tokenizer.eos_token_id

    @cached_property
    def vocabulary(self) -> str:
        """Of tokens and their ids: where it is equal, an id stands for the same text."""
        return hashlib.sha256(repr(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()[:16]

    @cached_property
    def ids(self) -> np.ndarray:
        """Ids that stand for something, in order. Models may have more, to fill their embeddings up."""
        known = {*self.tokenizer.get_vocab().values(), *self.tokenizer.added_tokens_decoder, *self.stop}
        return np.array(sorted(known), np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Of vocabulary, merges, special tokens and template: equal for models between which ids may travel."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        state = hashlib.sha256(text.encode())
        state.update(f"{self.tokenizer.chat_template}:{self.end}:{self.stop}".encode())
        if self.form is not None and (self.form.variables or self.thoughts != "strip"):
            state.update(f"{sorted(self.form.variables.items())}:{self.thoughts}".encode())
        return state.hexdigest()[:16]

    def prompts(self, prompts: Sequence[Dialogue]) -> list[np.ndarray]:
        """Prompts as token ids, up to where the reply begins, with one beginning-of-text token where it has one.

        A prompt that the template refuses has none, and is for the caller to leave out; a template that refuses them
        all is an error.
        """
        if self.form is not None:
            texts, refused = [], []
            for prompt in prompts:
                try:
                    texts.append(self.form.prompt(prompt.messages))
                except UserError as error:
                    texts.append("")
                    refused.append(error)
            if refused and len(refused) == len(texts):
                raise refused[0]
            if refused:
                log.warning("%d prompts are left out: %s", len(refused), refused[0])
        else:
            texts = [prompt.text.rstrip(" ") for prompt in prompts]  # replies bring the space
        return [row for part in sliced(len(texts)) for row in self._prompt_ids(texts[part])]

    def _prompt_ids(self, texts: list[str]) -> list[np.ndarray]:
        tokenizer = self.tokenizer
        if self.form is not None:
            ids = iter(ids_of(tokenizer, [text for text in texts if text]))
            ids = [next(ids) if text else [] for text in texts]
        else:
            ids = ids_of(tokenizer, texts, special=True)
            if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:  # it closes every text by itself
                ids = [row[:-1] for row in ids]
        start = tokenizer.bos_token_id
        ids = [row[1:] if start is not None and row[:2] == [start, start] else row for row in ids]
        return [np.asarray(row, np.int64) for row in ids]

    def dialogue(self, prompt: Dialogue, reply: str) -> str:
        """A whole dialogue as text, for a model that judges it; special tokens are part of the text."""
        if self.form is None:
            return transcript((*prompt.messages, Message("assistant", reply)))
        return self.form.dialogue(prompt.messages, reply)

    def replies(self, texts: Sequence[str], finished: Sequence[bool] | None = None) -> list[np.ndarray]:
        """Replies as token ids, without their end, as they go on a prompt.

        Args:
            finished: [N] which of them are followed by their end; these have what the template writes before it.
        """
        ends = [False] * len(texts) if finished is None else [bool(x) for x in finished]
        return [row for part in sliced(len(texts)) for row in self._reply_ids(texts[part], ends[part])]

    def _reply_ids(self, texts: Sequence[str], ends: list[bool]) -> list[np.ndarray]:
        taught = [self.to_teach(text) for text in texts]
        ids = ids_after(self.tokenizer, self._anchor, [f"{self._lead}{text}" for text in taught])
        if self._after and any(ends):  # may be one token with the last of the reply
            wanted = [k for k, ended in enumerate(ends) if ended]
            closed = [f"{self._lead}{taught[k]}{self._after}{self.form.end}" for k in wanted]
            for k, row in zip(wanted, ids_after(self.tokenizer, self._anchor, closed), strict=True):
                last = len(row) - 1 - row[::-1].index(self.end)
                ids[k] = row[:last]
        # what is a thought alone has no reply, and not even the space before one
        return [
            np.asarray(row if new or not old.strip() else [], np.int64)
            for row, new, old in zip(ids, taught, texts, strict=True)
        ]

    def to_teach(self, text: str) -> str:
        """A reply as it is to be read after a prompt: without its thought, or with what closes an empty one."""
        text = text.strip()
        if self.thoughts == "keep":
            return self.form.before_reply(text) if self.form is not None else text
        return self._allowed(split(text), "a reply holds").reply

    def _allowed(self, parts: Said, how: str) -> Said:
        if parts.thought and self.thoughts == "refuse":
            raise UserError(
                f"{self.name}: {how} a thought ({parts.thought[:60]!r}), and thoughts=refuse; set thoughts=strip to "
                "leave thoughts out, or thoughts=keep to keep them as part of replies"
            )
        return parts

    def goes_on(self, text: str) -> list[int]:
        """Token ids of the beginning of a reply, its whitespace as it is."""
        return ids_after(self.tokenizer, self._anchor, [text])[0]

    @cached_property
    def _anchor(self) -> str:
        """The end of a prompt, from its last special token on where that is enough to tokenise what follows."""
        whole, tokenizer = self._context, self.tokenizer
        place = max((whole.rfind(token) for token in self.form.specials), default=-1) if self.form else -1
        if place <= 0:
            return whole
        trial = [f"{self._lead}{REPLY}"]
        return (
            whole[place:] if ids_after(tokenizer, whole[place:], trial) == ids_after(tokenizer, whole, trial) else whole
        )

    def text(self, tokens: Sequence[int]) -> str:
        """A reply's tokens as text, without special tokens and (unless they are kept) thoughts."""
        return self.said(tokens).reply

    def said(self, tokens: Sequence[int]) -> Said:
        """A written reply and the thought before it; where thoughts are kept, they are part of the reply.

        Raises:
            UserError: it holds a thought, and they are refused.
        """
        ids = list(map(int, tokens))
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if self._tags & set(ids):  # tags that are special tokens are in no text
            shown = [token for token in ids if token in self._tags or token not in self._special_ids]
            text = self.tokenizer.decode(shown, skip_special_tokens=False).strip()
        if self.thoughts == "keep" and (opened := left_open(self._context)):
            text = f"{opened}{text}"
        return self.heard(text)

    def heard(self, text: str) -> Said:
        """A written text as the reply and the thought before it, as `said`."""
        return Said("", text) if self.thoughts == "keep" else self._allowed(split(text), "it wrote")

    def thought(self, tokens: Sequence[int]) -> int:
        """How many tokens a written reply begins with that are its thought."""
        parts = self.said(tokens)
        if not parts.thought:
            return 0
        if not parts.closed:
            return len(tokens)
        if not parts.reply:
            return len(tokens) - int(int(tokens[-1]) in self.stop)
        # the first place from which on the reply is all there is
        return bisect(
            range(len(tokens)), False, key=lambda place: len(self.said(tokens[place + 1 :]).reply) < len(parts.reply)
        )

    @cached_property
    def _special_ids(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)

    @cached_property
    def _tags(self) -> set[int]:
        tags = {*TAGS, *TAGS.values()}
        return {place for place in self._special_ids if self.tokenizer.convert_ids_to_tokens(place) in tags}

    def until_stop(self, text: str, start: int = 0) -> tuple[str, bool]:
        """A reply up to the first string that ends it, from a place on, and whether there was one."""
        lines = f"\n{text}"  # a reply begins a line
        places = (lines.find(string, start + 1 if start else 0) for string in self.stop_strings)
        ends = [place for place in places if place >= 0]
        return (lines[1 : min(ends)].rstrip(), True) if ends else (text, False)

    def cut(self, tokens: np.ndarray, kept: int = 0) -> tuple[np.ndarray, bool]:
        """A reply's tokens before the first string that ends it, and whether there was one.

        Args:
            kept: tokens at the beginning that are not looked through.
        """
        if not self.stop_strings:
            return tokens, False
        whole, ended = self.until_stop(self.text(tokens), len(self.text(tokens[:kept])))
        if not ended:
            return tokens, False
        size = len(tokens)
        while size > kept and len(self.text(tokens[: size - 1])) >= len(whole):
            size -= 1
        return tokens[:size], True


@dataclass(frozen=True)
class Style:
    """Dialogues as text that a base model can go on with: how they begin, how each turn does, and what ends a reply."""

    before: str
    user: str
    assistant: str
    after_user: str
    after_assistant: str
    stop: tuple[str, ...]


ROLES_STYLE = Style("", "\n\n[User]\n", "\n\n[Assistant]\n", "", "", ("\n[User]", "\n[Assistant]", "\n[System]"))
# After URIAL (Lin et al. 2023, arXiv 2312.01552): what an assistant is like, and a few answers that show it.
URIAL = json.loads((Path(__file__).parent / "urial.json").read_text(encoding="utf-8"))
EXAMPLES = URIAL["examples"]  # question, answer
SHOWN = [f"# Query:\n```\n{question}\n```\n\n# Answer:\n```\n{answer}\n```" for question, answer in EXAMPLES]
URIAL_STYLE = Style(
    "\n\n".join([URIAL["introduction"], *SHOWN]),
    "\n\n# Query:\n```\n",
    "\n\n# Answer:\n```\n",
    "\n```",
    "\n```",
    ("\n```", "\n# Query:"),
)
STYLES = {"roles": ROLES_STYLE, "urial": URIAL_STYLE}


class TextChat(Chat):
    """Dialogues as plain text, for base models: in plain roles, or with instructions and examples before (URIAL).

    Args:
        tokenizer: of the model. style: a key of `STYLES`.
    """

    def __init__(self, tokenizer: Any, style: str, thoughts: Thoughts = "strip", name: str = ""):
        super().__init__(tokenizer, None, thoughts, name)
        self.form = None
        self.style = STYLES[style]
        self.stop_strings = self.style.stop
        self._context, self._lead, self._after = self.style.assistant, "", ""

    def prompts(self, prompts: Sequence[Dialogue]) -> list[np.ndarray]:
        start = self.tokenizer.bos_token_id
        first = [start] if start is not None and start in beginning(self.tokenizer) else []
        texts = [self._text(p.messages) for p in prompts]
        return [
            np.asarray(first + row, np.int64)
            for part in sliced(len(texts))
            for row in ids_of(self.tokenizer, texts[part])
        ]

    def _text(self, turns: Sequence[Message]) -> str:
        style, text = self.style, self.style.before
        for turn in turns:
            if turn.role == "assistant":
                text += f"{style.assistant}{turn.content}{style.after_assistant}"
            elif turn.role == "system":
                text += f"\n\n[System]\n{turn.content}" if not style.before else f"\n\n{turn.content}"
            else:
                text += f"{style.user}{turn.content}{style.after_user}"
        return (text + style.assistant).lstrip("\n")

    @cached_property
    def fingerprint(self) -> str:
        """As of any chat, and of the style."""
        return hashlib.sha256(f"{super().fingerprint}:{self.style}".encode()).hexdigest()[:16]
