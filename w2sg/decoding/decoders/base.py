"""What every decoder is: its options, the models that it needs, how it writes, and what a report says of it.

A decoder is one class in one file. `w2sg.decoding.decoders` lists those of w2sg; one from outside is named by
``decoder._target_``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator

from w2sg.config import plugins
from w2sg.config.build import function_identity
from w2sg.config.option import option
from w2sg.config.options import Sampling
from w2sg.config.schema import TrainConfig
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.served import Server
from w2sg.decoding.decoders.written import Written
from w2sg.errors import UserError, name_hooks

STRONG, TUNED, UNTUNED, REWARD = "strong", "tuned", "untuned", "reward"
TAKEN = ("plain", "guide")  # names of other systems in a report
KINDS: dict[str, type[Decoder]] = {}


@dataclass(frozen=True)
class Law:
    """What is known of the distribution of a decoder's replies, against what the strong model writes by itself.

    Attributes:
        how: ``itself``: it is the strong model's. ``exact``: each next token has the strong model's logits plus
            ``tilt`` times what alignment did to the small model's, so that the divergence can be worked out.
            ``at most``: the divergence has the bound ``bound``. ``unknown``: none of these, and ``why``.
        bound: in nats a reply.
    """

    how: Literal["itself", "exact", "at most", "unknown"]
    why: str = ""
    tilt: float = 0.0
    bound: float = float("nan")

    @property
    def has_logits(self) -> bool:
        """Whether each next token has logits, by which answers can be scored without writing them."""
        return self.how in ("itself", "exact")


class Decoder(Sampling):
    """A way of writing replies. Its fields are options; a class must say its ``kind``, its ``words`` and `write`.

    Attributes:
        kind: its name: of its system in reports, of its stages in the store.
        words: what a page calls it.
        needs: models: ``strong``; ``tuned`` and ``untuned``, the weak model after and before its alignment;
            ``reward``, the reward model of its option ``guide``.
        generated_by: where it is no more than sampling, as methods that train do it: the model that writes, and the
            one that it is contrasted with. `write` is then needed for servers alone.
        no_server: why a server of texts cannot write for it; options of a server are refused with that.
        traces: whether `write` notes its rounds, so that a few can be shown one by one.
        drafts: whether a small model writes part of a reply, so that reports say how much and why it ended.
    """

    kind: str
    temperature: float = option(0.7, "sampling temperature; 0 is greedy", ge=0.0)
    max_new_tokens: PositiveInt = option(128, "a reply that reaches this is cut off")

    words: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({STRONG})
    generated_by: ClassVar[tuple[str, ...]] = ()
    no_server: ClassVar[str] = "this decoder is not written for one"
    traces: ClassVar[bool] = False
    drafts: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):  # only to be inherited from
            return
        other = KINDS.get(kind, cls)
        if not re.fullmatch(r"\w[\w.-]*", kind, re.ASCII):
            raise TypeError(f"{cls.__name__}: its kind {kind!r} names files; use letters, digits, '_', '-' and '.'")
        if kind in TAKEN or (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__name__}: another system is called {kind!r}; give it a kind of its own")
        if not isinstance(getattr(cls, "words", None), str):
            raise TypeError(f"{cls.__name__}: say in `words` what a page calls it")
        if cls.write is Decoder.write and not cls.generated_by:
            raise TypeError(f"{cls.__name__}: write(engines, prompts) is missing, which answers a batch of prompts")
        if isinstance(cls.needs, Set) and (unknown := sorted(cls.needs - {STRONG, TUNED, UNTUNED, REWARD})):
            raise TypeError(f"{cls.__name__}: needs {unknown[0]!r}; choose among strong, tuned, untuned and reward")
        if isinstance(cls.needs, Set) and REWARD in cls.needs and "guide" not in cls.model_fields:
            raise TypeError(
                f"{cls.__name__}: needs 'reward', the reward model of its option guide; give it "
                "guide: w2sg.decoding.decoders.guided.Guide"
            )
        name_hooks(cls, Decoder)
        KINDS[kind] = cls

    @model_validator(mode="before")
    @classmethod
    def _without_server(cls, options: Any) -> Any:
        if isinstance(options, dict) and options.get("server") is not None and "server" not in cls.model_fields:
            raise ValueError(f"server: {cls.no_server}; leave it out, or use decoder=search or best_of_n")
        return options

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> bool:
        """Whether these options, as they are typed or stand in a report, are its own."""
        return options.get("kind") == cls.model_fields["kind"].default

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, engines: Engines, prompts: Prompts) -> list[Written]:
        """A reply to each prompt of a batch. Costs are counted by whoever asks."""
        raise NotImplementedError(f"decoder={self.kind} has no write(engines, prompts)")

    def given(self, reply: Written) -> int:
        """First tokens of a reply in which no string that ends the strong model's turns is looked for."""
        return reply.draft

    @property
    def adds_logits(self) -> bool:
        """Whether logits of the weak and the strong model are added, which takes one vocabulary."""
        return False

    @property
    def is_plain(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.law().how == "itself"

    @property
    def served_by(self) -> Server | None:
        """Who writes in place of the strong model, if a server does."""
        return None

    @property
    def needs_pair(self) -> bool:
        """Whether the weak model takes part, aligned."""
        return bool({TUNED, UNTUNED} & self.needs)

    # -- in the store -------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> str:
        """The name of its stages in the store."""
        return self.kind

    def key(self) -> dict[str, Any]:
        """What decides its replies, for cache keys; of a class from outside w2sg its source text, too."""
        outside = [kind for kind in type(self).__mro__ if issubclass(kind, Decoder) and not _shipped(kind)]
        sources = [function_identity({"_target_": f"{kind.__module__}.{kind.__qualname__}"}) for kind in outside]
        return self.model_dump(exclude={"batch_size", "server"}) | ({"outside": sources} if sources else {})

    # -- in reports ---------------------------------------------------------------------------------------------------

    def setting(self) -> str:
        """Its main options in a few words, for titles."""
        return f"temperature {self.temperature:g}"

    def facts(self, reply: Written) -> dict[str, Any]:
        """What is known of a reply beside its text, as columns of samples.parquet."""
        counted = {"counted_by": reply.counted_by} if reply.counted_by else {}
        return {"strong_read": reply.strong_read, "guide_read": reply.guide_read, **counted}

    def law(self) -> Law:
        """What is known of the distribution of its replies."""
        return Law("unknown", "nothing is known of its law")

    @property
    def in_the_making(self) -> int:
        """The most replies to a prompt that are in the making at once."""
        return max(1, self.independent_samples)

    @property
    def independent_samples(self) -> int:
        """How many whole replies are drawn of which the guide's best is taken; 0 where it is not done so."""
        return 0

    def problems(self, config: TrainConfig) -> list[str]:
        """What is wrong between its options and the rest of the configuration; ``"key: what and what to do"`` each."""
        return []


def _shipped(kind: type[Decoder]) -> bool:
    return kind.__module__.startswith("w2sg.")


def class_of(options: Mapping[str, Any]) -> type[Decoder]:
    """The class that options are of.

    Raises:
        ValueError: there is none; it names the key and what to do.
    """
    if "_target_" in options:
        target = options["_target_"]
        try:
            kind = plugins.resolve(str(target))
        except UserError as error:
            raise ValueError(f"_target_: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, Decoder)):
            raise ValueError(
                f"_target_: {target} is no decoder; name a class that inherits from w2sg.decoding.decoders.Decoder"
            )
        if not isinstance(kind.model_fields["kind"].default, str):
            name = kind.__name__.lower()
            raise ValueError(f'_target_: {target}: give it kind: Literal["{name}"] = "{name}"')
        return kind
    for kind in KINDS.values():
        if kind.takes(options):
            return kind
    if "kind" not in options:
        raise ValueError("kind: needs a value")
    raise ValueError(
        f"kind: there is no {options['kind']!r}; choose among {', '.join(sorted(KINDS))}, or name a class of your own "
        "in _target_"
    )
