"""A server with OpenAI's completions API: where it is, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import PositiveInt

from w2sg.config.option import Options, option


class ServerOptions(Options):
    """A server that completes text; none without a ``url``."""

    url: str | None = option(None, "its address with the version, as http://localhost:8000/v1; null is no server")
    model: str | None = option(None, "what the server calls the model")
    key_variable: str = option("OPENAI_API_KEY", "environment variable with its key; without it none is sent")
    workers: PositiveInt = option(8, "requests at a time")
    attempts: PositiveInt = option(6, "how often a request is sent before the run gives up; what was answered is kept")
    timeout: float = option(600.0, "seconds to wait for an answer", gt=0.0)
    requests_per_minute: PositiveInt | None = option(None, "requests sent in a minute at most; null is no limit")
    tokens_per_minute: PositiveInt | None = option(
        None, "tokens read and written in a minute at most, by the longest reply until it is there; null is no limit"
    )
    max_tokens: PositiveInt | None = option(
        None,
        "budget: tokens that a run (decoder.server.*: each stage) may have the server read and write; what was "
        "answered is kept, and costs nothing when the run goes on; null is no limit",
    )
    price_in: float | None = option(None, "price of a million tokens read, in any currency, for the line of cost", ge=0)
    price_out: float | None = option(None, "price of a million tokens written", ge=0)

    def rules(self) -> list[str]:
        if self.url is None:
            fields = type(self).model_fields
            unread = [name for name, field in fields.items() if getattr(self, name) != field.get_default()]
            return [
                f"{name}: read only where server.url names a server; set that, or leave it as it is" for name in unread
            ]
        broken = []
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.netloc:
            broken.append(f"url: {self.url!r} is not the address of a server, as http://localhost:8000/v1")
        if "@" in address.netloc or address.query:
            broken.append(
                "url: reports name it, so no key belongs into it; name the variable that has it in key_variable"
            )
        if self.model is None:
            broken.append("model: say what the server calls its model; the address with /models names them")
        return broken


class ServerConfig(ServerOptions):
    """A server that writes in place of models as they are found, in any method; none without a ``url``.

    A role's model then names the tokenizer and the chat template. What trains it needs its weights as before.
    """

    roles: list[Literal["weak", "strong", "judge"]] = option(
        ["strong"],
        "the models that it stands in for where they write as they were found: weak, strong, judge",
        min_length=1,
    )


def server_problems(server: ServerConfig, method: Mapping[str, Any]) -> list[str]:
    """What a method would not ask a server, or a server cannot do."""
    if server.url is None:
        return []
    sampling, judge = method.get("sampling"), method.get("judge")
    asked = isinstance(judge, Mapping) and judge.get("kind") == "llm"
    broken = []
    if "judge" in server.roles and not asked:
        broken.append("server.roles: there is no judge that is a language model; choose judge=llm, or take judge out")
    writes = {"weak", "strong"} & set(server.roles)
    if writes and not isinstance(sampling, Mapping) and method.get("decoder") is None:
        broken.append("server.url: nothing is written by this method, so no server is asked; leave it out")
    if writes and isinstance(sampling, Mapping) and sampling.get("top_k"):
        broken.append("method.sampling.top_k: a completions server takes no top_k; set it to 0, or use top_p")
    return broken
