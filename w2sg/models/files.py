"""The files of a model's folder, each looked at before anything of it is loaded."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from w2sg.errors import UserError
from w2sg.models.unreadable import first_line, whole_file
from w2sg.models.weights import names

READ = {".safetensors", ".bin", ".json", ".model", ".txt"}  # of a model's folder; what its identity is made of
SCORE = re.compile(r"(^|\.)score\.(weight|bias)$")


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
    present = {p.name for p in files}
    if "adapter_config.json" in present:
        raise UserError(
            f"{role}.name: {folder} holds adapters{_base(folder)} and no whole model; merge them first (peft's "
            "merge_and_unload, then save_pretrained), and name that folder"
        )
    if "config.json" not in present:
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


def ends_of(eos_token_id: Any, role: str, name: str) -> list[int]:
    """Tokens that settings of generation end a reply at.

    Args:
        eos_token_id: of those settings: a number, a list of them, or None.

    Raises:
        UserError: it holds something else than tokens' numbers.
    """
    ends = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
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
    tensor_names: list[str] = []
    with contextlib.suppress(SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    tensor_names += tensors.keys()
            elif file.suffix == ".bin" and file.name.startswith("pytorch_model"):
                tensor_names += torch.load(file, map_location="meta", mmap=True, weights_only=True)
    return tensor_names
