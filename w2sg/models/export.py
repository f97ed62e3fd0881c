"""A model of a finished run, loaded whole and written as an ordinary transformers folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from w2sg.errors import UserError
from w2sg.models.finished import FinishedModel, source_of
from w2sg.models.policy import load_policy
from w2sg.models.unreadable import quiet_loading
from w2sg.store.files import remove, write_json

ORIGIN = "w2sg.json"  # beside an exported model: where it came from
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # merging in bf16 rounds every weight that adapters touch


def load_merged(trained: FinishedModel) -> tuple[nn.Module, Any]:
    """A ``...ForCausalLM`` with its adapters merged into it, and its tokenizer.

    Raises:
        UserError: its base is not to be had, or merging changes what it says.
    """
    source = source_of(trained.spec, trained.role)
    if trained.spec.random_init and trained.folder is None:
        import lightning as L

        L.seed_everything(trained.seed, workers=True, verbose=False)
    policy = load_policy(source, None if trained.folder is None else trained.folder / "model", trainable=False)
    model = policy.model
    if policy.adapted:
        expected = _logits(model)
        model = model.merge_and_unload(safe_merge=True)
        if not _close(_logits(model), expected, TOLERANCE[model.dtype]):
            raise UserError(
                f"{trained.name}: its adapters cannot be merged: merged, it says something else than with them. "
                "Adapters on an output layer that shares its weights with the embeddings do that; leave "
                "lora.targets=all-linear"
            )
    stop = source.chat.stop
    theirs = model.generation_config.eos_token_id
    known = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    if missing := [token for token in stop if token not in known]:
        model.generation_config.eos_token_id = [*known, *missing]  # it was taught to end a reply with these
    return model.eval(), source.tokenizer


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Logits of a few tokens, [T, V], in fp32."""
    with quiet_loading():
        return model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits[0].float()


def _close(values: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((values - expected).norm() <= tolerance * expected.norm())


def export_model(trained: FinishedModel, to: Path) -> list[Path]:
    """Write a model and its tokenizer as a folder that transformers, vLLM and others read; all of it or nothing.

    Args:
        to: a folder that is not there yet, or is empty.

    Returns:
        The files.

    Raises:
        UserError: there is something at ``to`` already, or it cannot be written.
    """
    try:
        taken = os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir()))
    except OSError as error:
        raise UserError(f"to: {to} cannot be read ({error.strerror}); name another folder") from error
    if taken:
        raise UserError(f"to: there is something at {to} already; name another folder, or remove it")
    model, tokenizer = load_merged(trained)
    part = to.absolute().with_name(f".{to.absolute().name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        with quiet_loading(bars=True):
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        write_json(part / ORIGIN, trained.origin())
        for file in part.iterdir():
            file.chmod((part / ORIGIN).stat().st_mode)  # safetensors lets only its owner read what it writes
        os.replace(part, to)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # as where a file stands in the way
            remove(part)
        raise UserError(
            f"to: {to} cannot be written ({getattr(error, 'strerror', None) or error}); free space, or name another "
            "folder; nothing was left behind"
        ) from error
    except BaseException:
        remove(part)
        raise
    return sorted(to.iterdir())
