"""The engine over a model of transformers, its cache, and adapters with their base in one forward.

Shapes: m models, B rows, L tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2sg.decoding.engine import Count
from w2sg.decoding.packed import pack
from w2sg.decoding.prefix import Levels, Prefix, attending
from w2sg.errors import UserError
from w2sg.language import Policy
from w2sg.logprobs import token_logprobs

log = logging.getLogger(__name__)

# of models that have been asked: whether their rows may share their prompts' keys
_SHARES: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _cache(config: Any) -> Any:
    """A cache that appends in place; transformers' own copies all it holds at every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        _buffers: tuple[Tensor, Tensor] | None = None
        _rows: Tensor | None = None  # to go on with; copied only when there is more to hold

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            old = self.get_seq_length()
            new = old + keys.shape[-2]
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            if self._buffers is None or self._rows is not None or self._buffers[0].shape[-2] < new:
                room = new + max(64, new // 2)
                self._buffers = tuple(
                    self._moved(held, part.new_empty((*part.shape[:-2], room, part.shape[-1])))
                    for part, held in zip((keys, values), (self.keys, self.values), strict=True)
                )
                self._rows = None
            for buffer, part in zip(self._buffers, (keys, values), strict=True):
                buffer[..., old:new, :] = part
            self.keys, self.values = (buffer[..., :new, :] for buffer in self._buffers)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            self._rows = indices if self._rows is None else self._rows[indices]

        def held(self) -> tuple[Tensor, Tensor]:
            """Keys and values of the rows that go on."""
            both = self.keys, self.values
            return both if self._rows is None else tuple(part.index_select(0, self._rows) for part in both)

        def _moved(self, held: Tensor, buffer: Tensor) -> Tensor:
            if not self.get_seq_length():
                return buffer
            start = buffer[..., : held.shape[-2], :]
            if self._rows is None:
                start.copy_(held)
            else:
                torch.index_select(held, 0, self._rows, out=start)
            return buffer

    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _select(cache: Any, rows: Tensor) -> None:
    """Go on with these rows of a cache alone."""
    for layer in cache.layers:
        # layers with a state have no other way to do it, or one that forgets the state; static ones have no other
        if _has_state(layer) or not hasattr(layer, "batch_select_indices"):
            layer.reorder_cache(rows)
        else:
            layer.batch_select_indices(rows)


def _has_state(layer: Any) -> bool:
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return isinstance(layer, LinearAttentionCacheLayerMixin)


def _cache_argument(model: Any) -> str:
    """What a model calls its cache; some that have a state swallow any other name without a word."""
    known = inspect.signature(type(model).forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in known:
            return name
    raise UserError(f"{type(model).__name__}: it takes no cache that decoding knows how to fill")


class TransformersEngine:
    """One model of transformers; or a base model and its adapters as two, which share every read of the weights.

    Rows carry their own positions. They are padded on the left at first; later, tokens that a row lacks, or that were
    taken back, are columns of the cache that it does not see. What all prompts begin with, the system prompt of a chat
    template say, is read once.

    A cache that cannot have such holes (recurrent states, or a window of attention that the rows have outgrown) is made
    anew from all tokens of the rows where it would need them, which is said once.

    Args:
        policy: the model; it must not be in training mode.
        base_too: for a policy with adapters: the logits are those of the adapted model, then those of its base.
        columns: tokens that the cache has room for, all at once: the static cache of transformers, whose tensors keep
            their shape, as compiled models ask for. None lets it grow, which is quicker for all others, and lets forks
            share what they have in common.
    """

    worth = 16  # columns of the cache, from which on a fork shares them: fewer are sooner copied

    def __init__(self, policy: Policy, base_too: bool = False, columns: int | None = None):
        if base_too and not policy.adapted:
            raise ValueError("base_too needs a model with adapters")
        self.policy, self.base_too, self.columns = policy, base_too, columns
        pack(policy)
        config = policy.plain.config
        self.device = next(policy.parameters()).device
        self.limit = getattr(config, "max_position_embeddings", None)
        self.count = Count()
        self._said = False
        self._cache_argument = _cache_argument(policy.plain)
        self._recurrent = getattr(policy.plain, "_is_stateful", False) or any(map(_has_state, self._empty().layers))
        self._window = _window(config)
        self._restarts = False
        if self._recurrent:
            self._restarts = not self._goes_on()
        self._shares = False
        if not self._recurrent and self._window is None and columns is None:
            if policy.plain not in _SHARES:
                _SHARES[policy.plain] = self._sharing_works()
            self._shares = _SHARES[policy.plain]
        self.count = Count()

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self.cache, self._owing, self._holes = self._empty(), False, False
        self._prefixes, self._gaps = [], False
        # what fills up shorter prompts comes between their start and their end where the start is read once
        seen = self._window is None or max(map(len, prompts)) <= self._window
        shared = _common_start(prompts) if seen and not self._recurrent else 0
        if shared:
            start = torch.as_tensor(np.asarray(prompts[0][:shared]), device=self.device)[None]
            self.ids, self.mask = start, torch.ones_like(start)
            self.next = self.mask.sum(1)
            self._forward(start, torch.arange(shared, device=self.device)[None])
            self._owed = self.next.new_full((1,), -1)
            self._take(torch.zeros(len(prompts), dtype=torch.long, device=self.device))
        ids, own = _left([np.asarray(prompt[shared:]) for prompt in prompts], self.device)
        self.ids = torch.cat([self.ids, ids], 1) if shared else ids
        self.mask = torch.cat([own.new_ones((len(prompts), shared)), own], 1)
        self._holes = bool(shared) and bool((own == 0).any())
        self.next = self.mask.sum(1)
        self._owed = self.next.new_full((len(prompts),), -1)
        self.count.prompt += sum(map(len, prompts))
        return self._forward(ids, shared + (own.cumsum(1) - 1).clamp(min=0))

    def extend(self, tokens: Tensor) -> Tensor:
        if self._owing or (self._holes and self._holes_hurt(1)):
            self.read([np.array([token]) for token in tokens.tolist()])
            return self.logits
        self.count.written += len(tokens)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), 1))], 1)
        # rows that have ended may go on for a while, and nobody looks at what they say
        positions = self._within(self.next[:, None])
        self.next = positions[:, 0] + 1
        return self._forward(tokens[:, None], positions)

    @torch.inference_mode()
    def read(self, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
        owed = self._owed.tolist()
        whole = [
            np.array([token, *chunk] if token >= 0 else chunk, np.int64)
            for token, chunk in zip(owed, chunks, strict=True)
        ]
        if not max(map(len, whole)):
            return [np.zeros((0, len(self.logits)), np.float32) for _ in whole]
        self._owed, self._owing = torch.full_like(self._owed, -1), False
        self.count.given += sum(map(len, whole))
        ids, own = (x.flip(1) for x in _left([row[::-1] for row in whole], self.device))  # filled on the right
        sizes, before = own.sum(1), self.logits
        # what comes after the last token of a full reply is nobody's business, so it may stand one past the end
        if self.limit is not None and int((self.next + sizes).max()) > self.limit + 1:
            raise self._too_long(int((self.next + sizes).max()))
        self._gaps = self._gaps or bool((own == 0).any())
        self._holes = self._holes or self._gaps or (self._restarts and ids.shape[1] > 1)
        if self._holes and self._holes_hurt(ids.shape[1]):
            states = self._read_anew(whole, sizes, ids.shape[1])
        else:
            self.ids, self.mask = torch.cat([self.ids, ids], 1), torch.cat([self.mask, own], 1)
            positions = self.next[:, None] + (own.cumsum(1) - 1).clamp(min=0)
            self.next = self.next + sizes
            states = self._states(ids, self._within(positions))
        rows = torch.arange(len(whole), device=self.device)
        last = self.policy.logits(states[:, rows, (sizes - 1).clamp(min=0)])
        self.logits = torch.where((sizes > 0)[None, :, None], last, before)
        found = self._token_values(states, before, ids, own)
        return [part[int(token >= 0) :] for token, part in zip(owed, found, strict=True)]

    def rollback(self, counts: np.ndarray) -> None:
        counts = torch.as_tensor(np.asarray(counts), device=self.device)
        taken = counts > 0
        if not bool(taken.any()):
            return
        # what a row then ends with is read again with what follows, since the logits after it were not kept
        drop = torch.where(taken, counts - (self._owed >= 0).long() + 1, 0)
        from_right = self.mask.flip(1).cumsum(1).flip(1)
        column = ((from_right == drop[:, None]) & (self.mask == 1)).int().argmax(1)
        self._owed = torch.where(taken, self.ids.gather(1, column[:, None])[:, 0], self._owed)
        self.mask = torch.where(from_right > drop[:, None], self.mask, 0)
        self.next = self.mask.sum(1)
        self._owing = self._holes = self._gaps = True
        end = 0
        for prefix in self._prefixes:
            begin, end = end, end + len(prefix)
            prefix.padded = prefix.padded or bool((self.mask[:, begin:end] == 0).any())

    def select(self, rows: Tensor) -> None:
        if self._shares and len(rows) > len(self.mask) and self._columns() >= self.worth:
            self._share()
        self._take(rows.to(self.device))

    def _take(self, rows: Tensor) -> None:
        count = len(self.mask)
        self.ids, self.mask, self.next, self._owed = (x[rows] for x in (self.ids, self.mask, self.next, self._owed))
        self.logits = self.logits[:, rows]
        # columns in which no row has a token any more are kept: cutting them would copy the cache again
        rows = torch.cat([rows, rows + count]) if self.base_too else rows
        for prefix in self._prefixes:
            prefix.select(rows)
        if not self._prefixes or self.cache.get_seq_length():  # else nothing was read since the fork
            _select(self.cache, rows)

    def _columns(self) -> int:
        """Tokens that the cache holds for each row by itself."""
        return self.mask.shape[1] - sum(map(len, self._prefixes))

    def _share(self) -> None:
        """What has been read so far becomes what rows share: first the prompts, then what came after them."""
        held = [layer.held() for layer in self.cache.layers]
        if len(self._prefixes) == 2:
            before = self._prefixes.pop().rows()
            held = [
                tuple(torch.cat(pair, 2) for pair in zip(*both, strict=True)) for both in zip(before, held, strict=True)
            ]
        rows, begin = torch.arange(len(held[0][0]), device=self.device), sum(map(len, self._prefixes))
        self._prefixes.append(Prefix(held, rows, bool((self.mask[:, begin:] == 0).any())))
        self.cache, self._gaps = self._empty(), False

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _empty(self) -> Any:
        """A cache without tokens."""
        config = self.policy.plain.config
        if self.columns is None:
            return _cache(config)
        from transformers import StaticCache

        return StaticCache(config=config, max_cache_len=self.columns)

    def _run(self, model: Any, ids: Tensor, positions: Tensor) -> Any:
        self.count.computed += ids.numel()
        mask = self.mask
        if self.columns is not None and mask.shape[1] > self.columns:
            raise ValueError(f"{mask.shape[1]} tokens do not fit into a cache of {self.columns} columns")
        if self._cache_argument == "cache_params":  # models without attention ask for the mask of the new tokens alone
            mask = mask[:, -ids.shape[1] :]
        if self.base_too:
            ids, positions, mask = (torch.cat([x, x]) for x in (ids, positions, mask))
        with contextlib.ExitStack() as stack:
            if self.base_too:
                stack.enter_context(_first_half_adapted(self.policy.model))
            if self._prefixes:
                levels = Levels(self._prefixes, mask, ids.shape[1], self._gaps)
                stack.enter_context(attending(self.policy.plain.config, levels))
            return model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                **{self._cache_argument: self.cache},
            )

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits after the last of these tokens, [m, B, V]."""
        if self.limit is not None and int(self.next.max()) > self.limit:
            raise self._too_long(int(self.next.max()))
        found = self._run(self.policy.plain.base_model, ids, positions).last_hidden_state
        last = self.policy.ready(found[:, -1])
        self.logits = self.policy.logits(last).view(2 if self.base_too else 1, len(ids), -1)
        return self.logits

    def _within(self, positions: Tensor) -> Tensor:
        return positions if self.limit is None else positions.clamp(max=self.limit - 1)

    def _too_long(self, tokens: int) -> UserError:
        return UserError(
            f"a prompt of {tokens} tokens is longer than the {self.limit} positions of the model; lower max_length, or "
            f"max_new_tokens if its reply is read with it ({type(self.policy.plain).__name__})"
        )

    def _states(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Final states of these tokens, [m, B, L, D]."""
        found = self.policy.ready(self._run(self.policy.plain.base_model, ids, positions).last_hidden_state)
        return found.view(2 if self.base_too else 1, *ids.shape, -1)

    def _token_values(self, states: Tensor, before: Tensor, ids: Tensor, own: Tensor) -> list[np.ndarray]:
        """[B] of [n, m] log-probabilities of given tokens, the first by the logits before them."""
        models, places = len(states), own[:, 1:].bool()
        found = torch.empty((models, *ids.shape), device=ids.device)
        found[:, :, 0] = before.log_softmax(-1).gather(2, ids[:, :1].expand(models, -1, -1))[..., 0]
        weight, bias = self.policy.head()
        targets = ids[:, 1:][places]
        for model in range(models):
            values = token_logprobs(states[model, :, :-1][places], weight, targets, bias, softcap=self.policy.softcap)
            found[model, :, 1:][places] = values.float()
        found, sizes = found.permute(1, 2, 0).cpu().numpy(), own.sum(1).tolist()
        return [row[:n] for row, n in zip(found, sizes, strict=True)]

    # -- caches that have no holes ------------------------------------------------------------------------------------

    def _holes_hurt(self, more: int) -> bool:
        return self._recurrent or (self._window is not None and self.ids.shape[1] + more > self._window)

    def _goes_on(self) -> bool:
        """Whether several tokens at once are read on from a state, which some models then forget without a word."""
        tokens = np.arange(1, 13)
        with torch.inference_mode():
            whole = self.start([tokens])
            self.start([tokens[:9]])
            self.read([tokens[9:]])
        # a state that was lost shows in the first digit, an order of summation in the third even in bf16
        return bool((self.logits - whole).norm() <= 2e-2 * whole.norm())

    def _sharing_works(self) -> bool:
        """Whether the model says the same with a shared prefix as without."""
        if not getattr(self.policy.plain, "_supports_attention_backend", False):
            return False
        prompts, more = [np.arange(1, 13), np.arange(1, 6)], [np.arange(5, 8), np.arange(1, 2), np.arange(2, 4)]
        found, usual = [], self.worth
        for self.worth in (1, usual):
            self._shares = self.worth == 1
            try:
                with torch.inference_mode():
                    self.start(prompts)
                    self.select(torch.tensor([0, 0, 1]))
                    self.read(more)
                    self.extend(torch.tensor([3, 4, 5], device=self.device))
                    self.select(torch.tensor([1, 0, 2, 2]))
                    self.extend(torch.tensor([3, 4, 5, 6], device=self.device))
            except (NotImplementedError, AttributeError, KeyError, TypeError) as error:
                log.debug("%s: prompts are not shared between rows: %s", type(self.policy.plain).__name__, error)
                return False
            found.append(self.logits)
        # attention in another order rounds differently, and that is all it may do
        within = 1e-4 if self.policy.plain.dtype == torch.float32 else 2e-2
        return bool((found[1] - found[0]).norm() <= within * found[0].norm())

    def _read_anew(self, chunks: Sequence[np.ndarray], sizes: Tensor, longest: int) -> Tensor:
        """Read all tokens of the rows and these from the start; the states of these, filled on the right."""
        if not self._said:
            kind = "its state" if self._recurrent else f"its window of {self._window} tokens"
            log.warning(
                "%s: %s cannot be cut back, so that texts are read anew from their start; this is slower",
                type(self.policy.plain).__name__,
                kind,
            )
            self._said = True
        kept = [row[seen.bool()].cpu().numpy() for row, seen in zip(self.ids, self.mask, strict=True)]
        self.count.given += sum(map(len, kept))
        self.cache = self._empty()
        self.ids, self.mask = _left([np.append(a, b) for a, b in zip(kept, chunks, strict=True)], self.device)
        self.next, self._holes = self.mask.sum(1), False
        states = self._states(self.ids, self._within((self.mask.cumsum(1) - 1).clamp(min=0)))
        place = self.ids.shape[1] - sizes[:, None] + torch.arange(longest, device=self.device)
        place = place.clamp(max=self.ids.shape[1] - 1)
        return states[:, torch.arange(len(place), device=self.device)[:, None], place]


def _left(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens, filled on the left, and where they have tokens: [B, L] each."""
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    own = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.from_numpy(np.array(tokens, np.int64))
        own[row, longest - len(tokens) :] = 1
    return ids.to(device), own.to(device)


def _window(config: Any) -> int | None:
    """Tokens that the layers with the shortest sight look back on; None where all see everything."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not {"sliding_attention", "chunked_attention"} & set(kinds):
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((w for w in windows if w), default=None)


def _common_start(prompts: Sequence[np.ndarray], worth: int = 8) -> int:
    """Tokens that all prompts begin with, one short of the shortest; 0 where too few are worth a forward."""
    if len(prompts) < 2:
        return 0
    first, shared = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        differs = np.flatnonzero(np.asarray(first[:shared]) != np.asarray(prompt[:shared]))
        shared = int(differs[0]) if len(differs) else shared
    return shared if shared >= worth else 0


@contextlib.contextmanager
def _first_half_adapted(model: Any) -> Iterator[None]:
    """Low-rank adapters act on the first half of the rows alone, in place.

    peft has the same (``adapter_names``), but gathers and scatters the rows of every layer by index.
    """
    from peft.tuners.lora import LoraLayer

    adapter = model.active_adapter

    def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        half = len(output) // 2
        low = layer.lora_A[adapter](inputs[0][:half])
        output[:half].add_(layer.lora_B[adapter](low), alpha=layer.scaling[adapter])

    handles = [
        layer.register_forward_hook(add)
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    ]
    try:
        with model.disable_adapter():
            yield
    finally:
        for handle in handles:
            handle.remove()
