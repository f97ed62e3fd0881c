"""The verbs of methods that let language models write and train them on what was written."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from w2sg.config.options import FineTuning, PlainSampling, PreferenceTuning, Sampling
from w2sg.data import noise
from w2sg.data.completions import Completions, Encoded, encode
from w2sg.data.dialogue import Chat
from w2sg.data.loading import Examples
from w2sg.data.replies import Prompts, Replies, ReplyPairs
from w2sg.data.table import Table, digest
from w2sg.data.thoughts import split
from w2sg.decoding import vllm as by_vllm
from w2sg.decoding.contrastive import Decoded, ReplyRows
from w2sg.decoding.engine import Engine, Several
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import TrainingError, UserError
from w2sg.experiment.run import Run
from w2sg.losses import preferences as preference
from w2sg.losses.logprobs import position_kl
from w2sg.models.loading import Source
from w2sg.models.packing import MIXES, keeps_replies_apart, rules_key
from w2sg.models.policy import Policy, load_policy, padding
from w2sg.store.shards import Found
from w2sg.store.store import write_json
from w2sg.training.inputs import VERSION
from w2sg.training.stages import FitJob, ReadJob, load_found
from w2sg.training.text_modules import PreferenceModule, ReplyModule, SupervisedModule, WeakTargetModule, objective

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Writer:
    """A language model at one point of its training.

    Attributes:
        name: for stage names.
        source: the role's model.
        folder: of the stage that trained it; None as it was found.
    """

    name: str
    source: Source
    folder: Path | None = None

    @property
    def saved(self) -> Path | None:
        """Where its weights are, if not where they were found."""
        return None if self.folder is None else self.folder / "model"


class TextRun:
    """A run's verbs over replies; each is a cached stage of the run.

    Args:
        run: the run whose stages, devices and seed are used.
    """

    def __init__(self, run: Run):
        self.run, self.stages = run, run.stages
        self.seed, self.precision = run.config.seed, run.config.trainer.precision
        self.dropped: dict[str, dict[str, int]] = {}
        self._encoded: dict[tuple[str, ...], Encoded] = {}
        self._packs: dict[tuple, bool] = {}

    def key_of(self, writer: Writer) -> dict[str, Any]:
        """A language model as part of a cache key."""
        if writer.folder is not None:
            return {"stage": writer.folder.name}
        spec = writer.source.spec
        return {
            **writer.source.identity,
            "dtype": spec.dtype,
            "layers": spec.layers,
            "random_init": self.seed if spec.random_init else None,
            **rules_key(writer.source.config, spec.max_length, shared=False),
        }

    def rules(self, source: Source) -> dict[str, Any]:
        """What the key of a stage that reads replies says besides of a model with windows."""
        return rules_key(source.config, source.spec.max_length, shared=True)

    def stage_seed(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:4], "big")

    def load(self, writer: Writer, trainable: bool = False) -> Policy:
        spec = writer.source.spec
        if spec.random_init and (
            writer.folder is None or spec.train == "lora"
        ):  # adapters are saved without their base
            L.seed_everything(self.seed, workers=True, verbose=False)
        return load_policy(writer.source, writer.saved, trainable)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def encode(self, source: Source, data: Replies | ReplyPairs, name: str) -> Encoded:
        """Replies or pairs as rows of a model's tokens; what had to be dropped is counted under ``name``."""
        sides = [data.chosen, data.rejected] if isinstance(data, ReplyPairs) else [data]
        content = digest(*data.ids, *(s for side in sides for s in (*(p.identity for p in side.prompts), *side.texts)))
        memory = (source.chat.fingerprint, str(source.spec.max_length), content, name)
        if memory not in self._encoded:
            earlier = data.dropped if isinstance(data, ReplyPairs) else {}
            if not len(data):
                raise UserError(
                    f"{name}: there is nothing to read or train on; left out were "
                    f"{', '.join(f'{n} {reason}' for reason, n in earlier.items()) or 'none'}"
                )
            prompts = source.chat.prompts(sides[0].prompts)
            replies = list(zip(*(_unless_blank(side, source.chat) for side in sides), strict=True))
            finished = list(zip(*(side.finished.tolist() for side in sides), strict=True))
            self._look(name, source.chat, sides, prompts, replies)
            found = encode(data.ids, prompts, replies, finished, source.chat.end, source.spec.max_length)
            if not len(found.kept):
                raise UserError(
                    f"{name}: none of {len(data)} examples can be used "
                    f"({', '.join(f'{len(v)} {k}' for k, v in found.dropped.items())}); raise max_length, or look at "
                    "the data"
                )
            counts = {reason: len(rows) for reason, rows in found.dropped.items()}
            counts = {**earlier, **counts}
            if found.truncated:
                counts["cut to max_length (kept)"] = found.truncated
            self.dropped[name] = counts
            if counts:
                log.info("%s: %s", name, ", ".join(f"{n} {reason}" for reason, n in counts.items()))
            self._encoded[memory] = found
        return self._encoded[memory]

    def _look(
        self, name: str, chat: Chat, sides: Sequence[Replies], prompts: list[np.ndarray], replies: list[tuple]
    ) -> None:
        """Whether a few rows are what was given; and how many replies come with a thought that is left out."""
        reading = self.run.reading
        for place, side in enumerate(sides):
            own = [row[place] for row in replies]
            reading.chats(chat, side.prompts, prompts, side.texts, own, side.finished)
        if chat.thoughts == "strip":
            said = [split(text) for side in sides for text in side.texts]
            reading.thoughts(name, sum(bool(s.thought) for s in said), sum(not s.closed for s in said))

    def _packed(self, source: Source, completions: Completions, policy: Policy) -> Completions:
        """The rows, packed where the backbone keeps replies apart."""
        spec = source.spec
        memory = (source.folder, source.gguf, spec.attention, spec.dtype, spec.max_length, spec.share_prompt)
        if memory not in self._packs:
            self._packs[memory] = keeps_replies_apart(policy, spec.max_length, spec.share_prompt)
            if spec.share_prompt and not self._packs[memory]:
                log.warning("%s: %s", spec.name, MIXES)
        packed = self._packs[memory]
        return Completions(completions.prompts, completions.replies, completions.columns, packed)

    # -- fits ---------------------------------------------------------------------------------------------------------

    def _fit(
        self,
        name: str,
        start: Writer,
        data: Replies | ReplyPairs,
        options: FineTuning,
        key: dict[str, Any],
        module: Any,
        targets: Tensor | None = None,
        columns: list[np.ndarray] | None = None,
    ) -> Writer:
        source = start.source
        spec = source.spec
        rows = self.encode(source, data, name)
        fit_options = options.fit_options(spec.train)
        ids = [data.ids[i] for i in rows.kept]
        full_key = {
            "version": VERSION,
            "start": self.key_of(start),
            "train": {"mode": spec.train, **({"lora": spec.lora.model_dump()} if spec.train == "lora" else {})},
            "dropout": spec.dropout,
            "data": {"rows": len(ids), "content": rows.completions.content, "ids": digest(*ids)},
            "from": data.key,
            "optimization": fit_options.model_dump(),
            "precision": self.precision,
            "seed": self.seed,
            **self.rules(source),
            **key,
        }

        def make() -> FitJob:
            seed = self.stage_seed(name)
            L.seed_everything(seed, workers=True, verbose=False)  # adapters are drawn from the stage's own seed
            policy = self.load(start, trainable=True)
            completions = self._packed(source, rows.completions, policy)
            completions = Completions(completions.prompts, completions.replies, columns, completions.packed)
            examples = Examples(completions, ids, torch.zeros(len(ids), dtype=torch.long), targets)
            held_out = None
            if fit_options.validation > 0 and len(ids) > 1:
                draws = np.array([noise.draw(self.seed, f"held-out:{i}") for i in ids])
                order = np.argsort(draws, kind="stable")
                count = min(len(order) - 1, max(1, round(fit_options.validation * len(order))))
                held_out, examples = examples.take(np.sort(order[:count])), examples.take(np.sort(order[count:]))
            notes = {"dropped": self.dropped.get(name, {}), "packed": completions.packed}
            return FitJob(policy, module, examples, held_out, fit_options, seed, spec.micro_batch, notes)

        return Writer(name, source, self.stages.fit(name, full_key, make))

    def supervise(
        self, name: str, start: Writer, replies: Replies, options: FineTuning, confidence: float = 0.0
    ) -> Writer:
        """Supervised fine-tuning on replies alone, with an auxiliary confidence loss if asked for."""
        goal = {"objective": {"loss": "supervised", **({"confidence": confidence} if confidence else {})}}
        return self._fit(name, start, replies, options, goal, objective(SupervisedModule, confidence=confidence))

    def prefer(self, name: str, start: Writer, pairs: ReplyPairs, options: PreferenceTuning) -> Writer:
        """Preference optimisation; the reference is the model that training starts from."""
        goal = options.objective()
        own = {k: v for k, v in goal.items() if k in preference.options_of(options.loss)}
        free = options.loss in preference.REFERENCE_FREE
        targets, key = torch.zeros(len(self.encode(start.source, pairs, name).kept), 2), {"objective": goal}
        if not free:
            values, stage = self.read_replies(f"{name}-reference", start, pairs, name)
            targets, key["reference"] = values, stage
        module = objective(
            PreferenceModule,
            loss=partial(preference.LOSSES[options.loss], beta=options.beta, **own),
            beta=options.beta,
            supervised=options.supervised,
            supervised_mean=options.supervised_mean,
            reference_free=free,
            per_token=options.loss in preference.PER_TOKEN,
        )
        return self._fit(name, start, pairs, options, key, module, targets)

    def follow(
        self, name: str, start: Writer, weak: tuple[Writer, Writer], replies: Replies, options: FineTuning, gamma: float
    ) -> Writer:
        """WSPO: the strong model's change is to be that of the weak pair (after, before), token by token.

        Raises:
            UserError: the tokenizers differ, so that there are no common tokens.
        """
        one_tokenizer([writer.source for writer in (start, *weak)])
        parts, stages = [], []
        for writer in (start, *weak):
            values, sizes, stage = self.token_values(f"{name}-{writer.name}", writer, replies, name)
            parts.append(values)
            stages.append(stage)
        columns = list(torch.stack(parts, 1).split(sizes.tolist()))
        key = {"objective": {"loss": "wspo", "gamma": gamma}, "targets": stages}
        module = objective(WeakTargetModule, gamma=gamma)
        return self._fit(name, start, replies, options, key, module, columns=[c.numpy() for c in columns])

    # -- reading ------------------------------------------------------------------------------------------------------

    def token_values(
        self, stage: str, writer: Writer, data: Replies | ReplyPairs, name: str
    ) -> tuple[Tensor, Tensor, str]:
        """Log-probabilities of all reply tokens, [T], how many each example has, [N], and the stage's folder name."""
        source, rows = writer.source, self.encode(writer.source, data, name)
        ids = [data.ids[i] for i in rows.kept]
        key = {
            "version": VERSION,
            "model": self.key_of(writer),
            "attention": source.spec.attention,
            "data": {"rows": len(ids), "content": rows.completions.content, "ids": digest(*ids)},
            "precision": self.precision,
            **self.rules(source),
        }

        def make() -> ReadJob:
            policy = self.load(writer)
            completions = self._packed(source, rows.completions, policy)

            def read(batch: dict[str, Tensor]) -> Found:
                return Found(policy(batch), batch["sizes"].sum(1))

            return ReadJob(policy, read, Examples(completions, ids, torch.zeros(len(ids), dtype=torch.long)))

        folder = self.stages.read(stage, key, make)
        there, found = load_found(folder)
        expected = torch.from_numpy(rows.completions.sizes.sum(1))
        if there != ids or not torch.equal(found["sizes"], expected):
            raise TrainingError(
                f"{stage}: the log-probabilities in {folder.name} are of other tokens than those asked for; delete "
                "that folder, and it is computed anew"
            )
        if not torch.isfinite(found["values"]).all():
            raise TrainingError(f"{stage}: a log-probability in {folder.name} is not finite; use dtype=float32")
        return found["values"], found["sizes"], folder.name

    def read_replies(self, stage: str, writer: Writer, data: Replies | ReplyPairs, name: str) -> tuple[Tensor, str]:
        """Summed log-probabilities of each example's replies, [N, n] in the order of its encoded rows."""
        values, _, folder = self.token_values(stage, writer, data, name)
        sizes = torch.from_numpy(self.encode(writer.source, data, name).completions.sizes)
        owner = torch.repeat_interleave(torch.arange(sizes.numel()), sizes.flatten())
        sums = torch.zeros(sizes.numel(), dtype=torch.float64).index_add(0, owner, values.double())
        return sums.view(sizes.shape).float(), folder

    def divergence(self, name: str, writer: Writer, base: Writer, replies: Replies) -> np.ndarray:
        """Exact KL(writer || base) of the next token at every position of replies, averaged over each reply: [N].

        Both models must have one tokenizer. Over a model's own replies the mean estimates its divergence per token, of
        texts as they were sampled: a temperature or nucleus shifts it.
        """
        source = writer.source
        rows = self.encode(source, replies, name)
        ids = [f"{replies.ids[i]}:{replies.sample[i]}" for i in rows.kept]
        key = {
            "version": VERSION,
            "model": self.key_of(writer),
            "base": self.key_of(base),
            "data": {"rows": len(ids), "content": rows.completions.content},
            "precision": self.precision,
            **self.rules(source),
        }

        def make() -> ReadJob:
            policies = nn.ModuleList([self.load(writer), self.load(base)])
            completions = self._packed(source, rows.completions, policies[0])

            def read(batch: dict[str, Tensor]) -> Tensor:
                (p, q), heads = (policy.states(batch) for policy in policies), [policy.head() for policy in policies]
                found = position_kl(
                    p, heads[0][0], q, heads[1][0], heads[0][1], heads[1][1], softcap=policies[0].softcap
                )
                sums = torch.zeros(batch["sizes"].numel(), device=found.device).index_add(0, batch["owner"], found)
                return sums / batch["sizes"].flatten()

            examples = Examples(completions, ids, torch.zeros(len(ids), dtype=torch.long))
            return ReadJob(policies, read, examples, whole=True)

        _, found = load_found(self.stages.read(name, key, make))
        return found["values"].double().numpy()

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(
        self,
        name: str,
        writer: Writer,
        prompts: Prompts,
        sampling: Sampling,
        settings: Sequence[Sequence[float]] | None = None,
        reference: Writer | None = None,
        samples: int = 1,
        engine: str = "transformers",
    ) -> Replies:
        """Let a model write to prompts, or a pair of models by contrastive decoding.

        Args:
            sampling: lengths and batches; its own settings if none are given.
            settings: rows of `w2sg.decoding.sampling.Settings`; each prompt is answered with each of them.
            reference: the model before its alignment.
            samples: replies to each prompt with each setting.
            engine: ``vllm`` where it is plain sampling of a whole model.
        """
        source = writer.source
        columns = [sampling.columns()] if settings is None else [list(row) for row in settings]
        ids = source.chat.prompts(prompts.texts)
        self.run.reading.chats(source.chat, prompts.texts, ids)
        room = source.spec.max_length
        fits = [p for p, row in enumerate(ids) if 0 < len(row) < room]
        if len(fits) < len(ids):
            refused = sum(len(row) == 0 for row in ids)
            counts = {"prompt refused by the chat template": refused, "prompt longer than max_length": -refused}
            counts["prompt longer than max_length"] += len(ids) - len(fits)
            self.dropped[name] = {reason: count for reason, count in counts.items() if count}
            log.info("%s: left out %s", name, ", ".join(f"{n} {reason}" for reason, n in self.dropped[name].items()))
        if not fits:
            raise UserError(f"{name}: every prompt is longer than max_length={room}; raise it")
        each = len(columns) * samples
        rows = ReplyRows(
            prompts=[ids[p] for p in fits],
            prompt_ids=[prompts.ids[p] for p in fits],
            prompt_of=np.repeat(np.arange(len(fits)), each),
            sample=np.tile(np.repeat(np.arange(samples), len(columns)), len(fits)),
            settings=np.tile(np.array(columns, np.float64), (len(fits) * samples, 1)),
            max_new_tokens=sampling.max_new_tokens,
            seed=self.stage_seed(name),
        )
        group = np.tile(np.arange(len(columns)), len(fits) * samples)
        key = {
            "version": VERSION,
            "model": self.key_of(writer),
            **({} if reference is None else {"reference": self.key_of(reference)}),
            "prompts": {"rows": len(fits), "content": digest(*(str(row.tolist()) for row in rows.prompts))},
            "ids": digest(*rows.prompt_ids),
            "stop": source.chat.stop,
            **padding(source),
            "settings": columns,
            "samples": samples,
            "max_new_tokens": sampling.max_new_tokens,
            "precision": self.precision,
            "seed": rows.seed,
        }
        row_ids = [f"{rows.prompt_ids[p]}:{s}:{g}" for p, s, g in zip(rows.prompt_of, rows.sample, group, strict=True)]

        if engine == "vllm":
            key = {**key, "engine": engine, "max_length": room}
            folder = self.stages.compute(name, key, partial(self._by_vllm, writer, rows, row_ids))
        else:
            folder = self.stages.read(name, key, partial(self._writing, writer, reference, rows, row_ids, sampling))
        _, found = load_found(folder)
        table = found["values"].numpy()
        parts = np.split(table, np.cumsum(found["sizes"].numpy())[:-1])
        cut = [source.chat.cut(part[:, 0].astype(np.int64)) for part in parts]
        tokens = [row for row, _ in cut]
        parts = [part[: len(row)] for part, row in zip(parts, tokens, strict=True)]
        begins = [source.chat.thought(row) for row in tokens]
        closed = np.array(
            [not at or source.chat.said(row).closed for at, row in zip(begins, tokens, strict=True)], bool
        )
        self.run.reading.thoughts(name, sum(at > 0 for at in begins), int((~closed).sum()))
        tokens = [row[at:] for at, row in zip(begins, tokens, strict=True)]
        parts = [part[at:] for at, part in zip(begins, parts, strict=True)]
        return Replies(
            ids=[rows.prompt_ids[p] for p in rows.prompt_of],
            prompts=[prompts.texts[fits[p]] for p in rows.prompt_of],
            texts=[source.chat.text(row) for row in tokens],
            finished=closed & (found["flags"].numpy().astype(bool) | np.array([ended for _, ended in cut], bool)),
            sample=rows.sample,
            group=group,
            key={"stage": folder.name},
            tokens=tokens,
            log_probabilities=[part[:, 1:] for part in parts],
            fingerprint=source.chat.fingerprint,
        )

    def sample(self, name: str, writer: Writer, prompts: Prompts, sampling: PlainSampling, samples: int = 1) -> Replies:
        """Plain samples of one model, by the engine that was asked for."""
        return self.write(name, writer, prompts, sampling, samples=samples, engine=sampling.engine)

    def _writing(
        self, writer: Writer, reference: Writer | None, rows: ReplyRows, ids: list[str], sampling: Sampling
    ) -> ReadJob:
        policies, engine = self._engine(writer, reference)
        stop = writer.source.chat.stop

        def read(batch: dict[str, Tensor]) -> Found:
            found = rows.write(engine(), batch, stop)
            values, sizes, flags = (x.to(batch["row"].device) for x in _tensors(found))
            return Found(values, sizes, flags, found.useful, found.forwards)

        examples = Examples(rows, ids, torch.zeros(len(ids), dtype=torch.long))
        return ReadJob(policies, read, examples, rows=sampling.batch_size, whole=True)

    def _by_vllm(self, writer: Writer, rows: ReplyRows, row_ids: list[str], part: Path) -> dict[str, Any]:
        source = writer.source
        if reason := by_vllm.why_not(
            source.gguf is not None, source.spec.train == "lora" and writer.folder is not None
        ):
            raise UserError(f"engine: vLLM cannot sample {writer.name}: {reason}; use engine=transformers")
        model = str(writer.saved or source.folder)
        revision = None if writer.saved else source.identity.get("revision")
        spec, ids = source.spec, source.chat.ids.tolist() if padding(source) else None
        found = by_vllm.sample(model, revision, spec.dtype, spec.max_length, rows, source.chat.stop, ids)
        values, sizes, flags = _tensors(found)
        save_file({"values": values, "sizes": sizes, "flags": flags}, part / "values.safetensors")
        write_json(part / "ids.json", row_ids)
        return {"examples": len(row_ids), "tokens": found.useful, "padded_tokens": found.forwards}

    def _engine(self, writer: Writer, reference: Writer | None) -> tuple[nn.ModuleList, Any]:
        """The models that write, and what makes an engine of them once they are on their device."""
        adapters_of = reference is not None and reference.folder is None and reference.source is writer.source
        first = self.load(writer)
        if adapters_of and first.adapted:
            return nn.ModuleList([first]), lambda: TransformersEngine(first, base_too=True)
        policies = nn.ModuleList([first] if reference is None else [first, self.load(reference)])

        def engine() -> Engine:
            engines = [TransformersEngine(policy) for policy in policies]
            return engines[0] if len(engines) == 1 else Several(*engines)

        return policies, engine


def one_tokenizer(sources: Sequence[Source]) -> None:
    """What WSPO needs.

    Raises:
        UserError: tokenizers, templates or lengths differ, so that there are no common tokens.
    """
    if len({source.chat.fingerprint for source in sources}) > 1:
        raise UserError(
            "method.baselines: wspo compares the models token by token, which needs one tokenizer and chat template "
            "for weak and strong; leave wspo out"
        )
    if len({source.spec.max_length for source in sources}) > 1:
        raise UserError(
            "method.baselines: wspo compares the models token by token, so they must read the same length; set "
            "weak.max_length and strong.max_length to one number, or leave wspo out"
        )


def one_vocabulary(tuned: Source, untuned: Source) -> None:
    """What every log-ratio of a model after and before its alignment needs.

    Raises:
        UserError: a token id stands for different texts in the two.
    """
    if tuned.chat.vocabulary != untuned.chat.vocabulary:
        raise UserError(
            f"weak.untuned: {untuned.spec.name} has another vocabulary than {tuned.spec.name}, so it is not that model "
            "before its alignment; name the one that it was tuned from"
        )


def reading_as(base: Writer, writer: Writer) -> Writer:
    """A model that reads with another's template and length; of one vocabulary."""
    own, other = base.source, writer.source
    if own.chat.fingerprint == other.chat.fingerprint and own.spec.max_length == other.spec.max_length:
        return base
    source = replace(own, spec=own.spec.model_copy(update={"max_length": other.spec.max_length}))
    source.chat = other.chat
    return replace(base, source=source)


def _unless_blank(replies: Replies, chat: Chat) -> list[np.ndarray]:
    """Token ids of replies; none for one without a visible character, whatever its tokens are."""
    ids = replies.encode(chat)
    return [row if text.strip() else row[:0] for row, text in zip(ids, replies.texts, strict=True)]


def _tensors(found: Decoded) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and log-probabilities as one [T, 1 + m] table, tokens of each reply, and whether it was finished."""
    values = [
        np.concatenate([tokens[:, None].astype(np.float64), logs], 1)
        for tokens, logs in zip(found.tokens, found.log_probabilities, strict=True)
    ]
    # token ids are whole numbers far below 2^24, which fp32 holds exactly
    flat = torch.from_numpy(np.concatenate(values)).float()
    return flat, torch.tensor([len(v) for v in values]), torch.from_numpy(found.stopped.astype(np.int64))


def single_texts(name: str, texts: Sequence[str], ids: Sequence[str]) -> Table:
    """Texts one by one, as a table whose scores are one reward each."""
    zeros = np.zeros(len(texts), np.int64)
    return Table(name, "pairs", 2, list(ids), [""] * len(texts), [(text,) for text in texts], zeros, zeros)


__all__ = ["ReplyModule", "TextRun", "Writer", "one_tokenizer", "one_vocabulary", "reading_as", "single_texts"]
