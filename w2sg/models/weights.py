"""Whether the weights of a model are all there, and its own: nothing but a head may be missing from a file.

What a checkpoint lacks is drawn at random by transformers, with a word to nobody; so what it lacked is looked at here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from w2sg.errors import UserError
from w2sg.models.backbones import name_body
from w2sg.models.spread import weights_at_hand

log = logging.getLogger(__name__)

# buffers that older versions of transformers wrote into their files, and that are computed now
COMPUTED = re.compile(
    r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|masked_bias|attention\.(masked_)?bias|position_ids|\.rope\.freqs)$"
)
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")
SHOWN = 3


def names(tensors: Iterable[str]) -> str:
    """The first few names of a list."""
    ordered = sorted(tensors)
    return ", ".join(ordered[:SHOWN]) + (", ..." if len(ordered) > SHOWN else "")


def check_loaded(
    model: nn.Module,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[Any],
    role: str,
    name: str,
    depth: int | None = None,
    inside: bool = False,
) -> list[str]:
    """See to it that a model's weights came from its file.

    Args:
        missing, unexpected, mismatched: as transformers reports them; mismatched are (name, shape in the file, shape).
        depth: of the blocks that are kept, where the others are cut off; None where all are.
        inside: whether the file is of a model that has this one as a part.

    Returns:
        Names of what is drawn at random: parts of a head, and nothing else.

    Raises:
        UserError: a part of the body is missing, has another shape, or the file is of another architecture.
    """
    name_body(model)
    missing, unexpected = set(missing), {key for key in unexpected if not COMPUTED.search(key)}
    total = len(model.state_dict())
    shapes = {m[0]: (tuple(m[1]), tuple(m[2])) for m in mismatched}
    drawn = {key for key in missing if _of_head(model, key)}
    if lost := missing - drawn:
        raise UserError(
            f"{role}.name: the file of {name} has no weights for {len(lost)} of {total} tensors of the backbone, the "
            f"first {names(lost)}; {_why(lost, unexpected)}"
        )
    if bad := {key: shape for key, shape in shapes.items() if not _of_head(model, key)}:
        key = min(bad)
        raise UserError(
            f"{role}.name: {len(bad)} tensors of {name} have other shapes in its file than its config.json says, the "
            f"first {key}: {bad[key][0]} and not {bad[key][1]}; one of the two is of another model"
        )
    extra = {key for key in unexpected if _in_body(model, key)}
    if inside:  # its eyes and ears may stand beside the text model
        children = {name for name, _ in model.base_model.named_children()}
        extra = {key for key in extra if children & set(key.split(".")[:2])}
    if depth is not None:  # of blocks that were cut off
        extra = {key for key in extra if not ((m := BLOCK.search(key)) and int(m[1]) >= depth)}
    if extra:
        raise UserError(
            f"{role}.name: the file of {name} has {len(extra)} tensors that {type(model).__name__} has no place for, "
            f"the first {names(extra)}; its config.json is of another architecture or of fewer layers"
        )
    known = {name for name, _ in model.named_children()} | {"lm_head", "embed_out", "output", "score"}
    if others := {key for key in unexpected - extra if not BLOCK.search(key) and key.partition(".")[0] not in known}:
        log.warning("%s: %s has tensors that are not read: %s", role, name, names(others))
    return sorted(drawn | shapes.keys())


def _of_head(model: nn.Module, key: str) -> bool:
    """Whether a weight stands outside of the body."""
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    return body is not None and body is not model and not key.startswith(f"{prefix}.")


def _in_body(model: nn.Module, key: str) -> bool:
    """Whether a name in a file stands where the body's weights do: under its prefix, or under a child of the body."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and key.startswith(f"{prefix}."):
        return True
    children = {name for name, _ in model.base_model.named_children()}
    return key.partition(".")[0] in children


def _why(lost: set[str], unexpected: set[str]) -> str:
    """What the names in the file tell of how it was written."""
    known = min(lost)
    for key in sorted(unexpected):
        if key.endswith(known) and (prefix := key.removesuffix(known)):
            if "base_model.model." in prefix or "lora" in prefix:
                return f"its names begin with {prefix}: merge the adapters into the model, and save that"
            return f"its names begin with {prefix}: save the model that was wrapped, not its wrapper"
    if any("lora_" in key or ".base_layer." in key for key in unexpected):
        return "it is of a model with adapters: merge them into it, and save that"
    if unexpected := {key for key in unexpected if not re.search(r"head|score|classifier|embed_out", key)}:
        return f"what it has instead is of another architecture ({names(unexpected)})"
    return "download it again"


@torch.no_grad()
def check_finite(model: nn.Module, role: str, name: str) -> None:
    """Refuse a model with weights that are no numbers.

    Raises:
        UserError: NaN or infinite ones, with the names of their tensors.
    """
    bad = []
    for key, weight in weights_at_hand(model):
        if weight.numel() and weight.is_floating_point():
            low, high = weight.aminmax()  # a NaN anywhere is both
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(key)
    if bad:
        raise UserError(
            f"{role}.name: {len(bad)} tensors of {name} have weights that are NaN or infinite, the first {names(bad)}; "
            "its training diverged, or its file is damaged: take another copy of it"
        )


def check_targets(model: nn.Module, targets: str | list[str], role: str, name: str) -> None:
    """See to it that every layer that is to have an adapter is there; peft is content with one of them.

    Raises:
        UserError: one is not.
    """
    if isinstance(targets, str):  # all-linear, or a pattern over whole names, which peft tries itself
        return
    layers = [key for key, _ in model.named_modules()]
    lost = [target for target in targets if not any(k == target or k.endswith(f".{target}") for k in layers)]
    if lost:
        kinds = (nn.Linear, *(type(m) for m in model.modules() if type(m).__name__ == "Conv1D"))
        has = {key.rpartition(".")[2] for key, module in model.named_modules() if isinstance(module, kinds)}
        raise UserError(
            f"{role}.lora.targets: {name} has no {' and no '.join(lost)}; it has {', '.join(sorted(has))}, or use "
            "all-linear"
        )


def fill(model: nn.Module, read: Mapping[str, Tensor], role: str, name: str) -> None:
    """Move weights of a language model into one with another head.

    Raises:
        UserError: a tensor has another shape.
    """
    state = model.state_dict()
    for key, weight in read.items():
        if key in state and state[key].shape != weight.shape:
            raise UserError(
                f"{role}.name: {key} of {name} has the shape {tuple(weight.shape)} and not {tuple(state[key].shape)}"
            )
    model.load_state_dict({k: v for k, v in read.items() if k in state}, strict=False)
    model.tie_weights()
