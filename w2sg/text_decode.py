"""Decoders as stages: replies of a frozen strong model, steered by a small one, with what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.data.loading import Examples
from w2sg.data.table import digest
from w2sg.decode_options import BestOfN, Contrastive, Decoder, Drafted, Eft, Guide, Plain, Search, needs_pair
from w2sg.decoding.by_transformers import TransformersEngine
from w2sg.decoding.drafting import Drafting, Rule
from w2sg.decoding.engine import Engine, Several, Tilted
from w2sg.decoding.search import EngineGrower, Result, search
from w2sg.decoding.values import ImplicitValue, Mixture, RewardValue
from w2sg.errors import UserError
from w2sg.inputs import VERSION
from w2sg.replies import Prompts, Replies
from w2sg.shards import Found
from w2sg.stages import ReadJob, load_found
from w2sg.store import read_json, write_json
from w2sg.text_run import TextRun, Writer

FATES = ("", "reached", "complete", "longest")
# of a row of numbers behind each token: what it is, and facts of its reply, which are the same for all its tokens
TOKEN, LOG_P, DRAFTED, CANDIDATE, VALUE, FINISHED, FATE, STRONG_READ, GUIDE_READ, ROUNDS, POOLED = range(11)
COLUMNS = 11


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
            and what the decoder knows: ``kept``, ``fate`` of a draft, ``rounds`` and ``pooled`` of a search.
        drafted: [N] of [n] bool, which tokens a draft wrote.
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
    """

    def __init__(
        self,
        text: TextRun,
        strong: Writer,
        pair: Pair | None,
        rewards: Callable[[], tuple[nn.Module, Callable[[Sequence[str], Sequence[str]], np.ndarray]]] | None = None,
        reward_key: dict[str, Any] | None = None,
    ):
        self.text, self.strong, self.pair = text, strong, pair
        self.rewards, self.reward_key = rewards, reward_key

    def write(self, name: str, decoder: Decoder, prompts: Prompts) -> Steered:
        """Replies to all prompts that fit."""
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
        replies = self.text.write(name, writer, prompts, decoder, reference=reference)
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
            lengths = np.array([len(row) for row in source.chat.prompts(prompts.texts)])
            fits &= (lengths > 0) & (lengths < source.spec.max_length)
        if not fits.any():
            raise UserError(f"{name}: no prompt fits into max_length of all models; raise it")
        if lost := int((~fits).sum()):
            self.text.dropped[name] = {"prompt longer than max_length, or refused by a chat template": lost}
        keep = np.flatnonzero(fits)
        return Prompts(prompts.name, [prompts.ids[k] for k in keep], [prompts.texts[k] for k in keep])

    def _key(self, decoder: Decoder, prompts: Prompts) -> dict[str, Any]:
        models = {"strong": self.text.key_of(self.strong)}
        if needs_pair(decoder):
            models["tuned"] = self.text.key_of(self.pair.tuned)
        if needs_pair(decoder) and not isinstance(decoder, Drafted):  # drafts are of the aligned model alone
            models["untuned"] = self.text.key_of(self.pair.untuned)
        chats = [source.chat for source in self._sources(decoder)]
        return {
            "version": VERSION,
            "decoder": decoder.model_dump(exclude={"batch_size"}),
            "models": models,
            "max_length": [source.spec.max_length for source in self._sources(decoder)],
            **({"reward": self.reward_key} if self.reward_key and decoder.guide.reward else {}),
            "prompts": [digest(*(str(row.tolist()) for row in chat.prompts(prompts.texts))) for chat in chats],
            "ids": digest(*prompts.ids),
            "stop": [[*chat.stop, *chat.stop_strings] for chat in chats],
            "precision": self.text.precision,
            "seed": self.text.stage_seed("decode"),
        }

    def _job(self, decoder: Decoder, prompts: Prompts) -> ReadJob:
        policies, reward = self._models(decoder)
        seed = self.text.stage_seed("decode")

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
        key = self._key(decoder, prompts) | {"traces": True}

        def work(part: Path) -> dict[str, Any]:
            policies, reward = self._models(decoder)
            policies.to(self.text.run.devices.fabric.device)
            device, mixed = self.text.run.devices.fabric.device, self.text.precision == "bf16-mixed"
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):  # as in the stages that Lightning runs
                work = Work(self, decoder, policies, reward, self.text.stage_seed("decode"))
                results = work.trace(prompts.texts, prompts.ids)
            found = [
                {"prompt": text, "rule": r.rule, "best": r.best.text, "value": r.best.value, "rounds": r.trace}
                for text, r in zip(prompts.texts, results, strict=True)
            ]
            write_json(part / "traces.json", found)
            return {"examples": len(found)}

        return read_json(self.text.stages.compute(name, key, work) / "traces.json")

    def _models(self, decoder: Decoder) -> tuple[nn.ModuleList, Any]:
        """Everything that a decoder reads with, the strong model first, and a reward guide where it has one."""
        policies = nn.ModuleList([self.text.load(self.strong)])
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
        columns: dict[str, list[Any]] = {
            k: [] for k in ("id", "prompt", "text", "finished", "tokens", "logs", "number")
        }
        values, facts, drafted, chosen = [], [], [], []
        for i, prompt in zip(prompts.ids, prompts.texts, strict=True):
            table = parts[place[i]]
            chosen.append(len(values))
            starts = np.flatnonzero(np.diff(table[:, CANDIDATE], prepend=-1.0))
            for number, part in enumerate(np.split(table, starts[1:]) if len(table) else [np.zeros((0, COLUMNS))]):
                first = part[0] if len(part) else np.zeros(COLUMNS)
                tokens, _ = chat.cut(part[:, TOKEN].astype(np.int64), int(part[:, DRAFTED].sum()))
                part = part[: len(tokens)]
                row = (i, prompt, chat.text(tokens), bool(first[FINISHED]) or not len(part), tokens)
                for key, value in zip(columns, (*row, part[:, [LOG_P]], number), strict=True):
                    columns[key].append(value)
                values.append(first[VALUE])
                if number == 0:
                    facts.append(_facts(decoder, first, part))
                    drafted.append(part[:, DRAFTED].astype(bool))
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


def _facts(decoder: Decoder, first: np.ndarray, part: np.ndarray) -> dict[str, Any]:
    found = {"strong_read": float(first[STRONG_READ]), "guide_read": float(first[GUIDE_READ])}
    if isinstance(decoder, Drafted):
        found |= {"kept": int(part[:, DRAFTED].sum()), "fate": FATES[int(first[FATE])]}
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


class Work:
    """One batch of prompts at work: the engines that a decoder needs, made from the stage's models."""

    def __init__(self, decoders: Decoders, decoder: Decoder, policies: nn.ModuleList, reward: Any, seed: int):
        self.decoders, self.decoder, self.reward, self.seed = decoders, decoder, reward, seed
        self.strong = TransformersEngine(policies[0])
        small = [p for p in policies[1:] if hasattr(p, "adapted")]
        self.small: Engine | None = None
        if len(small) == 1 and not isinstance(decoder, Drafted):
            self.small = TransformersEngine(small[0], base_too=True)
        elif len(small) > 1:
            self.small = Several(*(TransformersEngine(policy) for policy in small))
        self.tuned = TransformersEngine(small[0]) if small else None

    def write(self, prompts: list[str], ids: list[str], device: torch.device) -> Found:
        """What is to be kept of each prompt."""
        decoder = self.decoder
        if isinstance(decoder, Drafted):
            tables, forwards = self._draft(prompts, ids)
        else:
            tables, forwards = self._search(prompts, ids)
        sizes = torch.tensor([len(table) for table in tables])
        values = torch.from_numpy(np.concatenate(tables)).float()  # token ids lie far below 2^24
        useful = int(sizes.sum())
        return Found(values.to(device), sizes.to(device), None, useful, max(useful, forwards))

    def trace(self, prompts: list[str], ids: list[str]) -> list[Result]:
        """The same again, with every hypothesis of every round noted."""
        return self._results(prompts, ids, True)[0]

    def _search(self, prompts: list[str], ids: list[str]) -> tuple[list[np.ndarray], int]:
        results, grower = self._results(prompts, ids, False)
        value = isinstance(self.decoder, Search | BestOfN) and self.decoder.guide.implicit
        strong = self.strong.count.total / len(prompts)
        small = grower.engine.pair if isinstance(grower.engine, Tilted) else self.small
        guide = small.count.total / len(prompts) if small is not None else 0.0
        if self.reward is not None:
            guide += self.reward.read / len(prompts)
            self.reward.read = 0
        if small is not self.small and value:  # a search over tilted logits asks the pair twice
            guide += self.small.count.total / len(prompts)
        tables = []
        for result in results:
            rest = [h for h in result.beam if h is not result.best] if isinstance(self.decoder, BestOfN) else []
            parts = []
            for number, h in enumerate([result.best, *rest]):
                part = np.zeros((len(h.tokens), COLUMNS))
                part[:, TOKEN], part[:, LOG_P], part[:, CANDIDATE] = h.tokens, h.log_probabilities[:, 0], number
                part[:, VALUE], part[:, FINISHED], part[:, ROUNDS] = h.value, h.finished, result.rounds
                part[:, STRONG_READ], part[:, GUIDE_READ] = strong, guide
                part[:, POOLED] = result.rule != "beam"
                parts.append(part)
            tables.append(np.concatenate(parts))
        return tables, grower.forwards

    def _results(self, prompts: list[str], ids: list[str], trace: bool) -> tuple[list[Result], EngineGrower]:
        decoder, source = self.decoder, self.decoders.strong.source
        engine: Engine = self.strong
        beams, children, chunk, value, beta = 1, 1, decoder.max_new_tokens, None, 0.0
        if isinstance(decoder, Eft):
            beta = decoder.beta
        elif isinstance(decoder, Search):
            beams, children, beta = decoder.beams, decoder.children, decoder.tilt
            chunk = min(decoder.chunk, decoder.max_new_tokens)
        elif isinstance(decoder, BestOfN):
            beams = decoder.samples
        if beta:
            # a pair of its own: the guide's stands on other rows
            pair = self._pair_again()
            engine = Tilted(self.strong, pair, beta)
        if isinstance(decoder, Search | BestOfN):
            value = self._value(decoder.guide)
        chat, room = source.chat, None
        if value is not None and decoder.guide.implicit and self.small.limit is not None:
            guide = self.decoders.pair.tuned.source.chat
            if guide.vocabulary == chat.vocabulary:  # the guide must have positions for what it is to read
                room = [self.small.limit - len(row) for row in guide.prompts(prompts)]
        grower = EngineGrower(
            engine,
            chat.prompts,
            chat.text,
            ids,
            decoder.columns(),
            chat.stop,
            chunk,
            decoder.max_new_tokens,
            self.seed,
            chat.cut,
            room,
        )
        return search(grower, value, prompts, beams, children, trace, not isinstance(decoder, BestOfN)), grower

    def _pair_again(self) -> Engine:
        if isinstance(self.small, TransformersEngine):
            return TransformersEngine(self.small.policy, base_too=True)
        return Several(*(TransformersEngine(engine.policy) for engine in self.small.engines))

    def _value(self, guide: Guide) -> Any:
        parts = []
        strong = self.decoders.strong.source.chat
        if guide.implicit:
            chat = self.decoders.pair.tuned.source.chat
            shared = chat.vocabulary == strong.vocabulary
            value = ImplicitValue(
                self.small, chat, shared, strong.stop, guide.beta, guide.normalise, guide.length_alpha
            )
            parts.append((guide.implicit, value))
        if guide.reward:
            parts.append((guide.reward, RewardValue(self.reward)))
        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else Mixture(parts)

    def _draft(self, prompts: list[str], ids: list[str]) -> tuple[list[np.ndarray], int]:
        decoder, strong, pair = self.decoder, self.decoders.strong.source, self.decoders.pair
        rule = Rule(decoder.window, decoder.threshold, decoder.check, decoder.draft, decoder.max_new_tokens)
        columns = decoder.columns()
        drafting = Drafting(
            self.tuned, self.strong, (pair.tuned.source.chat, strong.chat), (columns, columns), rule, ids, self.seed
        )
        found = drafting.write(prompts)
        read = [self.strong.count.total / len(prompts), self.tuned.count.total / len(prompts)]
        tables = []
        for draft in found:
            part = np.zeros((len(draft.tokens), COLUMNS))
            part[:, TOKEN], part[:, LOG_P] = draft.tokens, draft.log_probabilities
            part[: draft.kept, DRAFTED], part[:, FINISHED] = 1, draft.finished
            part[:, FATE], part[:, [STRONG_READ, GUIDE_READ]] = FATES.index(draft.switch), read
            tables.append(part)
        return tables, drafting.forwards
