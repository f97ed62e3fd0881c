"""A small aligned model drafts the beginning, the large base model goes on (weak-to-strong decoding, arXiv 2506.07434).

The base model reads the draft as it grows and takes over, from its own cache, where it would have written the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.decoding.contrastive import go_on, stream
from w2sg.decoding.engine import Engine, Scorer
from w2sg.decoding.sampling import Settings
from w2sg.decoding.search_values import common_start

TOLERANCE = 1e-9  # of mean log-probabilities: equal numbers worked out in two ways differ by less
SCAN = 32  # tokens that the base model writes before its text is looked through for strings that end it


def switch_after(log_probabilities: np.ndarray, window: int, threshold: float) -> tuple[int, bool]:
    """Where the base model takes over from a draft.

    Args:
        log_probabilities: [n] that the base model gives to the tokens of the draft.
        window: tokens whose geometric mean probability is taken. threshold: what it has to reach.

    Returns:
        How many tokens of the draft are kept, and whether the threshold was reached; all of them where it was not.
    """
    logs = np.asarray(log_probabilities, np.float64)
    if len(logs) >= window:
        means = np.lib.stride_tricks.sliding_window_view(logs, window).mean(-1)
        reached = np.flatnonzero(means >= np.log(threshold) - TOLERANCE)
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


class Drafting:
    """Both models at work on a batch of prompts.

    Args:
        drafter: engine of the small model. base: engine of the large one. chats: how they write dialogues.
        columns: rows of `w2sg.decoding.sampling.Settings`, of the drafter and of the base.
        identities, seed: as in `w2sg.decoding.search.EngineGrower`.
    """

    def __init__(
        self,
        drafter: Engine,
        base: Scorer,
        chats: tuple[Chat, Chat],
        columns: tuple[Sequence[float], Sequence[float]],
        rule: Rule,
        identities: Sequence[str],
        seed: int,
    ):
        self.drafter, self.base, self.chats, self.columns = drafter, base, chats, columns
        self.rule, self.identities, self.seed = rule, identities, seed
        self.shared = chats[0].vocabulary == chats[1].vocabulary
        self.forwards = 0

    @torch.inference_mode()
    def write(self, prompts: Sequence[Dialogue]) -> list[Draft]:
        """A reply to each prompt."""
        rule, (small, large) = self.rule, self.chats
        count = len(prompts)
        ids = small.prompts(prompts), large.prompts(prompts)
        self.drafter.start(ids[0])
        self.base.start(ids[1])
        room = [room_of(self.base, row, rule.most) for row in ids[1]]
        drafts: list[np.ndarray] = [np.zeros(0, np.int64)] * count  # in the small model's tokens
        read: list[np.ndarray] = [np.zeros(0, np.int64)] * count  # in the large one's
        logs: list[np.ndarray] = [np.zeros(0)] * count
        fate, kept = [""] * count, [0] * count
        live = list(range(count))
        while live:
            limits = [min(rule.draft, room_of(self.drafter, ids[0][p], rule.draft)) - len(drafts[p]) for p in live]
            found, left = self._go_on(self.drafter, 0, live, [len(drafts[p]) for p in live], rule.check, limits)
            chunks: list[np.ndarray] = [np.zeros(0, np.int64)] * count
            back, ended = np.zeros(count, np.int64), {}
            for place, p in enumerate(live):
                drafts[p] = np.append(drafts[p], found.tokens[place])
                full = len(found.tokens[place]) >= limits[place]
                ended[p] = "complete" if found.stopped[place] else "longest" if full else ""
                wanted = self._as_base(drafts[p], ended[p] == "complete")
                if len(wanted) > room[p] and ended[p] == "complete":  # cut short, it has no end
                    ended[p] = "longest"
                wanted = wanted[: room[p]]
                common = common_start(read[p], wanted)
                back[p], chunks[p] = len(read[p]) - common, wanted[common:]
                logs[p], read[p] = logs[p][:common], wanted
            self.base.rollback(back)
            for p, values in enumerate(self.base.read(chunks)):
                logs[p] = np.append(logs[p], values[:, 0].astype(np.float64))
            back[:] = 0
            going = []
            for place, p in enumerate(live):
                sure = len(read[p]) if ended[p] else self._settled(drafts[p], read[p])
                kept[p], reached = switch_after(logs[p][:sure], rule.window, rule.threshold)
                fate[p] = "reached" if reached else ended[p]
                if reached:
                    back[p] = len(read[p]) - kept[p]
                    read[p], logs[p] = read[p][: kept[p]], logs[p][: kept[p]]
                elif ended[p]:
                    kept[p] = len(read[p])
                else:
                    going.append((place, p))
            self.base.rollback(back)
            live = [p for _, p in going]
            if live:
                at = {place: row for row, place in enumerate(left)}
                self.drafter.select(torch.tensor([at[place] for place, _ in going]))
                last = [int(drafts[p][-1]) for p in live]
                self.drafter.extend(torch.tensor(last, device=self.drafter.logits.device))
        return self._finish(drafts, read, logs, fate, kept, room)

    def _finish(self, drafts, read, logs, fate, kept, room) -> list[Draft]:
        """Let the base model go on where it is its turn."""
        large, finished, texts = self.chats[1], [f == "complete" for f in fate], [""] * len(fate)
        for p, tokens in enumerate(read):
            texts[p] = large.text(tokens)
        # strings that end the base model's turns may well stand in a draft, a fenced block of code say
        starts = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts]
        live = [p for p in range(len(fate)) if fate[p] != "complete" and len(read[p]) < room[p]]
        if live:
            self.base.select(torch.tensor(live))
            self.base.read([np.zeros(0, np.int64)] * len(live))
        while live:
            limits = [room[p] - len(read[p]) for p in live]
            found, left = self._go_on(self.base, 1, live, [len(read[p]) for p in live], SCAN, limits)
            going = []
            for place, p in enumerate(live):
                read[p] = np.append(read[p], found.tokens[place])
                logs[p] = np.append(logs[p], found.log_probabilities[place][:, 0])
                texts[p], cut = large.until_stop(large.text(read[p]), starts[p])
                finished[p] = cut or bool(found.stopped[place])
                if not finished[p] and len(read[p]) < room[p]:
                    going.append((place, p))
            live = [p for _, p in going]
            if live:
                at = {place: row for row, place in enumerate(left)}
                self.base.select(torch.tensor([at[place] for place, _ in going]))
                last = [int(read[p][-1]) for p in live]
                self.base.extend(torch.tensor(last, device=self.base.logits.device))
        return [
            Draft(read[p], logs[p], kept[p], fate[p], finished[p], texts[p], len(drafts[p])) for p in range(len(fate))
        ]

    def _go_on(self, engine, who: int, live, written, most: int, room):
        uniform = np.ones((len(live), most))
        for place, (p, n) in enumerate(zip(live, written, strict=True)):
            uniform[place] = stream(self.seed, self.identities[p], "draft" if who == 0 else 0, n + most)[n:]
        logits = engine.logits
        columns = torch.tensor([list(self.columns[who])]).expand(len(live), -1).to(logits.device)
        settings, stop = Settings.from_columns(columns), self.chats[who].stop
        found, left = go_on(engine, logits, settings, torch.from_numpy(uniform), stop, room)
        self.forwards += found.forwards
        return found, left

    def _as_base(self, draft: np.ndarray, complete: bool) -> np.ndarray:
        """The draft in the base model's tokens, without an end."""
        small, large = self.chats
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
        text = self.chats[0].text(draft)
        whole = text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip()
        if not whole:
            return 0
        return common_start(read, self.chats[1].replies([whole])[0])


def room_of(engine: Engine, prompt: np.ndarray, most: int) -> int:
    """Tokens that a reply to this prompt may have."""
    return most if engine.limit is None else min(most, engine.limit - len(prompt) + 1)
