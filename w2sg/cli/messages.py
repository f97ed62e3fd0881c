"""docs/messages.md: every error, warning and note of w2sg by its words, as they stand in the source.

``python -m w2sg.cli.messages`` writes it; a test compares it with the source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from w2sg.config.plugins import CONF

PACKAGE = Path(__file__).resolve().parents[1]
PAGE = CONF.parent / "docs" / "messages.md"
TITLES = {  # part of w2sg -> its heading
    "config": "Options and the command line",
    "cli": "Commands",
    "data": "Data",
    "models": "Models and their files",
    "losses": "Losses",
    "training": "Training and devices",
    "store": "The store",
    "experiment": "Stages of a run",
    "methods": "Methods",
    "decoding": "Decoding",
    "judges": "Judges",
    "evaluation": "Evaluation",
    "reports": "Reports",
    "compare": "Comparing runs",
    "known_answers": "Known answers",
    "api": "From Python",
}
OTHER = "Everything else"
HOLE = "…"  # stands for what a message fills in
GATHERS = re.compile(r"problem|warnings|_explain|refus|unknown_choice")  # functions that gather such lines
PIECE = re.compile(r"[\s;,.)]")  # so begins what is added to another message
PERCENT = re.compile(r"%[-0-9.]*[sdrfg]")
LOGS = {"warning": "warning", "info": "note"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Message:
    """One error, warning or note.

    Attributes:
        text: its words; ``…`` where a value is filled in.
        file: the module that has it, below w2sg.
        kind: ``error``, which ends the run, ``warning``, or ``note``, which is ordinary.
    """

    text: str
    file: str
    kind: str

    @property
    def literal(self) -> str:
        """The longest part of the text that every such message has."""
        return max(self.text.split(HOLE), key=len)


def page() -> str:
    """The whole page."""
    parts = [
        "# Messages\n",
        "Every error, warning and note of w2sg, with the module that writes it. This page is generated from the "
        f"source: `python -m w2sg.cli.messages`. {HOLE} stands for a name or a number. Most errors begin with their "
        "option. [Troubleshooting](troubleshooting.md) explains those that are met first.\n",
    ]
    rows: dict[str, list[Message]] = {title: [] for title in [*TITLES.values(), OTHER]}
    for message in messages():
        rows[TITLES.get(message.file.partition("/")[0], OTHER)].append(message)
    for title, found in rows.items():
        if found:
            table = [f"| {cell(m.text)} | {m.kind} | `{m.file}` |" for m in found]
            parts.append("\n".join([f"## {title}\n", "| message | kind | module |", "|---|---|---|", *table, ""]))
    return "\n".join(parts)


def cell(text: str) -> str:
    """A text as one cell of a table, in which no character is markup."""
    text = re.sub(r"\s*\n\s*", " / ", text.strip())
    return re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


@cache
def messages() -> tuple[Message, ...]:
    """Every message once per module, in the order of the source."""
    errors = error_classes()
    found: dict[tuple[str, str], Message] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        for text, kind in _of(ast.parse(file.read_text(encoding="utf-8")), errors):
            if _whole(text, kind):
                found.setdefault((text, name), Message(text, name, kind))
    return tuple(found.values())


def _whole(text: str, kind: str) -> bool:
    """Whether a text is a message, and no piece of one."""
    least = 2 if HOLE in text else 3 if kind == "error" else 5
    return PIECE.match(text) is None and len(re.findall(r"\w{2,}", text)) >= least


def error_classes() -> set[str]:
    """`UserError` and the names of all classes below it."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for file in PACKAGE.rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    known = {"UserError"}
    while more := {name for name, above in bases.items() if above & known} - known:
        known |= more
    return known


def _of(tree: ast.Module, errors: set[str]) -> Iterator[tuple[str, str]]:
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, Function)}
    for node, inside in _within(tree):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in errors:
                yield from ((text, "error") for text in _texts(node.args[0], inside, functions))
            elif name in LOGS and isinstance(node.func, ast.Attribute):
                for text in _texts(node.args[0], inside, functions):
                    yield PERCENT.sub(HOLE, text), LOGS[name]
            elif name == "append" and inside is not None and GATHERS.search(inside.name):
                yield from ((text, _kind(inside)) for text in _texts(node.args[0], inside, functions))
        elif isinstance(node, Function) and GATHERS.search(node.name):
            yield from ((text, _kind(node)) for text in _given(node, functions))


def _kind(function: Function) -> str:
    """What a function gathers: problems are refused, warnings stand in the report."""
    return "warning" if "warning" in function.name else "error"


def _within(tree: ast.Module) -> Iterator[tuple[ast.AST, Function | None]]:
    """Every node with the innermost function around it, in the order of the source."""
    waiting: list[tuple[ast.AST, Function | None]] = [(tree, None)]
    while waiting:
        node, inside = waiting.pop()
        yield node, inside
        inside = node if isinstance(node, Function) else inside
        waiting += [(child, inside) for child in ast.iter_child_nodes(node)][::-1]


def _given(function: Function, functions: dict[str, Function]) -> Iterator[str]:
    """The texts that a function returns or yields, alone or in a list, or adds to a list."""
    others = {name: other for name, other in functions.items() if other is not function}
    for node in ast.walk(function):
        if isinstance(node, ast.Return | ast.Yield | ast.AugAssign | ast.Assign) and node.value is not None:
            yield from _texts(node.value, function, others)


def _texts(node: ast.expr, inside: Function | None, functions: dict[str, Function]) -> Iterator[str]:
    """What an expression may say, each way once."""
    match node:
        case ast.Constant(value=str()) | ast.JoinedStr():
            yield _text(node)
        case ast.BinOp(op=ast.Add()) if _text(node) != HOLE:
            yield _text(node)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            yield from _texts(left, inside, functions)
            yield from _texts(right, inside, functions)
        case ast.IfExp(body=body, orelse=other):
            yield from _texts(body, inside, functions)
            yield from _texts(other, inside, functions)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            for item in items:
                yield from _texts(item, inside, functions)
        case ast.Starred(value=value):
            yield from _texts(value, inside, functions)
        case ast.ListComp(elt=element):
            yield from _texts(element, inside, functions)
        case ast.Call(func=ast.Attribute(attr="join"), args=[listed]):
            yield from _texts(listed, inside, functions)
        case ast.Call(func=ast.Name(id=name)) if name in functions:  # of the same module: what it returns
            yield from _given(functions[name], functions)
        case ast.Name(id=name) if inside is not None:  # what the function around it assigns to the name
            for other in ast.walk(inside):
                if isinstance(other, ast.Assign | ast.AugAssign) and _assigns(other, name):
                    yield from _texts(other.value, None, {})
        case _:
            pass


def _assigns(node: ast.Assign | ast.AugAssign, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _text(node: ast.expr) -> str:
    """The words of a string expression, with ``…`` for what is filled in."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return re.sub(f"{HOLE}+", HOLE, "".join(_text(part) for part in parts))
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return re.sub(f"{HOLE}+", HOLE, _text(left) + _text(right))
        case _:
            return HOLE


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
