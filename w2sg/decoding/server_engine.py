"""A model on a server of texts (`w2sg.decoding.text_engine.TextEngine`): text goes out and comes back, never ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from w2sg.config.server_schema import ServerOptions
from w2sg.data.dialogue import Chat
from w2sg.data.thoughts import split
from w2sg.decoding.completions import HALF, Completions, Refused
from w2sg.decoding.completions_limits import Kept
from w2sg.decoding.contrastive import Decoded, ReplyRows, stream
from w2sg.decoding.decoders.served import client, ends, texts_of
from w2sg.errors import UserError

log = logging.getLogger(__name__)
LISTED = (20, 5)  # most likely tokens that servers name at most: those of this machine, and hosted ones


class ServerEngine:
    """A model that a server runs in place of this process. It connects when it is first asked.

    Args:
        options: where it is. chat: of the model that it stands in for, which lends tokenizer and template.
        max_length: tokens of prompt and reply, by that tokenizer. kept: opens the answers from before.
        share: of so many ranks one asks.
        say: told in words what a reader of results must know.
    """

    name = "a server"

    def __init__(
        self,
        options: ServerOptions,
        chat: Chat,
        max_length: int,
        kept: Callable[[], Kept | None],
        share: int = 1,
        say: Callable[[str], None] = log.warning,
    ):
        self.options, self.chat, self.max_length = options, chat, max_length
        self.share, self._kept, self._say = share, kept, say
        self._client: Completions | None = None

    def key(self) -> dict[str, Any]:
        # not where it is; and not the weights of the model that lends its tokenizer
        return {"engine": "server", "model": {"server": self.options.model}}

    def ready(self) -> None:
        """Nothing: one rank asks."""

    def sample(self, rows: ReplyRows, stop: Sequence[int]) -> Decoded:
        if (rows.settings[:, 3] != 0).any() or (rows.settings[:, 5] != 1).any():
            raise UserError(
                "server.url: a completions server takes no top_k and no repetition_penalty; set top_k=0 "
                "(or use top_p) and repetition_penalty=1, or take the role out of server.roles"
            )
        texts, stops = texts_of(self.chat, rows.prompts), ends(self.chat)
        server = self._started()

        def ask(row: int) -> tuple[str, bool]:
            p, settings = rows.prompt_of[row], rows.settings[row]
            drawn = stream(rows.seed, rows.prompt_ids[p], int(rows.sample[row]), 1)[0]
            body = {
                "prompt": texts[p],
                "max_tokens": int(min(rows.max_new_tokens, self.max_length - len(rows.prompts[p]))),
                "temperature": float(settings[2]),
                "top_p": float(settings[4]),
                "seed": int(drawn * 2**31),
                **({"stop": stops} if stops else {}),
            }
            choice = server.ask(body)[0]
            return self._ended(choice["text"], choice["finish_reason"], stops)

        with ThreadPoolExecutor(server.workers) as pool:
            replies = list(pool.map(ask, range(len(rows))))
        finished = np.array([end for _, end in replies], bool)
        tokens = [
            np.append(row, self.chat.end) if end else row
            for row, end in zip(self._ids([text for text, _ in replies], finished), finished, strict=True)
        ]
        self._say_uncounted(server)
        none = [np.full((len(row), 1), np.nan, np.float32) for row in tokens]
        return Decoded(tokens, finished, none, sum(map(len, tokens)))

    def label_log_probabilities(self, prompts: Sequence[np.ndarray], labels: Sequence[Sequence[int]]) -> np.ndarray:
        """As of every engine; -inf is never given: a label that the server does not name among the likeliest has the
        log-probability of the last that it names, which is the most that it can have, and NaN where it names none."""
        before, last = labels[0][:-1], [row[-1] for row in labels]
        if any(row[:-1] != before for row in labels):
            raise UserError("server.url: labels that differ in more than one token cannot be read from a server")
        texts = texts_of(self.chat, [np.append(row, before).astype(np.int64) for row in prompts])
        words = [self.chat.tokenizer.decode([token]) for token in last]
        server = self._started()
        count = LISTED[0]

        def ask(text: str) -> list[float]:
            body = {"prompt": text, "max_tokens": 1, "temperature": 1.0, "seed": 0, "logprobs": count}
            return self._labels(server.ask(body)[0]["logprobs"], words)

        first = []
        for count in LISTED:
            try:
                first = [ask(text) for text in texts[:1]]
                break
            except Refused:
                if count == LISTED[-1]:
                    raise
        with ThreadPoolExecutor(server.workers) as pool:
            found = np.array(first + list(pool.map(ask, texts[1:])), np.float64).reshape(len(texts), len(words))
        self._say_uncounted(server)
        if lost := int(np.isnan(found).any(1).sum()):
            self._say(f"the server names none of the labels among its {count} likeliest tokens for {lost:,} questions")
        return found

    def token_log_probabilities(self, prompts: Sequence[np.ndarray], replies: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise UserError(
            "server.url: a completions server gives no log-probabilities of given texts; take the role out of "
            "server.roles"
        )

    def sleep(self) -> None:
        """Nothing: it holds nothing of this machine's devices."""

    def close(self) -> None:
        if self._client is not None:
            log.info("%s", self._client.cost)
            self._client.close()
            self._client = None

    def _started(self) -> Completions:
        if self._client is None:
            self._client = client(self.options, self.chat, self._kept(), "server")
        return self._client

    def _ended(self, text: str, reason: str, stops: Sequence[str]) -> tuple[str, bool]:
        """A reply up to where it ends, and whether it does. A reply begins a line."""
        places = [max(place - 1, 0) for place in map(f"\n{text}".find, stops) if place >= 0]
        text = text[: min(places)] if places else text
        return text.rstrip(HALF).strip(), reason == "stop" or bool(places)

    def _ids(self, texts: Sequence[str], finished: np.ndarray) -> list[np.ndarray]:
        """Replies as our tokenizer writes them, thoughts as they stand."""
        found = self.chat.replies(texts, finished.tolist())
        for k, text in enumerate(texts):
            parts = split(text)
            if parts.thought or not parts.closed:
                ids = self.chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                found[k] = np.asarray(ids, np.int64)
        return found

    def _labels(self, logprobs: Any, words: Sequence[str]) -> list[float]:
        try:
            listed = {str(word): float(value) for word, value in logprobs["top_logprobs"][0].items()}
        except (TypeError, KeyError, IndexError, AttributeError, ValueError):
            listed = {}
        if not listed:
            raise UserError(
                f"the server at {self.options.url} gives no log-probabilities of the likeliest tokens (logprobs), "
                "which a judge of labels needs; use a server that does, as vLLM or llama.cpp, take judge out of "
                "server.roles, or choose another judge"
            )
        least, found = min(listed.values()), []
        for word in words:
            alike = [value for name, value in listed.items() if name.strip() == word.strip()]
            found.append(listed[word] if word in listed else float(np.logaddexp.reduce(alike)) if alike else None)
        if all(value is None for value in found):
            return [np.nan] * len(words)
        return [least if value is None else value for value in found]

    def _say_uncounted(self, server: Completions) -> None:
        if server.usage.uncounted:
            self._say("the server does not count tokens: the tokenizer of the model that it stands for counts them")
