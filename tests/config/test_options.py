"""Every option of every schema is read somewhere: one that is not would be a promise that nobody keeps."""

import ast
import inspect
from pathlib import Path

import pytest

from w2sg.config import options as text_options
from w2sg.config import schema
from w2sg.decoding.decoders import best_of_n, contrastive, eft, guided, nudging, plain, served, wsd
from w2sg.decoding.decoders import search as searching
from w2sg.methods import cong, decode
from w2sg.methods.refine import options as refinement_options

ROOT = Path(__file__).parents[2]
CHECKS = ("rules", "problems", "check")  # what only looks whether options go together does not read them


def read_in(tree: ast.AST) -> set[str]:
    """Names that code reads: attributes, keys, and parameters that are given by name."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith(CHECKS):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        found |= read_in(node)
    return found


@pytest.fixture(scope="module")
def names() -> set[str]:
    files = [*(ROOT / "w2sg").rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    files = [file for file in files if not file.stem.endswith(("options", "schema"))]
    return set().union(*(read_in(ast.parse(file.read_text(encoding="utf-8"))) for file in files))


DECODERS = [best_of_n, contrastive, eft, guided, nudging, plain, searching, served, wsd]
MODULES = [schema, text_options, decode, refinement_options, cong, *DECODERS]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_option_is_read(module, names):
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, schema.Options)]
    own = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    here = set()  # methods of options that work with them, not the lines that name them
    for node in ast.walk(own):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(CHECKS):
            here |= read_in(node)
    fields = {(kind.__name__, field.alias or name) for kind in kinds for name, field in kind.model_fields.items()}
    assert fields
    assert not sorted(place for place in fields if place[1] not in names | here)


def test_an_option_that_nobody_reads_is_found(names):
    assert "batch_size" in names
    assert "an_option_of_" + "nobody" not in names
