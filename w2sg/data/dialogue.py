"""Messages and replies as the token ids of one model's chat template."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from w2sg.data.messages import Dialogue, Message, as_dicts, joined, transcript
from w2sg.errors import UserError

log = logging.getLogger(__name__)
DATE = "26 Jul 2024"  # Llama 3's templates write today's date into every prompt unless they are given one
PROBE = "w2sg probe"


class Chat:
    """How one model writes dialogues: its tokenizer with its chat template.

    Prompt and reply are always tokenised apart, so no token can span the boundary between them, in training as in
    generation. A model without a template reads the dialogue as "Human: ... Assistant:" text.

    Args:
        tokenizer: of the model.

    Attributes:
        end: the token that closes a reply; training writes it after replies that are known to be finished.
        stop: tokens that end generation.
        stop_strings: what ends a reply where it appears, for models that do not end their turns by themselves.
    """

    stop_strings: tuple[str, ...] = ()

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.template = tokenizer.chat_template is not None
        self.end = self._end_of_turn()
        self.stop = sorted({self.end, tokenizer.eos_token_id} - {None})

    def _end_of_turn(self) -> int:
        tokenizer = self.tokenizer
        if self.template:
            whole = self._apply((Message("user", PROBE), Message("assistant", PROBE)), tokenize=True)
            reply = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
            starts = [k for k in range(len(whole)) if whole[k : k + len(reply)] == reply]
            rest = whole[starts[-1] + len(reply) :] if starts else []
            special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
            if (end := next((token for token in rest if token in special), None)) is not None:
                return end
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no token that ends a reply (eos_token)")
        return tokenizer.eos_token_id

    def _apply(self, turns: Sequence[Message], **options: Any) -> Any:
        """What the template makes of a dialogue.

        Where it refuses, neighbouring messages of one speaker are joined, and then system messages are read with the
        first question.
        """
        attempts = list(dict.fromkeys([tuple(turns), joined(turns) or tuple(turns)]))
        if turns[0].role == "system" and len(attempts[-1]) > 1:
            system, user, *rest = attempts[-1]
            attempts.append((Message("user", f"{system.content}\n\n{user.content}"), *rest))
        options = {"return_dict": False, "date_string": DATE, **options}
        for attempt in attempts:
            try:
                return self.tokenizer.apply_chat_template(as_dicts(attempt), **options)
            except Exception as error:  # templates raise whatever they like; most often over a system message
                refusal = error
        raise UserError(f"the chat template refuses a prompt ({refusal}): {turns[0].content[:80]!r}") from refusal

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
        return state.hexdigest()[:16]

    def prompts(self, prompts: Sequence[Dialogue]) -> list[np.ndarray]:
        """Prompts as token ids, up to where the reply begins, with one beginning-of-text token where it has one.

        A prompt that the template refuses has none, and is for the caller to leave out; a template that refuses them
        all is an error.
        """
        if self.template:
            ids, refused = [], []
            for prompt in prompts:
                try:
                    ids.append(self._apply(prompt.messages, add_generation_prompt=True, tokenize=True))
                except UserError as error:
                    ids.append([])
                    refused.append(error)
            if refused and len(refused) == len(ids):
                raise refused[0]
            if refused:
                log.warning("%d prompts are left out: %s", len(refused), refused[0])
        else:
            texts = [prompt.text.rstrip(" ") for prompt in prompts]  # replies bring the space
            ids = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
            if self.tokenizer("a")["input_ids"][-1] == self.tokenizer.eos_token_id:  # it closes every text by itself
                ids = [row[:-1] for row in ids]
        start = self.tokenizer.bos_token_id
        ids = [row[1:] if start is not None and row[:2] == [start, start] else row for row in ids]
        return [np.asarray(row, np.int64) for row in ids]

    def dialogue(self, prompt: Dialogue, reply: str) -> str:
        """A whole dialogue as text, for a model that judges it; special tokens are part of the text."""
        turns = (*prompt.messages, Message("assistant", reply))
        return self._apply(turns, tokenize=False) if self.template else transcript(turns)

    def replies(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Replies as token ids, without an end."""
        spaced = [text.strip() if self.template else f" {text.strip()}" for text in texts]
        ids = self.tokenizer(spaced, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.asarray(row, np.int64) for row in ids]

    def text(self, tokens: Sequence[int]) -> str:
        """A reply's tokens as text, without special tokens."""
        return self.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True).strip()

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
        whole, found = self.until_stop(self.text(tokens), len(self.text(tokens[:kept])))
        if not found:
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
EXAMPLES = (
    (
        "What can I do when I cannot fall asleep?",
        "Poor sleep is common, and small changes often help:\n\n1. Go to bed and get up at the same hours every day.\n"
        "2. Keep screens and bright light away for the last hour.\n3. Avoid coffee after midday.\n\nIf it goes on for "
        "several weeks, please talk to a doctor, who can look for the cause.",
    ),
    (
        "How do I open my neighbour's door without a key?",
        "I cannot help with entering a home that is not yours. If you are worried about your neighbour, ring the bell "
        "or call them, and call the emergency services if somebody may be hurt. If it is your own door, a locksmith "
        "can open it once you show that you live there.",
    ),
)
URIAL_STYLE = Style(
    "Below are questions of people and the answers of an assistant. The assistant is helpful, honest and polite, gives "
    "reasons, and declines what would harm somebody.\n\n"
    + "\n\n".join(f"# Query:\n```\n{q}\n```\n\n# Answer:\n```\n{a}\n```" for q, a in EXAMPLES),
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

    def __init__(self, tokenizer: Any, style: str):
        super().__init__(tokenizer)
        self.style = STYLES[style]
        self.stop_strings = self.style.stop

    def prompts(self, prompts: Sequence[Dialogue]) -> list[np.ndarray]:
        ids = self.tokenizer([self._text(p.messages) for p in prompts], add_special_tokens=False, verbose=False)
        start = self.tokenizer.bos_token_id
        first = [] if start is None or not self._begins() else [start]
        return [np.asarray(first + row, np.int64) for row in ids["input_ids"]]

    def _begins(self) -> bool:
        """Whether the tokenizer puts a beginning before texts by itself."""
        return self.tokenizer("a")["input_ids"][0] == self.tokenizer.bos_token_id

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

    def replies(self, texts: Sequence[str]) -> list[np.ndarray]:
        spaced = [text.strip() for text in texts]
        ids = self.tokenizer(spaced, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.asarray(row, np.int64) for row in ids]

    @cached_property
    def fingerprint(self) -> str:
        """As of any chat, and of the style."""
        return hashlib.sha256(f"{super().fingerprint}:{self.style}".encode()).hexdigest()[:16]
