"""Packages import only those that stand above them, and no modules import each other in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each line may import those above it; names on one line do not import each other.
LAYERS = """
errors printable peers
stops
console
live
progress
memory
losses metrics
config
store
data
models
training
decoding
reports
experiment
judges
evaluation
methods
planning
compare
known_answers
cli
api
__main__
"""
LEVELS = {name: level for level, line in enumerate(LAYERS.split("\n")) for name in line.split()}


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package w2sg below a folder, by its dotted name."""
    found = {}
    for file in sorted((root / "w2sg").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of w2sg that it imports anywhere, also within functions and for types alone."""
    modules = modules_of(root)
    imports: dict[str, set[str]] = {}
    for name, file in modules.items():
        wanted = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} line {node.lineno}: imports are written in full"
                wanted |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        imports[name] = {module for module in wanted & set(modules) if module not in {name, "w2sg"}}
        # `from package import module` names both; the package itself is what is imported where it gives other names
        imports[name] -= {".".join(module.split(".")[:-1]) for module in imports[name]} - names_given(file, root)
    return imports


def names_given(file: Path, root: Path) -> set[str]:
    """Packages from which a file takes names that are no modules."""
    given = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("w2sg."):
            folder = root.joinpath(*node.module.split("."))
            if any(not (folder / f"{a.name}.py").exists() and not (folder / a.name).is_dir() for a in node.names):
                given.add(node.module)
    return given


def broken_rules(root: Path) -> list[str]:
    """Imports of a package that does not stand above the importing one."""
    broken = []
    for name, wanted in imports_of(root).items():
        package = [*name.split("."), ""][1]
        for module in wanted:
            other = module.split(".")[1]
            if package and other != package and LEVELS[other] >= LEVELS[package]:
                broken.append(f"{name} imports {module}")
    return sorted(broken)


def circles(root: Path) -> list[set[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    graph = imports_of(root)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(group)

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_every_package_has_its_place():
    assert {name.split(".")[1] for name in modules_of(ROOT) if "." in name} == set(LEVELS)


def test_packages_import_only_those_above_them():
    assert broken_rules(ROOT) == []


def test_no_modules_import_each_other():
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("from w2sg.methods import chain\n", "w2sg.losses.planted imports w2sg.methods.chain"),
        ("def late():\n    from w2sg.cli.launch import launch\n", "w2sg.losses.planted imports w2sg.cli.launch"),
        ("import w2sg.metrics.labels\n", "w2sg.losses.planted imports w2sg.metrics.labels"),
    ],
)
def test_a_planted_import_from_below_is_found(planted, found, tmp_path):
    for name, text in {
        "losses/planted.py": planted,
        "methods/chain.py": "",
        "cli/launch.py": "",
        "metrics/labels.py": "",
    }.items():
        file = tmp_path / "w2sg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert broken_rules(tmp_path) == [found]


def test_a_planted_circle_is_found(tmp_path):
    (tmp_path / "w2sg" / "data").mkdir(parents=True)
    (tmp_path / "w2sg" / "data" / "one.py").write_text("from w2sg.data import two\n")
    (tmp_path / "w2sg" / "data" / "two.py").write_text("def f():\n    from w2sg.data.one import g\n")
    assert circles(tmp_path) == [{"w2sg.data.one", "w2sg.data.two"}]
