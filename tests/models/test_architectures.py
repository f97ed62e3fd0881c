"""Every architecture reads and writes as plain transformers does, or is refused in one line; docs/models.md says which.

``W2SG_WRITE_MODELS_PAGE=1 python -m pytest -n 0 tests/models/test_architectures.py`` writes the page again.
"""

import os
from pathlib import Path

import pytest
from architectures import FAMILIES, lines_of, page, tried

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
WRITE = os.environ.get("W2SG_WRITE_MODELS_PAGE") == "1"
# of each kind of attention, mask and cache
ALWAYS = {"gpt_neo", "mpt", "llama", "llama4", "mistral", "qwen2 (window)", "gemma3", "phi3 (longrope)", "gpt_oss"}
ALWAYS |= {"deepseek_v3", "mamba", "lfm2", "cohere2", "bert"}
_found = {}


@pytest.mark.filterwarnings("ignore")  # of architectures, about kernels that are not installed
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in ALWAYS else pytest.mark.slow) for family in FAMILIES]
)
def test_the_numbers_are_those_of_transformers(family, tmp_path):
    found = _found[family] = tried(family, tmp_path / "model")
    if not WRITE:
        there = PAGE.read_text(encoding="utf-8").splitlines()
        for line in lines_of(family, found).values():
            assert line in there, f"docs/models.md is out of date; {__doc__.splitlines()[2]}"


def test_the_page_has_every_architecture_once():
    if WRITE:
        assert len(_found) == len(FAMILIES), "the page is written of all of them"
        PAGE.write_text(page(_found), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert {line[2:].split("Config)")[0].rsplit(" (", 1)[0] for line in lines} == set(FAMILIES)
    assert len(FAMILIES) >= 40
