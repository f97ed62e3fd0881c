"""A model of a finished run, loaded whole and written as an ordinary transformers folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from w2sg.errors import UserError
from w2sg.models.classifier import CLOSE, load_classifier, set_to_read
from w2sg.models.finished import FinishedModel, check_whole, source_of
from w2sg.models.heads import BagOfWords
from w2sg.models.policy import Policy, load_policy
from w2sg.models.standalone import bag_of_words, w2sg_classifier
from w2sg.models.standalone.w2sg_classifier import W2SGClassifier
from w2sg.models.unreadable import quiet_loading
from w2sg.store.files import read_json, remove, write_json
from w2sg.store.weights import weights

ORIGIN = "w2sg.json"  # beside an exported model: where it came from


def load_merged(trained: FinishedModel) -> tuple[nn.Module, Any]:
    """A ``...ForCausalLM`` with its adapters merged into it, and its tokenizer.

    Raises:
        UserError: its base is not to be had, or merging changes what it says.
    """
    check_whole(trained)
    source = source_of(trained.spec, trained.role)
    if trained.spec.random_init and trained.folder is None:
        import lightning as L

        L.seed_everything(trained.seed, workers=True, verbose=False)
    policy = load_policy(source, None if trained.folder is None else weights(trained.folder), trainable=False)
    model = merged(policy, trained.name)
    stop = source.chat.stop
    theirs = model.generation_config.eos_token_id
    known = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    if missing := [token for token in stop if token not in known]:
        model.generation_config.eos_token_id = [*known, *missing]  # it was taught to end a reply with these
    return model.eval(), source.tokenizer


def merged(policy: Policy, name: str) -> nn.Module:
    """The model of a policy, with its adapters merged into it where it has any.

    Raises:
        UserError: merging changes what it says.
    """
    model = policy.model
    if policy.adapted:
        expected = _logits(model)
        model = model.merge_and_unload(safe_merge=True)
        if not _close(_logits(model), expected, CLOSE[model.dtype]):
            raise UserError(
                f"{name}: its adapters cannot be merged: merged, it says something else than with them. "
                "Adapters on an output layer that shares its weights with the embeddings do that; leave "
                "lora.targets=all-linear"
            )
    return model


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Logits of a few tokens, [T, V], in fp32."""
    with quiet_loading():
        return model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits[0].float()


def _close(values: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((values - expected).norm() <= tolerance * expected.norm())


def export_model(
    trained: FinishedModel,
    to: Path,
    adapter: bool = False,
    seen: Sequence[str] = (),
    finish: Callable[[Path, dict[str, Any]], None] | None = None,
) -> list[Path]:
    """Write a model and its tokenizer as a folder that transformers, vLLM and others read; all of it or nothing.

    Args:
        to: a folder that is not there yet, or is empty.
        adapter: of a model with LoRA, write the adapters alone; otherwise they are merged into the model.
        seen: texts that a model that labels reads, none of which may end in its token for filling.
        finish: looks at the folder before it is put in place, and adds to it; gets it and what is known of the model.

    Returns:
        The files.

    Raises:
        UserError: there is something at ``to`` already, it cannot be written, or there are no adapters to write.
    """
    try:
        taken = os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir()))
    except OSError as error:
        raise UserError(f"to: {to} cannot be read ({error.strerror}); name another folder") from error
    if taken:
        raise UserError(f"to: there is something at {to} already; name another folder, or remove it")
    if adapter:
        _check_adapter(trained)
    about: dict[str, Any] = {}
    if adapter:
        model, tokenizer, about = None, source_of(trained.spec, trained.role).tokenizer, {"form": "adapter"}
        if trained.scoring is not None:
            set_to_read(tokenizer, trained.spec.max_length)
    elif trained.scoring is None:
        model, tokenizer = load_merged(trained)
        about = {"form": "policy"}
    else:
        made = load_classifier(trained, seen)
        model, tokenizer = made.model, made.tokenizer
        form = "words" if tokenizer is None else "classifier" if made.ordinary else "own classifier"
        about = {"form": form, "constant": made.constant, "notes": made.notes}
    part = to.absolute().with_name(f".{to.absolute().name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        if adapter:
            shutil.copytree(weights(trained.folder), part, dirs_exist_ok=True)
        elif about["form"] == "words":
            _write_words(model, trained, part)
        else:
            write_model(model, part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        origin = trained.origin() | {"form": about["form"]}
        write_json(part / ORIGIN, origin)
        if finish is not None:
            finish(part, about)
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


def _check_adapter(trained: FinishedModel) -> None:
    """Refuse to write adapters alone where there are none, or where nobody else has what they were trained on."""
    spec, no = trained.spec, "adapter: "
    if trained.folder is None or spec.train != "lora":
        raise UserError(f"{no}{trained.name} was not trained with adapters (tune=lora); leave adapter out")
    if changed := [name for name, value in (("keep_layers", spec.layers), ("round_weights", spec.quantise)) if value]:
        raise UserError(
            f"{no}the adapters of {trained.name} stand on a changed copy of {spec.name} ({changed[0]}), which nobody "
            "else has; leave adapter out, so that they are merged"
        )


def write_model(model: nn.Module, folder: Path) -> None:
    with quiet_loading(bars=True):
        model.save_pretrained(folder)
    if isinstance(model, W2SGClassifier):
        file = Path(w2sg_classifier.__file__)
        shutil.copyfile(file, folder / file.name)
        config = read_json(folder / "config.json")
        names = {"AutoConfig": "W2SGClassifierConfig", "AutoModelForSequenceClassification": "W2SGClassifier"}
        config["auto_map"] = {auto: f"{file.stem}.{name}" for auto, name in names.items()}
        write_json(folder / "config.json", config)


def _write_words(model: BagOfWords, trained: FinishedModel, folder: Path) -> None:
    """A bag of words, with the file that reads it."""
    model.save(folder)
    labels = ["reward"] if trained.scoring.pairs else list(map(str, range(trained.scoring.classes)))
    settings = {"buckets": model.words.num_embeddings, "scale": model.scale, "max_length": trained.spec.max_length}
    write_json(folder / "config.json", settings | {"labels": labels})
    shutil.copyfile(bag_of_words.__file__, folder / "bag_of_words.py")
