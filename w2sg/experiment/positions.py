"""Models that run out of positions while replies are written: how many replies that meets, said once for each model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from w2sg.data.messages import Dialogue
from w2sg.decoding.sight import positions_of
from w2sg.experiment.context import Context
from w2sg.models.source import Source
from w2sg.reports.words import short

ENDS = "end there, unfinished"
UNGUIDED = "go on there without its guidance"
UNDRAFTED = "have no more of its words from there on"


def limit_of(sources: Sequence[Source]) -> tuple[int | None, Source | None]:
    """The fewest positions that any of some models has, and whose they are; None where none has a limit."""
    limits = [(n, k) for k, source in enumerate(sources) if (n := positions_of(source.config)) is not None]
    if not limits:
        return None, None
    least, place = min(limits)
    return least, sources[place]


def too_long(limit: int, source: Source) -> str:
    """Why a prompt was left out."""
    return f"prompt longer than the {limit:,} positions of {source.role} ({short(source.spec.name)})"


def say_ends(run: Context, stage: str, source: Source, count: int, total: int, what: str = ENDS) -> None:
    """Say that replies came to the last position of a model.

    Args:
        count: of the replies, which are ``total``. what: happens to them.
    """
    if count:
        role, positions = source.role, positions_of(source.config)
        run.reading.say(
            f"{stage}: {count:,} of {total:,} replies reach the last of the {positions:,} positions of {role} "
            f"({short(source.spec.name)}) and {what}; choose a model with more positions for {role}, or leave out long "
            f"prompts by {role}.max_length"
        )


def reaching(source: Source, prompts: Sequence[Dialogue], replies: Sequence[np.ndarray], full: Sequence[bool]) -> int:
    """How many replies a model has no position left for.

    Args:
        replies: in its tokens. full: [N] those that ended for another reason than want of room.
    """
    limit = positions_of(source.config)
    if limit is None:
        return 0
    lengths = [len(p) + len(r) for p, r in zip(source.chat.prompts(prompts), replies, strict=True)]
    # the last token of a reply is written and never read, so it needs no position
    return sum(n > limit + 1 or (n >= limit and not ended) for n, ended in zip(lengths, full, strict=True))
