"""The documentation on the terminal: ``w2sg docs`` lists its pages, ``w2sg docs howto/loss`` shows one.

A wheel carries the pages. Their commands are shown as ``w2sg ...``, since there is no train.py beside a wheel.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from w2sg.config import plugins
from w2sg.config.programs import with_verbs
from w2sg.config.suggest import similar
from w2sg.errors import UserError

FOLDER = plugins.CONF.parent / "docs"


def pages() -> dict[str, Path]:
    """Every page by its name: the path below docs/, without ``.md``."""
    files = (file for file in FOLDER.rglob("*") if file.suffix in (".md", ".yaml", ".ipynb"))
    return {file.relative_to(FOLDER).as_posix().removesuffix(".md"): file for file in sorted(files)}


def as_verbs(text: str) -> str:
    """A page whose blocks of commands are those of ``w2sg``.

    >>> as_verbs("```bash\\npython evaluate.py -m decoder=eft,wsd\\npython evaluate.py runs=outputs\\n```")
    '```bash\\nw2sg decode -m decoder=eft,wsd\\nw2sg compare outputs\\n```'
    """
    return re.sub(r"(?<=```bash\n).*?(?=```)", lambda block: _commands(block[0]), text, flags=re.S)


def _commands(text: str) -> str:
    text = text.replace("python train.py", "w2sg train")
    text = re.sub(r"python evaluate\.py (?=(?:-m )?(?:decoder|experiment)=)", "w2sg decode ", text)
    text = re.sub(r"python evaluate\.py (\S+)", lambda found: with_verbs(found[1]).strip("`"), text)
    return text.replace("w2sg store why key=", "w2sg store why ")


def show(name: str, word: str = "") -> str:
    """A page, or its lines with a word.

    Raises:
        UserError: there is no such page, or no such line.
    """
    found = pages()
    if name not in found:
        near = similar(name, found, 1)
        words = f"did you mean `w2sg docs {near[0]}`?" if near else "`w2sg docs` lists them"
        raise UserError(f"docs: there is no page {name}; {words}")
    text = as_verbs(found[name].read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if word.lower() in line.lower()]
    if not lines:
        raise UserError(f"docs: the page {name} has no line with {word}; `w2sg docs {name}` shows all of it")
    return "\n".join(lines)


def main() -> None:
    """What is typed after ``w2sg docs``."""
    from w2sg.cli.launch import readable_errors

    words = sys.argv[1:]
    with readable_errors():
        if len(words) > 2:
            raise UserError(f"{words[2]}: w2sg docs takes one page, and one word of it")
        if words:
            print(show(*words))
        else:
            titles = {name: _title(file) for name, file in pages().items()}
            width = max(map(len, titles))
            print("\n".join(f"{name:<{width}}  {title}" for name, title in titles.items()))


def _title(file: Path) -> str:
    if file.suffix == ".ipynb":
        return "all of `import w2sg` in one notebook"
    heads = [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return heads[0] if file.suffix == ".md" else heads[1].partition(". ")[0]
