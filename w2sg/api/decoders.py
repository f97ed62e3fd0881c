"""Decoders over models in memory or by name: the ways of writing of ``python evaluate.py decoder=``, from Python."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from w2sg.api.prompts import prompts_of
from w2sg.config.check import check_options
from w2sg.config.model_schema import ModelConfig
from w2sg.data.dialogue import Chat, TextChat
from w2sg.data.replies import Prompts
from w2sg.decoding.contrastive import ReplyRows
from w2sg.decoding.decoders import REWARD, STRONG, TUNED, UNTUNED, Decoder, Written, class_of
from w2sg.decoding.decoders.batches import check_vocabulary, write_batch
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.packed_layers import unpack
from w2sg.errors import UserError
from w2sg.models.backbones import check_vocabulary as check_tokenizer
from w2sg.models.backbones import name_body
from w2sg.models.files import ends_of
from w2sg.models.policy import Policy, checked_policy, load_policy
from w2sg.models.source import find
from w2sg.store.keys import stage_seed

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from w2sg.data.messages import Dialogue

Style = Literal["chat", "roles", "urial"]
Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class _Rewards:
    """A reward function of the caller's as guides ask it: of dialogues and replies."""

    def __init__(self, rewards: Reward):
        self.rewards, self.read = rewards, 0  # what it reads is not known

    def __call__(self, prompts: Sequence[Dialogue], replies: Sequence[str]) -> np.ndarray:
        found = self.rewards([prompt.text for prompt in prompts], list(replies))
        found = np.asarray(found.detach().cpu().float() if isinstance(found, Tensor) else found, np.float64)
        if found.shape != (len(replies),) or not np.isfinite(found).all():
            raise UserError(
                f"reward: it gave {list(found.shape)} for {len(replies)} replies; give one finite number for each"
            )
        return found


@dataclass(frozen=True)
class _Model:
    """A model with how it writes. ``given`` is the caller's own object, which is left as it was."""

    policy: Policy
    chat: Chat
    given: bool


class Writer:
    """A decoder with its models, ready to write. `decoder` makes one.

    Attributes:
        decoder: its options.
    """

    def __init__(
        self, decoder: Decoder, strong: _Model | None, weak: Sequence[_Model], rewards: _Rewards | None, seed: int
    ):
        self.decoder, self.seed = decoder, seed
        self._strong, self._weak, self._rewards = strong, list(weak), rewards

    def write(self, prompts: Sequence[Any], **options: Any) -> list[Written]:
        """A reply to each prompt.

        A reply is decided by the seed and its prompt alone, not by the other prompts of the call.

        Args:
            prompts: [P] texts: a message of the user for a model with a chat template, else what the model
                continues. A transcript ("Human: ... Assistant:") has the turns that it shows. Or lists of messages,
                ``{"role": ..., "content": ...}``.
            options: of the decoder, for this call alone, as ``max_new_tokens=64``.

        Returns:
            [P] replies with ``text``, ``tokens``, ``log_probabilities`` (nats, by the model that writes),
            ``finished``, and ``value`` and ``candidates`` of decoders that choose.

        Raises:
            UserError: an option does not hold, or a prompt does not fit into a model.
        """
        decoder = self.decoder
        if options:
            decoder = check_options(type(decoder), {**decoder.model_dump(by_alias=True), **options})
        wanted = prompts_of(prompts)
        unique = Prompts("prompts", list(dict.fromkeys(wanted.ids)), list(dict.fromkeys(wanted.texts)))
        written: dict[str, Written] = {}
        with self._reading():
            for start in range(0, len(unique), decoder.batch_size):
                batch = unique.take(range(start, min(start + decoder.batch_size, len(unique))))
                self._check_fits(batch)
                replies = self._generated(decoder, batch) if decoder.generated_by else self._steered(decoder, batch)
                written |= dict(zip(batch.ids, replies, strict=True))
        return [written[i] for i in wanted.ids]

    def _steered(self, decoder: Decoder, prompts: Prompts) -> list[Written]:
        writer = self._writer
        engines = Engines(
            None if self._strong is None else self._strong.policy,
            [model.policy for model in self._weak],
            writer.chat,
            self._weak[0].chat if self._weak else None,
            stage_seed(self.seed, "plain"),
            self._rewards,
        )
        replies = []
        for reply in write_batch(decoder, engines, prompts):
            said = replace(reply, candidates=tuple(self._said(decoder, one) for one in reply.candidates))
            replies.append(self._said(decoder, said))
        return replies

    def _generated(self, decoder: Decoder, prompts: Prompts) -> list[Written]:
        """What is no more than sampling of one model, or of a contrast."""
        from w2sg.decoding.engine import Several
        from w2sg.decoding.transformers_engine import TransformersEngine

        models = [self._strong] if decoder.generated_by == (STRONG,) else self._weak
        contrast = len(decoder.generated_by) > 1
        if contrast and len(models) == 1:
            engine: Any = TransformersEngine(models[0].policy, base_too=True)
        else:
            engines = [TransformersEngine(model.policy) for model in models[: len(decoder.generated_by)]]
            engine = engines[0] if len(engines) == 1 else Several(*engines)
        chat, count = models[0].chat, len(prompts)
        name = decoder.stage if contrast else "plain"
        rows = ReplyRows(
            prompts=chat.prompts(prompts.texts),
            prompt_ids=prompts.ids,
            prompt_of=np.arange(count),
            sample=np.zeros(count, np.int64),
            settings=np.tile(np.array([decoder.columns()], np.float64), (count, 1)),
            max_new_tokens=decoder.max_new_tokens,
            seed=stage_seed(self.seed, name),
        )
        device = next(models[0].policy.parameters()).device
        batch = {name: column.to(device) for name, column in rows.collate(range(count)).items()}
        found = rows.write(engine, batch, chat.stop)
        parts = zip(found.tokens, found.log_probabilities, found.stopped.tolist(), strict=True)
        return [self._said(decoder, Written(row, logs[:, 0], finished=ended)) for row, logs, ended in parts]

    @property
    def _writer(self) -> _Model:
        return self._weak[0] if self._strong is None else self._strong

    def _said(self, decoder: Decoder, reply: Written) -> Written:
        return reply.as_said(self._writer.chat, decoder.given(reply))[0]

    def _check_fits(self, prompts: Prompts) -> None:
        for model in (self._strong, *self._weak):
            if model is None:
                continue
            for row, prompt in zip(model.chat.prompts(prompts.texts), prompts.texts, strict=True):
                if not len(row):
                    raise UserError(f"{model.chat.name}: its chat template refuses the prompt {prompt.text[:60]!r}")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Models of the caller's are as they were afterwards."""
        given = [model.policy.model for model in (self._strong, *self._weak) if model is not None and model.given]
        with _evaluating(given):
            try:
                yield
            finally:
                for module in given:
                    unpack(module)  # else weights that are trained on later would not be seen


@contextlib.contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Models in evaluation mode, then each of their modules in its own again."""
    training = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was


def decoder(
    kind: str,
    *,
    strong: Any = None,
    weak: Any = None,
    tokenizer: Any = None,
    weak_tokenizer: Any = None,
    reward: Reward | None = None,
    style: Style = "chat",
    seed: int = 0,
    **options: Any,
) -> Writer:
    """A decoder over transformers models, of any kind that ``decoder=`` takes.

    In full precision replies are those of ``python evaluate.py decoder=KIND`` with the same models, options and seed.

    Args:
        kind: ``sampling``, ``contrastive``, ``eft``, ``search``, ``best_of_n``, ``wsd`` or ``nudging``
            (docs/decoding.md), or the dotted path of your decoder class.
        strong: the model that is steered: a ``...ForCausalLM`` on any device, or a name: a hub id, a folder, a .gguf
            file, ``package:<module>/<file>``.
        weak: ``(aligned, base)``, the small model after and before its alignment, each as ``strong``; or one of them
            where the decoder needs no more: the aligned one alone, or a peft model, whose base is the one before.
        tokenizer: of ``strong``; where that is a name, its own if none is given.
        weak_tokenizer: of the weak models; ``tokenizer`` if none is given and they are objects.
        reward: for ``search`` and ``best_of_n``: a function of prompts and replies, two lists of B texts, that gives B
            numbers. It alone guides, unless ``guide=`` says otherwise.
        style: how ``strong`` reads dialogues: ``chat`` (its template), ``roles`` or ``urial`` (for base models).
        seed: of the replies.
        options: of the decoder (docs/options.md), as ``beta=1.0``, ``max_new_tokens=64``, ``guide={"beta": 0.5}``.

    Raises:
        UserError: a model or an option is missing, not read by this decoder, or does not fit.
    """
    if style not in get_args(Style):
        raise UserError(f"style: there is no {style!r}; choose among {', '.join(get_args(Style))}")
    if reward is not None and not callable(reward):
        raise UserError(f"reward: {reward!r} is no function; give one of prompts and replies")
    if reward is not None:
        only = {"implicit": 0.0} if "guide" not in options else {}
        options["guide"] = {"reward": 1.0, "model": "reward", **only, **options.get("guide", {})}
    named = {"kind": kind} if "." not in kind else {"_target_": kind}
    try:
        chosen = class_of(named)
    except ValueError as error:
        raise UserError(f"decoder: {error}") from error
    if reward is not None and "guide" not in chosen.model_fields:
        raise UserError(f"decoder {kind}: no reward guides it; leave reward out, or use search or best_of_n")
    made: Decoder = check_options(chosen, {"kind": chosen.model_fields["kind"].default, **options})
    if made.served_by is not None:
        raise UserError(
            "server: a server writes where a decoder is measured; use w2sg.decode(['decoder.server.url=…'])"
        )
    if getattr(made, "engine", None) not in (None, "transformers"):
        raise UserError(f"engine: {made.engine} samples where a decoder is measured; use w2sg.decode, or leave it out")
    parts = [] if weak is None else list(weak) if isinstance(weak, tuple | list) else [weak]
    _check_needs(made, strong, parts, reward)
    big = None if strong is None else _model(strong, tokenizer, "strong", style)
    own = weak_tokenizer if weak_tokenizer is not None else tokenizer
    small = [_model(one, weak_tokenizer if _named(one) else own, "weak", "chat") for one in parts]
    if UNTUNED in made.needs and len(small) == 1 and not small[0].policy.adapted:
        raise UserError(f"decoder {made.kind}: weak is one model without adapters; give (aligned, base)")
    if len(small) == 2 and small[0].chat.vocabulary != small[1].chat.vocabulary:
        raise UserError("weak: the two models have different vocabularies; give one model after and before alignment")
    if weak_tokenizer is None and big is not None and small and not any(map(_named, parts)):
        sizes = [model.policy.model.config.get_text_config().vocab_size for model in (small[0], big)]
        if sizes[0] != sizes[1]:
            log.warning(
                "weak is read with strong's tokenizer, but has %d ids and strong %d; if it has a tokenizer of "
                "another kind, give weak_tokenizer=",
                *sizes,
            )
    if made.adds_logits and big is not None and small:
        check_vocabulary(made, small[0].chat, big.chat)
    return Writer(made, big, small, None if reward is None else _Rewards(reward), seed)


def _check_needs(made: Decoder, strong: Any, weak: Sequence[Any], reward: Any) -> None:
    needs, name = made.needs, f"decoder {made.kind}"
    if STRONG in needs and strong is None:
        raise UserError(f"{name}: strong is missing; give a model or its name")
    if STRONG not in needs and strong is not None:
        raise UserError(f"{name}: the strong model writes nothing in it; leave strong out")
    pair = UNTUNED in needs
    if needs & {TUNED, UNTUNED} and not weak:
        raise UserError(f"{name}: weak is missing; give {'(aligned, base)' if pair else 'the small aligned model'}")
    if weak and not needs & {TUNED, UNTUNED}:
        raise UserError(f"{name}: no weak model takes part in it; leave weak out")
    if len(weak) > (2 if pair else 1):
        raise UserError(f"{name}: weak is {len(weak)} models; give {'(aligned, base)' if pair else 'the aligned one'}")
    if REWARD in needs and reward is None:
        raise UserError(f"{name}: guide.reward has a weight; give the reward function as reward=")
    if REWARD not in needs and reward is not None:
        raise UserError(f"{name}: guide.reward is 0; give it a weight, or leave reward out")


def _named(model: Any) -> bool:
    return isinstance(model, str | Path)


def _model(model: Any, tokenizer: Any, role: str, style: str) -> _Model:
    """A model with its chat, from an object or a name."""
    if _named(model):
        source = replace(find(ModelConfig(name=str(model)), role), style=style)
        if tokenizer is not None:
            raise UserError(
                f"{role}: {model} has its tokenizer with it; leave the tokenizer out, or give the model itself"
            )
        return _Model(load_policy(source, trainable=False), source.chat, given=False)
    name = getattr(model, "name_or_path", "") or type(model).__name__
    if not isinstance(model, nn.Module) or getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UserError(
            f"{role}: {type(model).__name__} is no language model; give a ...ForCausalLM, or a model's name"
        )
    if tokenizer is None:
        raise UserError(f"{role}: the tokenizer of {name} is missing; give it as tokenizer= (or weak_tokenizer=)")
    if not hasattr(tokenizer, "chat_template"):
        raise UserError(
            f"{role}: {type(tokenizer).__name__} is no tokenizer; give one of transformers, as "
            "AutoTokenizer.from_pretrained makes it"
        )
    check_tokenizer(tokenizer, model.config.get_text_config(decoder=True), role, name)
    chat = Chat(tokenizer, name=name) if style == "chat" else TextChat(tokenizer, style, name=name)
    ends = ends_of(getattr(model.generation_config, "eos_token_id", None), role, name)
    chat.stop = sorted({*chat.stop, *ends})
    with _evaluating([model]):
        name_body(model.get_base_model() if hasattr(model, "get_base_model") else model)
        policy = checked_policy(model, chat, role, name)
    return _Model(policy, chat, given=True)
