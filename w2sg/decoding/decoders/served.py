"""A server with OpenAI's completions API in place of the strong model, which is then a black box of texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from urllib.parse import urlsplit

from pydantic import PositiveInt

from w2sg.config.option import Options, option
from w2sg.config.options import Sampling
from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.decoding.server import ServerGrower


class Server(Options):
    """A server with OpenAI's completions API that writes in place of the strong model; none without a ``url``.

    The strong model names its tokenizer and chat template alone. Needs ``method.evaluation.surprise=false``.
    """

    url: str | None = option(None, "its address with the version, as http://localhost:8000/v1; null is no server")
    model: str | None = option(None, "what the server calls the model")
    key_variable: str = option("OPENAI_API_KEY", "environment variable with its key; without it none is sent")
    workers: PositiveInt = option(8, "requests at a time")
    attempts: PositiveInt = option(6, "how often a request is sent before the run gives up; what was answered is kept")
    timeout: float = option(600.0, "seconds to wait for an answer", gt=0.0)

    def rules(self) -> list[str]:
        if self.url is None:
            unread = [name for name, field in Server.model_fields.items() if getattr(self, name) != field.default]
            return [
                f"{name}: read only where server.url names a server; set that, or leave it as it is" for name in unread
            ]
        broken = []
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.netloc:
            broken.append(f"url: {self.url!r} is not the address of a server, as http://localhost:8000/v1")
        if "@" in address.netloc:
            broken.append(
                "url: reports name it, so no key belongs into it; name the variable that has it in key_variable"
            )
        if self.model is None:
            broken.append("model: say what the server calls its model; the address with /models names them")
        return broken

    def grower(self, chat: Chat, sampling: Sampling, seed: int) -> ServerGrower:
        """What asks the server for chunks; it holds connections, so it is a context.

        Args:
            chat: of the strong model. sampling: of the server. seed: of its requests.
        """
        return ServerGrower(
            self.url,
            self.model,
            partial(as_text, chat),
            (),
            sampling.max_new_tokens,
            sampling.max_new_tokens,
            seed,
            sampling.temperature,
            sampling.top_p,
            ends(chat),
            self.key_variable,
            self.workers,
            self.attempts,
            timeout=self.timeout,
            size=lambda text: len(chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        )


def as_text(chat: Chat, prompts: Sequence[Dialogue]) -> list[str]:
    """Prompts as texts, without the beginning that servers add by themselves."""
    start = chat.tokenizer.bos_token_id
    rows = [row[1:] if len(row) and row[0] == start else row for row in chat.prompts(prompts)]
    return [chat.tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in rows]


def ends(chat: Chat) -> list[str]:
    """Texts that end a reply: a server knows its own end of a text, and not always that of a turn."""
    return [*chat.stop_strings, *([chat.tokenizer.decode([chat.end])] if chat.template else [])]
