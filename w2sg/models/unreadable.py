"""Libraries reading a model's files: their errors in one line (role, model, cause, remedy), their chatter kept quiet.

transformers, tokenizers, safetensors, pickle and gguf each raise errors of their own over damaged or foreign files.
`reading` is the one place where they become a `UserError`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from w2sg.errors import UserError

POINTER = b"version https://git-lfs"  # what git-lfs leaves in the place of a file that was not downloaded
# what the text of an error says, and what to do; the first that is found counts
CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"trust_remote_code|custom code|remote code",
        "it needs code from its own repository; look at that code, and allow it with {role}.trust_remote_code=true",
    ),
    (
        r"does not recognize this architecture|unrecognized (configuration|model)|Should have a `model_type`|"
        r"unknown model type",
        "this version of transformers does not know its architecture; check model_type in its config.json, or install "
        "a newer transformers",
    ),
    (
        r"Architecture .* not supported|GGUF model with architecture",
        "transformers cannot read GGUF files of this architecture; take the model's own folder or hub id",
    ),
    (
        r"flash.?attn|flash.?attention|FlashAttention",
        "flash attention is not possible here; use {role}.attention=sdpa",
    ),
    (r"scaled_dot_product_attention", "use {role}.attention=eager"),
    (r"requires? the .*(package|library)|No module named|pip install", "install what it asks for"),
    (r"Target modules .* not found", "name layers that the model has in {role}.lora.targets, or use all-linear"),
    (
        r"incomplete metadata|HeaderTooLarge|InvalidHeader|header|MetadataIncompleteBuffer|central directory|"
        r"Ran out of input|pickle|UnpicklingError|not a valid zip|invalid load key",
        "a file of its weights is cut off or damaged; download it again",
    ),
    (r"out of memory", "it does not fit into memory; choose a smaller model, dtype=bfloat16 or more memory"),
    (r"Permission denied", "let yourself read it (chmod)"),
    (r"JSON|Expecting value|Extra data|delimiter|utf-8|codec", "one of its .json files is damaged; download it again"),
)


def first_line(error: BaseException) -> str:
    """What an error says first, with its kind where it says nothing of use by itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = re.sub(r"\x1b\[[0-9;]*m", "", lines[0]) if lines else ""
    line = line if len(line) <= 300 else line[:297] + "..."
    return line if isinstance(error, UserError | OSError) and line else f"{type(error).__name__}: {line}".rstrip(": ")


@contextlib.contextmanager
def reading(role: str, name: str, what: str = "cannot be read", remedy: str = "") -> Iterator[None]:
    """Turn whatever a library raises over a model's files into one line.

    Only calls of libraries belong inside, so that no fault of this package's own is hidden.

    Args:
        role: the key that the model was asked for by, as ``strong``.
        name: of the model, as it was typed.
        what: went wrong.
        remedy: if the cause is none of `CAUSES`.

    Raises:
        UserError: the one line; the library's error is its cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain ones
        messages = " ".join(f"{type(e).__name__} {e}" for e in _chain(error))
        known = next((remedy for words, remedy in CAUSES if re.search(words, messages, re.IGNORECASE)), remedy)
        todo = known or "check that the folder is whole, or download it again"
        raise UserError(
            f"{role}.name: the model {name} {what} ({first_line(error)}); {todo.format(role=role)}"
        ) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def whole_file(path: Path, role: str) -> None:
    """Refuse what is no file that can be read, or stands for one that was not downloaded.

    Raises:
        UserError: a folder, a pipe, a link to nothing, a file that may not be read, an empty one, or a git-lfs pointer.
    """
    try:
        is_file = path.is_file()
    except OSError:
        is_file = False
    if not is_file:
        kind = "a link to nothing" if path.is_symlink() else "a folder" if path.is_dir() else "no ordinary file"
        raise UserError(f"{role}.name: {path} is {kind}, where a file of a model should be; put that file back")
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise UserError(
            f"{role}.name: {path} cannot be read ({error.strerror}); let yourself read it (chmod)"
        ) from error
    if start == POINTER:
        raise UserError(
            f"{role}.name: {path} is a pointer of git-lfs and not the file itself; run `git lfs pull` in its folder"
        )
    if not start and path.suffix in {".safetensors", ".bin", ".json", ".model", ".gguf"}:
        raise UserError(f"{role}.name: {path} is empty; download it again")


@contextlib.contextmanager
def quiet_loading(bars: bool = False) -> Iterator[None]:
    """Keep transformers' loading reports off the terminal: a new head is meant, and cut layers are asked for.

    Args:
        bars: also swallow what is written to stderr; the bars of de-quantising and of saving have no other switch.
    """
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    others = logging.getLogger("accelerate.big_modeling")  # which weights are elsewhere is said by w2sg.models.spread
    loud, others.disabled = others.disabled, True
    try:
        with contextlib.redirect_stderr(io.StringIO()) if bars else contextlib.nullcontext():
            yield
    finally:
        others.disabled = loud
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
