"""The examples of one split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from w2sg.data.messages import Dialogue
from w2sg.errors import UserError


def digest(*parts: str) -> str:
    """The first 16 hex digits of the sha256 of strings, told apart by their lengths."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()[:16]


def uniform(*key: object) -> float:
    """A number in [0, 1) decided by a key alone: the first 8 bytes of ``sha256("a:b:...")`` over 2^64."""
    text = ":".join(str(k) for k in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


class Groups:
    """Keys that belong together, by what was joined; the smallest key names a group, whatever the order."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, key: str) -> str:
        """The name of a key's group."""
        parent = self._parent
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    def join(self, keys: Sequence[str]) -> None:
        """Put the groups of these keys together."""
        first, *others = keys
        for other in others:
            ends = self.root(first), self.root(other)
            self._parent[max(ends)] = min(ends)


@dataclass(frozen=True)
class Table:
    """Examples of one split. Rows are joined by id, never by position.

    Attributes:
        name: ``ground_truth``, ``transfer`` or ``test``.
        kind: ``pairs`` (choose between two texts), ``classes``, or ``answers`` (questions with an answer, no label).
        classes: C, 2 for pairs.
        ids: [N] content hashes.
        prompts: [N] what the texts answer (the passage or question of a class, or its text; without text for pairs
            that have no prompt); splits are disjoint by it. The texts of pairs and answers begin with its text.
        texts: [N] whole texts that a model reads: two for a pair, in an order that says nothing of the label; a
            question with its answer.
        first: [N] which of a pair's texts is the "first" reply; zeros for others.
        labels: [N] gold class (zeros for answers); for pairs 0 where the first reply is preferred.
        subsets: [N] which part of its data each row is of, "" where that is not said; None where no row says it.
    """

    name: str
    kind: str
    classes: int
    ids: list[str]
    prompts: list[Dialogue]
    texts: list[tuple[str, ...]]
    first: np.ndarray
    labels: np.ndarray
    subsets: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _content(self) -> str:
        return digest(self.kind, *(part for i, t in zip(self.ids, self.texts, strict=True) for part in (i, *t)))

    def needs_labels(self, pairs: bool = False) -> None:
        """Refuse rows without labels.

        Args:
            pairs: whether classes are refused, too.

        Raises:
            UserError: the rows are questions with answers, or classes where pairs are needed.
        """
        if self.kind == "answers":
            raise UserError(
                "dataset: these are questions with answers and no labels; use method=refine, or a dataset with "
                f"preference pairs{'' if pairs else ' or classes'}"
            )
        if pairs and self.kind != "pairs":
            raise UserError("dataset: these are texts with classes; use a dataset with preference pairs")

    def reply(self, row: int, which: int = 0) -> str:
        """What one of a row's texts says to its prompt."""
        return self.texts[row][which][len(self.prompts[row].text) :].strip()

    def content_hash(self) -> str:
        """Of ids and texts: not of labels nor of which reply is first, so frozen features serve every seed."""
        return self._content

    def label_hash(self) -> str:
        """Of ids, orientation and gold labels."""
        columns = zip(self.ids, self.first.tolist(), self.labels.tolist(), strict=True)
        return digest(str(self.classes), *(f"{i}:{f}:{y}" for i, f, y in columns))

    @cached_property
    def clusters(self) -> list[str]:
        """[N] the prompt of each row, as a hash: what statistics draw and test as one.

        Pairs without a prompt belong together where a chain of texts in common joins them.
        """
        shared = Groups()
        rows = [(p.text and p.identity, texts) for p, texts in zip(self.prompts, self.texts, strict=True)]
        for prompt, texts in rows:
            if not prompt:
                shared.join(texts)
        return [digest("prompt", p) if p else digest("texts", shared.root(texts[0])) for p, texts in rows]

    def take(self, index: Sequence[int]) -> Table:
        """The rows ``index``, in that order."""
        index = np.asarray(index, np.int64)
        lists = {name: [getattr(self, name)[i] for i in index] for name in ("ids", "prompts", "texts")}
        if self.subsets is not None:
            lists["subsets"] = [self.subsets[i] for i in index]
        return replace(self, **lists, first=self.first[index], labels=self.labels[index])


def single_texts(name: str, texts: Sequence[str], ids: Sequence[str]) -> Table:
    """Texts one by one, as a table whose scores are one reward each."""
    zeros = np.zeros(len(texts), np.int64)
    return Table(name, "pairs", 2, list(ids), [""] * len(texts), [(text,) for text in texts], zeros, zeros)
