"""Decoders as stages: replies of a frozen strong model, steered by a small one, with what they cost."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg import stops
from w2sg.data.dialogue import Chat
from w2sg.data.loading import Examples
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Prompts, Replies
from w2sg.data.table import digest
from w2sg.decoding.options import BestOfN, Contrastive, Decoder, Drafted, Plain, Search, Server, needs_pair
from w2sg.decoding.server import ServerGrower
from w2sg.errors import UserError
from w2sg.experiment.decode_batch import (
    CANDIDATE,
    COLUMNS,
    DRAFTED,
    FATE,
    FATES,
    FINISHED,
    GUIDE_READ,
    LOG_P,
    NOTHING,
    POOLED,
    ROUNDS,
    STRONG_READ,
    TOKEN,
    VALUE,
    Work,
)
from w2sg.experiment.text import TextRun, Writer
from w2sg.models.policy import padding
from w2sg.store.files import read_json, remove, write_json
from w2sg.store.sealed import seal, sweep, unsound
from w2sg.store.shards import Found
from w2sg.store.soundness import SCRATCH
from w2sg.training.inputs import VERSION
from w2sg.training.stages import ReadJob, load_found

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """The weak model after and before its alignment."""

    tuned: Writer
    untuned: Writer


@dataclass(frozen=True)
class Steered:
    """What a decoder wrote: the reply that was chosen to each prompt, and everything it was chosen from.

    Attributes:
        replies: one to each prompt.
        candidates: all that were left, in the order of their values; of best-of-n all samples. values: of them.
        facts: of each reply: ``strong_read``, ``guide_read`` (tokens read by the strong model and by each small one),
            and what the decoder knows: ``kept``, ``fate`` of a draft, ``rounds`` and ``pooled`` of a search, and where
            a server writes ``counted_by``: who counted what it read (each round the prompt anew) and wrote.
        drafted: [N] of [n] bool, which tokens a draft wrote, up to the strong model's first.
        stage: its name in the store.
    """

    replies: Replies
    candidates: Replies
    values: np.ndarray
    facts: list[dict[str, Any]]
    drafted: list[np.ndarray]
    stage: str


class Decoders:
    """Writes to prompts in any of the ways of conf/decoder.

    Args:
        strong: the frozen model. pair: the weak one, where the decoder asks for it.
        rewards: of prompts and replies, for a guide that is a reward model; and its part of the cache key.
        server: writes in place of the strong model, of which then only the tokenizer is read; replies have the tokens
            that this one makes of them, and their end.
    """

    def __init__(
        self,
        text: TextRun,
        strong: Writer,
        pair: Pair | None,
        rewards: Callable[[], tuple[nn.Module, Callable[[Sequence[str], Sequence[str]], np.ndarray]]] | None = None,
        reward_key: dict[str, Any] | None = None,
        server: Server | None = None,
    ):
        self.text, self.strong, self.pair = text, strong, pair
        self.rewards, self.reward_key, self.server = rewards, reward_key, server
        self._rounds: dict[str, dict[str, Any]] = {}  # of searches by a server, which would not be the same again

    def write(self, name: str, decoder: Decoder, prompts: Prompts) -> Steered:
        """Replies to all prompts that fit."""
        if self.server is not None:
            prompts = self._fitting(name, decoder, prompts)
            work = partial(self._ask, decoder, prompts)
            return self._answered(self.text.stages.compute(name, self._key(decoder, prompts), work), decoder, prompts)
        if isinstance(decoder, Plain | Contrastive):
            return self._sampled(name, decoder, prompts)
        prompts = self._fitting(name, decoder, prompts)
        folder = self.text.stages.read(name, self._key(decoder, prompts), lambda: self._job(decoder, prompts))
        return self._steered(folder, decoder, prompts)

    # -- one model, or a contrast: as methods that train do it --------------------------------------------------------

    def _sampled(self, name: str, decoder: Plain | Contrastive, prompts: Prompts) -> Steered:
        writer, reference = self.strong, None
        if isinstance(decoder, Contrastive):
            writer, reference = self.pair.tuned, self.pair.untuned
        engine = decoder.engine if isinstance(decoder, Plain) else "transformers"
        replies = self.text.write(name, writer, prompts, decoder, reference=reference, engine=engine)
        lengths = writer.source.chat.prompts(replies.prompts)
        facts = []
        for tokens, prompt in zip(replies.tokens, lengths, strict=True):
            read = len(prompt) + len(tokens) - 1
            alone = isinstance(decoder, Plain)
            facts.append({"strong_read": read if alone else 0, "guide_read": 0 if alone else read})
        drafted = [np.zeros(len(tokens), bool) for tokens in replies.tokens]
        return Steered(replies, replies, np.zeros(len(replies)), facts, drafted, replies.key["stage"])

    # -- stages -------------------------------------------------------------------------------------------------------

    def _sources(self, decoder: Decoder) -> list[Any]:
        return [self.strong.source] + ([self.pair.tuned.source] if needs_pair(decoder) else [])

    def _fitting(self, name: str, decoder: Decoder, prompts: Prompts) -> Prompts:
        """Prompts that all models can read with some room left for a reply."""
        fits = np.ones(len(prompts), bool)
        for source in self._sources(decoder):
            ids = source.chat.prompts(prompts.texts)
            self.text.run.reading.chats(source.chat, prompts.texts, ids)
            lengths = np.array([len(row) for row in ids])
            fits &= (lengths > 0) & (lengths < source.spec.max_length)
        if not fits.any():
            raise UserError(f"{name}: no prompt fits into max_length of all models; raise it")
        if lost := int((~fits).sum()):
            self.text.dropped[name] = {"prompt longer than max_length, or refused by a chat template": lost}
        keep = np.flatnonzero(fits)
        return Prompts(prompts.name, [prompts.ids[k] for k in keep], [prompts.texts[k] for k in keep])

    def _key(self, decoder: Decoder, prompts: Prompts) -> dict[str, Any]:
        # where the server is does not change what it says, nor do the weights of the model that lends its tokenizer
        models = {"strong": {"server": self.server.model} if self.server else self.text.key_of(self.strong)}
        if needs_pair(decoder):
            models["tuned"] = self.text.key_of(self.pair.tuned)
        if needs_pair(decoder) and not isinstance(decoder, Drafted):  # drafts are of the aligned model alone
            models["untuned"] = self.text.key_of(self.pair.untuned)
        chats = [source.chat for source in self._sources(decoder)]
        return {
            "version": VERSION,
            "rows": 2,  # a reply without tokens has one, too
            "decoder": decoder.model_dump(exclude={"batch_size", "server"}),
            "models": models,
            **self._unwritable(decoder),
            "max_length": [source.spec.max_length for source in self._sources(decoder)],
            **({"thoughts": [chat.thoughts for chat in chats]} if any(c.thoughts != "strip" for c in chats) else {}),
            **({"reward": self.reward_key} if self.reward_key and decoder.guide.reward else {}),
            "prompts": [digest(*(str(row.tolist()) for row in chat.prompts(prompts.texts))) for chat in chats],
            "ids": digest(*prompts.ids),
            "stop": [[*chat.stop, *chat.stop_strings] for chat in chats],
            "precision": self.text.precision,
            "seed": self.text.stage_seed("plain"),
            **(self._served_key(prompts) if self.server else {}),
        }

    def _unwritable(self, decoder: Decoder) -> dict[str, Any]:
        """Of each model that writes tokens, the ids that it may not; nothing where there are none."""
        sources = self._sources(decoder)[self.server is not None :]
        found = [padding(source).get("unwritable") for source in sources]
        return {"unwritable": found} if any(found) else {}

    def _job(self, decoder: Decoder, prompts: Prompts) -> ReadJob:
        policies, reward = self._models(decoder)
        seed = self.text.stage_seed("plain")

        def read(batch: dict[str, Tensor]) -> Found:
            rows = batch["row"].tolist()
            work = Work(self, decoder, policies, reward, seed)
            return work.write([prompts.texts[r] for r in rows], [prompts.ids[r] for r in rows], batch["row"].device)

        examples = Examples(
            _Rows(self.strong.source.chat.prompts(prompts.texts)), prompts.ids, torch.zeros(len(prompts))
        )
        return ReadJob(policies, read, examples, rows=decoder.batch_size, whole=True)

    def traces(self, name: str, decoder: Search, prompts: Prompts) -> list[dict[str, Any]]:
        """The searches for a few prompts, which all models have room for, again and round by round; in fp32 they come
        out the same.
        """
        if self.server is not None:
            return [{"prompt": p.text, **self._rounds[i]} for i, p in zip(prompts.ids, prompts.texts, strict=True)]
        key = self._key(decoder, prompts) | {"traces": True}

        def work(part: Path) -> dict[str, Any]:
            policies, reward = self._models(decoder)
            policies.to(self.text.run.devices.fabric.device)
            device, mixed = self.text.run.devices.fabric.device, self.text.precision == "bf16-mixed"
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):  # as in the stages that Lightning runs
                work = Work(self, decoder, policies, reward, self.text.stage_seed("plain"))
                results = work.trace(prompts.texts, prompts.ids)
            found = [
                {"prompt": p.text, "rule": r.rule, "best": r.best.text, "value": r.best.value, "rounds": r.trace}
                for p, r in zip(prompts.texts, results, strict=True)
            ]
            write_json(part / "traces.json", found)
            return {"examples": len(found)}

        return read_json(self.text.stages.compute(name, key, work) / "traces.json")

    def _models(self, decoder: Decoder) -> tuple[nn.ModuleList, Any]:
        """Everything that a decoder reads with, the strong model first, and a reward guide where it has one."""
        policies = nn.ModuleList([] if self.server else [self.text.load(self.strong)])
        reward = None
        if needs_pair(decoder):
            policies.extend([self.text.load(self.pair.tuned)] if isinstance(decoder, Drafted) else self._small())
        if getattr(decoder, "guide", None) is not None and decoder.guide.reward:
            module, reward = self.rewards()
            policies.append(module)
        return policies, reward

    def _small(self) -> list[nn.Module]:
        """The weak pair: one model with adapters where it is its own base, else two."""
        tuned = self.text.load(self.pair.tuned)
        if tuned.adapted and self.pair.untuned.folder is None and self.pair.untuned.source is self.pair.tuned.source:
            return [tuned]
        return [tuned, self.text.load(self.pair.untuned)]

    def _steered(self, folder: Path, decoder: Decoder, prompts: Prompts) -> Steered:
        ids, found = load_found(folder)
        place = {i: row for row, i in enumerate(ids)}
        parts = np.split(found["values"].double().numpy(), np.cumsum(found["sizes"].numpy())[:-1])
        chat = self.strong.source.chat
        nudged = isinstance(decoder, Drafted) and decoder.nudges  # they were cut where each of them was written
        columns: dict[str, list[Any]] = {
            k: [] for k in ("id", "prompt", "text", "finished", "tokens", "logs", "number")
        }
        values, facts, drafted, chosen, thought = [], [], [], [], []
        for i, prompt in zip(prompts.ids, prompts.texts, strict=True):
            table = parts[place[i]]
            chosen.append(len(values))
            starts = np.flatnonzero(np.diff(table[:, CANDIDATE], prepend=-1.0))
            for number, part in enumerate(np.split(table, starts[1:]) if len(table) else [np.zeros((0, COLUMNS))]):
                first = part[0] if len(part) else np.zeros(COLUMNS)
                part = part[part[:, TOKEN] != NOTHING]
                given = len(part) if nudged else int(part[:, DRAFTED].sum())
                tokens, _ = chat.cut(part[:, TOKEN].astype(np.int64), given)
                begins, closed = chat.thought(tokens), chat.said(tokens).closed
                thought += [closed] if begins else []
                part, tokens = part[begins : len(tokens)], tokens[begins:]
                ended = closed and (bool(first[FINISHED]) or not len(part))
                row = (i, prompt, chat.text(tokens), ended, tokens)
                for key, value in zip(columns, (*row, part[:, [LOG_P]], number), strict=True):
                    columns[key].append(value)
                values.append(first[VALUE])
                if number == 0:
                    facts.append(_facts(decoder, first, part))
                    drafted.append(np.logical_and.accumulate(part[:, DRAFTED].astype(bool)))
        if thought:
            self.text.run.reading.thoughts(decoder.kind, len(thought), thought.count(False))
        candidates = Replies(
            ids=columns["id"],
            prompts=columns["prompt"],
            texts=columns["text"],
            finished=np.array(columns["finished"]),
            sample=np.array(columns["number"]),
            group=np.zeros(len(values), np.int64),
            key={"stage": folder.name},
            tokens=columns["tokens"],
            log_probabilities=columns["logs"],
            fingerprint=chat.fingerprint,
        )
        return Steered(candidates.take(chosen), candidates, np.array(values), facts, drafted, folder.name)

    # -- a server in place of the strong model ------------------------------------------------------------------------

    def _ask(self, decoder: Plain | Search | BestOfN, prompts: Prompts, part: Path) -> dict[str, Any]:
        """Have the server write, and keep what came of each batch of prompts as soon as it is there."""
        scratch = part / SCRATCH
        scratch.mkdir(parents=True, exist_ok=True)
        done = _answered_before(scratch)
        todo = [k for k, i in enumerate(prompts.ids) if i not in done]
        if done and todo:
            log.info("%d of %d prompts were answered before", len(done), len(prompts))
        if todo:
            policies, reward = self._models(decoder)
            device, mixed = self.text.run.devices.fabric.device, self.text.precision == "bf16-mixed"
            policies.to(device)
            seed = self.text.stage_seed("plain")
            with self._grower(decoder) as grower, torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                for start in range(0, len(todo), decoder.batch_size):
                    some = todo[start : start + decoder.batch_size]
                    work = Work(self, decoder, policies, reward, seed, grower)
                    rows = work.ask([prompts.texts[k] for k in some], [prompts.ids[k] for k in some])
                    with stops.deferred():
                        seal(
                            scratch, f"answers-{len(done):06d}", ".json.gz", lambda f, rows=rows: f.write(_packed(rows))
                        )
                    done |= rows
                if grower.asked.uncounted:
                    log.warning("the server does not count tokens: they are counted by the tokenizer of strong=")
        (part / "answers.json.gz").write_bytes(_packed(done))
        written = sum(c["tokens"] for row in done.values() for c in row["candidates"])
        seconds = sum(row["seconds"] for row in done.values())
        return {"examples": len(done), "tokens": written, "padded_tokens": written, "seconds": seconds}

    def _served_key(self, prompts: Prompts) -> dict[str, Any]:
        source = self.strong.source
        return {
            "texts": digest(*_as_text(source.chat, prompts.texts)),
            "strings": _ends(source.chat),
            "positions": getattr(source.config, "max_position_embeddings", None),
        }

    def _grower(self, decoder: Plain | Search | BestOfN) -> ServerGrower:
        server, chat = self.server, self.strong.source.chat
        return ServerGrower(
            server.url,
            server.model,
            partial(_as_text, chat),
            (),
            min(decoder.chunk, decoder.max_new_tokens) if isinstance(decoder, Search) else decoder.max_new_tokens,
            decoder.max_new_tokens,
            self.text.stage_seed("plain"),
            decoder.temperature,
            decoder.top_p,
            _ends(chat),
            server.key_variable,
            server.workers,
            server.attempts,
            timeout=server.timeout,
            size=lambda text: len(chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        )

    def _answered(self, folder: Path, decoder: Plain | Search | BestOfN, prompts: Prompts) -> Steered:
        chat, found = self.strong.source.chat, _read_rows(folder / "answers.json.gz")
        rows = [found[i] for i in prompts.ids]
        counts = np.array([len(row["candidates"]) for row in rows])
        flat = [candidate for row in rows for candidate in row["candidates"]]
        said = [chat.heard(c["text"]) for c in flat]
        self.text.run.reading.thoughts(
            decoder.kind, sum(bool(s.thought) for s in said), sum(not s.closed for s in said)
        )
        texts = [s.reply for s in said]
        finished = np.array([c["finished"] and s.closed for c, s in zip(flat, said, strict=True)], bool)
        tokens = [
            np.append(ids if text.strip() else ids[:0], np.full(int(ended), chat.end))
            for ids, text, ended in zip(chat.replies(texts, finished), texts, finished, strict=True)
        ]
        owner = np.repeat(np.arange(len(rows)), counts)
        first = np.cumsum(counts) - counts
        candidates = Replies(
            ids=[prompts.ids[p] for p in owner],
            prompts=[prompts.texts[p] for p in owner],
            texts=texts,
            finished=finished,
            sample=np.arange(len(flat)) - first[owner],
            group=np.zeros(len(flat), np.int64),
            key={"stage": folder.name},
            tokens=tokens,
            fingerprint=chat.fingerprint,
        )
        values = np.array([c["value"] for c in flat])
        names = ["strong_read", "guide_read", "counted_by"]
        names += [] if isinstance(decoder, Plain) else ["value", "rounds", "pooled"]
        self._rounds |= {
            i: {
                "rule": row["rule"],
                "best": row["candidates"][0]["text"],
                "value": row["value"],
                "rounds": row["trace"],
            }
            for i, row in zip(prompts.ids, rows, strict=True)
        }
        facts = [{name: row[name] for name in names} for row in rows]
        drafted = [np.zeros(len(tokens[k]), bool) for k in first]
        return Steered(candidates.take(first), candidates, values, facts, drafted, folder.name)


def _as_text(chat: Chat, prompts: Sequence[Dialogue]) -> list[str]:
    """Prompts as texts, without the beginning that servers add by themselves."""
    start = chat.tokenizer.bos_token_id
    rows = [row[1:] if len(row) and row[0] == start else row for row in chat.prompts(prompts)]
    return [chat.tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in rows]


def _ends(chat: Chat) -> list[str]:
    """Texts that end a reply: a server knows its own end of a text, and not always that of a turn."""
    return [*chat.stop_strings, *([chat.tokenizer.decode([chat.end])] if chat.template else [])]


def _packed(rows: dict[str, Any]) -> bytes:
    return gzip.compress(json.dumps(rows, ensure_ascii=False, allow_nan=False).encode(), 6, mtime=0)


def _answered_before(scratch: Path) -> dict[str, Any]:
    """What a server answered before the run was stopped; damaged files are deleted, and their prompts asked again."""
    sweep(scratch)
    done: dict[str, Any] = {}
    for file in sorted(scratch.glob("*.json.gz")):
        if wrong := unsound(file):
            log.warning("the answers %s cannot be used (%s); they are asked for again", file.name, wrong)
            remove(file)
        else:
            done |= _read_rows(file)
    return done


def _read_rows(file: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(file.read_bytes()))


def _facts(decoder: Decoder, first: np.ndarray, part: np.ndarray) -> dict[str, Any]:
    found = {"strong_read": float(first[STRONG_READ]), "guide_read": float(first[GUIDE_READ])}
    if isinstance(decoder, Drafted):
        found |= {"kept": int(part[:, DRAFTED].sum()), "fate": FATES[int(first[FATE])]}
        found |= {"nudges": int(first[ROUNDS])} if decoder.nudges else {}
    if isinstance(decoder, Search | BestOfN):
        found |= {"value": float(first[VALUE]), "rounds": int(first[ROUNDS]), "pooled": bool(first[POOLED])}
    return found


class _Rows:
    """Prompts as inputs of a reading stage, one row each."""

    def __init__(self, prompts: Sequence[np.ndarray]):
        self.lengths = np.array([len(row) for row in prompts], np.int64)
        self.useful = np.zeros(len(prompts), np.int64)  # counted as they are written
        self.sizes = np.zeros((len(prompts), 0), np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, index: Sequence[int]) -> dict[str, Tensor]:
        return {"row": torch.as_tensor(np.asarray(index))}
