"""Prompts as callers have them: texts, transcripts, or lists of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from w2sg.data.messages import Dialogue
from w2sg.data.replies import Prompts, prompt_id
from w2sg.errors import UserError

ROLES = ("user", "assistant", "system")


def prompts_of(given: Any) -> Prompts:
    """Prompts with their content hashes, in the order given.

    Raises:
        UserError: one is neither a text nor a list of messages that ends with the user's.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise UserError(f"prompts: {type(given).__name__} was given; give a list of texts, or of lists of messages")
    texts = [_dialogue(prompt) for prompt in given]
    if not texts:
        raise UserError("prompts: none were given; give a list of texts, or of lists of messages")
    return Prompts("prompts", [prompt_id(prompt) for prompt in texts], texts)


def _dialogue(prompt: Any) -> Dialogue:
    if isinstance(prompt, Dialogue):
        return prompt
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("prompts: one of them is empty; leave it out")
        return Dialogue.of_text(prompt)
    try:
        messages = [(message["role"], message["content"]) for message in prompt]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"prompts: {str(prompt)[:60]!r} is no prompt; give a text, or messages, {{'role': 'user', 'content': …}}"
        ) from error
    if wrong := [role for role, content in messages if role not in ROLES or not isinstance(content, str)]:
        raise UserError(f"prompts: a message of {wrong[0]!r}; roles are {', '.join(ROLES)}, and contents are texts")
    if not messages or messages[-1][0] != "user":
        raise UserError("prompts: a dialogue ends with a message of the user, which is answered")
    return Dialogue.of_messages(messages)
