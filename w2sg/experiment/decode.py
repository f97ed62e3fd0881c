"""Decoders as stages: replies of a frozen strong model, steered by a small one, with what they cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg import progress
from w2sg.data.loading import Examples
from w2sg.data.replies import Prompts
from w2sg.data.rows import ByPlace
from w2sg.data.table import digest
from w2sg.decoding.completions_limits import Kept
from w2sg.decoding.decoders import REWARD, STRONG, TUNED, UNTUNED, Decoder
from w2sg.decoding.decoders import written as stored
from w2sg.decoding.decoders.batches import write_batch
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.served import Server, as_text, ends
from w2sg.decoding.decoders.written import Written
from w2sg.decoding.sight import positions_of
from w2sg.errors import UserError
from w2sg.experiment import foreseen_replies as foreseen_of
from w2sg.experiment.answers import ANSWERS, ask
from w2sg.experiment.context import Context
from w2sg.experiment.generate import generate
from w2sg.experiment.keys import key_of
from w2sg.experiment.positions import ENDS, UNDRAFTED, UNGUIDED, reaching, say_ends, too_long
from w2sg.experiment.replies import load_trained
from w2sg.experiment.steered import Pair, Steered, steered, trace_of
from w2sg.models.mixed import hold_in_bf16
from w2sg.models.policy import padding
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.store.files import read_json, write_json
from w2sg.store.shards import Found
from w2sg.store.soundness import SCRATCH
from w2sg.training.inputs import VERSION
from w2sg.training.stage_values import load_parts
from w2sg.training.stages import ReadJob


class Decoders:
    """Writes to prompts by any decoder.

    Args:
        strong: the frozen model. pair: the weak one, where the decoder asks for it.
        reward: the reward model, where the guide is one: `key` is its part of cache keys, `scorer` gives the module
            and what scores prompts and replies with it.
        server: writes in place of the strong model, of which then only the tokenizer is read; replies have the tokens
            that this one makes of them, and their end.
    """

    def __init__(
        self,
        run: Context,
        strong: Trained,
        pair: Pair | None = None,
        reward: Any = None,
        server: Server | None = None,
    ):
        self.run, self.strong, self.pair = run, strong, pair
        self.reward, self.server = reward, server
        self._answered: dict[str, Written] = {}  # by a server, which would not say the same again

    def write(self, name: str, decoder: Decoder, prompts: Prompts) -> Steered:
        """Replies to all prompts that fit.

        Raises:
            UserError: no prompt fits.
        """
        if decoder.generated_by and self.server is None:
            return self._generated(name, decoder, prompts)
        prompts = self._fitting(name, decoder, prompts)
        key = self._key(decoder, prompts)
        if self.server is None:
            folder = self.run.stages.read(name, key, lambda: self._job(decoder, prompts), whole=True)
            replies = {i: stored.unpack(table) for i, table in load_parts(folder).items()}
        else:
            found = partial(foreseen_of.answers, self.strong.source.chat, decoder, prompts)
            folder = self.run.stages.compute(name, key, partial(self._ask, decoder, prompts), found)
            replies = {i: stored.unpack_text(answer) for i, answer in stored.from_file(folder / ANSWERS).items()}
            self._answered |= replies
        found = steered(self.run, decoder, self.strong, prompts, [replies[i] for i in prompts.ids], folder.name)
        self._say_positions(name, decoder, found)
        return found

    def traces(self, name: str, decoder: Decoder, prompts: Prompts) -> list[dict[str, Any]]:
        """The rounds of a few prompts, which all models have room for, written again.

        In fp32 they come out the same.
        """
        if self.server is not None:
            return [trace_of(prompt, self._answered[i]) for i, prompt in zip(prompts.ids, prompts.texts, strict=True)]
        if self.strong.source.spec.tp_plan is not None and self.run.devices.world > 1:
            self.run.reading.say(
                f"{name}: no rounds of searches are shown, which one device alone would write again, and no device has "
                "all of the strong model (strong.tp_plan)"
            )
            return []

        def work(part: Path) -> dict[str, Any]:
            modules, engines = self._models(decoder)
            progress.count("writing", len(prompts), "replies")
            progress.at(0, len(prompts))
            with self._on_device(modules):
                replies = decoder.write(engines(trace=True), prompts)
            rounds = [trace_of(*row) for row in zip(prompts.texts, replies, strict=True)]
            write_json(part / "traces.json", rounds)
            return {"examples": len(rounds)}

        key = self._key(decoder, prompts) | {"traces": True}
        return read_json(self.run.stages.compute(name, key, work, foreseen_of.no_traces) / "traces.json")

    # -- one model, or a contrast: as methods that train do it --------------------------------------------------------

    def _generated(self, name: str, decoder: Decoder, prompts: Prompts) -> Steered:
        models = {STRONG: self.strong} | ({} if self.pair is None else vars(self.pair))
        writer, *contrast = (models[role] for role in decoder.generated_by)
        replies = generate(self.run, name, writer, prompts, decoder, contrast=contrast[0] if contrast else None)
        facts = []
        for tokens, prompt in zip(replies.tokens, writer.source.chat.prompts(replies.prompts), strict=True):
            read = len(prompt) + len(tokens) - 1  # a reply's last token is never read
            strong = decoder.generated_by[0] == STRONG
            facts.append(decoder.facts(Written(strong_read=read * strong, guide_read=read * (not strong))))
        drafted = [np.zeros(len(tokens), bool) for tokens in replies.tokens]
        return Steered(replies, replies, np.zeros(len(replies)), facts, drafted, replies.key["stage"])

    # -- stages -------------------------------------------------------------------------------------------------------

    def _sources(self, decoder: Decoder) -> list[Any]:
        return [self.strong.source] + ([self.pair.tuned.source] if decoder.needs_pair else [])

    def _readers(self, decoder: Decoder) -> list[Any]:
        """Models that read every prompt, with the untuned one where it is asked, too."""
        return self._sources(decoder) + ([self.pair.untuned.source] if UNTUNED in decoder.needs else [])

    def _say_positions(self, name: str, decoder: Decoder, found: Steered) -> None:
        """How many replies came to the last position of a model, or were too long for a reward model that guides."""
        prompts, replies = found.replies.prompts, found.replies
        most, strong, texts = decoder.max_new_tokens, self.strong.source, [text.strip() for text in replies.texts]
        said: set[tuple[Any, ...]] = set()
        for place, source in enumerate(self._readers(decoder) if self.server is None else ()):
            shared = source.chat.vocabulary == strong.chat.vocabulary
            tokens = replies.tokens if shared else source.chat.replies(texts)
            room = np.array([len(row) < most for row in replies.tokens])
            ended = replies.finished | ~room if shared else np.ones(len(replies), bool)
            who = (source.role, source.spec.name)
            if who not in said and (count := reaching(source, prompts, tokens, ended)):
                said.add(who)
                what = ENDS if not place or (shared and not decoder.drafts) else UNGUIDED
                say_ends(self.run, name, source, count, len(replies), UNDRAFTED if place and decoder.drafts else what)
        if REWARD in decoder.needs:
            guide = self.reward.source
            lengths = [len(ids) for ids in guide.encode(self.reward.texts(prompts, texts))]
            if lost := sum(n > guide.spec.max_length for n in lengths):
                self.run.reading.say(
                    f"{name}: {lost:,} of {len(lengths):,} replies with their prompts are longer than the "
                    f"{guide.spec.max_length:,} tokens that the reward guide reads (decoder.guide.model), and lost "
                    "their start to it; choose one with more positions, or lower max_new_tokens"
                )

    def _fitting(self, name: str, decoder: Decoder, prompts: Prompts) -> Prompts:
        """Prompts that all models can read with some room left for a reply."""
        fits = np.ones(len(prompts), bool)
        short: dict[str, int] = {}
        for source in self._readers(decoder):
            ids = source.chat.prompts(prompts.texts)
            if source in self._sources(decoder):
                self.run.reading.chats(source.chat, prompts.texts, ids)
            lengths = np.array([len(row) for row in ids])
            fits &= (lengths > 0) & (lengths < source.spec.max_length)
            limit = positions_of(source.config)
            if limit is not None and (beyond := int((fits & (lengths > limit)).sum())):
                fits &= lengths <= limit
                short[too_long(limit, source)] = beyond
        if not fits.any():
            words = f" ({'; '.join(short)})" if short else ""
            raise UserError(f"{name}: no prompt fits into max_length of all models{words}; raise it")
        if lost := int((~fits).sum()) - sum(short.values()):
            short = {"prompt longer than max_length, or refused by a chat template": lost, **short}
        if short:
            self.run.dropped[name] = short
        return prompts.take(np.flatnonzero(fits))

    def _key(self, decoder: Decoder, prompts: Prompts) -> dict[str, Any]:
        # where the server is does not change what it says, nor do the weights of the model that lends its tokenizer
        models = {STRONG: {"server": self.server.model} if self.server else key_of(self.run, self.strong)}
        if decoder.needs_pair:
            models[TUNED] = key_of(self.run, self.pair.tuned)
        if UNTUNED in decoder.needs:
            models[UNTUNED] = key_of(self.run, self.pair.untuned)
        sources = self._sources(decoder)
        chats = [source.chat for source in sources]
        unwritable = [padding(source).get("unwritable") for source in sources[self.server is not None :]]
        key = {
            "version": VERSION,
            "rows": 2,  # a reply without tokens has one, too
            "decoder": decoder.key(),
            "models": models,
            "max_length": [source.spec.max_length for source in sources],
            "prompts": [digest(*(str(row.tolist()) for row in chat.prompts(prompts.texts))) for chat in chats],
            "ids": digest(*prompts.ids),
            "stop": [[*chat.stop, *chat.stop_strings] for chat in chats],
            "precision": self.run.precision,
            "seed": self.run.stage_seed("plain"),
        }
        if any(unwritable):
            key["unwritable"] = unwritable
        if any(chat.thoughts != "strip" for chat in chats):
            key["thoughts"] = [chat.thoughts for chat in chats]
        if REWARD in decoder.needs:
            key |= {"reward": self.reward.key(), "precision": self.run.scoring_precision}
        if self.server is not None:
            positions = getattr(self.strong.source.config, "max_position_embeddings", None)
            key |= {"texts": digest(*as_text(chats[0], prompts.texts)), "strings": ends(chats[0])}
            key["positions"] = positions
        return key

    def _models(self, decoder: Decoder) -> tuple[nn.ModuleList, Callable[..., Engines]]:
        """Everything that a decoder reads with, and what makes engines of it, anew for each batch."""
        strong = None if self.server else load_trained(self.run, self.strong)
        small, reward, modules = [], None, [strong] if strong is not None else []
        if decoder.needs_pair:
            small.append(load_trained(self.run, self.pair.tuned))
        if UNTUNED in decoder.needs and not self._is_its_own_base(small[0]):
            small.append(load_trained(self.run, self.pair.untuned))
        modules += small
        if REWARD in decoder.needs:
            module, reward = self.reward.scorer()
            modules.append(module)
        source = self.strong.source
        return nn.ModuleList(modules), partial(
            Engines,
            strong,
            small,
            source.chat,
            self.pair.tuned.source.chat if decoder.needs_pair else None,
            self.run.stage_seed("plain"),
            reward,
            limit=getattr(source.config, "max_position_embeddings", None) if self.server else None,
        )

    def _is_its_own_base(self, tuned: Any) -> bool:
        """Whether the weak model before its alignment is the same with its adapters switched off."""
        before = self.pair.untuned
        return tuned.adapted and before.folder is None and before.source is self.pair.tuned.source

    def _job(self, decoder: Decoder, prompts: Prompts) -> ReadJob:
        modules, engines = self._models(decoder)

        def read(batch: dict[str, Tensor]) -> Found:
            work = engines()
            replies = write_batch(decoder, work, prompts.take(batch["row"].tolist()))
            tables = [stored.pack(reply) for reply in replies]
            sizes = torch.tensor([len(table) for table in tables])
            values = torch.from_numpy(np.concatenate(tables)).float()  # token ids lie far below 2^24
            device, useful = batch["row"].device, int(sizes.sum())
            return Found(values.to(device), sizes.to(device), None, useful, max(useful, work.forwards))

        ids = self.strong.source.chat.prompts(prompts.texts)
        rows = ByPlace([len(row) + decoder.max_new_tokens for row in ids])
        examples = Examples(rows, prompts.ids, torch.zeros(len(prompts)))
        both = 2 if UNTUNED in decoder.needs and self._is_its_own_base(modules[1]) else 1
        size = {"rows": decoder.batch_size, "written": decoder.in_the_making * both}
        found = partial(foreseen_of.written, self.strong.source.chat, decoder, prompts)
        return ReadJob(modules, read, examples, **size, verb="writing", unit="replies", foreseen=found)

    def _ask(self, decoder: Decoder, prompts: Prompts, folder: Path) -> dict[str, Any]:
        modules, engines = self._models(decoder)
        with (
            self.server.grower(
                self.strong.source.chat, decoder, self.run.stage_seed("plain"), Kept(folder / SCRATCH)
            ) as server,
            self._on_device(modules),
        ):
            return ask(decoder, prompts, partial(engines, server=server, trace=decoder.traces), server, folder)

    def _on_device(self, modules: nn.ModuleList) -> torch.autocast:
        """Models outside a stage that Lightning runs, with its precision."""
        device, mixed = self.run.devices.fabric.device, self.run.devices.mixed
        if mixed:
            hold_in_bf16(modules)
        modules.to(device)
        return torch.autocast(device.type, torch.bfloat16, enabled=mixed)


def decode(
    run: Context,
    name: str,
    decoder: Decoder,
    prompts: Prompts,
    model: Trained | Source | None = None,
    pair: Pair | None = None,
    reward: Any = None,
) -> Steered:
    """Replies of a frozen model by a decoder, with what they cost.

    Args:
        name: the stage.
        decoder: how they are written.
        prompts: what is answered.
        model: the one that writes; None is the strong model as it was found.
        pair: the weak model after and before its alignment, where the decoder needs it.
        reward: a reward model, where one guides.

    Raises:
        UserError: no prompt fits into the models.
    """
    return Decoders(run, run.as_trained(model or run.strong), pair, reward, decoder.served_by).write(
        name, decoder, prompts
    )
