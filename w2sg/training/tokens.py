"""Token ids of many texts: made once per store, by one process, and mapped by all; of a few texts made where needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from w2sg.data import ragged
from w2sg.training.stages import Stages

# Characters from which token ids are a stage of their own: a million tokens or so, which take a tokenizer a second or
# two. Below that a folder of the store, its lock and its seal cost as much as they save.
MANY = 4_000_000


def encoded(
    stages: Stages,
    name: str,
    key: dict[str, Any],
    encoder: Callable[[list[str]], Sequence[Sequence[int]]],
    texts: Sequence[str],
) -> ragged.Ragged:
    """Token ids of texts, in their order.

    Args:
        stages: of the run, which has a stage more where the texts are many.
        name: of that stage.
        key: what decides the ids.
        encoder: texts to ids; it is given a slice of them at a time.
    """
    if sum(map(len, texts)) < MANY:
        return ragged.encode(encoder, texts)

    def work(part: Path) -> dict[str, Any]:
        return {"texts": len(texts), "tokens_written": ragged.write(encoder, texts, part)}

    return ragged.mapped(stages.compute(name, key, work))
