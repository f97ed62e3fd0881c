"""Best-of-n: whole replies of the strong model, of which the guide takes the best."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from w2sg.config.option import option
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders.base import Law
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.guided import Guided
from w2sg.decoding.decoders.written import Written
from w2sg.metrics.replies import best_of_n_bound


class BestOfN(Guided):
    """Whole replies of the strong model, of which the best is taken."""

    kind: Literal["best_of_n"] = "best_of_n"
    samples: PositiveInt = option(16, "replies to each prompt (n)")
    batch_size: PositiveInt = option(
        8, "prompts in flight, on each device; each has samples rows; does not change the replies"
    )

    words: ClassVar[str] = "best of n"

    def rules(self) -> list[str]:
        if self.temperature == 0 and self.samples > 1:
            return ["temperature: at 0 all samples are the same; raise it"]
        return super().rules()

    def write(self, engines: Engines, prompts: Prompts) -> list[Written]:
        # one beam whose chunk is a whole reply; equal samples all count, for they are draws
        value, room = self.guide.value(engines), self.guide.room(engines, prompts.texts)
        results = engines.search(self, prompts, value, self.samples, room=room, distinct=False)
        return [Written.of(result, with_candidates=True) for result in results]

    @property
    def independent_samples(self) -> int:
        return self.samples

    def setting(self) -> str:
        return f"n {self.samples}"

    def law(self) -> Law:
        return Law("at most", bound=best_of_n_bound(self.samples))
