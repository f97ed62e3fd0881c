"""A server with OpenAI's completions API in place of the strong model, which is then a black box of texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from w2sg.config.options import Sampling
from w2sg.config.server_schema import ServerOptions
from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.decoding.completions import Completions
from w2sg.decoding.completions_limits import Kept, Limits
from w2sg.decoding.server import ServerGrower


class Server(ServerOptions):
    """A server with OpenAI's completions API that writes in place of the strong model; none without a ``url``.

    The strong model names its tokenizer and chat template alone. Needs ``method.evaluation.surprise=false``.
    """

    def grower(self, chat: Chat, sampling: Sampling, seed: int, kept: Kept | None = None) -> ServerGrower:
        """What asks the server for chunks; it holds connections, so it is a context.

        Args:
            chat: of the strong model. sampling: of the server. seed: of its requests. kept: answers from before.
        """
        return ServerGrower(
            client(self, chat, kept),
            partial(as_text, chat),
            (),
            sampling.max_new_tokens,
            sampling.max_new_tokens,
            seed,
            sampling.temperature,
            sampling.top_p,
            ends(chat),
        )


def client(options: ServerOptions, chat: Chat, kept: Kept | None, name: str = "decoder.server") -> Completions:
    """What sends requests to a server of a model that has a chat's tokenizer.

    Args:
        kept: answers from before. name: of the options.
    """
    return Completions(
        options.url,
        options.model,
        options.key_variable,
        options.workers,
        options.attempts,
        timeout=options.timeout,
        size=lambda text: len(chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        limits=Limits(
            options.requests_per_minute,
            options.tokens_per_minute,
            options.max_tokens,
            options.price_in,
            options.price_out,
        ),
        kept=kept,
        budget=f"{name}.max_tokens",
    )


def as_text(chat: Chat, prompts: Sequence[Dialogue]) -> list[str]:
    """Prompts as texts, without the beginning that servers add by themselves."""
    return texts_of(chat, chat.prompts(prompts))


def texts_of(chat: Chat, rows: Sequence[np.ndarray]) -> list[str]:
    """The same of prompts as token ids."""
    start = chat.tokenizer.bos_token_id
    rows = [row[1:] if len(row) and row[0] == start else row for row in rows]
    return [chat.tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in rows]


def ends(chat: Chat) -> list[str]:
    """Texts that end a reply: a server knows its own end of a text, and not always that of a turn."""
    return [*chat.stop_strings, *([chat.tokenizer.decode([chat.end])] if chat.template else [])]
