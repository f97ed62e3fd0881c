"""Contrastive decoding between a model after and before its alignment (ConG, arXiv 2510.07884), and plain sampling.

The log-probabilities that both models gave each token are kept, so the implicit reward of a reply costs nothing more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from w2sg import progress
from w2sg.data.rows import ByPlace
from w2sg.decoding.engine import Engine
from w2sg.decoding.sampling import Settings, next_tokens


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
        places = torch.tensor(prompt_of, device=logits.device)
        engine.select(places)
        logits = logits[:, places]
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
    alive = torch.arange(rows, device=device)
    room = torch.as_tensor(room, device=device)
    written = torch.zeros((rows, most), dtype=torch.long, device=device)
    kept = torch.zeros((rows, most, len(logits)), device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    uniform, ends = uniform.to(device), torch.tensor(sorted(stop), device=device)
    settings = settings.take(alive)
    allowed = getattr(engine, "writable", None), getattr(engine, "name", "the model")
    earlier = filled_up(before, logits.shape[-1], device) if len(before) else written[:, :0]
    done = room <= 0
    forwards = 0
    for step in range(0 if bool(done.all()) else most):
        so_far = torch.cat([earlier[alive], written[alive, :step]], 1)
        tokens, logs = next_tokens(logits, settings, uniform[alive, step], so_far, *allowed)
        forwards += len(alive)
        live = alive[~done]
        written[live, step] = tokens[~done]
        kept[live, step] = logs.gather(2, tokens.expand(len(logs), -1)[..., None])[:, ~done, 0].T.to(kept.dtype)
        lengths[live] += 1
        progress.tokens(len(live))
        if whole:
            progress.part((step + 1) / most)
        ended = torch.isin(tokens, ends) & ~done
        stopped[alive[ended]] = True
        done |= ended | (lengths[alive] >= room[alive])
        if step + 1 == most or bool(done.all()):
            break
        # finished rows are let go of when there are enough of them to be worth moving the others
        if int(done.sum()) * 8 >= len(alive):
            rest = torch.nonzero(~done)[:, 0]
            engine.select(rest)
            alive, tokens, settings, done = alive[rest], tokens[rest], settings.take(rest), done[rest]
        logits = engine.extend(tokens)
    sizes = lengths.tolist()
    decoded = Decoded(
        [row[:n].cpu().numpy() for row, n in zip(written, sizes, strict=True)],
        stopped.cpu().numpy(),
        [row[:n].cpu().numpy() for row, n in zip(kept, sizes, strict=True)],
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
