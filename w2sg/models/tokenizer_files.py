"""Tokenizers of model folders, and chat templates of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2sg.data.tokens import ids_of
from w2sg.errors import UserError
from w2sg.models.unreadable import quiet_loading

# one of these holds the vocabulary; tokenizer_config.json alone makes a tokenizer to which every word is unknown
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken", "tokenizer*.py")


def load_tokenizer(folder: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or of a model on the hub.

    Raises:
        UserError: it has no files of a tokenizer, or they cannot be read, or its tokenizer knows no words.
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    remedy = (
        "copy the files of its tokenizer (tokenizer.json or tokenizer.model, tokenizer_config.json) from where the "
        "model comes from into the folder, or save it there with tokenizer.save_pretrained"
    )
    if path.is_dir() and not any(next(path.glob(name), None) for name in VOCABULARIES):
        raise UserError(f"{folder}: the folder holds no tokenizer files, so no text can be read; {remedy}")
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever its classes raise over a file that is damaged, missing or not there
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{folder}: its tokenizer cannot be read ({reason}); {remedy}") from error
    if not any(ids_of(tokenizer, ["a", "the question"])):
        raise UserError(f"{folder}: its tokenizer reads no token of a text; {remedy}")
    return tokenizer


def read_template(file: str) -> str:
    """A chat template from a file.

    Raises:
        UserError: it is not there, or is no text.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"chat_template: the file {path} cannot be read ({reason}); name a jinja template") from error
    if not text.strip():
        raise UserError(f"chat_template: the file {path} is empty; name a jinja template")
    return text
