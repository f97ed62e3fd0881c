"""Chunks from a server that only completes text (OpenAI's completions API): a strong model that is a black box."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from w2sg.data.messages import Dialogue
from w2sg.decoding.completions import HALF, Completions, Refused, Usage
from w2sg.decoding.contrastive import stream
from w2sg.decoding.search import Hypothesis

log = logging.getLogger(__name__)


class ServerGrower:
    """Grows hypotheses by asking a server to go on with text: no tokens, no probabilities, no state to keep.

    One request gives all children of a hypothesis where the server offers several choices (``n``); where it refuses
    that, or gives fewer, each child is a request of its own. The first request finds out which.

    The server tokenises prompt and reply so far anew each round. Text is handed back exactly as it came, its spaces
    included, but a chunk that ends inside a word or after a space may go on otherwise than one long sample would.
    Half a character at the end of a chunk is left to the next one, so a chunk should have more tokens than a character.

    The seed of a request hangs on ``seed``, the prompt's id and the lineage alone, so that a run asks the same again.
    Servers may ignore it, and some share one state between requests that they answer at once: only one that honours it
    gives the same replies again, and some only with ``workers=1``.

    A grower holds connections: close it, or use it as a context.

    Args:
        client: of the server.
        texts: prompts as texts that a reply is added to, without the beginning of text that servers add by themselves.
        identities: [P] of the prompts, as in `w2sg.decoding.search.EngineGrower`. Like ``room`` they may be set anew
            before other prompts are started.
        chunk: tokens of the server written between choices. most: tokens that a reply may have.
        stop: texts that end a reply, at most four for some servers; they are looked for here as well, since a server
            sees one chunk at a time and may leave them in. A reply begins a line.
        room: [P] tokens that a reply to each prompt may have at most, where that is less than ``most``.

    Raises:
        UserError: on growing, where the server is not there, refuses, keeps failing, or answers in another format. The
            key is in no message.
    """

    def __init__(
        self,
        client: Completions,
        texts: Callable[[Sequence[Dialogue]], list[str]],
        identities: Sequence[str],
        chunk: int,
        most: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        room: Sequence[int] | None = None,
    ):
        self.client, self.texts, self.identities = client, texts, identities
        self.chunk, self.most, self.seed, self.stop = chunk, most, seed, list(stop)
        self.temperature, self.top_p, self.room = temperature, top_p, room
        self._several: bool | None = None  # whether the server gives several choices; None until the first request

    def __enter__(self) -> ServerGrower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self.client.close()

    @property
    def usage(self) -> Usage:
        """What the server read and wrote."""
        return self.client.usage

    def start(self, prompts: Sequence[Dialogue]) -> list[Hypothesis]:
        self._before, self._rounds = self.texts(prompts), 0
        return [Hypothesis(p, -1, "", None, None, False, False, "") for p in range(len(prompts))]

    def grow(self, live: Sequence[Hypothesis], children: Sequence[int]) -> list[Hypothesis]:
        names = [[_lineage(h, k, self._rounds) for k in range(n)] for h, n in zip(live, children, strict=True)]
        texts: list[list[tuple[str, str]]] = [[] for _ in live]
        if self._several is None and len(names[0]) > 1:
            # alone: were it one of many, what the others ask for would hang on which is answered first
            try:
                texts[0] = self._ask(live[0], names[0][0], len(names[0]))
            except Refused:
                self._several = False  # and if that is not why, the next request says what is
            else:
                self._several = len(texts[0]) == len(names[0])
            if not self._several:
                log.info("the server at %s gives one text a request, so each is asked for by itself", self.client.url)
        with ThreadPoolExecutor(self.client.workers) as pool:
            if self._several:
                rows = [row for row in range(len(live)) if not texts[row]]
                wanted = [(live[row], names[row][0], len(names[row])) for row in rows]
                for row, choices in zip(rows, pool.map(lambda ask: self._ask(*ask), wanted), strict=True):
                    texts[row] = choices
            missing = [(row, name) for row in range(len(live)) for name in names[row][len(texts[row]) :]]
            single = pool.map(lambda ask: self._ask(live[ask[0]], ask[1], 1), missing)
            for (row, _), choices in zip(missing, single, strict=True):
                texts[row] += choices
        self._rounds += 1
        return [
            self._child(row, live[row], name, *choice)
            for row in range(len(live))
            for name, choice in zip(names[row], texts[row], strict=True)
        ]

    def keep(self, places: Sequence[int]) -> None:
        """Nothing: all that there is of a hypothesis is its text."""

    def _child(self, row: int, parent: Hypothesis, lineage: str, text: str, reason: str) -> Hypothesis:
        text = parent.text + text
        ends = [max(place - 1, 0) for place in map(f"\n{text}".find, self.stop) if place >= 0]
        finished = reason == "stop" or bool(ends)
        # what a filter took away will not come with another request
        cut = not finished and (reason == "content_filter" or self._left(parent) <= 0)
        text = text[: min(ends)] if ends else text
        text = text if finished else text.rstrip(HALF)
        text = text.strip() if finished or cut else text
        return Hypothesis(parent.prompt, row, text, None, None, finished, cut, lineage)

    def _left(self, h: Hypothesis) -> int:
        """Tokens that may still be written."""
        room = self.most if self.room is None else min(self.most, self.room[h.prompt])
        return room - self._rounds * self.chunk

    def _ask(self, h: Hypothesis, lineage: str, count: int) -> list[tuple[str, str]]:
        """Up to ``count`` continuations of a hypothesis, each with the reason why it ends."""
        drawn = stream(self.seed, self.identities[h.prompt], lineage, self._rounds + 1)[self._rounds]
        body = {
            "prompt": self._before[h.prompt] + h.text,
            "max_tokens": min(self.chunk, self._left(h)),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": int(drawn * 2**31),
        }
        if count > 1:  # some servers refuse the field as such
            body["n"] = count
        if self.stop:
            body["stop"] = self.stop
        return [(one["text"], one["finish_reason"]) for one in self.client.ask(body)][:count]


def _lineage(parent: Hypothesis, child: int, rounds: int) -> str:
    """As in a search of tokens, but of rounds: the first child goes on with its parent's stream."""
    if not rounds:
        return str(child)
    return parent.lineage if child == 0 else f"{parent.lineage}/{rounds}.{child}"
