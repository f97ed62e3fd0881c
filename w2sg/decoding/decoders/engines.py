"""The models of a decoder at work on one batch of prompts: engines, chats and random numbers, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from w2sg.config.options import Sampling
from w2sg.data.dialogue import Chat
from w2sg.data.replies import Prompts
from w2sg.decoding.engine import Engine, Scorer, Several, Tilted
from w2sg.decoding.search import EngineGrower, Result, Value, search
from w2sg.decoding.server import ServerGrower
from w2sg.decoding.together import Side
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import UserError
from w2sg.models.policy import Policy


@dataclass(eq=False, repr=False)
class Engines:
    """Everything that `Decoder.write` may use. Engines keep state, so that each batch has new ones.

    Args:
        policy: the strong model; None where a server writes.
        small: the weak model after its alignment, and before it: one model where its adapters can be switched off.
        chat, small_chat: how they write dialogues.
        seed: of all random numbers.
        reward: of prompts and replies, [B], for a guide that is a reward model.
        server: writes in place of the strong model. limit: positions of that model, where they are known.
        trace: whether the rounds of searches are noted.

    Attributes:
        forwards: rows read one token further, summed over steps; what is written is held against it.
    """

    policy: Policy | None
    small: Sequence[Policy]
    chat: Chat
    small_chat: Chat | None
    seed: int
    reward: Any = None
    server: ServerGrower | None = None
    limit: int | None = None
    trace: bool = False
    forwards: int = 0
    _guides: list[Scorer] = field(default_factory=list)

    def __post_init__(self):
        self._before = None if self.server is None else replace(self.server.usage)
        if self.reward is not None:
            self.reward.read = 0  # it is kept from batch to batch, and counts on

    # -- models -------------------------------------------------------------------------------------------------------

    @property
    def shared(self) -> bool:
        """Whether token ids of the strong model are the weak one's as well."""
        return self.small_chat is not None and self.small_chat.vocabulary == self.chat.vocabulary

    @cached_property
    def strong(self) -> Scorer:
        """The strong model."""
        return self._writer(self.policy)

    @cached_property
    def tuned(self) -> Scorer:
        """The weak model after its alignment.

        Raises:
            UserError: the decoder does not say that it needs it.
        """
        self._check_needs("tuned", 1)
        engine = self._writer(self.small[0])
        self._guides.append(engine)
        return engine

    @cached_property
    def pair(self) -> Scorer:
        """The weak model after and before its alignment, as one engine of two models."""
        return self.new_pair()

    def new_pair(self) -> Scorer:
        """The same once more, for what stands on other rows."""
        self._check_needs("pair", 1 if self.small and self.small[0].adapted else 2)
        if len(self.small) == 1:
            pair = TransformersEngine(self.small[0], base_too=True)
        else:
            pair = Several(*map(TransformersEngine, self.small))
        self._guides.append(pair)
        return pair

    def _check_needs(self, what: str, models: int) -> None:
        if len(self.small) < models:
            needs = '"strong", "tuned"' + (', "untuned"' if what == "pair" else "")
            raise UserError(
                f"engines.{what}: the decoder does not say that it needs it; write needs = frozenset({{{needs}}})"
            )

    def _writer(self, policy: Policy) -> TransformersEngine:
        engine = TransformersEngine(policy)
        if self.policy is not None and self.shared:
            # One vocabulary may have embeddings of unequal size: no model writes an id that another has no row for.
            policies = self.policy, *self.small
            engine.write_below(min(one.plain.get_input_embeddings().num_embeddings for one in policies))
        return engine

    def sides(self, sampling: Sampling) -> tuple[Side, Side]:
        """The aligned weak model and the strong one, for decoders by which they write together."""
        columns = sampling.columns()
        return Side(self.tuned, self.small_chat, columns), Side(self.strong, self.chat, columns)

    # -- writing ------------------------------------------------------------------------------------------------------

    def search(
        self,
        sampling: Sampling,
        prompts: Prompts,
        value: Value | None = None,
        beams: int = 1,
        children: int = 1,
        chunk: int | None = None,
        tilt: float = 0.0,
        room: Sequence[int] | None = None,
        distinct: bool = True,
    ) -> list[Result]:
        """Search over the strong model, or over what a server writes; with one beam and one child a plain sample.

        Args:
            sampling: how the strong model is sampled. value: what hypotheses are worth; None with nothing to choose.
            beams, children, distinct: as in `w2sg.decoding.search.search`.
            chunk: tokens written between choices; None for a whole reply.
            tilt: times what alignment did to the weak model's logits is added to the strong model's.
            room: [P] tokens that a reply to each prompt may have at most, for the guide's sake.
        """
        most = sampling.max_new_tokens
        chunk = min(chunk or most, most)
        grower: Any = self.server
        if grower is None:
            engine: Engine = Tilted(self.strong, self.new_pair(), tilt) if tilt else self.strong
            chat, columns = self.chat, sampling.columns()
            grower = EngineGrower(
                engine, chat.prompts, chat.text, prompts.ids, columns, chat.stop, chunk, most, self.seed, chat.cut, room
            )
        else:
            grower.identities, grower.chunk, grower.room = prompts.ids, chunk, self._positions(prompts, most, room)
        results = search(grower, value, prompts.texts, beams, children, self.trace, distinct)
        self.forwards += getattr(grower, "forwards", 0)
        return results

    def _positions(self, prompts: Prompts, most: int, room: Sequence[int] | None) -> list[int]:
        """Tokens that a server may write to each prompt, for all models that have so many positions and no more."""
        least = np.full(len(prompts), most)
        if self.limit is not None:
            least = np.minimum(least, [self.limit - len(row) for row in self.chat.prompts(prompts.texts)])
        return np.minimum(least, most if room is None else room).clip(min=1).tolist()

    # -- what it cost -------------------------------------------------------------------------------------------------

    @property
    def strong_read(self) -> int:
        """Tokens that the strong model has read for this batch; a server reads each prompt anew each round."""
        if self.server is None:
            return self.strong.count.total
        now, before = self.server.usage, self._before
        return now.prompt_tokens + now.completion_tokens - before.prompt_tokens - before.completion_tokens

    @property
    def counted_by(self) -> str:
        """Who counted what a server read: itself, or the tokenizer of the strong model where it says nothing."""
        if self.server is None:
            return ""
        return "server" if self.server.usage.uncounted == self._before.uncounted else "tokenizer"

    @property
    def guide_read(self) -> int:
        """Tokens that each small model has read for this batch, and a reward guide."""
        return sum(engine.count.total for engine in self._guides) + getattr(self.reward, "read", 0)
