"""Messages as files have them: lists of turns under many names, or JSON text of such lists."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from w2sg.data.files import parse_json
from w2sg.data.messages import LAST_TURN, Message
from w2sg.errors import UserError

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "client"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
# what a turn may carry besides its role and its text, where it changes what was said
TOOLS = ("tool_calls", "function_call", "tool_call_id")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
BEGINS = re.compile(r"\s*(Human|Assistant|System):")
JSON_TURNS = re.compile(r"\s*\[?\s*\{\s*\"")
PYTHON_TURNS = re.compile(r"\s*\[?\s*\{\s*'\w+'\s*:|\s*\[?\s*array\(\[\{'")
# "Human:" and "Assistant:" that begin lines, but not after an empty one
LOOSE = re.compile(r"\s*Human:.*?\n[ \t\r]*Assistant:", re.S)
LIST = re.compile(r"\s*\[\s*(?:'.*'|\".*\")\s*\]\s*", re.S)
REPR = "a list of messages written as Python text; save the data as .jsonl or .parquet, which keep lists"
# of chat templates; a text that holds one was templated before
SPECIAL = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|endoftext|user|assistant|system|end)\|>"
    r"|<[|｜](?:User|Assistant|turn|header_start|start_of_role|START_OF_TURN_TOKEN|end_of_text)[|｜]>"
    r"|<\|(?:end_of_turn|eom_id|eot|start|message|channel|return|im_user|im_assistant|im_middle)\|>|<\|turn>"
    r"|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>|<extra_id_\d>|\[\|(?:user|assistant)\|\]"
)


def kind_of(value: Any) -> str:
    """What a cell is: ``messages``, ``json`` or ``python`` text of them, a ``dialogue`` as one text, ``text``, or its
    type.
    """
    if isinstance(value, str):
        if PYTHON_TURNS.match(value) and any(f"'{key}'" in value for key in ROLE_KEYS):
            return "python"
        if JSON_TURNS.match(value):
            try:
                return "json" if kind_of(parse_json(value)) == "messages" else "text"
            except ValueError:
                return "text"
        return "dialogue" if BEGINS.match(value) and LAST_TURN in value else "text"
    turns = _listed(value)
    if turns is not None and all(isinstance(turn, dict) and any(k in turn for k in ROLE_KEYS) for turn in turns):
        return "messages"
    return "nothing" if value is None else type(value).__name__


def _listed(value: Any) -> list[Any] | None:
    """Turns as a list: one alone, or columns of turns as some tables have them."""
    if isinstance(value, dict):
        role, text = (next((k for k in keys if k in value), None) for keys in (ROLE_KEYS, TEXT_KEYS))
        if role and text and isinstance(value[role], list) and isinstance(value[text], list):
            pairs = zip(value[role], value[text], strict=True) if len(value[role]) == len(value[text]) else ()
            return [{"role": r, "content": t} for r, t in pairs]
        return [value] if role else None
    return list(value) if isinstance(value, list | tuple) else None


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """The messages of a cell.

    Args:
        name: of the column, for messages.

    Raises:
        ValueError: it holds none, or what is no text.
    """
    if isinstance(value, str):
        if kind_of(value) == "python":
            raise ValueError(f"{name} is {REPR}")
        if kind_of(value) != "json":
            raise ValueError(f"{name} is text, not a list of messages")
        value = parse_json(value)
    turns = _listed(value)
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{name} is not a list of messages")
    return tuple(_message(turn) for turn in turns)


def _message(turn: dict[str, Any]) -> Message:
    role = next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None)
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        tool = isinstance(role, str) and role.lower() in ("tool", "function", "observation", "function_call", "ipython")
        raise ValueError(f"unknown role {role!r}{' (tools are not read; leave such dialogues out)' if tool else ''}")
    used = next((key for key in TOOLS if turn.get(key)), None)
    if used is not None:
        raise ValueError(f"a message with {used}, which is not read; leave such dialogues out")
    if (thought := next((key for key in THOUGHTS if turn.get(key)), None)) is not None:
        raise ValueError(f"a message with {thought}, which is not read; leave it out, or put it into the content")
    return Message(known, _content(next((turn[key] for key in TEXT_KEYS if turn.get(key) is not None), None)))


def _content(content: Any) -> str:
    """A message's text; of parts, those that are text."""
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        kinds = {str(p.get("type")) if isinstance(p, dict) else type(p).__name__ for p in content}
        if kinds - {"text", "str"}:
            raise ValueError(
                f"a message with {' and '.join(sorted(kinds - {'text', 'str'}))}, of which only text is read"
            )
        content = "".join(p if isinstance(p, str) else p.get("text") or "" for p in content) if content else None
    if not isinstance(content, str):
        raise ValueError("a message without text")
    return content


def majority(values: Iterable[Any]) -> str:
    """The kind of most cells that are there."""
    counts = Counter(kind for value in values if (kind := kind_of(value)) != "nothing")
    return counts.most_common(1)[0][0] if counts else "nothing"


def unread(value: Any) -> set[str]:
    """Keys of messages that hold something, and that nothing reads."""
    turns = value if isinstance(value, list) else [value]
    return {
        str(key)
        for turn in turns
        if isinstance(turn, dict) and any(k in turn for k in ROLE_KEYS)
        for key, held in turn.items()
        if held not in (None, "", [], {}) and key not in (*ROLE_KEYS, *TEXT_KEYS, *TOOLS, *THOUGHTS, "type")
    }


def refuse_loose(values: Iterable[Any], name: str, where: str) -> None:
    """Dialogues as text whose turns stand on lines of their own without an empty line before them."""
    cells = [value for value in values if isinstance(value, str)]
    if cells and 2 * sum(LAST_TURN not in cell and bool(LOOSE.match(cell)) for cell in cells) > len(cells):
        raise UserError(
            f"dataset.path: {where}: the column {name} holds dialogues ('Human: ... Assistant:') whose turns do not "
            "begin after an empty line; write '\\n\\nHuman:' and '\\n\\nAssistant:' (line breaks are \\n, not \\r\\n)"
        )


# of cells that are no text: what to do with them
KINDS = {
    "list": "lists that are no messages {role, content}; of several replies, write a row for each pair of them",
    "dict": "objects without a role; write texts, or messages as {role, content}",
}


def refuse_kinds(kind: str, name: str, where: str) -> None:
    """Columns whose cells are no text or messages; also what pandas' to_csv does to a column of messages.

    Args:
        kind: of most cells.
    """
    if kind == "python":
        raise UserError(f"dataset.path: {where}: the column {name} is {REPR}")
    if kind not in ("text", "messages", "json", "dialogue", "nothing"):
        what = KINDS.get(kind, f"values of the type {kind}; write them as text")
        raise UserError(f"dataset.path: {where}: the column {name} holds {what}")
