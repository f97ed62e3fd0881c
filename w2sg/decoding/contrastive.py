"""Contrastive decoding between a model after and before its alignment (ConG, arXiv 2510.07884), and plain sampling.

The log-probabilities that both models gave each token are kept, so the implicit reward of a reply costs nothing more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from w2sg import progress
from w2sg.data.rows import ByPlace
from w2sg.decoding import waits
from w2sg.decoding.engine import Engine, check
from w2sg.decoding.sampling import Settings, nothing_left, sampled
from w2sg.errors import UserError


@dataclass(frozen=True)
class Decoded:
    """Replies of a batch.

    Attributes:
        tokens: [B] ids of each, the token that ended it included.
        stopped: [B] whether it came to an end by itself, and not to the longest that was allowed.
        log_probabilities: [B] of [length, m]: each model's log-probability of each token.
        forwards: rows read one token further, summed over steps: with ``useful`` / ``forwards`` the part not wasted.
    """

    tokens: list[np.ndarray]
    stopped: np.ndarray
    log_probabilities: list[np.ndarray]
    forwards: int

    @property
    def useful(self) -> int:
        """Tokens that were written."""
        return sum(map(len, self.tokens))


def stream(seed: int, identity: str, sample: int | str, length: int) -> np.ndarray:
    """The random numbers of one reply, [length] in [0, 1): decided by seed, prompt id and sample number alone.

    A sample may also be named by its lineage, where it grew out of others.

    So a reply depends neither on the batch that it is written in, nor on its order, nor on the number of devices.
    """
    key = hashlib.sha256(f"{seed}:{identity}:{sample}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).random(length)


@torch.inference_mode()
def decode(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    settings: Settings,
    uniform: Tensor,
    stop: Sequence[int],
    prompt_of: Sequence[int] | None = None,
) -> Decoded:
    """Write a reply to each row.

    Args:
        engine: of the aligned model and, for a contrast, its reference after it.
        prompts: ids of each prompt.
        settings: of the B rows.
        uniform: [B, T] random numbers; T is the most tokens that a reply may have. A reply also ends, unfinished, where
            the model has no position left.
        stop: tokens that end a reply.
        prompt_of: [B] the prompt of each row, which is read once for all its rows; default is one row a prompt.
    """
    prompt_of = list(range(len(prompts))) if prompt_of is None else list(prompt_of)
    most = uniform.shape[1]
    logits = engine.start(prompts)
    if prompt_of != list(range(len(prompts))):
        engine.select(torch.tensor(prompt_of))
        logits = logits[:, waits.sent(prompt_of, logits.device)]
    # the last token of a reply is never read, so it needs no position
    room = [most if engine.limit is None else min(most, engine.limit - len(prompts[p]) + 1) for p in prompt_of]
    return go_on(engine, logits, settings, uniform, stop, room, whole=True)[0]


@torch.inference_mode()
def go_on(
    engine: Engine,
    logits: Tensor,
    settings: Settings,
    uniform: Tensor,
    stop: Sequence[int],
    room: Sequence[int],
    before: Sequence[np.ndarray] = (),
    whole: bool = False,
) -> tuple[Decoded, list[int]]:
    """Write on where the rows of an engine stand.

    Args:
        logits: [m, B, V] of each row's next token.
        settings: of the B rows. A repetition penalty is of the tokens ``before`` and of what is written here.
        uniform: [B, T] random numbers; T is the most tokens that are written. stop: tokens that end a row.
        room: [B] the most tokens that each row may still have; a row without room writes nothing.
        before: [B] the tokens that each reply has already, where it has any.
        whole: these are whole replies, so the share of the batch that is done is known.

    Returns:
        What was written, and the rows that the engine is left with, in its order: all that did not stop or reach their
        room are among them, with everything read but the last token.
    """
    rows, most = uniform.shape
    device = logits.device
    known, room = settings.known(), np.asarray(room)
    written = torch.zeros((rows, most), dtype=torch.long, device=device)
    kept = torch.zeros((rows, most, len(logits)), device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    uniform, ends = uniform.to(device), torch.tensor(sorted(stop), device=device)
    writable = getattr(engine, "writable", None)
    earlier = filled_up(before, logits.shape[-1], device) if len(before) else written[:, :0]
    # Of the rows that the engine still has, in its order. The host knows `alive` and `room`; the device knows which
    # are `done`, and how many tokens each has (`size`).
    alive, places, drawn = np.arange(rows), torch.arange(rows, device=device), uniform
    left = torch.from_numpy(room).to(device)
    done, size = left <= 0, lengths.clone()
    sound = torch.ones((), dtype=torch.bool, device=device)
    free, asked, told = waits.free(device), None, 0
    forwards = 0

    def look(answer: waits.Copied) -> np.ndarray:
        """Which rows were done when this was asked; and say how far the replies are."""
        nonlocal told
        *ended, total, fine = answer.numpy().tolist()
        if not fine:
            check(engine)
            raise UserError(nothing_left(getattr(engine, "name", "the model")))
        progress.tokens(total - told)
        told = total
        return np.array(ended, bool)

    for step in range(most if (room > 0).any() else 0):
        so_far = torch.cat([earlier[places], written[places, :step]], 1) if known.penalised else None
        tokens, logs, having = sampled(logits, settings, known, drawn[:, step], so_far, writable)
        forwards += len(alive)
        sound = sound & having
        written[places, step] = tokens.masked_fill(done, 0)
        picked = logs.gather(2, tokens.expand(len(logs), -1)[..., None])[..., 0].T
        kept[places, step] = picked.masked_fill(done[:, None], 0.0).to(kept.dtype)
        size = size + ~done
        if whole:
            progress.part((step + 1) / most)
        ended = torch.isin(tokens, ends) & ~done
        stopped[places] = stopped[places] | ended
        lengths[places] = size
        done = done | ended | (size >= left)
        over = room[alive] <= step + 1  # these are done, whatever they say
        if step + 1 == most or over.all():
            break
        if asked is not None:
            over |= look(asked)
            asked = None
        elif free or step % waits.EVERY == 0:
            asked = waits.Copied(torch.cat([done.long(), lengths.sum()[None], sound.long()[None]]))
            if free:
                over |= look(asked)
                asked = None
        if over.all():
            break
        # finished rows are let go of when there are enough of them to be worth moving the others
        if asked is None and over.sum() * 8 >= len(alive):
            rest = np.flatnonzero(~over)
            engine.select(torch.from_numpy(rest))
            alive, known, rest = alive[rest], known.take(rest), waits.sent(rest, device)
            settings = settings.take(rest)
            places, drawn, left, size, done, tokens = (x[rest] for x in (places, drawn, left, size, done, tokens))
        logits = engine.extend(tokens)
    if rows:
        look(waits.Copied(torch.cat([lengths.sum()[None], sound.long()[None]])))
    sizes = lengths.tolist()
    decoded = Decoded(
        [row[:n] for row, n in zip(written.cpu().numpy(), sizes, strict=True)],
        stopped.cpu().numpy(),
        [row[:n] for row, n in zip(kept.cpu().numpy(), sizes, strict=True)],
        forwards,
    )
    return decoded, alive.tolist()


def filled_up(rows: Sequence[np.ndarray], filling: int, device: torch.device) -> Tensor:
    """[B, t] of rows of token ids, with an id that none has where a row is shorter."""
    table = np.full((len(rows), max(map(len, rows), default=0)), filling, np.int64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return torch.from_numpy(table).to(device)


def keep_rows(engine: Engine, left: Sequence[int], rows: Sequence[int], last: Sequence[int]) -> None:
    """Go on with some of the rows that `go_on` has left, which now read the last token that they wrote.

    Args:
        left: the rows that `go_on` has left, as it names them. rows: those that go on. last: their last tokens.
    """
    places = {row: place for place, row in enumerate(left)}
    engine.select(torch.tensor([places[row] for row in rows]))
    # go_on never reads a row's last token: it is needed only by the rows that go on
    engine.extend(torch.tensor(list(last), device=engine.logits.device))


@dataclass(eq=False)
class ReplyRows(ByPlace):
    """Rows to write, as inputs of a reading stage; rows of one prompt are neighbours.

    Attributes:
        prompts: [P] token ids.
        prompt_ids: [P] ids of the prompts.
        prompt_of: [N] the prompt of each row.
        sample: [N] which of the prompt's samples it is; rows with equal numbers draw the same random numbers, so
            settings are compared on common ones.
        settings: [N, 6] columns of `Settings`.
        max_new_tokens: of each reply.
        seed: of the streams.
    """

    prompts: list[np.ndarray]
    prompt_ids: list[str]
    prompt_of: np.ndarray
    sample: np.ndarray
    settings: np.ndarray
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        super().__init__([len(self.prompts[p]) + self.max_new_tokens for p in self.prompt_of])

    def take(self, places: np.ndarray) -> ReplyRows:
        """Some of the rows, by their places; all prompts stay."""
        columns = {name: getattr(self, name)[places] for name in ("prompt_of", "sample", "settings")}
        return replace(self, **columns)

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]:
        """``row``: [b] the places of the rows, ``settings``: [b, 6], ``uniform``: [b, T]."""
        index = np.asarray(index)
        uniform = [
            stream(self.seed, self.prompt_ids[self.prompt_of[i]], int(self.sample[i]), self.max_new_tokens)
            for i in index
        ]
        return super().collate(index) | {
            "settings": torch.from_numpy(self.settings[index]).float(),
            "uniform": torch.from_numpy(np.stack(uniform)),
        }

    def write(self, engine: Engine, batch: dict[str, Tensor], stop: Sequence[int]) -> Decoded:
        """Write the rows of a collated batch."""
        prompts, prompt_of = np.unique(self.prompt_of[batch["row"].cpu().numpy()], return_inverse=True)
        ids = [self.prompts[p] for p in prompts]
        return decode(engine, ids, Settings.from_columns(batch["settings"]), batch["uniform"], stop, prompt_of.tolist())
