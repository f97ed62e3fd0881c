"""Chunks from a server that only completes text (OpenAI's completions API): a strong model that is a black box."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2

from w2sg.data.messages import Dialogue
from w2sg.decoding.contrastive import stream
from w2sg.decoding.search import Hypothesis
from w2sg.errors import UserError

log = logging.getLogger(__name__)
AGAIN = {408, 429}  # states of a server that pass, as do those from 500 on
LONGEST_WAIT = 60.0  # seconds between two attempts
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
        uncounted: answers that said nothing of tokens; with `ServerGrower.size` theirs are counted here.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0


class ServerGrower:
    """Grows hypotheses by asking a server to go on with text: no tokens, no probabilities, no state to keep.

    One request gives all children of a hypothesis where the server offers several choices (``n``); where it refuses
    that, or gives fewer, each child is a request of its own. The first request finds out which.

    The server tokenises prompt and reply so far anew each round. Text is handed back exactly as it came, its spaces
    included, but a chunk that ends inside a word or after a space may go on otherwise than one long sample would.
    Half a character at the end of a chunk is left to the next one, so a chunk should have more tokens than a character.

    The seed of a request hangs on ``seed``, the prompt's id and the lineage alone, so that a run asks the same again.
    Servers may ignore it, and some share one state between requests that they answer at once: only one that honours it
    gives the same replies again, and some only with ``workers=1``.

    A grower holds connections: close it, or use it as a context.

    Args:
        url: of the API with its version, ``http://localhost:8000/v1``; ``/completions`` is added to it.
        model: what the server calls it.
        texts: prompts as texts that a reply is added to, without the beginning of text that servers add by themselves.
        identities: [P] of the prompts, as in `w2sg.decoding.search.EngineGrower`. Like ``room`` they may be set anew
            before other prompts are started.
        chunk: tokens of the server written between choices. most: tokens that a reply may have.
        stop: texts that end a reply, at most four for some servers; they are looked for here as well, since a server
            sees one chunk at a time and may leave them in. A reply begins a line.
        key_variable: the environment variable with the key; it is read once, and no key is sent where it is not set.
        workers: requests at a time. attempts: how often one is sent before giving up.
        wait: seconds before the second attempt, and twice as long before each further one. timeout: seconds to wait for
            an answer.
        room: [P] tokens that a reply to each prompt may have at most, where that is less than ``most``.
        size: tokens of a text, for answers of a server that does not count them.

    Raises:
        UserError: on growing, where the server is not there, refuses, keeps failing, or answers in another format. The
            key is in no message.
    """

    def __init__(
        self,
        url: str,
        model: str,
        texts: Callable[[Sequence[Dialogue]], list[str]],
        identities: Sequence[str],
        chunk: int,
        most: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        key_variable: str = "OPENAI_API_KEY",
        workers: int = 8,
        attempts: int = 6,
        wait: float = 1.0,
        timeout: float = 600.0,
        room: Sequence[int] | None = None,
        size: Callable[[str], int] | None = None,
    ):
        self.url, self.model, self.texts, self.identities = url.rstrip("/"), model, texts, identities
        self.chunk, self.most, self.seed, self.stop = chunk, most, seed, list(stop)
        self.room, self.size = room, size
        self.temperature, self.top_p, self.key_variable = temperature, top_p, key_variable
        self.workers, self.attempts, self.wait = workers, attempts, wait
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
        self.usage = Usage()
        self._lock = threading.Lock()
        self._several: bool | None = None  # whether the server gives several choices; None until the first request
        self._answered = False
        self._names: set[str] = set()  # of other models

    def __enter__(self) -> ServerGrower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def start(self, prompts: Sequence[Dialogue]) -> list[Hypothesis]:
        self._before, self._rounds = self.texts(prompts), 0
        return [Hypothesis(p, -1, "", None, None, False, False, "") for p in range(len(prompts))]

    def grow(self, live: Sequence[Hypothesis], children: Sequence[int]) -> list[Hypothesis]:
        names = [[_lineage(h, k, self._rounds) for k in range(n)] for h, n in zip(live, children, strict=True)]
        texts: list[list[tuple[str, str]]] = [[] for _ in live]
        if self._several is None and len(names[0]) > 1:
            # alone: were it one of many, what the others ask for would hang on which is answered first
            try:
                texts[0] = self._ask(live[0], names[0][0], len(names[0]))
            except Refused:
                self._several = False  # and if that is not why, the next request says what is
            else:
                self._several = len(texts[0]) == len(names[0])
            if not self._several:
                log.info("the server at %s gives one text a request, so each is asked for by itself", self.url)
        with ThreadPoolExecutor(self.workers) as pool:
            if self._several:
                rows = [row for row in range(len(live)) if not texts[row]]
                wanted = [(live[row], names[row][0], len(names[row])) for row in rows]
                for row, choices in zip(rows, pool.map(lambda ask: self._ask(*ask), wanted), strict=True):
                    texts[row] = choices
            missing = [(row, name) for row in range(len(live)) for name in names[row][len(texts[row]) :]]
            single = pool.map(lambda ask: self._ask(live[ask[0]], ask[1], 1), missing)
            for (row, _), choices in zip(missing, single, strict=True):
                texts[row] += choices
        self._rounds += 1
        return [
            self._child(row, live[row], name, *choice)
            for row in range(len(live))
            for name, choice in zip(names[row], texts[row], strict=True)
        ]

    def keep(self, places: Sequence[int]) -> None:
        """Nothing: all that there is of a hypothesis is its text."""

    def _child(self, row: int, parent: Hypothesis, lineage: str, text: str, reason: str) -> Hypothesis:
        text = parent.text + text
        ends = [max(place - 1, 0) for place in map(f"\n{text}".find, self.stop) if place >= 0]
        finished = reason == "stop" or bool(ends)
        # what a filter took away will not come with another request
        cut = not finished and (reason == "content_filter" or self._left(parent) <= 0)
        text = text[: min(ends)] if ends else text
        text = text if finished else text.rstrip(HALF)
        text = text.strip() if finished or cut else text
        return Hypothesis(parent.prompt, row, text, None, None, finished, cut, lineage)

    def _left(self, h: Hypothesis) -> int:
        """Tokens that may still be written."""
        room = self.most if self.room is None else min(self.most, self.room[h.prompt])
        return room - self._rounds * self.chunk

    def _ask(self, h: Hypothesis, lineage: str, count: int) -> list[tuple[str, str]]:
        """Up to ``count`` continuations of a hypothesis, each with the reason why it ends."""
        drawn = stream(self.seed, self.identities[h.prompt], lineage, self._rounds + 1)[self._rounds]
        body = {
            "model": self.model,
            "prompt": self._before[h.prompt] + h.text,
            "max_tokens": min(self.chunk, self._left(h)),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": int(drawn * 2**31),
        }
        if count > 1:  # some servers refuse the field as such
            body["n"] = count
        if self.stop:
            body["stop"] = self.stop
        return self._choices(self._post(body), body)[:count]

    def _post(self, body: dict[str, Any]) -> httpx2.Response:
        trouble, pause = "", 0.0
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(max(self.wait * 2 ** (attempt - 1), pause), LONGEST_WAIT))
            with self._lock:
                self.usage.requests += 1
            pause = 0.0
            try:
                response = self._client.post(f"{self.url}/completions", json=body)
            except httpx2.RequestError as error:
                trouble = "no answer in time" if isinstance(error, httpx2.TimeoutException) else self._safe(str(error))
                if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)) and not self._answered:
                    raise UserError(
                        f"there is no server at {self.url} ({trouble}): start it, or correct the address"
                    ) from error
                continue
            self._answered = True
            if response.status_code < 500 and response.status_code not in AGAIN:
                self._check(response)
                return response
            trouble = f"status {response.status_code}: {self._said(response)}"
            after = response.headers.get("retry-after", "")
            pause = float(after) if after.isdecimal() else 0.0  # it may also be a date
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

    def _choices(self, response: httpx2.Response, body: dict[str, Any]) -> list[tuple[str, str]]:
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
        with self._lock:
            if not any(usage):
                self.usage.uncounted += 1
                if self.size is not None:
                    usage = [self.size(body["prompt"]), sum(self.size(text) for text, _ in choices)]
            self.usage.prompt_tokens += usage[0]
            self.usage.completion_tokens += usage[1]
        return choices

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
        if isinstance(name, str) and name not in ("", self.model) and name not in self._names:
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


def _lineage(parent: Hypothesis, child: int, rounds: int) -> str:
    """As in a search of tokens, but of rounds: the first child goes on with its parent's stream."""
    if not rounds:
        return str(child)
    return parent.lineage if child == 0 else f"{parent.lineage}/{rounds}.{child}"
