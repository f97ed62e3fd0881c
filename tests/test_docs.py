"""The documentation: it builds as a site without a network, and says what the code says, in plain sentences."""

import ast
import html
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from conftest import ROOT, compose

from w2sg.cli import messages
from w2sg.cli.help import VERBS
from w2sg.config.check import check, check_evaluate

DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATED = {"docs/options.md", "docs/models.md", "docs/messages.md"}
WRITTEN = {name: text for name, text in PAGES.items() if name not in GENERATED}
# docs/howto runs each of its blocks (test_howto), and the README too (test_readme)
BLOCKS = [
    (name, block["before"].splitlines()[-1] if block["before"] else "", block["text"])
    for name, text in WRITTEN.items()
    if not name.startswith(("docs/howto/", "README"))
    for block in re.finditer(r"(?P<before>[^\n]*)\n```bash\n(?P<text>.*?)```", text, re.S)
]
INLINE = sorted(
    {
        command
        for name, text in WRITTEN.items()
        for command in re.findall(r"`(python (?:train|evaluate)\.py [^`\n]+)`", text)
        if not name.startswith("docs/howto/") and not re.search(r"\.\.\.|[<|]|\b[A-Z]{3,}\b|=$|--", command)
    }
)


# -- the site ---------------------------------------------------------------------------------------------------------


class Fetched(HTMLParser):
    """What a browser would fetch from elsewhere to show a page, and the images without a text in their place."""

    def __init__(self):
        super().__init__()
        self.outside: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        if tag == "link" and known.get("rel") in ("canonical", "prev", "next"):
            return
        address = known.get("src") or (known.get("href") if tag == "link" else None)
        if address and re.match(r"(?:\w+:)?//", address):
            self.outside.append(address)
        if tag == "img" and len(known.get("alt") or "") < 20:
            self.silent.append(str(address))


@pytest.mark.slow
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    for package in ("material", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    known = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    for way in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        known[way] = "http://127.0.0.1:9"  # nothing listens there
    built = subprocess.run(command, env=known, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        text, fetched = page.read_text(encoding="utf-8"), Fetched()
        fetched.feed(text)
        assert fetched.outside == [], page
        assert fetched.silent == [], page
        assert 'class="mermaid"' not in text, page  # the theme would fetch its library
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"@import|url\(\W?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_page_is_in_the_navigation():
    def files(node):
        if isinstance(node, str):
            return [node]
        return [file for part in (node.values() if isinstance(node, dict) else node) for file in files(part)]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    here = [p.relative_to(DOCS).as_posix() for kind in ("*.md", "*.ipynb") for p in DOCS.rglob(kind)]
    assert sorted(files(settings["nav"])) == sorted(here)
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False


def test_the_figures_of_the_concepts_are_drawn_by_their_script():
    place = importlib.util.spec_from_file_location("concepts", DOCS / "figures" / "concepts.py")
    script = importlib.util.module_from_spec(place)
    sys.modules[place.name] = script
    place.loader.exec_module(script)
    for name, draw in script.FIGURES.items():
        file = DOCS / "figures" / f"concept_{name}.svg"
        assert file.read_text(encoding="utf-8") == draw().svg(), "python docs/figures/concepts.py draws it"
        assert f"concept_{name}.svg" in PAGES[f"docs/concepts/{name}.md"]


def test_pictures_are_small_and_say_what_they_show():
    for name, text in WRITTEN.items():
        for words, file in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
            assert len(words) >= 20, (name, file)
            assert ((ROOT / name).parent / file).stat().st_size < 200_000, file


# -- commands ---------------------------------------------------------------------------------------------------------


def test_every_block_of_commands_is_run_or_says_why_not():
    assert len(BLOCKS) > 20
    for name, before, text in BLOCKS:
        assert re.fullmatch(r"<!-- (tested|composed|not run: [a-z ]+) -->", before), (name, text)


def composes(command: str) -> None:
    _, script, *typed = shlex.split(command)
    words = [word for word in typed if word != "-m"]
    if "-m" in typed:
        words = [w if "[" in w else f"{w.partition('=')[0]}={w.partition('=')[2].split(',')[-1]}" for w in words]
    if script == "train.py":
        check(compose(*words))
    elif any(word.startswith(("decoder=", "experiment=")) for word in words):
        check(compose(*words, name="decode"))
    else:
        check_evaluate(compose(*words, name="evaluate"))


@pytest.mark.parametrize(
    "command", sorted({*INLINE, *(c for _, how, text in BLOCKS if "composed" in how for c in text.splitlines())})
)
def test_every_command_that_is_named_composes(command):
    composes(command)


def test_every_verb_is_in_the_table_of_verbs():
    listed = re.findall(r"^\| `w2sg ([\w-]+)", PAGES["docs/command_line.md"], re.M)
    assert listed == list(VERBS)


# -- messages ---------------------------------------------------------------------------------------------------------


def test_the_page_of_messages_is_what_the_source_says():
    assert messages.PAGE.read_text(encoding="utf-8") == messages.page(), "python -m w2sg.cli.messages writes it"


def test_no_error_of_the_source_is_missing_on_the_page():
    """Looked for in another way: the longest piece of every text that an error is made from."""
    shown = html.unescape(re.sub(r"\\(.)", r"\1", PAGES["docs/messages.md"])).replace("\n", " ")
    seen, classes = 0, messages.error_classes()
    for file in (ROOT / "w2sg").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in classes and node.args):
                continue
            own = [node.args[0]] if isinstance(node.args[0], ast.Constant | ast.JoinedStr) else []
            for words in own:
                parts = [words] if isinstance(words, ast.Constant) else words.values
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                longest = max((line for text in texts for line in str(text).splitlines()), key=len, default="").strip()
                if len(longest.split()) > 2:
                    seen += 1
                    assert longest in shown, f"{file.name}: {longest}"
    assert seen > 250


def test_troubleshooting_explains_messages_that_there_are():
    headings = re.findall(r"^### `(.+)`$", PAGES["docs/troubleshooting.md"], re.M)
    assert len(headings) >= 30
    known = [message.text for message in messages.messages()]
    for heading in headings:
        if heading.startswith("torch."):  # of a library
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in heading.replace("strong.", "….").split("…")), re.S)
        assert any(pattern.match(text) or pattern.match(text.removeprefix("…")) for text in known), heading


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise UserError('a b: this is wrong')", [("a b: this is wrong", "error")]),
        ("raise UserError(f'{name}: no such ' f'{kind} here')", [("…: no such … here", "error")]),
        ("log.warning('%s is left out', name)", [("… is left out", "warning")]),
        ("def problems(c):\n    out = []\n    out.append(f'{c} is bad')\n    return out", [("… is bad", "error")]),
        ("def say(x):\n    words = 'one thing' if x else 'other thing'\n    raise UserError(words)", "one thing"),
        ("def why(x):\n    return f'because of {x}'\n\nraise UserError(why(1))", [("because of …", "error")]),
    ],
)
def test_messages_are_found_where_they_are_made(source, found):
    given = list(messages._of(ast.parse(source), {"UserError"}))
    assert given == ([("one thing", "error"), ("other thing", "error")] if isinstance(found, str) else found)


# -- words ------------------------------------------------------------------------------------------------------------


def sentences(text: str) -> list[list[str]]:
    """The words of every sentence of the prose; items of lists and paragraphs end one, a colon does not."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^(?:\s*\||#|!\[| {4}).*$", "\n", text, flags=re.M)
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", text, flags=re.M)
    return [words for part in re.split(r"(?<=[.?!])[)\"]?\s+|\n\s*\n", text) if len(words := part.split()) > 1]


@pytest.mark.parametrize("name", WRITTEN)
def test_sentences_are_short(name):
    found = sentences(WRITTEN[name])
    assert sum(map(len, found)) / max(len(found), 1) < 20
    assert [" ".join(words) for words in found if len(words) > 40] == []


def test_the_readme_is_short():
    prose = re.sub(r"```.*?```|<!--.*?-->|!\[.*?\)|\[([^\]]*)\]\([^)]*\)", r"\1", WRITTEN["README.md"], flags=re.S)
    assert len(prose.split()) <= 700


@pytest.mark.parametrize("name", WRITTEN)
def test_words_are_those_of_the_field(name):
    assert re.findall(r"\bof (?:its|their) own\b|\banew\b|\bgoes on\b|\btold apart\b|\bmend\b", WRITTEN[name]) == []
