"""How many bytes a model takes: its weights, what a forward keeps for its backward, its cache; nothing is loaded.

A model of the same widths and a few blocks reads tensors that have shapes and no numbers (torch's fake tensors), and
what autograd keeps is counted. So it holds for every architecture that transformers has, in every precision, and a
model of a hundred billion weights is counted in a second. Where an architecture cannot be read so (experts that are
chosen by numbers), a rule of thumb takes its place, which says so.

Shapes: D width of the states, I width of the feed-forward layers, V tokens in the vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from w2sg.config.model_schema import ModelConfig
from w2sg.losses.logprobs import chunk_for
from w2sg.models.activations import in_one_kernel
from w2sg.models.backbones import DEPTH, cut_to, recompute, set_dropout

log = logging.getLogger(__name__)

# bytes that an optimizer keeps on the device for each weight that is trained; what is paged gives way
STATES = {"adamw": 8, "adam": 8, "adafactor": 0, "adamw8bit": 2, "paged_adamw8bit": 0}
LENGTH = 512  # tokens of a row, where nothing else is known of it


@dataclass(frozen=True)
class Use:
    """What decides what a model takes, beside its configuration.

    Attributes:
        train: ``full``, ``lora``, ``head`` (on cached features), or None for a model that only reads or writes.
        precision: of the trainer, ``32-true`` or ``bf16-mixed``. dtype: of the weights.
        checkpointing: activations of a block are made again in the backward pass.
        packed: several texts share a row, which takes a mask. attention, dropout: as the
            model's options say.
        rank, targets: of the adapters, with ``train="lora"``.
        optimizer: a name in `STATES`.
    """

    train: str | None = "full"
    precision: str = "32-true"
    dtype: str = "float32"
    checkpointing: bool = False
    packed: bool = False
    attention: str = "sdpa"
    dropout: float = 0.0
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    optimizer: str = "adamw"

    @classmethod
    def of(cls, spec: ModelConfig, precision: str, optimizer: str = "adamw", packed: bool = True) -> Use:
        """Of a role that is trained."""
        targets = spec.lora.targets if isinstance(spec.lora.targets, str) else tuple(spec.lora.targets)
        return cls(
            spec.train,
            precision,
            spec.dtype,
            spec.gradient_checkpointing,
            packed,
            spec.attention,
            spec.dropout,
            spec.lora.r,
            targets,
            optimizer,
        )


@dataclass(frozen=True)
class Kept:
    """What a forward with gradients keeps until its backward, in bytes.

    Attributes:
        fixed: whatever the tokens: copies of the weights in the precision of the products.
        token: of each token of a padded batch, in all blocks.
        block: of each token in one block: about what a forward without gradients, or the backward of a block, has in
            hand at once.
        measured: False where it is a rule of thumb.
    """

    fixed: float
    token: float
    block: float
    measured: bool = True


def kept(config: Any, use: Use, length: int = LENGTH) -> Kept:
    """What a forward of a model's blocks keeps; the output layer and its logits are apart (`logits_bytes`).

    Args:
        config: of a text model of transformers, cut to the blocks that are used.
        length: tokens of a row: a mask has a number for each two of them.

    Returns:
        For a model that is only read, nothing but what a block has in hand.
    """
    if use.train not in ("full", "lora"):
        return Kept(0.0, 0.0, kept(config, replace(use, train="full"), length).block)
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _kept(_Config(config, settings), use, length)


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: all of them, and those that are trained."""

    all: int
    trained: int


def weights(config: Any, use: Use) -> Weights:
    """Of a language model; a scorer has a row of D numbers in place of an output layer that is not tied."""
    count = sum(p.numel() for p in _meta(config).parameters())
    if use.train == "full":
        return Weights(count, count)
    if use.train == "lora":
        with torch.device("meta"):
            adapted = sum(p.numel() for p in _adapted(_meta(config), use).parameters() if p.requires_grad)
        return Weights(count + adapted, adapted)
    return Weights(count, 0)


def state_bytes(config: Any, use: Use, devices: int = 1) -> dict[str, float]:
    """Bytes of ``weights``, ``gradients`` and ``optimizer`` on each of the devices that a model is cut over."""
    counted, width, states = weights(config, use), _width(use.dtype), STATES[use.optimizer]
    adapters = counted.trained if use.train == "lora" else 0  # peft makes adapters in fp32
    return {
        "weights": ((counted.all - adapters) * width + adapters * 4) / devices,
        "gradients": counted.trained * (4 if adapters else width) / devices,
        # as wide as the weights, unless of 8 bits
        "optimizer": counted.trained * states * (width / 4 if states == 8 and not adapters else 1) / devices,
    }


def cache_bytes(config: Any, length: int, dtype: str = "float32") -> int:
    """Bytes of the keys and values (and states) of one row of so many tokens; a growing cache moves with half as many
    again.
    """
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _cached(_Config(config, settings), max(1, int(length)), dtype)


def logits_bytes(vocabulary: int, positions: int, device: str = "cuda") -> int:
    """Bytes of the logits in hand at once for so many positions whose tokens are asked for: two tables in fp32, and
    one in bf16.
    """
    return 10 * vocabulary * min(positions, chunk_for(vocabulary, device))


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


class _Config:
    """A configuration as an argument of functions that remember."""

    def __init__(self, config: Any, settings: str):
        self.config, self.settings = config, settings

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(self.settings)


@functools.lru_cache(maxsize=256)
def _kept(of: _Config, use: Use, length: int) -> Kept:
    if getattr(of.config, "num_experts_per_tok", None):
        return _by_rule(of.config, use)
    depth, period = _depth(of.config), _period(of.config)
    some = (period, 2 * period) if 2 * period < depth else (max(1, depth // 2), depth)

    def line(blocks: int, use: Use) -> tuple[float, float]:
        """Of so many blocks: bytes a token, and bytes whatever the tokens."""
        one, two = (_saved(of.config, blocks, use, rows, length) for rows in (1, 2))
        return (two - one) / length, 2 * one - two

    def all_blocks(use: Use) -> tuple[float, float, float, float]:
        """Of all blocks, a token and whatever the tokens, and of one block."""
        low, high = line(some[0], use), line(some[1], use)
        steps = some[1] - some[0]
        block, cast = ((b - a) / steps if steps else b / depth for a, b in zip(low, high, strict=True))
        return high[0] + (depth - some[1]) * block, high[1] + (depth - some[1]) * cast, block, cast

    try:
        token, fixed, block, cast = all_blocks(replace(use, checkpointing=False))
        if use.checkpointing:  # what enters blocks, and the insides of the one that is made again
            token, fixed = all_blocks(use)[0], cast
    except Exception as error:  # whatever its code does with numbers that are not there
        _by_hand(of.config, "activations", error)
        return _by_rule(of.config, use)
    return Kept(max(0.0, fixed), token, block)


def _saved(config: Any, depth: int, use: Use, rows: int, length: int) -> int:
    """Bytes that one forward keeps beside the model's own tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    precision = torch.autocast("cpu", torch.bfloat16, enabled=use.precision == "bf16-mixed")
    body = _body(config, depth, use)
    with FakeTensorMode(), precision, torch.enable_grad():
        body = _fake(body)
        mine = {t.untyped_storage()._cdata for t in (*body.parameters(), *body.buffers())}
        ids = torch.zeros((rows, length), dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with counting(mine) as found, _masks(body, rows, length, use):
            body(**inputs)
        return sum(found.values())


@contextlib.contextmanager
def counting(without: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps inside of the block, but those of these storages (``_cdata``)."""
    found: dict[int, int] = {}
    alive: list[Any] = []  # a storage's number may be given to another one once it is gone

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in without and storage._cdata not in found:
            alive.append(storage)
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def _fake(body: nn.Module) -> nn.Module:
    """A model without storage as one of fake tensors, inside of their mode: adapters cannot be added to such."""
    for module in body.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(empty, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return body


def _body(config: Any, depth: int, use: Use) -> nn.Module:
    """The model without its head, without storage."""
    from transformers import AutoModel

    config = copy.deepcopy(config)
    cut_to(config, depth)
    set_dropout(config, use.dropout)
    attention = use.attention if use.attention == "eager" else "sdpa"  # flash attention keeps what sdpa's kernels do
    with torch.device("meta"):
        body = AutoModel.from_config(config, dtype=getattr(torch, use.dtype), attn_implementation=attention)
        in_one_kernel(body)
        if use.checkpointing:
            recompute(body)
        if use.train != "full":
            body.requires_grad_(False)
        if use.train == "lora":
            if use.checkpointing:
                body.enable_input_require_grads()
            body = _adapted(body, use)
    return body.train(use.train is not None)


def _adapted(model: nn.Module, use: Use) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = use.targets if isinstance(use.targets, str) else list(use.targets)
    flat = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return get_peft_model(model, LoraConfig(r=use.rank, target_modules=targets, fan_in_fan_out=flat))


@contextlib.contextmanager
def _masks(body: nn.Module, rows: int, length: int, use: Use) -> Iterator[None]:
    """One mask for all blocks where rows are packed, and none where causality is enough."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as functions

    if use.attention == "eager":
        yield
        return
    low = use.precision == "bf16-mixed" or use.dtype == "bfloat16"
    shape = (rows, 1, length, length)
    mask = torch.zeros(shape, dtype=torch.bfloat16 if low else torch.float32) if use.packed else None
    usual = functions["sdpa"]
    functions["sdpa"] = lambda **_: mask
    try:
        yield
    finally:
        functions["sdpa"] = usual


@functools.lru_cache(maxsize=256)
def _cached(of: _Config, length: int, dtype: str) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache

    depth, period = _depth(of.config), _period(of.config)
    some = depth if depth <= 2 * period else period * (depth // period > 0)
    try:
        body = _body(of.config, some, Use(train=None, dtype=dtype))
        with FakeTensorMode(), torch.no_grad():
            body = _fake(body)
            cache = DynamicCache(config=body.config)
            ids = torch.zeros((1, length), dtype=torch.long)
            with _masks(body, 1, length, Use()):
                body(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
            held = [t for layer in cache.layers for t in _held(vars(layer).values())]
        if held:
            return round(sum(t.numel() * t.element_size() for t in held) * depth / some)
    except Exception as error:  # as in `_kept`
        _by_hand(of.config, "cache", error)
    heads = getattr(of.config, "num_attention_heads", None) or 1
    width = getattr(of.config, "head_dim", None) or of.config.hidden_size // heads
    return 2 * depth * (getattr(of.config, "num_key_value_heads", None) or heads) * width * length * _width(dtype)


def _held(values: Any) -> Iterator[Tensor]:
    """Tensors in what a layer of a cache has, those in lists and dictionaries as well."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from _held(value.values() if isinstance(value, dict) else value)


def _by_hand(config: Any, what: str, error: Exception) -> None:
    log.info("%s: its %s are taken from a rule of thumb; it cannot be counted", type(config).__name__, what)
    log.debug("%s", type(config).__name__, exc_info=error)


def _by_rule(config: Any, use: Use) -> Kept:
    """Of a decoder with gated feed-forward layers: 13 states and 4 inner ones a block, which Llamas have."""
    depth, inner = _depth(config), getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if getattr(config, "num_experts_per_tok", None):
        inner = (getattr(config, "moe_intermediate_size", None) or inner) * config.num_experts_per_tok
    low = use.precision == "bf16-mixed" or use.dtype == "bfloat16"
    part = 1.0 if not low else 0.7 if use.dtype == "float32" else 0.56
    block = 4 * part * (13 * config.hidden_size + 4 * inner)
    casts = 2 * weights(config, Use(train=None)).all if use.precision == "bf16-mixed" and use.dtype == "float32" else 0
    token = _inputs(config, use) * depth if use.checkpointing else block * depth
    return Kept(casts / (depth if use.checkpointing else 1), token, block, measured=False)


def _inputs(config: Any, use: Use) -> float:
    """Bytes of a token's state between blocks."""
    return config.hidden_size * _width(use.dtype)


def _depth(config: Any) -> int:
    return next(depth for key in DEPTH if isinstance(depth := getattr(config, key, None), int) and depth > 0)


def _period(config: Any) -> int:
    """After how many blocks their kinds come again; 1 where all are alike."""
    kinds = getattr(config, "layer_types", None) or []
    for period in range(1, len(kinds) // 2 + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return period
    return max(1, len(kinds))


def _meta(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def _width(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
