"""A server with OpenAI's completions API: requests, answers, and what goes wrong on the way."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from w2sg.decoding.completions_limits import FREE, Kept, Limits, Meter, retry_after
from w2sg.errors import UserError

log = logging.getLogger(__name__)
AGAIN = {408, 429}  # states of a server that pass, as do those from 500 on
LONGEST_WAIT = 60.0  # seconds between two attempts, where the server asks for no more
CONNECT = 10.0  # seconds to wait for a connection, however long an answer may take
REASONS = ("stop", "length", "content_filter")
ECHO = 16  # characters of a prompt from which on a text that begins with all of them repeats it
HALF = "\N{REPLACEMENT CHARACTER}"  # what a character of several bytes is while some of them are missing


class Refused(UserError):
    """The server takes a request for a bad one: it may have asked for what this server does not offer."""


@dataclass
class Usage:
    """What a server was sent and what it read and wrote for it.

    Attributes:
        requests: sent, repeated ones included. prompt_tokens, completion_tokens: as the server counts them (``usage``),
            where it does; each round it reads prompt and reply so far anew, whether or not it remembers them.
        kept: answers that were there from before, whose tokens are counted as well.
        uncounted: answers that said nothing of tokens; with `Completions.size` theirs are counted here.
    """

    requests: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0


class Completions:
    """A server that completes text. Threads may share it.

    It holds connections: close it, or use it as a context.

    Args:
        url: of the API with its version, ``http://localhost:8000/v1``; ``/completions`` is added to it.
        model: what the server calls it.
        key_variable: the environment variable with the key; it is read once, and no key is sent where it is not set.
        workers: requests at a time. attempts: how often one is sent before giving up.
        wait: seconds before the second attempt, and twice as long before each further one; a server that is busy may
            ask for more (Retry-After). timeout: seconds to wait for an answer.
        size: tokens of a text, for answers of a server that does not count them.
        limits: requests and tokens a minute, a budget, prices.
        kept: answers of a run that was killed; None keeps none. budget: name of the option, for its error.

    Raises:
        UserError: on asking, where the server is not there, refuses, keeps failing, or answers in another format. The
            key is in no message.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        workers: int = 8,
        attempts: int = 6,
        wait: float = 1.0,
        timeout: float = 600.0,
        size: Callable[[str], int] | None = None,
        limits: Limits = FREE,
        kept: Kept | None = None,
        budget: str = "server.max_tokens",
    ):
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.workers, self.attempts, self.wait, self.size = workers, attempts, wait, size
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"{url!r} is not the address of a server: it begins with http:// or https://")
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # errors of the client would show it
            raise UserError(f"the key in the environment variable {key_variable} has characters that no key has")
        if (requests := logging.getLogger("httpx2")).level == logging.NOTSET:
            requests.setLevel(logging.WARNING)  # it says every single request, thousands in a run
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise UserError(f"{url!r} is not the address of a server: {error}") from error
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT)),
            limits=httpx2.Limits(max_connections=workers),
        )
        self.usage, self.meter, self.kept = Usage(), Meter(limits, budget), kept
        self._lock = threading.Lock()
        self._answered = False
        self._names: set[str] = set()  # of other models

    def __enter__(self) -> Completions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    @property
    def cost(self) -> str:
        """What was asked and what it cost, in a line."""
        return f"the server at {self.url}: {self.meter.line(self.usage.kept)}"

    def ask(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of an answer.

        Args:
            body: of the request but for the model: ``prompt``, ``max_tokens``, ``seed`` and what else is wanted.

        Raises:
            Refused: the server takes it for a bad request.
        """
        body = {"model": self.model, **body}
        if self.kept is None:
            (choices, usage, counted), before = self._sent(body), False
        else:
            (choices, usage, counted), before = self.kept.get(body, lambda: self._sent(body))
        with self._lock:
            self.usage.kept += before
            self.usage.uncounted += not counted
            self.usage.prompt_tokens += usage[0]
            self.usage.completion_tokens += usage[1]
        return choices

    def _sent(self, body: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int], bool]:
        """Choices, tokens read and written, and whether the server counted them."""
        most = body["max_tokens"] * body.get("n", 1)
        most += self.size(body["prompt"]) if self.size is not None else len(body["prompt"]) // 3 + 1
        trouble, pause = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(max(min(self.wait * 2 ** (attempt - 1), LONGEST_WAIT), pause))
            entry, usage = self.meter.take(most), [0, 0]
            with self._lock:
                self.usage.requests += 1
            try:
                response = self._client.post(f"{self.url}/completions", json=body)
                self._answered, pause = True, retry_after(response.headers.get("retry-after", ""))
                if response.status_code < 500 and response.status_code not in AGAIN:
                    self._check(response)
                    choices, usage, counted = self._choices(response, body)
                    return choices, usage, counted
                trouble = f"status {response.status_code}: {self._said(response)}"
            except httpx2.RequestError as error:
                trouble, pause = self._safe(str(error)), 0.0
                if isinstance(error, httpx2.TimeoutException):
                    trouble = "no answer in time"
                if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)) and not self._answered:
                    raise UserError(
                        f"there is no server at {self.url} ({trouble}): start it, or correct the address"
                    ) from error
            finally:
                self.meter.settle(entry, *usage)
        raise UserError(
            f"the server at {self.url} failed {self.attempts} times to complete a text with the model {self.model!r}, "
            f"at last with {trouble}. See to it, or send fewer requests at a time (workers is {self.workers}), then "
            f"run this again"
        )

    def _check(self, response: httpx2.Response) -> None:
        status, reason = response.status_code, self._said(response)
        if status in (400, 422):
            raise Refused(
                f"the server at {self.url} refuses to complete a text with the model {self.model!r}: {reason}. Correct "
                f"the model's name or the sampling options, or shorten prompts and replies to what the model can read"
            )
        if status in (401, 403):
            state = "was refused" if self._key else "is not set"
            raise UserError(
                f"the server at {self.url} wants a key, and that in the environment variable {self.key_variable} "
                f"{state}: {reason}"
            )
        if status == 404:
            raise UserError(
                f"the server at {self.url} has no model {self.model!r}, or offers no completions of text there: "
                f"{reason}. {self.url}/models names its models; the address ends with the version, mostly /v1"
            )
        if status != 200:
            raise UserError(f"the server at {self.url} answers with status {status}: {reason}. Correct the address")

    def _choices(self, response: httpx2.Response, body: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int], bool]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if isinstance(answer, dict) and answer.get("error"):
            raise UserError(
                f"the server at {self.url} cannot complete a text with the model {self.model!r}: {self._said(response)}"
            )
        try:
            choices = [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
            counts = answer.get("usage") or {}
            usage = [counts.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
            right = all(isinstance(text, str) and reason in REASONS for text, reason in choices)
            right = right and len(choices) > 0 and all(type(n) is int for n in usage)
        except (TypeError, KeyError, AttributeError):
            right = False
        if not right:
            raise UserError(
                f"the server at {self.url} does not answer in the format of OpenAI's completions (choices of text and "
                f"finish_reason, which is stop or length), but {_instead(answer, response)}: {self._said(response)}. "
                "Use one that does"
            )
        self._keeps_to(body, choices, usage[1])
        self._other_name(answer.get("model"))
        counted = any(usage)
        if not counted and self.size is not None:
            usage = [self.size(body["prompt"]), sum(self.size(text) for text, _ in choices)]
        names = ("text", "finish_reason", "logprobs")
        return [{name: choice.get(name) for name in names} for choice in answer["choices"]], usage, counted

    def _keeps_to(self, body: dict[str, Any], choices: Sequence[tuple[str, str]], counted: int) -> None:
        """A chunk is what is added to a text, and no longer than asked for: searches and lengths hang on both."""
        most, prompt = body["max_tokens"], body["prompt"].strip()
        for text, _ in choices:
            # by another tokenizer than the server's a text may have a few tokens more, and half characters have many
            size = 0 if self.size is None else self.size(text.replace(HALF, ""))
            written = counted if counted > most * len(choices) else size if size > 2 * most + 8 else 0
            if written:
                raise UserError(
                    f"the server at {self.url} ignores max_tokens: it was asked for {most} tokens at most and wrote "
                    f"{written}. Use one that keeps to it"
                )
            if len(prompt) >= ECHO and text.strip().startswith(prompt):
                raise UserError(
                    f"the server at {self.url} repeats the prompt before what it adds (echo), so that replies would "
                    "begin with their questions. Switch that off there, or use another"
                )

    def _other_name(self, name: Any) -> None:
        own = ("", self.model, f"{self.model}@main")  # transformers serve names the revision, too
        if isinstance(name, str) and name not in own and name not in self._names:
            self._names.add(name)
            log.warning("the server at %s answers as the model %r; %r was asked for", self.url, name, self.model)

    def _said(self, response: httpx2.Response) -> str:
        """What an answer says, most of all of an error, in short."""
        text = response.text
        try:
            answer = response.json()
        except ValueError:
            answer = {}
        if isinstance(answer, dict):
            error = answer.get("error") or answer.get("detail") or answer.get("message") or text
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        return self._safe(text)

    def _safe(self, text: str) -> str:
        """Servers may repeat the key that they were given, and proxies answer in pages."""
        if re.search(r"<(!doctype|html|body)\b", text[:1000], re.IGNORECASE):
            text = f"a page of HTML, {re.sub(r'<(script|style).*?</[^>]*>|<[^>]*>', ' ', text, flags=re.DOTALL)}"
        text = text.replace(self._key, "***") if self._key else text
        text = " ".join(text.split()) or "nothing"
        return text if len(text) <= 300 else f"{text[:300]}..."


def _instead(answer: Any, response: httpx2.Response) -> str:
    """What an answer is in place of a completion, in a few words."""
    text = response.text.strip()
    if not text:
        return "with nothing (an empty body)"
    if text.startswith("data:") or "event-stream" in response.headers.get("content-type", ""):
        return "streams pieces of it"
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choices = choices if isinstance(choices, list) else []
    if any(isinstance(choice, dict) and "message" in choice for choice in choices):
        return "as chats are answered"
    reasons = [choice["finish_reason"] for choice in choices if isinstance(choice, dict) and "finish_reason" in choice]
    if others := [reason for reason in reasons if reason is None or reason not in REASONS]:
        return f"ends a text for the reason {others[0]!r}, and says"
    return "with"
