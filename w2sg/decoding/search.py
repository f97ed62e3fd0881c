"""Chunk-level beam search: a frozen strong model proposes, a value chooses (weak-to-strong search, arXiv 2405.19262).

Best-of-n is one beam whose chunk is a whole reply; one beam with one child is plain sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from w2sg import progress
from w2sg.data.messages import Dialogue
from w2sg.decoding.contrastive import go_on, keep_rows, stream
from w2sg.decoding.engine import Engine
from w2sg.decoding.sampling import Settings
from w2sg.errors import UserError, calling, path_of

BEAM, POOL = "beam", "finished pool"  # rules by which the best is chosen


@dataclass(frozen=True)
class Hypothesis:
    """A reply on the way.

    Attributes:
        prompt: its prompt's place. parent: the place of what it grew out of among the last round's live ones.
        text: so far, without special tokens. tokens: [n] so far, the one that ended it included; None in a black box.
        log_probabilities: [n, m] of the models that wrote it.
        finished: it came to an end by itself. cut: it had no room left. One of them ends it.
        lineage: names its stream of random numbers. value: what the guide thinks of it.
        closing: tokens at its end that say nothing but that it ends; several may.
    """

    prompt: int
    parent: int
    text: str
    tokens: np.ndarray | None
    log_probabilities: np.ndarray | None
    finished: bool
    cut: bool
    lineage: str
    value: float = float("nan")
    closing: int = 0

    @property
    def ended(self) -> bool:
        """Nothing will be added to it."""
        return self.finished or self.cut

    @property
    def key(self) -> Any:
        """What it says: hypotheses with equal keys are one."""
        text = self.text if self.tokens is None else tuple(self.tokens[: len(self.tokens) - self.closing].tolist())
        return text, self.finished, self.cut


class Grower(Protocol):
    """Writes hypotheses on."""

    def start(self, prompts: Sequence[Dialogue]) -> list[Hypothesis]:
        """An empty reply to each prompt."""

    def grow(self, live: Sequence[Hypothesis], children: Sequence[int]) -> list[Hypothesis]:
        """A chunk more for each child of each live hypothesis; ``parent`` is its place in ``live``."""

    def keep(self, places: Sequence[int]) -> None:
        """Of what was grown last, these are live."""


class Value(Protocol):
    """What a hypothesis is worth. Rows are those of the live hypotheses."""

    def start(self, prompts: Sequence[Dialogue]) -> None:
        """Prompts, a row each."""

    def extend(self, grown: Sequence[Hypothesis]) -> np.ndarray:
        """[B] values of what grew out of the rows (``parent``), which are the rows from now on."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""


@dataclass(frozen=True)
class Result:
    """What was found for one prompt.

    Attributes:
        best: its value is that of this very reply. rule: whether it was still in the `BEAM` or had fallen out (`POOL`).
        beam: all that were left, best first. rounds: chunks.
        trace: of each round, what was looked at; empty if not asked for.
    """

    best: Hypothesis
    rule: str
    beam: list[Hypothesis]
    rounds: int
    trace: list[list[dict[str, Any]]] = field(default_factory=list)


def search(
    grower: Grower,
    value: Value | None,
    prompts: Sequence[Dialogue],
    beams: int,
    children: int,
    trace: bool = False,
    distinct: bool = True,
) -> list[Result]:
    """Search for the reply of highest value to each prompt.

    Each round writes a chunk for ``children`` successors of every live hypothesis (the first round ``beams * children``
    for the prompt), and the best ``beams`` go on, whoever their parents are. A finished reply keeps its place in the
    beam, once, until it is pushed out, and is remembered even then; equal replies are one.

    Args:
        value: None where there is nothing to choose (one beam, one child).
        trace: note every hypothesis of every round.
        distinct: equal replies are one; of best-of-n all samples count.
    """
    count = len(prompts)
    live = grower.start(prompts)
    if value is not None:
        value.start(prompts)
    beam: list[list[Hypothesis]] = [[] for _ in range(count)]
    pool: list[Hypothesis | None] = [None] * count
    traces: list[list[list[dict[str, Any]]]] = [[] for _ in range(count)]
    rounds, first = [0] * count, True
    # Two lists have two orders. ``grown`` is the grower's, and ``places`` are places in it. ``new`` are the different
    # ones among them, whose places are the rows of ``value``; ``mine`` and ``staying`` are such rows.
    while live:
        # only one empty reply stands before the first round, so all of the beam grows out of it
        grown = grower.grow(live, [beams * children if first else children] * len(live))
        places = _distinct(grown, beam) if distinct else list(range(len(grown)))
        new = [grown[place] for place in places]
        worth = _worth(value, new) if value is not None and new else np.zeros(len(new))
        new = [replace(h, value=float(v)) for h, v in zip(new, worth, strict=True)]
        staying: list[int] = []
        mine: list[list[int]] = [[] for _ in range(count)]
        for row, h in enumerate(new):
            mine[h.prompt].append(row)
        for p in sorted({h.prompt for h in grown}):
            rounds[p] += 1
            # what has ended is in no grower's rows any more: it competes by the value that it had
            before = [h for h in beam[p] if h.ended]
            beam[p], kept = choose_beam(before, [new[row] for row in mine[p]], beams)
            staying += [mine[p][k] for k in kept if not new[mine[p][k]].ended]
            # the pool also has those that the beam pushes out: a later round may end with nothing better
            for h in (new[row] for row in mine[p]):
                if h.finished and (pool[p] is None or h.value > pool[p].value):
                    pool[p] = h
            if trace:
                noted = [(h, False) for h in before] + [(new[row], True) for row in mine[p]]
                held = {id(h) for h in beam[p]}
                traces[p].append([_note(h, fresh, id(h) in held, live) for h, fresh in noted])
        grower.keep([places[row] for row in staying])
        if value is not None:
            value.select(staying)
        live, first = [new[row] for row in staying], False
    results = []
    for p in range(count):
        best, rule = beam[p][0], BEAM
        if pool[p] is not None and pool[p].value > best.value:
            best, rule = pool[p], POOL
        results.append(Result(best, rule, beam[p], rounds[p], traces[p]))
    return results


def _worth(value: Value, new: Sequence[Hypothesis]) -> np.ndarray:
    """[B] what hypotheses are worth.

    Raises:
        UserError: it is not one number each.
    """
    with calling(value, "extend"):
        worth = np.array([float(one) for one in value.extend(new)])
    if len(worth) != len(new):
        raise UserError(f"{path_of(value)}.extend: gave {len(worth)} values for {len(new)} hypotheses; give one each")
    if lost := int(np.isnan(worth).sum()):
        raise UserError(f"{path_of(value)}.extend: gave NaN for {lost} of {len(new)} hypotheses; give numbers")
    return worth


def choose_beam(
    ended: Sequence[Hypothesis], new: Sequence[Hypothesis], beams: int
) -> tuple[list[Hypothesis], list[int]]:
    """The best of what had ended and what is new, best first, and the places of the new ones among them.

    No parent has a quota. Of equal values the one that came first goes on.
    """
    values = np.array([h.value for h in (*ended, *new)])
    order = np.argsort(-values, kind="stable")[:beams]
    both = [*ended, *new]
    return [both[k] for k in order], [int(k) - len(ended) for k in order if k >= len(ended)]


def _distinct(grown: Sequence[Hypothesis], beam: Sequence[Sequence[Hypothesis]]) -> list[int]:
    """Places of different hypotheses, the first of each kind, that are not in the beam as ended ones."""
    held = {(h.prompt, h.key) for hypotheses in beam for h in hypotheses if h.ended}
    seen: dict[Any, int] = {}
    for place, h in enumerate(grown):
        if (h.prompt, h.key) not in held:
            seen.setdefault((h.prompt, h.key), place)
    return list(seen.values())


def _note(h: Hypothesis, fresh: bool, kept: bool, live: Sequence[Hypothesis]) -> dict[str, Any]:
    before = live[h.parent].text if fresh else ""
    if not h.text.startswith(before):  # ended replies have lost the space that they began with
        before = before.lstrip()
    new = h.text[len(before) :] if h.text.startswith(before) else h.text
    return {
        "before": before if fresh else h.text,
        "chunk": new if fresh else "",
        "value": h.value,
        "kept": kept,
        "finished": h.finished,
        "carried": not fresh,
    }


class EngineGrower:
    """Grows hypotheses by sampling an engine, whose cached state forks and is cut down with them.

    Args:
        encode: prompts as token ids. text_of: token ids of a reply as text.
        identities: [P] of the prompts, which seed their random numbers together with ``seed`` and the lineage: neither
            the batch nor its order, nor what was pruned, changes a reply.
        columns: one row of `w2sg.decoding.sampling.Settings`. stop: tokens that end a reply.
        chunk: tokens written between choices. most: tokens that a reply may have.
        cut: a reply's tokens before what ends it in its text, and whether that is there; None where only tokens end it.
        room: [P] tokens that a reply to each prompt may have at most, for the guide's sake.
    """

    def __init__(
        self,
        engine: Engine,
        encode: Callable[[Sequence[Dialogue]], list[np.ndarray]],
        text_of: Callable[[Sequence[int]], str],
        identities: Sequence[str],
        columns: Sequence[float],
        stop: Sequence[int],
        chunk: int,
        most: int,
        seed: int,
        cut: Callable[[np.ndarray], tuple[np.ndarray, bool]] | None = None,
        room: Sequence[int] | None = None,
    ):
        self.cut, self.bound = cut, room
        self.engine, self.encode, self.text_of, self.identities = engine, encode, text_of, identities
        self.columns, self.stop, self.chunk, self.most, self.seed = columns, stop, chunk, most, seed
        self.forwards, self.ends = 0, frozenset(stop)

    @torch.inference_mode()
    def start(self, prompts: Sequence[Dialogue]) -> list[Hypothesis]:
        ids = self.encode(prompts)
        self.engine.start(ids)
        limit = self.engine.limit
        self.room = [self.most if limit is None else min(self.most, limit - len(row) + 1) for row in ids]
        if self.bound is not None:
            self.room = [min(most, bound) for most, bound in zip(self.room, self.bound, strict=True)]
        nothing = np.zeros(0, np.int64), np.zeros((0, len(self.engine.logits)), np.float32)
        return [Hypothesis(p, -1, "", *nothing, False, False, "") for p in range(len(prompts))]

    @torch.inference_mode()
    def grow(self, live: Sequence[Hypothesis], children: Sequence[int]) -> list[Hypothesis]:
        parents = np.repeat(np.arange(len(live)), children)
        numbers = [k for count in children for k in range(count)]
        if len(parents) != len(live):
            self.engine.select(torch.from_numpy(parents))
        lineages = [_lineage(live[row], k) for row, k in zip(parents, numbers, strict=True)]
        written = [len(live[row].tokens) for row in parents]
        uniform = np.ones((len(parents), self.chunk))
        for place, (row, lineage) in enumerate(zip(parents, lineages, strict=True)):
            drawn = stream(self.seed, self.identities[live[row].prompt], lineage, written[place] + self.chunk)
            uniform[place] = drawn[written[place] :]
        logits = self.engine.logits
        settings = Settings.alike(self.columns, len(parents), logits.device)
        room = [self.room[live[row].prompt] - n for row, n in zip(parents, written, strict=True)]
        before = [live[row].tokens for row in parents]
        chunks, self._left = go_on(self.engine, logits, settings, torch.from_numpy(uniform), self.stop, room, before)
        self.forwards += chunks.forwards
        grown = []
        for place, row in enumerate(parents):
            parent = live[row]
            tokens = np.append(parent.tokens, chunks.tokens[place])
            stopped = bool(chunks.stopped[place])
            logs = np.concatenate([parent.log_probabilities, chunks.log_probabilities[place]])
            if self.cut is not None:
                tokens, ended = self.cut(tokens)
                logs, stopped = logs[: len(tokens)], stopped or ended
            cut = not stopped and len(tokens) >= self.room[parent.prompt]
            text = self.text_of(tokens)
            closing = int(len(tokens) > 0 and int(tokens[-1]) in self.ends)
            grown.append(
                Hypothesis(parent.prompt, int(row), text, tokens, logs, stopped, cut, lineages[place], closing=closing)
            )
        self._grown = grown
        progress.part(max((len(h.tokens) for h in grown), default=0) / self.most)
        return grown

    @torch.inference_mode()
    def keep(self, places: Sequence[int]) -> None:
        if not len(places):
            return
        keep_rows(self.engine, self._left, places, [int(self._grown[place].tokens[-1]) for place in places])


def _lineage(parent: Hypothesis, child: int) -> str:
    """The name of a child's stream: the first goes on with its parent's, so that a single child is a plain sample."""
    if not len(parent.tokens):
        return str(child)
    return parent.lineage if child == 0 else f"{parent.lineage}/{len(parent.tokens)}.{child}"
