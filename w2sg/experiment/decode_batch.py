"""One batch of prompts at work: what a decoder's engines write, as rows of numbers or of text.

What is written here is what `w2sg.experiment.decode` stores and reads back.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from w2sg.data.messages import Dialogue
from w2sg.decoding.drafting import Drafting, Rule
from w2sg.decoding.engine import Engine, Several, Tilted
from w2sg.decoding.nudging import Nudging
from w2sg.decoding.options import BestOfN, Decoder, Drafted, Eft, Guide, Plain, Search, needs_pair
from w2sg.decoding.search import EngineGrower, Result, search
from w2sg.decoding.search_values import ImplicitValue, Mixture, RewardValue
from w2sg.decoding.server import ServerGrower
from w2sg.decoding.together import Side
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.store.shards import Found

if TYPE_CHECKING:
    from w2sg.experiment.decode import Decoders

FATES = ("", "reached", "complete", "longest")
# of a row of numbers behind each token: what it is, and facts of its reply, which are the same for all its tokens
TOKEN, LOG_P, DRAFTED, CANDIDATE, VALUE, FINISHED, FATE, STRONG_READ, GUIDE_READ, ROUNDS, POOLED = range(11)
COLUMNS = 11
NOTHING = -1  # in place of a token


class Work:
    """One batch of prompts at work: the engines that a decoder needs, made from the stage's models."""

    def __init__(
        self,
        decoders: Decoders,
        decoder: Decoder,
        policies: nn.ModuleList,
        reward: Any,
        seed: int,
        server: ServerGrower | None = None,
    ):
        self.decoders, self.decoder, self.reward, self.seed, self.server = decoders, decoder, reward, seed, server
        self.strong = TransformersEngine(policies[0]) if server is None else None
        small = [p for p in policies[server is None :] if hasattr(p, "adapted")]
        self.small: Engine | None = None
        if len(small) == 1 and not isinstance(decoder, Drafted):
            self.small = TransformersEngine(small[0], base_too=True)
        elif len(small) > 1:
            self.small = Several(*(TransformersEngine(policy) for policy in small))
        self.tuned = TransformersEngine(small[0]) if small else None
        if self.strong is not None and small:
            self._write_what_all_read(small)

    def _write_what_all_read(self, small: list[Any]) -> None:
        """One vocabulary may have embeddings of unequal size: no model writes an id that another has no row for."""
        chats = [writer.source.chat for writer in (self.decoders.strong, self.decoders.pair.tuned)]
        if chats[0].vocabulary == chats[1].vocabulary:
            least = min(policy.plain.get_input_embeddings().num_embeddings for policy in (self.strong.policy, *small))
            for engine in (self.strong, self.tuned):
                engine.write_below(least)

    def write(self, prompts: list[Dialogue], ids: list[str], device: torch.device) -> Found:
        """What is to be kept of each prompt."""
        decoder = self.decoder
        if isinstance(decoder, Drafted):
            tables, forwards = (self._nudge if decoder.nudges else self._draft)(prompts, ids)
        else:
            tables, forwards = self._search(prompts, ids)
        sizes = torch.tensor([len(table) for table in tables])
        values = torch.from_numpy(np.concatenate(tables)).float()  # token ids lie far below 2^24
        useful = int(sizes.sum())
        return Found(values.to(device), sizes.to(device), None, useful, max(useful, forwards))

    def trace(self, prompts: list[Dialogue], ids: list[str]) -> list[Result]:
        """The same again, with every hypothesis of every round noted."""
        return self._results(prompts, ids, True)[0]

    def ask(self, prompts: list[Dialogue], ids: list[str]) -> dict[str, dict[str, Any]]:
        """What the server makes of each prompt, to be kept as it is."""
        decoder, grower = self.decoder, self.server
        begun, before = time.perf_counter(), replace(grower.asked)
        grower.identities, grower.room = ids, self._room(prompts)
        beams, children, value = 1, 1, None
        if isinstance(decoder, Search):
            beams, children = decoder.beams, decoder.children
        elif isinstance(decoder, BestOfN):
            beams = decoder.samples
        if not isinstance(decoder, Plain):
            value = self._value(decoder.guide)
        traced = isinstance(decoder, Search)
        results = search(grower, value, prompts, beams, children, traced, not isinstance(decoder, BestOfN))
        asked, size = grower.asked, grower.size
        read = asked.prompt_tokens + asked.completion_tokens - before.prompt_tokens - before.completion_tokens
        shared = {
            "strong_read": read / len(prompts),
            "guide_read": self._guide_read() / len(prompts),
            "counted_by": "server" if asked.uncounted == before.uncounted else "tokenizer",
            "seconds": (time.perf_counter() - begun) / len(prompts),
        }
        rows = {}
        for i, result in zip(ids, results, strict=True):
            rest = [h for h in result.beam if h is not result.best] if isinstance(decoder, BestOfN) else []
            candidates = [
                {"text": h.text, "finished": h.finished, "value": h.value, "tokens": size(h.text)}
                for h in (result.best, *rest)
            ]
            about = {"rule": result.rule, "pooled": result.rule != "beam", "rounds": result.rounds}
            rows[i] = shared | about | {"value": result.best.value, "candidates": candidates, "trace": result.trace}
        return rows

    def _room(self, prompts: list[Dialogue]) -> list[int]:
        """Tokens that a reply to each prompt may have, for the models that have as many positions and no more."""
        source, most = self.decoders.strong.source, self.decoder.max_new_tokens
        limits = [(source.chat, getattr(source.config, "max_position_embeddings", None))]
        if needs_pair(self.decoder):
            chat = self.decoders.pair.tuned.source.chat
            shared = chat.vocabulary == source.chat.vocabulary  # else it is not known what its tokens are
            limits.append((chat, self.small.limit if shared else None))
        room = np.full(len(prompts), most)
        for chat, limit in limits:
            if limit is not None:
                room = np.minimum(room, [limit - len(row) for row in chat.prompts(prompts)])
        return room.clip(min=1).tolist()

    def _guide_read(self) -> int:
        """Tokens that each small model has read, and a reward guide."""
        found = self.small.count.total if self.small is not None else 0
        if self.reward is not None:
            found += self.reward.read
            self.reward.read = 0
        return found

    def _search(self, prompts: list[Dialogue], ids: list[str]) -> tuple[list[np.ndarray], int]:
        results, grower = self._results(prompts, ids, False)
        value = isinstance(self.decoder, Search | BestOfN) and self.decoder.guide.implicit
        strong = self.strong.count.total / len(prompts)
        small = grower.engine.pair if isinstance(grower.engine, Tilted) else self.small
        guide = small.count.total / len(prompts) if small is not None else 0.0
        if self.reward is not None:
            guide += self.reward.read / len(prompts)
            self.reward.read = 0
        if small is not self.small and value:  # a search over tilted logits asks the pair twice
            guide += self.small.count.total / len(prompts)
        tables = []
        for result in results:
            rest = [h for h in result.beam if h is not result.best] if isinstance(self.decoder, BestOfN) else []
            parts = []
            for number, h in enumerate([result.best, *rest]):
                part = _written(h.tokens, h.log_probabilities[:, 0])
                part[:, CANDIDATE] = number
                part[:, VALUE], part[:, FINISHED], part[:, ROUNDS] = h.value, h.finished, result.rounds
                part[:, STRONG_READ], part[:, GUIDE_READ] = strong, guide
                part[:, POOLED] = result.rule != "beam"
                parts.append(part)
            tables.append(np.concatenate(parts))
        return tables, grower.forwards

    def _results(self, prompts: list[Dialogue], ids: list[str], trace: bool) -> tuple[list[Result], EngineGrower]:
        decoder, source = self.decoder, self.decoders.strong.source
        engine: Engine = self.strong
        beams, children, chunk, value, beta = 1, 1, decoder.max_new_tokens, None, 0.0
        if isinstance(decoder, Eft):
            beta = decoder.beta
        elif isinstance(decoder, Search):
            beams, children, beta = decoder.beams, decoder.children, decoder.tilt
            chunk = min(decoder.chunk, decoder.max_new_tokens)
        elif isinstance(decoder, BestOfN):
            beams = decoder.samples
        if beta:
            # a pair of its own: the guide's stands on other rows
            pair = self._pair_again()
            engine = Tilted(self.strong, pair, beta)
        if isinstance(decoder, Search | BestOfN):
            value = self._value(decoder.guide)
        chat, room = source.chat, None
        if value is not None and decoder.guide.implicit and self.small.limit is not None:
            guide = self.decoders.pair.tuned.source.chat
            if guide.vocabulary == chat.vocabulary:  # the guide must have positions for what it is to read
                room = [self.small.limit - len(row) for row in guide.prompts(prompts)]
        grower = EngineGrower(
            engine,
            chat.prompts,
            chat.text,
            ids,
            decoder.columns(),
            chat.stop,
            chunk,
            decoder.max_new_tokens,
            self.seed,
            chat.cut,
            room,
        )
        return search(grower, value, prompts, beams, children, trace, not isinstance(decoder, BestOfN)), grower

    def _pair_again(self) -> Engine:
        if isinstance(self.small, TransformersEngine):
            return TransformersEngine(self.small.policy, base_too=True)
        return Several(*(TransformersEngine(engine.policy) for engine in self.small.engines))

    def _value(self, guide: Guide) -> Any:
        parts = []
        strong = self.decoders.strong.source.chat
        if guide.implicit:
            chat = self.decoders.pair.tuned.source.chat
            shared = chat.vocabulary == strong.vocabulary
            value = ImplicitValue(
                self.small, chat, shared, strong.stop, guide.beta, guide.normalise, guide.length_alpha
            )
            parts.append((guide.implicit, value))
        if guide.reward:
            parts.append((guide.reward, RewardValue(self.reward)))
        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else Mixture(parts)

    def _draft(self, prompts: list[Dialogue], ids: list[str]) -> tuple[list[np.ndarray], int]:
        decoder, strong, pair = self.decoder, self.decoders.strong.source, self.decoders.pair
        most = decoder.max_new_tokens
        rule = Rule(decoder.window, decoder.threshold, decoder.check, decoder.draft or most, most)
        columns = decoder.columns()
        sides = Side(self.tuned, pair.tuned.source.chat, columns), Side(self.strong, strong.chat, columns)
        drafting = Drafting(*sides, rule, ids, self.seed)
        found = drafting.write(prompts)
        read = [self.strong.count.total / len(prompts), self.tuned.count.total / len(prompts)]
        tables = []
        for draft in found:
            part = _written(draft.tokens, draft.log_probabilities)
            part[: draft.kept, DRAFTED], part[:, FINISHED] = 1, draft.finished
            part[:, FATE], part[:, [STRONG_READ, GUIDE_READ]] = FATES.index(draft.switch), read
            tables.append(part)
        return tables, drafting.forwards

    def _nudge(self, prompts: list[Dialogue], ids: list[str]) -> tuple[list[np.ndarray], int]:
        decoder, chats = self.decoder, (self.decoders.pair.tuned.source.chat, self.decoders.strong.source.chat)
        columns = decoder.columns()
        sides = Side(self.tuned, chats[0], columns), Side(self.strong, chats[1], columns)
        nudging = Nudging(*sides, decoder.threshold, decoder.max_new_tokens, ids, self.seed)
        found = nudging.write(prompts)
        read = [self.strong.count.total / len(prompts), self.tuned.count.total / len(prompts)]
        tables = []
        for reply in found:
            part = _written(reply.tokens, reply.log_probabilities)
            part[: len(reply.tokens), DRAFTED] = reply.nudged
            fate = "reached" if not reply.nudged.all() else "complete" if reply.finished else "longest"
            part[:, FINISHED], part[:, ROUNDS], part[:, FATE] = reply.finished, reply.nudges, FATES.index(fate)
            part[:, [STRONG_READ, GUIDE_READ]] = read
            tables.append(part)
        return tables, nudging.forwards


def _written(tokens: np.ndarray, log_probabilities: np.ndarray) -> np.ndarray:
    """A row for each token of a reply; one of `NOTHING` for a reply without any, which has a value and a cost, too."""
    part = np.zeros((max(1, len(tokens)), COLUMNS))
    part[:, TOKEN] = tokens if len(tokens) else NOTHING
    part[: len(tokens), LOG_P] = log_probabilities
    return part
