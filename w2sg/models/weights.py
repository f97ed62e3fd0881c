"""Whether the weights of a model are all there, and its own: nothing but a head may be missing from a file.

What a checkpoint lacks is drawn at random by transformers, with a word to nobody; so what it lacked is looked at here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from w2sg.errors import UserError
from w2sg.models.backbones import name_body
from w2sg.models.unreadable import first_line, whole_file

log = logging.getLogger(__name__)

READ = {".safetensors", ".bin", ".json", ".model", ".txt"}  # of a model's folder; what its identity is made of
SCORE = re.compile(r"(^|\.)score\.(weight|bias)$")
# buffers that older versions of transformers wrote into their files, and that are computed now
COMPUTED = re.compile(
    r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|masked_bias|attention\.(masked_)?bias|position_ids|\.rope\.freqs)$"
)
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")
SHOWN = 3


def names(found: Iterable[str]) -> str:
    """The first few names of a list."""
    found = sorted(found)
    return ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")


# ---------------------------------------------------------------------------------------------------------------------
# A folder, before anything of it is loaded
# ---------------------------------------------------------------------------------------------------------------------


def files_of(folder: Path, role: str, weights: bool = True) -> list[Path]:
    """The files of a model's folder that are read, each looked at.

    Args:
        weights: whether there must be any.

    Raises:
        UserError: it is no folder of a model, or a file of it cannot be read; see `whole_file`.
    """
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix in READ)
    except OSError as error:
        raise UserError(
            f"{role}.name: the folder {folder} cannot be read ({error.strerror}); let yourself read it"
        ) from error
    there = {p.name for p in files}
    if "adapter_config.json" in there:
        raise UserError(
            f"{role}.name: {folder} holds adapters{_base(folder)} and no whole model; merge them first (peft's "
            "merge_and_unload, then save_pretrained), and name that folder"
        )
    if "config.json" not in there:
        raise UserError(f"{role}.name: the folder {folder} holds no config.json, so it is not a saved model")
    for file in files:
        whole_file(file, role)
    _check_config(folder / "config.json", role)
    if weights and not any(p.suffix in {".safetensors", ".bin"} for p in files):
        raise UserError(f"{role}.name: the folder {folder} holds no weights (.safetensors or .bin); download them")
    for index in (p for p in files if p.name.endswith(".index.json")):
        _check_index(index, role)
    named = _json(folder / "config.json", role).get("quantization_config") is not None  # which is refused later
    if weights and not named and (packed := _packed(files)):
        raise UserError(
            f"{role}.name: {packed[0]} in {folder} holds numbers of {packed[1]}, which are weights only with the "
            "scales of a quantisation that its config.json does not name; take the model that it was made from"
        )
    for file in (p for p in files if p.name == "generation_config.json"):
        if not isinstance(settings := _json(file, role), dict):
            raise UserError(f"{role}.name: {file} holds no settings; download it again, or remove it")
        ends_of(settings.get("eos_token_id"), role, str(folder))
    return files


PACKED = {"I8", "U8", "I4", "U4", "F8_E4M3", "F8_E5M2", "F4", "F8_E8M0", "I32"}  # as safetensors names them


def _packed(files: Iterable[Path]) -> tuple[str, str] | None:
    """The first matrix of weights whose numbers are rounded to a few bits, and to which; None where there is none.

    transformers would read them as if they were the weights, without the scales that they have to be multiplied by.
    """
    with contextlib.suppress(SafetensorError, OSError, ValueError):  # a damaged file is said where it is loaded
        for file in (p for p in files if p.suffix == ".safetensors"):
            with safe_open(file, "pt") as tensors:
                names_there = tensors.keys()
                for key in names_there:
                    part = tensors.get_slice(key)
                    if key.endswith("weight") and len(part.get_shape()) > 1 and part.get_dtype() in PACKED:
                        return key, part.get_dtype()
    return None


def ends_of(found: Any, role: str, name: str) -> list[int]:
    """Tokens that settings of generation end a reply at.

    Args:
        found: their ``eos_token_id``.

    Raises:
        UserError: it holds something else than tokens' numbers.
    """
    ends = [] if found is None else found if isinstance(found, list) else [found]
    if wrong := [end for end in ends if not isinstance(end, int) or isinstance(end, bool)]:
        raise UserError(
            f"{role}.name: eos_token_id in generation_config.json of {name} is {wrong[0]!r} and no token's number; "
            "write the numbers of the tokens that end a reply there, or remove it"
        )
    return [end for end in ends if end >= 0]  # -1 is written for none


def _base(folder: Path) -> str:
    try:
        return (
            f" of {json.loads((folder / 'adapter_config.json').read_text(encoding='utf-8'))['base_model_name_or_path']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _check_config(file: Path, role: str) -> None:
    content = _json(file, role)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{role}.name: {file} is no configuration of a model; download it again")


def _json(file: Path, role: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{role}.name: {file} is no JSON ({first_line(error)}); download it again") from error


def _check_index(file: Path, role: str) -> None:
    """Every shard that an index names is there."""
    content = _json(file, role)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{role}.name: {file} is no index of weights (no weight_map); download it again")
    if lost := {place for place in places.values() if not (file.parent / place).is_file()}:
        raise UserError(
            f"{role}.name: {file} names {len(lost)} files of weights that are not there ({names(lost)}); download them"
        )


def has_score(files: Iterable[Path]) -> bool:
    """Whether the weights of a folder have a trained head for scores, as a reward model's have."""
    files = list(files)
    for index in (p for p in files if p.name.endswith(".index.json")):
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return any(map(SCORE.search, places))
    return any(map(SCORE.search, _names(files)))


def _names(files: Iterable[Path]) -> list[str]:
    """Names of the tensors in files of weights; none of a damaged one, which is said where it is loaded."""
    found: list[str] = []
    with contextlib.suppress(SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    found += tensors.keys()
            elif file.suffix == ".bin" and file.name.startswith("pytorch_model"):
                found += torch.load(file, map_location="meta", mmap=True, weights_only=True)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A model, once it is loaded
# ---------------------------------------------------------------------------------------------------------------------


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
    for key, weight in model.named_parameters():
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
    there = [key for key, _ in model.named_modules()]
    lost = [target for target in targets if not any(k == target or k.endswith(f".{target}") for k in there)]
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
    own = model.state_dict()
    for key, weight in read.items():
        if key in own and own[key].shape != weight.shape:
            raise UserError(
                f"{role}.name: {key} of {name} has the shape {tuple(weight.shape)} and not {tuple(own[key].shape)}"
            )
    model.load_state_dict({k: v for k, v in read.items() if k in own}, strict=False)
    model.tie_weights()
