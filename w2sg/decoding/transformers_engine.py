"""The engine over a model of transformers, its cache, and adapters with their base in one forward.

Shapes: m models (2 where the base is read beside its adapters, else 1), B rows, C columns of the cache, L new tokens,
D width of a state, V tokens in the vocabulary.

A row's tokens stand in some columns of the cache, in order; the mask [B, C] says in which. So a position is a count of
a row's tokens and not the number of a column, and tokens are taken back by the mask alone: the cache is not touched.
How many tokens a row has, and whether it lacks columns, the host counts for itself, so that it need not ask the device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2sg.decoding import waits
from w2sg.decoding.caches import cache_argument, empty_cache, has_state, select_rows
from w2sg.decoding.engine import Count
from w2sg.decoding.filling import by_length, common_start, fill_left, in_parts
from w2sg.decoding.given import given_values
from w2sg.decoding.hidden import columns_hidden
from w2sg.decoding.packed_layers import pack
from w2sg.decoding.prefix_cache import Levels, Prefix, attending
from w2sg.decoding.said import once, slower
from w2sg.decoding.sight import Sight, keeps_state, positions_of, reads_from_start, sight_of
from w2sg.errors import UserError
from w2sg.models.policy import Policy
from w2sg.models.rope import borders, rows_by_themselves, sides

log = logging.getLogger(__name__)
AT_ONCE = 2**16  # tokens of prompts that go through a model together: their activations take memory


class TransformersEngine:
    """One model of transformers; or a base model and its adapters as two, which share every read of the weights.

    Rows carry their own positions. They are padded on the left at first; later, tokens that a row lacks, or that were
    taken back, are columns of the cache that it does not see. What all prompts begin with, the system prompt of a chat
    template say, is read once.

    A cache that cannot have such holes (recurrent states, distances that count columns, or a window of attention that
    the rows have outgrown) is made anew from all tokens of the rows where it would need them, and so are keys at a
    length at which the model turns them otherwise. A model whose rows cannot be filled up at all, or whose cache is
    unknown, reads everything from its start, rows of equal length together. Each is found out by `w2sg.decoding.sight`
    and said once.

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
        self.limit = positions_of(config)
        self.name = f"{type(policy.plain).__name__} in {str(policy.plain.dtype).removeprefix('torch.')}"
        self.writable = None if policy.writable is None else policy.writable.to(self.device)
        self.count = Count()
        rows_by_themselves(policy.plain)
        self._turns = bool(borders(config))  # rotary frequencies change with the length of a text
        self._cache_argument = cache_argument(policy.plain)
        states = self._states_of_cache()
        self.recurrent = getattr(policy.plain, "_is_stateful", False) or any(states or ())
        self._unsound: Tensor | None = None  # whether logits were no numbers, where the device is asked later
        self._restarts = False  # a state is forgotten where several tokens are read on from it
        self.adopt(sight_of(self, cached=self._cache_argument is not None and states is not None))
        if self.recurrent and self._fills:
            self._restarts = not keeps_state(self)
        self.count = Count()
        if not self._fills:
            slower(policy.plain, "rows of unequal length cannot stand in one batch of it, or its cache is unknown")

    def write_below(self, count: int) -> None:
        """Write ids below this number alone, where another model that has no more is to read them."""
        rows = len(self.policy.head()[0])
        if count < rows:
            mask = torch.arange(rows, device=self.device) < count
            self.writable = mask if self.writable is None else self.writable & mask

    def adopt(self, sight: Sight) -> None:
        """Read as far as this goes."""
        self._fills, self._gaps_work, self._window = sight.filled, sight.gaps, sight.window
        self._shares, self._why = sight.shares, sight.why

    def _states_of_cache(self) -> list[bool] | None:
        """Which layers of the cache hold a state; None where no cache can be made."""
        try:
            return [has_state(layer) for layer in self._empty().layers]
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            log.debug("%s: no cache: %s", type(self.policy.plain).__name__, error)
            return None

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self._owing = False  # whether a row owes a token, `_owed` [B]: its last one, to be read again; -1 for none
        self._holes = False  # whether a row lacks a column between its tokens
        self._gaps = False  # whether a row lacks a column after those that rows share
        self._prefixes: list[Prefix] = []  # columns that rows share, at most two levels; they stand before the cache's
        if not self._fills:
            return self._start_from_start(prompts)
        self.cache = self._empty()
        # What fills up shorter prompts comes between their start and their end where the start is read once. A window
        # that counts columns would then see less of a short prompt, so the start is shared only inside of it.
        seen = self._window is None or max(map(len, prompts)) <= self._window
        shared = common_start(prompts) if seen and self._gaps_work else 0
        # nor is it shared where it would be turned by other frequencies than the whole prompts are
        sides = self._side_of(np.array([len(p) for p in prompts] + [shared]))
        shared = shared if bool((sides == sides[-1]).all()) else 0
        if shared:
            start = torch.as_tensor(np.asarray(prompts[0][:shared]), device=self.device)[None]
            self._hold(start, torch.ones_like(start), [shared])
            self._forward(start, torch.arange(shared, device=self.device)[None])
            self._take(torch.zeros(len(prompts), dtype=torch.long))
        ids, mask = fill_left([np.asarray(prompt[shared:]) for prompt in prompts], self.device)
        whole = torch.cat([self.ids, ids], 1) if shared else ids
        self._hold(whole, torch.cat([mask.new_ones((len(prompts), shared)), mask], 1), [len(p) for p in prompts])
        self._holes = bool(shared) and bool(self._lacks.any())
        self.count.prompt += sum(map(len, prompts))
        return self._forward(ids, shared + (mask.cumsum(1) - 1).clamp(min=0))

    def _hold(self, ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> None:
        """Rows of these tokens, [B, C] each, so many of each row, of which none owes any."""
        self.ids, self.mask, self.next = ids, mask, mask.sum(1)
        self.lengths = np.asarray(lengths, np.int64)  # `next`, on the host
        self._lacks = self.lengths < ids.shape[1]  # rows that lack a column
        self._side, self._owed = self._side_of(self.lengths), np.full_like(self.lengths, -1)

    def extend(self, tokens: Tensor) -> Tensor:
        if self._owing or (self._holes and self._holes_hurt(1)) or not self._fills or self._turned(self.lengths + 1):
            self.read([np.array([token]) for token in tokens.tolist()])
            return self.logits
        self.count.written += len(tokens)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), 1))], 1)
        # rows that have ended may go on for a while, and nobody looks at what they say
        positions = self._within(self.next[:, None])
        self.next = positions[:, 0] + 1
        self.lengths = np.minimum(self.lengths, np.inf if self.limit is None else self.limit - 1).astype(np.int64) + 1
        return self._forward(tokens[:, None], positions)

    @torch.inference_mode()
    def read(self, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
        # a row that owes its last token reads it first: that gives the logits which were not kept
        owed = self._owed.tolist()
        whole = [
            np.array([token, *chunk] if token >= 0 else chunk, np.int64)
            for token, chunk in zip(owed, chunks, strict=True)
        ]
        counts = np.array([len(row) for row in whole])
        if not counts.max():
            return [np.zeros((0, len(self.logits)), np.float32) for _ in whole]
        self._owed, self._owing = np.full_like(self._owed, -1), False
        self.count.given += int(counts.sum())
        ids, mask = (x.flip(1) for x in fill_left([row[::-1] for row in whole], self.device))  # filled on the right
        sizes, before = mask.sum(1), self.logits  # [B], and [m, B, V] of the first token
        # what comes after the last token of a full reply is nobody's business, so it may stand one past the end
        self._check_fits(self.lengths + counts, 1)
        short = counts < ids.shape[1]
        self._gaps = self._gaps or bool(short.any())
        self._holes = self._holes or self._gaps or (self._restarts and ids.shape[1] > 1)
        turned = self._turned(self.lengths + counts)
        if not self._fills or turned or (self._holes and self._holes_hurt(ids.shape[1])):
            states = self._read_anew(whole, sizes, ids.shape[1], turned)
        else:
            self.ids, self.mask = torch.cat([self.ids, ids], 1), torch.cat([self.mask, mask], 1)
            self._lacks = self._lacks | short
            positions = self.next[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
            self.next, self.lengths = self.next + sizes, self.lengths + counts
            states = self._states(ids, self._within(positions))
        rows = torch.arange(len(whole), device=self.device)
        last = self.head(states[:, rows, (sizes - 1).clamp(min=0)])
        self.logits = self._checked(torch.where((sizes > 0)[None, :, None], last, before))
        values = given_values(self.policy, states, before, ids, counts)
        self.check()
        return [part[int(token >= 0) :] for token, part in zip(owed, values, strict=True)]  # not of what was owed

    def rollback(self, counts: np.ndarray) -> None:
        counts = np.asarray(counts)
        taken = counts > 0
        if not taken.any():
            return
        # What a row then ends with is read again with what follows, since the logits after it were not kept: so one
        # token more is dropped, but for what a row owed already and has dropped.
        dropped = np.where(taken, counts - (self._owed >= 0) + 1, 0)
        drop = waits.sent(dropped, self.device)
        from_right = self.mask.flip(1).cumsum(1).flip(1)  # [B, C] tokens of a row from this column on
        column = ((from_right == drop[:, None]) & (self.mask == 1)).int().argmax(1)
        self._owed = np.where(taken, self.ids.gather(1, column[:, None])[:, 0].cpu().numpy(), self._owed)
        self.mask = torch.where(from_right > drop[:, None], self.mask, 0)
        self.next, self.lengths = self.mask.sum(1), self.lengths - dropped
        self._lacks = self._lacks | (dropped > 0)
        self._owing = self._holes = self._gaps = True
        end = 0
        for prefix in self._prefixes:
            begin, end = end, end + len(prefix)
            prefix.padded = prefix.padded or bool((self.mask[:, begin:end] == 0).any())

    def select(self, rows: Tensor) -> None:
        if len(rows) > len(self.mask) and self._fills and self._columns() >= self.worth:
            if self._shares:
                self._share()
            elif self._why:
                once(self.policy.plain, f"rows that go on from one prompt copy its keys each, since {self._why}")
        self._take(rows if rows.device.type == "cpu" else rows.cpu())

    def _take(self, rows: Tensor) -> None:
        """Go on with these rows, which the host knows."""
        count, there, rows = len(self.mask), rows.numpy(), waits.sent(rows.numpy(), self.device)
        self.ids, self.mask, self.next = (x[rows] for x in (self.ids, self.mask, self.next))
        self.lengths, self._lacks, self._owed, self._side = (
            x[there] for x in (self.lengths, self._lacks, self._owed, self._side)
        )
        self.logits = self.logits[:, rows]
        if not self._fills:
            return
        # columns in which no row has a token any more are kept: cutting them would copy the cache again
        both = np.concatenate([there, there + count]) if self.base_too else there
        for prefix in self._prefixes:
            prefix.select(both)
        if not self._prefixes or self.cache.get_seq_length():  # else nothing was read since the fork
            select_rows(self.cache, waits.sent(both, self.device) if self.base_too else rows)

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
        rows, begin = np.arange(len(held[0][0])), sum(map(len, self._prefixes))
        self._prefixes.append(Prefix(held, rows, bool((self.mask[:, begin:] == 0).any())))
        self.cache, self._gaps = self._empty(), False

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _empty(self) -> Any:
        return empty_cache(self.policy.plain.config, self.columns)

    def _run(self, model: Any, ids: Tensor, positions: Tensor, columns: int | None = None) -> Any:
        self.count.computed += ids.numel()
        mask = self.mask[:, :columns]  # up to the last of these tokens
        if self.columns is not None and mask.shape[1] > self.columns:
            raise ValueError(f"{mask.shape[1]} tokens do not fit into a cache of {self.columns} columns")
        if self._cache_argument == "cache_params":  # models without attention ask for the mask of the new tokens alone
            mask = mask[:, -ids.shape[1] :]
        if self.base_too:
            ids, positions, mask = (torch.cat([x, x]) for x in (ids, positions, mask))
        with contextlib.ExitStack() as stack:
            if self.base_too:
                stack.enter_context(self.policy.base_beside())
            if self._prefixes:
                levels = Levels(self._prefixes, mask, ids.shape[1], self._gaps)
                stack.enter_context(attending(self.policy.plain.config, levels))
            else:
                stack.enter_context(columns_hidden(self.policy.plain.config, bool(self._lacks.any()), self.columns))
            return model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                **{self._cache_argument: self.cache},
            )

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits after the last of these tokens, [m, B, V]."""
        self._check_fits(self.lengths)
        before, at_once = self.mask.shape[1] - ids.shape[1], AT_ONCE // (2 if self.base_too else 1)
        # a state may be forgotten between parts, and frequencies may be those of the part
        whole = self.recurrent or self._turns
        parts = [slice(0, ids.shape[1])] if whole else in_parts(len(ids), ids.shape[1], at_once)
        for part in parts:
            read = self._run(self.policy.body, ids[:, part], positions[:, part], before + part.stop)
        last = self.policy.ready(read.last_hidden_state[:, -1])
        self.logits = self._checked(self.head(last).view(2 if self.base_too else 1, len(ids), -1))
        return self.logits

    def _checked(self, logits: Tensor) -> Tensor:
        """Logits, of which none is no number; those of tokens that are ruled out may be minus infinity."""
        sums = logits.sum(-1)
        unsound = (sums.isnan() | sums.isposinf()).any()
        self._unsound = unsound if self._unsound is None else self._unsound | unsound
        if waits.free(self.device):
            self.check()
        return logits

    def check(self) -> None:
        """Look at what logits were; this asks the device.

        Raises:
            UserError: they were no numbers.
        """
        unsound, self._unsound = self._unsound, None
        if unsound is not None and bool(unsound):
            raise UserError(
                f"{self.name} gave logits that are no numbers (NaN or infinity): its weights are damaged, or its "
                "states are too large for that type; try dtype=float32, or load the model anew"
            )

    def _within(self, positions: Tensor) -> Tensor:
        return positions if self.limit is None else positions.clamp(max=self.limit - 1)

    def _check_fits(self, lengths: np.ndarray, beyond: int = 0) -> None:
        if self.limit is not None and (tokens := int(lengths.max())) > self.limit + beyond:
            raise UserError(
                f"a prompt of {tokens} tokens is longer than the {self.limit} positions of the model; lower "
                f"max_length, or max_new_tokens if its reply is read with it ({type(self.policy.plain).__name__})"
            )

    def _states(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Final states of these tokens, [m, B, L, D]."""
        states = self.policy.ready(self._run(self.policy.body, ids, positions).last_hidden_state)
        return states.view(2 if self.base_too else 1, *ids.shape, -1)

    def head(self, states: Tensor) -> Tensor:
        """[..., V] logits of states that are ready for the output layer."""
        return self.policy.logits(states)

    # -- caches that have no holes ------------------------------------------------------------------------------------

    def _holes_hurt(self, more: int) -> bool:
        return not self._gaps_work or (self._window is not None and self.ids.shape[1] + more > self._window)

    def _turned(self, lengths: np.ndarray) -> bool:
        """Whether rows come to a length at which the keys that they have are turned by the wrong frequencies."""
        return self._turns and bool((self._side_of(lengths) != self._side).any())

    def _side_of(self, lengths: np.ndarray) -> np.ndarray:
        """Which rotary frequencies texts of these lengths have, as a number for each."""
        if not self._turns:
            return np.zeros_like(lengths)
        return sides(self.policy.plain.config, torch.from_numpy(lengths)).numpy()

    def _start_from_start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Prompts as rows of a model whose rows cannot be filled up."""
        self._hold(*fill_left(prompts, self.device), [len(p) for p in prompts])
        self.count.prompt += sum(map(len, prompts))
        self._check_fits(self.lengths)
        self.logits = self._checked(self.head(self._all_from_start(1)[:, :, 0]))
        return self.logits

    def _all_from_start(self, last: int) -> Tensor:
        """[m, B, last, D] states of the last tokens of all rows, rows of equal length together, without filling."""
        lengths, ends = self.lengths.tolist(), None
        for places in by_length(lengths, AT_ONCE // (2 if self.base_too else 1)):
            rows, length = waits.sent(places, self.device), lengths[places[0]]
            states = self.from_start(self.ids[rows][:, self.ids.shape[1] - length :])[:, :, -last:]
            if ends is None:
                ends = states.new_zeros((len(states), len(lengths), last, states.shape[-1]))
            ends[:, rows, last - states.shape[2] :] = states
        return ends

    def from_start(self, ids: Any) -> Tensor:
        """[m, B, L, D] final states of whole texts of one length, [B, L], without a cache."""
        ids = torch.as_tensor(np.asarray(ids) if isinstance(ids, list) else ids, device=self.device)
        count = len(ids)
        self.count.computed += ids.numel()
        if self.base_too:
            ids = torch.cat([ids, ids])
        positions = self._within(torch.arange(ids.shape[1], device=self.device).expand(ids.shape))
        with contextlib.ExitStack() as stack:
            if self.base_too:
                stack.enter_context(self.policy.base_beside())
            states = self.policy.ready(reads_from_start(self.policy.body, ids, position_ids=positions))
        return states.view(2 if self.base_too else 1, count, *states.shape[1:])

    def _read_anew(self, chunks: Sequence[np.ndarray], sizes: Tensor, longest: int, turned: bool) -> Tensor:
        """Read all tokens of the rows and these from the start; the states of these, filled on the right."""
        if turned:
            slower(self.policy.plain, "its frequencies change with the length of a text")
        elif self._fills:
            kind = f"its window of {self._window} tokens" if self._gaps_work else "distances in its cache"
            slower(self.policy.plain, f"{'its state' if self.recurrent else kind} cannot be cut back")
        held, seen = self.ids.cpu().numpy(), self.mask.bool().cpu().numpy()
        kept = [row[columns] for row, columns in zip(held, seen, strict=True)]
        self.count.given += sum(map(len, kept))
        self._prefixes, self._gaps = [], False
        texts = [np.append(a, b) for a, b in zip(kept, chunks, strict=True)]
        self._hold(*fill_left(texts, self.device), [len(text) for text in texts])
        self._holes = False
        if self._fills:
            self.cache = self._empty()
            states = self._states(self.ids, self._within((self.mask.cumsum(1) - 1).clamp(min=0)))
        else:
            states = self._all_from_start(longest)
        # the rows end together, their new tokens do not begin together: [B, L] columns of those
        place = states.shape[2] - sizes[:, None] + torch.arange(longest, device=self.device)
        place = place.clamp(max=states.shape[2] - 1)
        return states[:, torch.arange(len(place), device=self.device)[:, None], place]
