"""A large base model writes, and a small aligned one nudges it where it is unsure (nudging, arXiv 2410.09300).

They take turns, word by word, each going on with what is there: unlike a draft's, the switch is not for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from w2sg import progress
from w2sg.data.dialogue import Chat, TextChat
from w2sg.data.messages import Dialogue
from w2sg.decoding.contrastive import stream
from w2sg.decoding.sampling import TIE, Settings, next_tokens
from w2sg.decoding.search_values import common_start
from w2sg.decoding.together import BASE, SMALL, STREAMS, Side, Together, room_of

CHOICES = 8  # of tokens, for one of a reply: where texts are handed over, what was said may be no token of the other's


@dataclass(frozen=True)
class Nudged:
    """How one reply came about.

    Attributes:
        tokens: [n] of the base model, without an end.
        log_probabilities: [n] that the base model gave them.
        nudged: [n] bool, which of them the small model wrote.
        nudges: how often it was the small model's turn.
        finished: the small model ended it. text: it.
    """

    tokens: np.ndarray
    log_probabilities: np.ndarray
    nudged: np.ndarray
    nudges: int
    finished: bool
    text: str


@dataclass
class _Reply:
    """One on its way.

    Attributes:
        place: of its prompt. room: tokens of each model that it may have.
        turn: whose it is. nudges: of the small model so far. begun: tokens of the writer when its turn began.
        tokens: what was said, in the tokens of the model ``writer``, who wrote last.
        base, nudged: the same in the base model's tokens, when it was last asked, and who wrote them.
        read, logs: tokens that each model has read, and the base model's log-probabilities of its own.
        drawn, numbers: random numbers of each model, used and known.
    """

    place: int
    room: tuple[int, int]
    turn: int = SMALL
    nudges: int = 1
    begun: int = 0
    writer: int = SMALL
    done: bool = False
    finished: bool = False
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    base: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    nudged: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    read: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64)] * 2)
    logs: np.ndarray = field(default_factory=lambda: np.zeros(0))
    drawn: list[int] = field(default_factory=lambda: [0, 0])
    numbers: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0)] * 2)


class Nudging(Together):
    """A small model and a base model that take turns, word by word.

    The small model begins. After each of its words, which ends where whitespace begins, the base model writes on if its
    likeliest token has at least the probability ``threshold``, and goes on until it has not; then the next word is the
    small model's, whatever it is. Where the base model would end the reply, by a token or a string, it is the small
    model's turn as well: that alone ends replies.

    Each token is read once by each model, in chunks where it is the other's. With different vocabularies what was said
    is tokenised anew for the model whose turn it is, and what came out otherwise than before is read again.

    Args:
        small, base: the models; their sampling does not change the probability that is held against ``threshold``.
        most: tokens of the base model that a reply may have.
        identities, seed: as in `w2sg.decoding.search.EngineGrower`.
    """

    def __init__(self, small: Side, base: Side, threshold: float, most: int, identities: Sequence[str], seed: int):
        super().__init__(small, base, identities, seed)
        self.threshold, self.most = threshold, most
        self.engines, self.chats = ([getattr(side, part) for side in self.sides] for part in ("engine", "chat"))

    @torch.inference_mode()
    def write(self, prompts: Sequence[Dialogue]) -> list[Nudged]:
        """A reply to each prompt."""
        ids = [chat.prompts(prompts) for chat in self.chats]
        for engine, rows in zip(self.engines, ids, strict=True):
            engine.start(rows)
        live = []
        for p, rows in enumerate(zip(*ids, strict=True)):
            # with another vocabulary a reply may have any number of the small model's tokens
            most = self.most if self.shared else np.iinfo(np.int64).max
            room = [room_of(e, row, m) for e, row, m in zip(self.engines, rows, (most, self.most), strict=True)]
            live.append(_Reply(p, (min(room), min(room)) if self.shared else tuple(room)))
        replies = list(live)
        while live:
            self._step(live)
            progress.part(max(len(reply.tokens) for reply in live) / self.most)
            ended = [reply for reply in live if reply.done]
            if ended:
                self._read(BASE, live, ended)
                left = torch.tensor([row for row, reply in enumerate(live) if not reply.done], dtype=torch.long)
                live = [reply for reply in live if not reply.done]
                for engine in self.engines if live else ():
                    engine.select(left)
        text = self.chats[BASE].text
        return [
            Nudged(r.base, r.logs[: len(r.base)], r.nudged, r.nudges, r.finished, text(r.base.tolist()))
            for r in replies
        ]

    def _step(self, live: list[_Reply]) -> None:
        """Each reply gets a token, or changes hands."""
        nudging = [reply for reply in live if reply.turn == SMALL]
        # The base model is asked in its own turns, and at each border of words in the small model's.
        for_base, offers = [reply for reply in live if reply.turn == BASE], {}
        if nudging:
            self._read(SMALL, live, nudging)
            tokens, _ = self._choose(SMALL, live, nudging)
            for reply, token in zip(nudging, tokens, strict=True):
                if token in self.chats[SMALL].stop:
                    reply.done = reply.finished = True
                elif len(reply.tokens) > reply.begun and self._begins_word(reply, token):
                    for_base.append(reply)
                    offers[reply.place] = token  # stands where the base model is not sure
                else:
                    self._append(SMALL, reply, token)
        if for_base:
            self._read(BASE, live, for_base)
            tokens, sure = self._choose(BASE, live, for_base)
            for reply, token, is_sure in zip(for_base, tokens, sure, strict=True):
                if is_sure and token not in self.chats[BASE].stop:  # the base model never ends a reply
                    if reply.turn == SMALL:
                        reply.turn, reply.begun = BASE, len(reply.base)
                    self._append(BASE, reply, token)
                elif reply.turn == SMALL:
                    self._append(SMALL, reply, offers[reply.place])
                else:
                    self._nudge(reply)

    def _nudge(self, reply: _Reply) -> None:
        reply.turn, reply.nudges = SMALL, reply.nudges + 1
        reply.tokens, reply.writer = self._as(SMALL, reply), SMALL
        reply.begun = len(reply.tokens)

    def _append(self, who: int, reply: _Reply, token: int) -> None:
        reply.tokens, reply.writer = np.append(self._as(who, reply), token), who
        progress.tokens(1)
        if who == BASE:
            reply.base, reply.nudged = reply.tokens, np.append(reply.nudged, False)
            cut, ended = self.chats[BASE].cut(reply.base, reply.begun)
            if ended:
                reply.tokens = reply.base = cut
                reply.nudged = reply.nudged[: len(cut)]
                self._nudge(reply)
        full = any(len(self._as(one, reply)) >= reply.room[one] for one in (SMALL, BASE))
        reply.done = full or sum(reply.drawn) >= CHOICES * self.most

    def _as(self, who: int, reply: _Reply) -> np.ndarray:
        """What was said so far in the tokens of one of the models."""
        if self.shared or who == reply.writer:
            return reply.tokens
        decode = self.chats[reply.writer].tokenizer.decode
        text = decode(reply.tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return encode_beginning(self.chats[who], text)

    def _begins_word(self, reply: _Reply, token: int) -> bool:
        decode, last = self.chats[SMALL].tokenizer.decode, reply.tokens[-1:].tolist()
        # together, since some tokenizers leave out the space that a text begins with
        before, both = (decode(ids, clean_up_tokenization_spaces=False) for ids in (last, [*last, token]))
        return both[len(before) :][:1].isspace()

    def _read(self, who: int, live: list[_Reply], some: list[_Reply]) -> None:
        """Let a model read what it has not of some replies."""
        back, chunks, meant = np.zeros(len(live), np.int64), [np.zeros(0, np.int64)] * len(live), set(map(id, some))
        for row, reply in enumerate(live):
            if id(reply) not in meant:
                continue
            wanted = self._as(who, reply)[: reply.room[who]]
            common = common_start(reply.read[who], wanted)
            back[row], chunks[row] = len(reply.read[who]) - common, wanted[common:]
            reply.read[who] = wanted
            if who == BASE:
                # tokens that the base model has not written itself are the small model's, in its tokenisation
                reply.logs, same = reply.logs[:common], common_start(reply.base, wanted)
                reply.nudged = np.append(reply.nudged[:same], np.ones(len(wanted) - same, bool))
                reply.base = wanted
        engine = self.engines[who]
        engine.rollback(back)
        read = engine.read(chunks)
        self.forwards += max(map(len, chunks)) * len(live)
        if who == BASE:
            for reply, values in zip(live, read, strict=True):
                reply.logs = np.append(reply.logs, values[:, 0].astype(np.float64))

    def _choose(self, who: int, live: list[_Reply], some: list[_Reply]) -> tuple[list[int], list[bool]]:
        """The token that a model would write next in each of some replies, and whether it is sure."""
        rows = {id(reply): row for row, reply in enumerate(live)}
        logits = self.engines[who].logits
        places = torch.tensor([rows[id(reply)] for reply in some], device=logits.device)
        settings = Settings.alike(self.sides[who].columns, len(some), logits.device)
        uniform: Tensor = torch.tensor([self._number(who, reply) for reply in some], dtype=torch.float64)
        engine = self.engines[who]
        writable, name = getattr(engine, "writable", None), getattr(engine, "name", "the model")
        tokens, logs = next_tokens(logits[:1, places], settings, uniform.to(logits.device), None, writable, name)
        best = logs[0] if writable is None else logs[0].masked_fill(~writable, -torch.inf)
        sure = best.amax(-1).double() >= np.log(self.threshold) - TIE
        return tokens.tolist(), sure.tolist()

    def _number(self, who: int, reply: _Reply) -> float:
        place = reply.drawn[who]
        if place >= len(reply.numbers[who]):
            identity = self.identities[reply.place]
            reply.numbers[who] = stream(self.seed, identity, STREAMS[who], 2 * max(place, self.most))
        reply.drawn[who] += 1
        return float(reply.numbers[who][place])


def encode_beginning(chat: Chat, text: str) -> np.ndarray:
    """The beginning of a reply as a model's tokens, as `Chat.replies`, but with whitespace beyond the first space."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}").removeprefix(" ")  # half a character is not text
    if not text:
        return np.zeros(0, np.int64)
    apart = text[0].isspace() or chat.template or isinstance(chat, TextChat)
    return np.asarray(chat.goes_on(text if apart else f" {text}"), np.int64)
