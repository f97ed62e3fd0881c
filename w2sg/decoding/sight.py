"""What a model's cache can do in a batch: found out once, by letting it read the same with and without filling.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from w2sg.errors import UserError

if TYPE_CHECKING:
    from w2sg.decoding.transformers_engine import TransformersEngine

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
    """

    filled: bool
    gaps: bool
    shares: bool
    window: int | None


_FOUND: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Sight]] = weakref.WeakKeyDictionary()


def sight_of(engine: TransformersEngine, cached: bool) -> Sight:
    """What the cache of an engine's model can do; each model is asked once.

    Args:
        cached: whether the engine knows how to fill the model's cache.
    """
    plain = engine.policy.plain
    found = _FOUND.setdefault(plain, {})
    key = cached, engine.columns is None
    if key not in found:
        window = window_of(plain.config)
        with torch.inference_mode():
            found[key] = _look(engine, window) if cached else Sight(False, False, False, None)
            if not found[key].filled:
                _can_read(engine)
    return found[key]


def _can_read(engine: TransformersEngine) -> None:
    try:
        engine.head(engine.from_start([_tokens(engine, 3)]))
    except _FAILURES as error:
        name, said = type(engine.policy.plain).__name__, " ".join(str(error).split())[:200]
        raise UserError(f"{name}: this kind of model cannot write here ({type(error).__name__}: {said})") from error


def _look(engine: TransformersEngine, window: int | None) -> Sight:
    """Ask the model: first what needs least."""
    if engine.limit is not None and engine.limit < 16:  # too few positions for the question
        return Sight(True, False, False, window)

    def agrees(sight: Sight, play: Any) -> bool:
        engine.adopt(sight)
        return _agrees(engine, play)

    filled = agrees(Sight(True, False, False, window), _unequal)
    gaps = filled and not engine.recurrent and agrees(Sight(True, True, False, window), _with_gaps)
    asks = getattr(engine.policy.plain, "_supports_attention_backend", False)
    shares = False
    if gaps and asks and window is None and engine.columns is None:
        usual, engine.worth = engine.worth, 1
        shares = agrees(Sight(True, True, True, None), _with_gaps)
        engine.worth = usual
    return Sight(filled, gaps, shares, window)


def _tokens(engine: TransformersEngine, count: int) -> np.ndarray:
    """Different ids from all over the vocabulary, without the lowest, which tend to be special."""
    vocabulary = len(engine.policy.head()[0])
    low = min(5, vocabulary - 1)
    return low + np.random.default_rng(0).permutation(max(1, vocabulary - low))[np.arange(count) % (vocabulary - low)]


def _unequal(engine: TransformersEngine, ids: np.ndarray) -> list[np.ndarray]:
    """Texts of unequal length, written on by two tokens and once let go of."""
    rows = [ids[:3], ids[3:13], ids[13:20]]
    engine.start(rows)
    more = ids[20:23]
    engine.extend(torch.as_tensor(more, device=engine.device))
    engine.select(torch.tensor([2, 0]))
    last = ids[23:25]
    engine.extend(torch.as_tensor(last, device=engine.device))
    return [np.array([*rows[r], more[r], token]) for r, token in zip((2, 0), last, strict=True)]


def _with_gaps(engine: TransformersEngine, ids: np.ndarray) -> list[np.ndarray]:
    """The same with a start in common, a fork, chunks of unequal length, and tokens taken back."""
    long = engine.limit is None or engine.limit >= 32
    start, rest = np.split(ids, [9 if long else 8])
    own, sizes = ((9, 2), (5, 1, 3)) if long else ((3, 1), (2, 1, 2))
    rows = [np.append(start, rest[: own[0]]), np.append(start, rest[own[0] : sum(own)])]
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


def _agrees(engine: TransformersEngine, play: Callable[[TransformersEngine, np.ndarray], list[np.ndarray]]) -> bool:
    """Whether the engine says of its rows what the model says of each, read alone and from its start."""
    try:
        texts = play(engine, _tokens(engine, 31))
        found = engine.logits
        wanted = torch.cat([engine.from_start([text])[:, :, -1] for text in texts], 1)
    except _FAILURES as error:
        log.debug("%s: %s: %s", type(engine.policy.plain).__name__, play.__name__, error)
        return False
    wanted = engine.head(wanted)
    # attention in another order rounds differently, and that is all that it may do
    within = 1e-4 if engine.policy.plain.dtype == torch.float32 else 2e-2
    apart = (found - wanted).nan_to_num(0.0, 0.0, 0.0)
    size = (wanted - wanted.mean(-1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
    return bool((apart.norm(dim=-1) <= within * size.norm(dim=-1).clamp(min=1e-3 * wanted.norm(dim=-1))).all())


def positions_of(config: Any) -> int | None:
    """Positions that a model has; None where there is no limit."""
    names = (
        ("max_position_embeddings", "max_seq_len")
        if getattr(config, "model_type", "") == "mpt"
        else ("max_position_embeddings",)
    )
    found = [getattr(config, name, None) for name in names]
    return next((int(n) for n in found if isinstance(n, int) and n > 0), None)


def window_of(config: Any) -> int | None:
    """Tokens that the layers with the shortest sight look back on; None where all see everything.

    Windows are counted in columns of the cache, so hidden columns would shorten them. Llama 4 weighs attention by the
    column that a token stands in, from a number of columns on.
    """
    found = []
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is None or set(kinds) - _FULL:
        names = [name for name in config.to_dict() if _WINDOW.match(name)]
        if not getattr(config, "use_sliding_window", True):
            names = [name for name in names if name != "sliding_window"]
        found += [getattr(config, name, None) for name in names]
    if getattr(config, "attn_temperature_tuning", None):
        found.append(getattr(config, "floor_scale", None))
    found = [v for value in found for v in (value if isinstance(value, list | tuple) else [value])]
    return min((int(w) for w in found if isinstance(w, int | float) and w > 0), default=None)


def reads_from_start(model: Any, ids: Tensor, **named: Any) -> Tensor:
    """Final states [B, L, D] of whole texts of one length, read as the model reads them by itself."""
    known = inspect.signature(type(model).forward).parameters
    given = {name: value for name, value in named.items() if name in known}
    if "use_cache" in known or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        given["use_cache"] = False
    return model(input_ids=ids, **given).last_hidden_state


def by_length(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Places of equal lengths."""
    found: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        found.setdefault(length, []).append(place)
    return found
