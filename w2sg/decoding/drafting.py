"""A small aligned model drafts the beginning, the large base model goes on (weak-to-strong decoding, arXiv 2506.07434).

The base model reads the draft as it grows and takes over, from its own cache, where it would have written the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from w2sg import progress
from w2sg.data.messages import Dialogue
from w2sg.decoding.contrastive import Decoded, go_on, keep_rows, stream
from w2sg.decoding.sampling import TIE, Settings
from w2sg.decoding.search_values import common_start
from w2sg.decoding.together import BASE, SMALL, STREAMS, Side, Together, room_of

SCAN = 32  # tokens that the base model writes before its text is looked through for strings that end it


def switch_after(log_probabilities: np.ndarray, window: int, threshold: float) -> tuple[int, bool]:
    """Where the base model takes over from a draft.

    Args:
        log_probabilities: [n] that the base model gives to the tokens of the draft.
        window: tokens whose geometric mean probability is taken. threshold: what it has to reach.

    Returns:
        How many tokens of the draft are kept, and whether the threshold was reached, within `TIE`; all of them where it
        was not.
    """
    logs = np.asarray(log_probabilities, np.float64)
    if len(logs) >= window:
        means = np.lib.stride_tricks.sliding_window_view(logs, window).mean(-1)
        reached = np.flatnonzero(means >= np.log(threshold) - TIE)
        if len(reached):
            return int(reached[0]) + window, True
    return len(logs), False


@dataclass(frozen=True)
class Draft:
    """How one reply came about.

    Attributes:
        tokens: [n] of the base model, the one that ended the reply included where it wrote it.
        log_probabilities: [n] that the base model gave them.
        kept: tokens of the draft among them. switch: ``reached``, ``complete`` (the draft came to its end first) or
            ``longest`` (it had no room left, and the base model went on from there).
        finished: the reply came to an end by itself. text: it, up to where a string ended it.
        drafted: tokens that the small model wrote.
    """

    tokens: np.ndarray
    log_probabilities: np.ndarray
    kept: int
    switch: str
    finished: bool
    text: str
    drafted: int


@dataclass(frozen=True)
class Rule:
    """When to switch, and how long replies may be.

    Attributes:
        window, threshold: see `switch_after`. check: tokens drafted between two looks at them.
        draft: tokens that a draft may have. most: tokens that a reply may have.
    """

    window: int
    threshold: float
    check: int
    draft: int
    most: int


class Drafting(Together):
    """A small model that drafts, and a base model that reads the drafts and goes on from them.

    Args:
        small: the model that drafts. base: the model that goes on.
        rule: when to switch.
        identities, seed: as in `w2sg.decoding.search.EngineGrower`.
    """

    def __init__(self, small: Side, base: Side, rule: Rule, identities: Sequence[str], seed: int):
        super().__init__(small, base, identities, seed)
        self.rule = rule

    @torch.inference_mode()
    def write(self, prompts: Sequence[Dialogue]) -> list[Draft]:
        """A reply to each prompt."""
        rule, (small, base) = self.rule, self.sides
        count = len(prompts)
        ids = small.chat.prompts(prompts), base.chat.prompts(prompts)
        small.engine.start(ids[SMALL])
        base.engine.start(ids[BASE])
        room = [room_of(base.engine, row, rule.most) for row in ids[BASE]]
        drafts: list[np.ndarray] = [np.zeros(0, np.int64)] * count  # in the small model's tokens
        read: list[np.ndarray] = [np.zeros(0, np.int64)] * count  # in the large one's
        logs: list[np.ndarray] = [np.zeros(0)] * count
        fate, kept = [""] * count, [0] * count
        live = list(range(count))
        # the small model drops prompts as their drafts end; the base model keeps all, for it goes on with most of them
        while live:
            limits = [min(rule.draft, room_of(small.engine, ids[SMALL][p], rule.draft)) - len(drafts[p]) for p in live]
            written, left = self._go_on(SMALL, live, [drafts[p] for p in live], rule.check, limits)
            chunks: list[np.ndarray] = [np.zeros(0, np.int64)] * count
            back, ended = np.zeros(count, np.int64), {}
            for place, p in enumerate(live):
                drafts[p] = np.append(drafts[p], written.tokens[place])
                full = len(written.tokens[place]) >= limits[place]
                ended[p] = "complete" if written.stopped[place] else "longest" if full else ""
                wanted = self._as_base(drafts[p], ended[p] == "complete")
                if len(wanted) > room[p] and ended[p] == "complete":  # cut short, it has no end
                    ended[p] = "longest"
                wanted = wanted[: room[p]]
                # with another vocabulary the last word may be tokenised otherwise now: that part is read again
                common = common_start(read[p], wanted)
                back[p], chunks[p] = len(read[p]) - common, wanted[common:]
                logs[p], read[p] = logs[p][:common], wanted
            base.engine.rollback(back)
            for p, values in enumerate(base.engine.read(chunks)):
                logs[p] = np.append(logs[p], values[:, 0].astype(np.float64))
            back[:] = 0
            going = []
            for place, p in enumerate(live):
                sure = len(read[p]) if ended[p] else self._settled(drafts[p], read[p])
                kept[p], reached = switch_after(logs[p][:sure], rule.window, rule.threshold)
                fate[p] = "reached" if reached else ended[p]
                if reached:  # the base model forgets what it read past the switch
                    back[p] = len(read[p]) - kept[p]
                    read[p], logs[p] = read[p][: kept[p]], logs[p][: kept[p]]
                elif ended[p]:
                    kept[p] = len(read[p])
                else:
                    going.append((place, p))
            base.engine.rollback(back)
            live = self._continue(SMALL, left, going, drafts)
        return self._finish(drafts, read, logs, fate, kept, room)

    def _finish(self, drafts, read, logs, fate, kept, room) -> list[Draft]:
        """Let the base model go on where it is its turn; every argument has an entry for each prompt."""
        base, finished, texts = self.sides[BASE], [f == "complete" for f in fate], [""] * len(fate)
        for p, tokens in enumerate(read):
            texts[p] = base.chat.text(tokens)
        # strings that end the base model's turns may well stand in a draft, a fenced block of code say
        starts = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts]
        live = [p for p in range(len(fate)) if fate[p] != "complete" and len(read[p]) < room[p]]
        if live:
            base.engine.select(torch.tensor(live))
            base.engine.read([np.zeros(0, np.int64)] * len(live))
        while live:
            limits = [room[p] - len(read[p]) for p in live]
            written, left = self._go_on(BASE, live, [read[p] for p in live], SCAN, limits)
            going = []
            for place, p in enumerate(live):
                read[p] = np.append(read[p], written.tokens[place])
                logs[p] = np.append(logs[p], written.log_probabilities[place][:, 0])
                texts[p], cut = base.chat.until_stop(base.chat.text(read[p]), starts[p])
                finished[p] = cut or bool(written.stopped[place])
                if not finished[p] and len(read[p]) < room[p]:
                    going.append((place, p))
            live = self._continue(BASE, left, going, read)
        return [
            Draft(read[p], logs[p], kept[p], fate[p], finished[p], texts[p], len(drafts[p])) for p in range(len(fate))
        ]

    def _go_on(
        self, who: int, live: list[int], written: list[np.ndarray], most: int, room: list[int]
    ) -> tuple[Decoded, list[int]]:
        """Up to ``most`` tokens more of one model to each live prompt, and the rows that its engine is left with.

        Args:
            live: prompts, in the order of the engine's rows. written: tokens of each reply so far, the
                model's own.
            room: tokens that each may still have.
        """
        side = self.sides[who]
        uniform = np.ones((len(live), most))
        for place, (p, n) in enumerate(zip(live, map(len, written), strict=True)):
            # by place in the reply, so that it does not matter in how many parts it is written
            uniform[place] = stream(self.seed, self.identities[p], STREAMS[who], n + most)[n:]
        logits = side.engine.logits
        settings = Settings.alike(side.columns, len(live), logits.device)
        decoded, left = go_on(side.engine, logits, settings, torch.from_numpy(uniform), side.chat.stop, room, written)
        self.forwards += decoded.forwards
        progress.part((max(map(len, written)) + most) / self.rule.most)
        return decoded, left

    def _continue(self, who: int, left: list[int], going: list[tuple[int, int]], tokens: list[np.ndarray]) -> list[int]:
        """The prompts that go on, whose rows are now all that an engine has, with everything read.

        Args:
            left: the rows that `_go_on` has left. going: row and prompt of each that goes on. tokens: of each prompt.
        """
        if going:
            last = [int(tokens[p][-1]) for _, p in going]
            keep_rows(self.sides[who].engine, left, [row for row, _ in going], last)
        return [p for _, p in going]

    def _as_base(self, draft: np.ndarray, complete: bool) -> np.ndarray:
        """The draft in the base model's tokens, without an end."""
        small, large = (side.chat for side in self.sides)
        stop = set(small.stop)
        if self.shared:
            return draft[:-1] if len(draft) and int(draft[-1]) in stop else draft
        text = small.text(draft)
        if not complete:  # a character of several bytes may be cut: what is there of it is not text
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        return large.replies([text])[0] if text.strip() else np.zeros(0, np.int64)

    def _settled(self, draft: np.ndarray, read: np.ndarray) -> int:
        """How many of the base model's tokens stay as they are, whatever the draft says next.

        With one vocabulary all do. Otherwise those of the last word may change, and wait for its end: so the switch is
        where reading the finished draft would put it.
        """
        if self.shared:
            return len(read)
        small, large = (side.chat for side in self.sides)
        text = small.text(draft)
        whole = text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip()
        if not whole:
            return 0
        return common_start(read, large.replies([whole])[0])
