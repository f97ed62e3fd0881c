"""A model's chat template: dialogues as the text that the model was trained on, and where in it the reply stands."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from w2sg.data import thoughts
from w2sg.data.messages import Message, joined
from w2sg.data.thoughts import Thoughts
from w2sg.errors import UserError, first_line

log = logging.getLogger(__name__)
Turns = Sequence[Message]
NOW = datetime.datetime(2024, 7, 26, 12)  # templates write today's date into every prompt; prompts are to stay the same
DATE = NOW.strftime("%d %b %Y")
QUESTION, REPLY = "w2sg question", "w2sg reply"  # of the dialogue that a template is tried on
SHOWN = 160  # characters of a text in a message


class Template:
    """Renders dialogues with a tokenizer's chat template.

    Args:
        tokenizer: of the model.
        variables: of the template, besides messages; ``enable_thinking`` of many reasoning models, say.
        thoughts: ``keep`` lets the model think as its template has it; else an empty, closed thought stands before
            every reply where the template opens one.

    Attributes:
        parts: roles whose messages the template wants as lists of parts.
        before: a prompt up to where the reply begins. lead, tail: what stands between it and the text of the reply, and
            between the text and its end. end: the token that ends it, as text; None where there is none.
        notes: what a user must know of it.

    Raises:
        UserError: no prompt shows its question; or the template thinks where that is refused.
    """

    def __init__(
        self, tokenizer: Any, variables: Mapping[str, Any] | None = None, thoughts: Thoughts = "strip", name: str = ""
    ):
        self.tokenizer, self.variables, self.thoughts = tokenizer, dict(variables or {}), thoughts
        self.name = name or tokenizer.name_or_path or "the model"
        self.parts: set[str] = set()
        self.notes: list[str] = []
        question = (Message("user", QUESTION),)
        self._find_form(question)
        self.generation = self._render(question, True)
        if len({self._render(question, True) for _ in range(8)}) > 1:
            raise UserError(
                f"{self.name}: its chat template writes another prompt each time, so no result could be repeated; give "
                "one that does not with chat_template=FILE"
            )
        whole = self._render([*question, Message("assistant", REPLY)], False)
        self.shows_replies = REPLY in whole
        self.before, self.lead, self.tail, self.end, self.opened = self.generation, "", "", None, None
        if self.shows_replies:
            at = whole.rfind(REPLY)
            self.before = self._joined(self.generation, whole[:at], self.notes)
            self.lead = whole[len(self.before) : at] if whole[:at].startswith(self.before) else ""
            self._find_end(whole[at + len(REPLY) :])
        else:
            self.notes.append("its chat template shows no replies; they follow the prompt, and eos_token ends them")
        self._find_thoughts(whole)

    # -- text ---------------------------------------------------------------------------------------------------------

    def prompt(self, turns: Turns) -> str:
        """A dialogue up to where the reply begins.

        Raises:
            UserError: the template refuses it, or does not show one of its messages.
        """
        turns, prompt = self._shown(turns, True)
        if not self.shows_replies:
            return prompt
        try:
            whole = self._render([*turns, Message("assistant", REPLY)], False)
        except Exception:  # some want the roles to alternate, and the last to be the user's
            whole = ""
        at = whole.rfind(REPLY)
        if at < 0:
            return prompt + self.before[len(self.generation) :] if self.before.startswith(self.generation) else prompt
        return self._joined(prompt, whole[:at], None)

    def dialogue(self, turns: Turns, reply: str) -> str:
        """A whole dialogue with its reply, as the template writes it.

        Raises:
            UserError: the template refuses it, or does not show one of its messages or the reply.
        """
        return self._shown([*turns, Message("assistant", reply)], False)[1]

    def before_reply(self, text: str) -> str:
        """A reply as a model that may think would write it after its prompt: with its thought, or an empty one."""
        parts = thoughts.split(text)
        opened = thoughts.left_open(self.before)
        if not parts.thought:
            return self._no_thought + text
        if opened is None:
            return text
        inner = text.lstrip().removeprefix(opened.strip())
        return inner.lstrip() if opened[-1:].isspace() else inner

    # -- how the template is -----------------------------------------------------------------------------------------

    def _find_form(self, question: Turns) -> None:
        """Whether messages are to be given as text or as a list of parts, by what of the question can be seen."""
        refused: Exception | None = None
        for parts in (set(), {"user", "system"}, {"user", "system", "assistant"}):
            seen, error = self._seen(parts, question, QUESTION)
            refused = refused or error
            if seen:
                break
        else:
            why = f" ({first_line(refused)})" if refused and str(refused) else ""
            raise UserError(
                f"{self.name}: its chat template shows nothing of a question{why}, so the model would answer empty "
                "prompts; give a template that does with chat_template=FILE"
            )
        if self.parts:
            self.notes.append("its chat template is given messages as lists of parts")
        reply = [*question, Message("assistant", REPLY)]
        if any(self._seen(parts, reply, REPLY)[0] for parts in (self.parts, self.parts ^ {"assistant"})):
            return
        _, error = self._seen(self.parts ^ {"assistant"}, reply, REPLY)
        if error is not None:
            raise UserError(
                f"{self.name}: its chat template refuses a dialogue of one question and one reply "
                f"({first_line(error)}); give another with chat_template=FILE"
            ) from error

    def _seen(self, parts: set[str], turns: Turns, content: str) -> tuple[bool, Exception | None]:
        """Whether the last message can be read where these roles are given as parts, or how the template refuses."""
        self.parts = parts
        try:
            text = self._render(turns, generation=turns[-1].role == "user")
        except Exception as error:  # templates raise whatever they like
            return False, error
        return content in text and not _listed(text, content), None

    def _find_end(self, rest: str) -> None:
        """The first special token after a reply, and what stands before it."""
        places = [(rest.find(token), -len(token), token) for token in self.specials if token in rest]
        if places:
            at, _, self.end = min(places)
            self.tail = rest[:at]
            if self.tail.strip():
                self.notes.append(f"its chat template writes {_brief(self.tail)} between a reply and its end")
        elif rest.strip():
            self.notes.append(
                f"its chat template ends a reply with {_brief(rest)}, which is no token; eos_token is taught, and "
                "decoding stops there"
            )
        else:
            self.notes.append("its chat template writes nothing after a last reply; eos_token is taught as its end")

    def _find_thoughts(self, whole: str) -> None:
        opened = thoughts.left_open(self.generation)
        at = whole.rfind(REPLY)
        extra = whole[:at].removeprefix(self.generation) if whole[:at].startswith(self.generation) else ""
        closed = thoughts.empty(extra)
        self._no_thought = thoughts.closing(opened) if opened else extra if closed else ""
        if not opened and not closed:
            return
        how = "opens a thought in the prompt" if opened else "writes an empty thought before every reply"
        if self.thoughts == "refuse":
            raise UserError(
                f"{self.name}: its chat template {how}: prompt {_brief(self.generation)}, dialogue {_brief(whole)}; "
                "set thoughts=strip (an empty, closed thought stands before every reply) or thoughts=keep (the model "
                "thinks), or chat_template_kwargs={enable_thinking: false} where the template knows it"
            )
        if self.thoughts == "keep":
            self.before, self.lead = self.generation, ""
            self.notes.append(f"its chat template {how}; thoughts are kept as part of replies (thoughts=keep)")
        else:
            self.notes.append(
                f"its chat template {how}: an empty, closed thought stands in every prompt, and models reply at once "
                "(thoughts=strip)"
            )

    def _joined(self, start: str, before: str, notes: list[str] | None) -> str:
        """The prompt of a generation prompt and of what the template writes before a reply.

        Args:
            start: the prompt as the template would have the model go on. before: a whole dialogue up to its reply.
        """
        if self.thoughts == "keep" and (thoughts.left_open(start) or thoughts.empty(before.removeprefix(start))):
            return start
        prompt = start
        if before.startswith(start):
            extra = before[len(start) :]
            # a space before the reply is part of its first token, so it is the reply's
            prompt += extra.rstrip(" ") if extra.strip() else ""
        elif start.rstrip() == before.rstrip():
            prompt = before.rstrip(" ")
            if notes is not None:
                notes.append(f"prompts end in {prompt[-12:]!r} as dialogues have it, not in {start[-12:]!r}")
        elif _bare(start) != _bare(before) and notes is not None:
            notes.append(
                f"its chat template goes on otherwise than it prompts: a prompt ends in {_last(start, before)}, the "
                f"same place of a dialogue in {_last(before, start)}"
            )
        opened = thoughts.left_open(prompt)
        if not opened or self.thoughts == "keep":
            return prompt
        bare = prompt.removesuffix(opened)
        if before.startswith(bare) and thoughts.empty(before[len(bare) :]) and not thoughts.left_open(before):
            return before.rstrip(" ")  # the template has an empty thought of its own, which is what the model knows
        return prompt + thoughts.closing(opened)

    @cached_property
    def specials(self) -> dict[str, int]:
        """Added tokens, as text, and their ids."""
        tokenizer = self.tokenizer
        tokens = {token.content: place for place, token in tokenizer.added_tokens_decoder.items()}
        tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        return {token: place for token, place in tokens.items() if token.strip()}

    # -- rendering ----------------------------------------------------------------------------------------------------

    def _shown(self, turns: Turns, generation: bool) -> tuple[Turns, str]:
        """The turns as they can be given, and what the template makes of them; every message is in it.

        System messages that the template refuses or leaves out are read with the first question.
        """
        # most want the roles to alternate; where they do not, neighbouring messages of one speaker are joined
        attempts = list(dict.fromkeys([tuple(turns), joined(turns) or tuple(turns)]))
        first, *others = attempts[-1]
        if first.role == "system" and others and others[0].role == "user":
            user, *rest = others
            attempts.append((Message("user", f"{first.content}\n\n{user.content}"), *rest))
        refusals: list[str] = []
        for attempt in attempts:
            try:
                text = self._render(attempt, generation)
            except Exception as error:  # templates raise whatever they like; most often over a system message
                refusals.append(str(error) or type(error).__name__)
                continue
            lost = [turn for turn in attempt if not _contains(text, turn)]
            if not lost:
                return attempt, text
            refusals.append(f"it does not show a message of the {lost[0].role}: {_brief(lost[0].content)}")
        raise UserError(f"the chat template refuses a prompt ({refusals[-1]}): {turns[0].content[:80]!r}")

    def _render(self, turns: Turns, generation: bool) -> str:
        # as the tokenizer's apply_chat_template does, which takes no functions: the clock would go on
        from transformers.utils.chat_template_utils import _compile_jinja_template

        messages = []
        for role, content in turns:
            parts = [{"type": "text", "text": content}]
            messages.append({"role": role, "content": parts if role in self.parts else content})
        given = {**self.tokenizer.special_tokens_map, "date_string": DATE, "strftime_now": NOW.strftime}
        given |= self.variables
        given |= {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation}
        return _compile_jinja_template(self.tokenizer.get_chat_template()).render(**given)


def _contains(text: str, turn: Message) -> bool:
    """Whether a message can be read in a rendered dialogue, whatever was done to its whitespace."""
    content = turn.content.strip()
    if content in text:
        return True
    if turn.role == "assistant":  # templates leave out what was thought in earlier turns
        content = thoughts.split(content).reply
    return "".join(content.split()) in "".join(text.split())


def _listed(text: str, content: str) -> bool:
    """Whether a list of parts was written as such."""
    return any(f"{quote}text{quote}: {quote}{content}" in text for quote in "'\"")


def _bare(text: str) -> str:
    """A text without an empty or open thought at its end, or whitespace there."""
    text = text.rstrip()
    for opened, close in thoughts.TAGS.items():
        text = text.removesuffix(close).rstrip().removesuffix(opened).rstrip()
    return text


def _last(text: str, other: str) -> str:
    same = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, same - 24) :][:60])


def _brief(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")
