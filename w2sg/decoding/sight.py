"""What a model's cache can do in a batch: found out once, by letting it read the same with and without filling.

The model is asked in fp32, whatever it computes in later: what rounding does is no fault of its cache.

Rows of unequal length are filled up, on the left at first and later between their tokens too. Most models are told by
masks and positions what stands where. Others count columns of the cache: the distance of MPT's ALiBi, the local window
of GPT-Neo, the state of a recurrent model. What such a model would say of a filled row is not what it says of the text.

Shapes: B rows, L tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from w2sg.decoding.engine import Scorer
from w2sg.errors import UserError
from w2sg.memory import ran_out
from w2sg.models.exact import asked, ordinary
from w2sg.models.policy import Policy

log = logging.getLogger(__name__)

# keys of configurations that name how far attention looks back, in tokens
_WINDOW = re.compile(r"^((sliding|attention|local)_)*windows?(_size)?$|^attention_chunk_size$|^local_attention$")
_FULL = {"full_attention", "attention", "linear_attention", "mamba", "conv", "moe", "global", "full"}
_FAILURES = (NotImplementedError, AttributeError, KeyError, TypeError, RuntimeError, ValueError, IndexError)


@dataclass(frozen=True)
class Sight:
    """What the cache of a model can do.

    Attributes:
        filled: rows of unequal length may stand in one batch, filled on the left. Where they may not, or there is no
            cache to fill, everything is read from its start, rows of equal length together.
        gaps: columns between the tokens of a row may be hidden.
        shares: rows may share the keys of their prompts.
        window: tokens beyond which columns must not be hidden; None where there is no such number.
        why: rows cannot share the keys of their prompts, in words; "" where they can.
    """

    filled: bool
    gaps: bool
    shares: bool
    window: int | None
    why: str = ""


class LocalEngine(Scorer, Protocol):
    """An engine over a model on this machine, whose cache is asked; see `TransformersEngine` for its attributes."""

    policy: Policy
    columns: int | None
    worth: int
    recurrent: bool
    device: torch.device

    def adopt(self, sight: Sight) -> None:
        """Read as far as this goes."""

    def from_start(self, ids: Any) -> Tensor:
        """[m, B, L, D] final states of whole texts of one length."""

    def head(self, states: Tensor) -> Tensor:
        """[..., V] logits of final states."""


_SIGHTS: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Sight]] = weakref.WeakKeyDictionary()


def sight_of(engine: LocalEngine, cached: bool) -> Sight:
    """What the cache of an engine's model can do; each model is asked once.

    Args:
        cached: whether the engine knows how to fill the model's cache.
    """
    plain = engine.policy.plain
    known = _SIGHTS.setdefault(plain, {})
    key = cached, engine.columns is None
    if key not in known:
        window = window_of(plain.config)
        with torch.inference_mode():
            known[key] = _look(engine, window) if cached else Sight(False, False, False, None)
            if not known[key].filled:
                _can_read(engine)
    return known[key]


def _can_read(engine: LocalEngine) -> None:
    try:
        engine.head(engine.from_start([_tokens(engine, 3)]))
    except _FAILURES as error:
        if ran_out(error):
            raise
        name, message = type(engine.policy.plain).__name__, " ".join(str(error).split())[:200]
        raise UserError(f"{name}: this kind of model cannot write here ({type(error).__name__}: {message})") from error


def _look(engine: LocalEngine, window: int | None) -> Sight:
    """Ask the model: first what needs least."""
    if engine.limit is not None and engine.limit < 16:  # too few positions for the question
        return Sight(True, False, False, window)

    def agrees(sight: Sight, play: Any) -> bool:
        engine.adopt(sight)
        return _agrees(engine, play)

    filled = agrees(Sight(True, False, False, window), _unequal)
    gaps = filled and not engine.recurrent and agrees(Sight(True, True, False, window), _with_gaps)
    shares, why = False, ""
    if engine.recurrent:
        why = "it holds a state in their place"
    elif not gaps:
        why = "its cache cannot have holes"
    elif not getattr(engine.policy.plain, "_supports_attention_backend", False):
        why = "its attention is fixed in its code"
    elif window is not None:
        why = f"its layers see windows of {window} tokens"
    elif engine.columns is not None:
        why = "its cache is of a fixed size"
    else:
        usual, engine.worth = engine.worth, 1
        shares = agrees(Sight(True, True, True, None), _with_gaps)
        engine.worth = usual
        why = "" if shares else "it then gives other numbers"
    return Sight(filled, gaps, shares, window, why)


@torch.inference_mode()
def keeps_state(engine: LocalEngine) -> bool:
    """Whether several tokens at once are read on from a state, which some models then forget without a word."""
    tokens = _tokens(engine, 12)

    def play() -> Tensor:
        whole = engine.start([tokens])
        engine.start([tokens[:9]])
        engine.read([tokens[9:]])
        return (engine.logits - whole).norm() / whole.norm()

    # a state that was lost shows in the first digit, an order of summation in the third even in bf16
    apart, _ = asked(engine.policy.plain, play)
    return bool(apart <= 2e-2)


def _tokens(engine: LocalEngine, count: int) -> np.ndarray:
    return ordinary(len(engine.policy.head()[0]), count)


def _unequal(engine: LocalEngine, ids: np.ndarray) -> list[np.ndarray]:
    """Texts of unequal length, written on by two tokens and once let go of."""
    rows = [ids[:3], ids[3:13], ids[13:20]]
    engine.start(rows)
    more = ids[20:23]
    engine.extend(torch.as_tensor(more, device=engine.device))
    engine.select(torch.tensor([2, 0]))
    last = ids[23:25]
    engine.extend(torch.as_tensor(last, device=engine.device))
    return [np.array([*rows[r], more[r], token]) for r, token in zip((2, 0), last, strict=True)]


def _with_gaps(engine: LocalEngine, ids: np.ndarray) -> list[np.ndarray]:
    """The same with a start in common, a fork, chunks of unequal length, and tokens taken back."""
    long = engine.limit is None or engine.limit >= 32
    start, rest = np.split(ids, [9 if long else 8])
    ends, sizes = ((9, 2), (5, 1, 3)) if long else ((3, 1), (2, 1, 2))
    rows = [np.append(start, rest[: ends[0]]), np.append(start, rest[ends[0] : sum(ends)])]
    engine.start(rows)
    engine.select(torch.tensor([1, 0, 1]))
    chunks = np.split(rest[-sum(sizes) :], np.cumsum(sizes)[:-1])
    texts = [np.append(rows[r], chunk) for r, chunk in zip((1, 0, 1), chunks, strict=True)]
    engine.read(chunks)
    engine.select(torch.tensor([2, 0, 1, 1]))
    back = [0, 2, 0, 1]
    engine.rollback(np.array(back))
    texts = [texts[r][: len(texts[r]) - n] for r, n in zip((2, 0, 1, 1), back, strict=True)]
    for token in ids[:2].tolist():
        engine.extend(torch.full((4,), token, device=engine.device))
        texts = [np.append(text, token) for text in texts]
    return texts


def _agrees(engine: LocalEngine, play: Callable[[LocalEngine, np.ndarray], list[np.ndarray]]) -> bool:
    """Whether the engine says of its rows what the model says of each, read alone and from its start."""

    def both() -> tuple[Tensor, Tensor]:
        texts = play(engine, _tokens(engine, 31))
        logits = engine.logits
        return logits, engine.head(torch.cat([engine.from_start([text])[:, :, -1] for text in texts], 1))

    try:
        (logits, wanted), exact = asked(engine.policy.plain, both)
    except _FAILURES as error:
        if ran_out(error):  # which says nothing of the model
            raise
        log.debug("%s: %s: %s", type(engine.policy.plain).__name__, play.__name__, error)
        return False
    # attention in another order rounds differently, and that is all that it may do
    within = 1e-4 if exact else 2e-2
    apart = (logits - wanted).nan_to_num(0.0, 0.0, 0.0)
    size = (wanted - wanted.mean(-1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
    return bool((apart.norm(dim=-1) <= within * size.norm(dim=-1).clamp(min=1e-3 * wanted.norm(dim=-1))).all())


def positions_of(config: Any) -> int | None:
    """Positions that a model has; None where there is no limit."""
    names = (
        ("max_position_embeddings", "max_seq_len")
        if getattr(config, "model_type", "") == "mpt"
        else ("max_position_embeddings",)
    )
    limits = [getattr(config, name, None) for name in names]
    return next((int(n) for n in limits if isinstance(n, int) and n > 0), None)


def window_of(config: Any) -> int | None:
    """Tokens that the layers with the shortest sight look back on; None where all see everything.

    Windows are counted in columns of the cache, so hidden columns would shorten them. Llama 4 weighs attention by the
    column that a token stands in, from a number of columns on.
    """
    sizes = []
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is None or set(kinds) - _FULL:
        names = [name for name in config.to_dict() if _WINDOW.match(name)]
        if not getattr(config, "use_sliding_window", True):
            names = [name for name in names if name != "sliding_window"]
        sizes += [getattr(config, name, None) for name in names]
    if getattr(config, "attn_temperature_tuning", None):
        sizes.append(getattr(config, "floor_scale", None))
    sizes = [v for value in sizes for v in (value if isinstance(value, list | tuple) else [value])]
    return min((int(w) for w in sizes if isinstance(w, int | float) and w > 0), default=None)


def reads_from_start(model: Any, ids: Tensor, **named: Any) -> Tensor:
    """Final states [B, L, D] of whole texts of one length, read as the model reads them by itself."""
    parameters = inspect.signature(type(model).forward).parameters
    given = {name: value for name, value in named.items() if name in parameters}
    if "use_cache" in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        given["use_cache"] = False
    return model(input_ids=ids, **given).last_hidden_state
