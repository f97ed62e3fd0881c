"""Whether texts may share a row of a model: its numbers must be those that transformers gives each text alone.

A model is asked with texts longer than its windows and chunks, and on both sides of the lengths at which it counts
otherwise, as far as texts come to be so long. Where it mixes the texts of a row (recurrent and convolutional layers,
positions that are counted in columns, kernels that take no mask), each text gets a row of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from w2sg.data.completions import Completions
from w2sg.data.masks import row_limits, windows
from w2sg.data.rows import pack
from w2sg.errors import UserError
from w2sg.models import rope
from w2sg.models.attention import is_kernel, on_any_device

if TYPE_CHECKING:
    from w2sg.models.policy import Policy
    from w2sg.models.scorer import LanguageScorer
    from w2sg.models.source import Source

log = logging.getLogger(__name__)
CARRIES = ("linear", "conv", "mamba", "recurrent", "hybrid")  # in the names of layer types
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


def rules_key(config: Any, max_length: int, shared: bool) -> dict[str, list[int]]:
    """What a stage's key says of a model whose rules change within its texts; nothing of others.

    Args:
        shared: whether texts share rows where the model allows it.
    """
    if config is None:  # a bag of words
        return {}
    borders = {"windows": windows(config) if shared else [], "rope": rope.borders(config)}
    below = {name: [size for size in sizes if size < max_length] for name, sizes in borders.items()}
    return {name: sizes for name, sizes in below.items() if sizes}


@torch.no_grad()
def separates_texts(
    scorer: LanguageScorer, vocabulary: int, max_length: int | None = None, wanted: bool = True
) -> bool:
    """Whether the states of two texts in a packed row are those of plain transformers, which reads each alone.

    Args:
        vocabulary: ids below it are drawn.
        max_length: of a text; None looks beyond all windows of the model.
        wanted: False only makes sure of rows of one text each.

    Raises:
        UserError: not even a row of its own gives a text the numbers of transformers.
    """
    backbone = scorer._plain.base_model
    draw, longest = np.random.default_rng(0), _longest(backbone.config, max_length)
    start = draw.integers(0, vocabulary, max(3, longest // 3)).tolist()
    first, second = (start + draw.integers(0, vocabulary, k - len(start)).tolist() for k in (longest, longest - 2))
    third = draw.integers(0, vocabulary, 3).tolist()  # on the near side of all borders

    def alone() -> list[Tensor]:
        return [_plain(backbone, text)[-1] for text in (first, second, third, second)]

    def together(packed: bool) -> list[Tensor]:
        texts = [first, second] if packed else [first, second, third, second]
        batch = pack([("a", "b")] * (len(texts) // 2), lambda _: texts, longest, packed).collate(range(len(texts) // 2))
        return [*scorer.hidden(_to(batch, backbone)).flatten(0, 1)]

    return _decide(scorer._plain, alone, together, wanted and why_apart(backbone.config, max_length) is None)


@torch.no_grad()
def keeps_replies_apart(policy: Policy, max_length: int | None = None, wanted: bool = True) -> bool:
    """Whether the states at replies in packed rows are those of plain transformers, which reads each alone.

    Args and errors: as of `separates_texts`.
    """
    backbone = policy.plain.base_model
    draw, longest = np.random.default_rng(0), _longest(backbone.config, max_length)
    vocabulary, before = policy.head()[0].shape[0], max(3, longest // 3)
    prompts = [draw.integers(0, vocabulary, before), draw.integers(0, vocabulary, 2)]
    sizes = [(longest - before, max(2, longest - before - 2)), (1, 3)]
    replies = [tuple(draw.integers(0, vocabulary, k) for k in pair) for pair in sizes]

    def alone() -> list[Tensor]:
        both = [(prompt, reply) for prompt, pair in zip(prompts, replies, strict=True) for reply in pair]
        states = [_plain(backbone, [*prompt.tolist(), *reply.tolist()]) for prompt, reply in both]
        return [policy.ready(state[len(prompt) - 1 : -1]) for state, (prompt, _) in zip(states, both, strict=True)]

    def together(packed: bool) -> list[Tensor]:
        batch = Completions(prompts, replies, packed=packed).collate([0, 1])
        return [*policy.states(_to(batch, backbone)).split([k for pair in sizes for k in pair])]

    return _decide(policy.plain, alone, together, wanted and why_apart(backbone.config, max_length) is None)


def _longest(config: Any, max_length: int | None) -> int:
    """Tokens of the texts to ask with: over every border that a text may come to."""
    limits = [size for size in (*windows(config), *rope.borders(config)) if max_length is None or size < max_length]
    longest = max((size + 9 for size in limits), default=7)
    return longest if max_length is None else max(7, min(longest, max_length))


def said_apart(source: Source) -> str:
    """The line of a model whose texts were to share rows and do not."""
    spec = source.spec
    reason = source.config and why_apart(source.config, spec.max_length, spec.attention)
    reason = reason or "this backbone mixes the texts of a packed row"
    return f"{spec.name}: {reason}, so each text gets a row of its own"


def why_apart(config: Any, max_length: int | None, attention: str | None = None) -> str | None:
    """Why texts cannot share a row, where a model's configuration says so; None where it has to be asked.

    A state that is carried from column to column would hardly show in weights that were just drawn.

    Args:
        attention: that it is read with, where its configuration does not say so yet.
    """
    attention = attention or config._attn_implementation or ""
    if is_kernel(attention):
        return f"attention={attention} takes no mask, which would keep texts apart"
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    carries = any(word in str(kind) for kind in kinds for word in CARRIES)
    if carries:
        return "a layer carries a state from token to token"
    if any(max_length is None or border < max_length for border in rope.borders(config)):
        return "its rotary frequencies hang on the length of a text"
    if any(max_length is None or 2 * max_length > limit for limit in row_limits(config)):
        return "it counts the columns of a row"
    return None


def _decide(
    model: nn.Module, alone: Callable[[], list[Tensor]], together: Callable[[bool], list[Tensor]], share: bool
) -> bool:
    name = type(model).__name__
    if model.device.type == "meta":  # of a plan: there are no numbers to compare
        return share
    try:
        with on_any_device(model):
            expected = alone()
            if share and all(_alike(lambda: together(True), expected, model) or [False]):
                return True
            same = [_close(a, b, model) for a, b in zip(together(False), expected, strict=True)]
    except REFUSALS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} cannot read a batch of texts ({reason}); choose another model") from error
    # in bf16 a text may choose other experts by a hair
    if not (all(same) if model.dtype == torch.float32 else any(same)):
        raise UserError(
            f"{name}: texts that are read together get other numbers than transformers gives each alone, so no result "
            "of this model could be believed; choose another model"
        )
    return False


def _alike(together: Callable[[], list[Tensor]], expected: Sequence[Tensor], model: nn.Module) -> list[bool]:
    """Which texts come out as they do alone; none where the model takes no packed rows."""
    try:
        return [_close(a, b, model) for a, b in zip(together(), expected, strict=False)]
    except REFUSALS as error:
        log.debug("%s takes no packed rows: %s", type(model).__name__, error)
        return []


def _close(states: Tensor, expected: Tensor, model: nn.Module) -> bool:
    """In bf16 two orders of summation differ in the third digit; leaking text differs in the first."""
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((states.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def _plain(backbone: nn.Module, text: list[int]) -> Tensor:
    """[L, D] as anybody would read it."""
    ids = torch.tensor([text], device=next(backbone.parameters()).device)
    return backbone(input_ids=ids, use_cache=False).last_hidden_state[0]


def _to(batch: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    device = next(backbone.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}
