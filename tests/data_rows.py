"""Rows written to files, read as a dataset, and looked at."""

from pathlib import Path

import torch
from conftest import conf_node
from torch import Tensor

from w2sg.data.masks import sight
from w2sg.data.splits import load_tables
from w2sg.data.table import Table

SPLITS = ("ground_truth", "transfer", "test")


ALL = dict.fromkeys(SPLITS)


def node(name: str, **changes) -> dict:
    """A dataset node of conf/dataset; all there is unless sizes are given."""
    options = conf_node(f"dataset/{name}")
    return {**options, "sizes": ALL, **changes}


def load(path: Path, name: str = "local", seed: int = 0, **changes):
    return load_tables(node(name, path=str(path), **changes), seed)


def each(tables) -> list[Table]:
    return [getattr(tables, name) for name in SPLITS]


def mask_of(part: Tensor, example: Tensor | None = None) -> Tensor:
    """[B, L, L] True where a query (row) may look at a key (column)."""
    rows, length = part.shape
    row, query, key = torch.arange(rows)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    return sight(part, example)(row, query, key)


def texts(tables) -> set[str]:
    return {text for t in each(tables) for pair in t.texts for text in pair}


def preferred(table: Table) -> list[str]:
    """The texts that the labels prefer, by what `first` and `labels` are documented to mean."""
    rows = zip(table.texts, table.first, table.labels, strict=True)
    return [pair[first] if label == 0 else pair[1 - first] for pair, first, label in rows]


def one(chosen: str, rejected: str, prompt: str = "a?") -> dict:
    start = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": start + chosen, "rejected": start + rejected}
