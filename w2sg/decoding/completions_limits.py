"""What may be asked of a server of texts: so many requests and tokens a minute, and a budget; and what it cost."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from w2sg.data.table import digest
from w2sg.errors import UserError

MINUTE = 60.0
LONGEST_ASKED = 900.0  # seconds that a server may ask to be left alone for


@dataclass(frozen=True)
class Limits:
    """What a server may be asked.

    Attributes:
        requests, tokens: a minute; None is as many as there are. budget: tokens read and written in one run, both
            together. price_in, price_out: of a million tokens read and written, in any currency.
    """

    requests: int | None = None
    tokens: int | None = None
    budget: int | None = None
    price_in: float | None = None
    price_out: float | None = None


FREE = Limits()


class Meter:
    """Holds requests back until limits allow them, and counts what is paid for. Threads may share it.

    Args:
        name: of the option that is the budget, for its error.
    """

    def __init__(self, limits: Limits, name: str = "server.max_tokens"):
        self.limits, self.name = limits, name
        self.requests = self.read = self.written = self._reserved = 0
        self._lock = threading.Lock()
        self._sent: deque[list[float]] = deque()  # time and tokens of the requests of the last minute

    def take(self, tokens: int) -> list[float]:
        """Wait until a request of up to so many tokens may be sent; returns what `settle` is given.

        Raises:
            UserError: it might cost more than is left of the budget.
        """
        limits = self.limits
        while True:
            with self._lock:
                used = self.read + self.written + self._reserved
                if limits.budget is not None and used + tokens > limits.budget:
                    raise UserError(
                        f"{self.name}: the budget of {limits.budget:,} tokens is spent: {self.read + self.written:,} "
                        f"were read and written, and the next request may take {tokens:,}. What was answered is kept; "
                        "raise it, and the same command goes on there"
                    )
                pause = self._pause(time.monotonic(), tokens)
                if pause <= 0:
                    entry = [time.monotonic(), float(tokens)]
                    self._sent.append(entry)
                    self._reserved += tokens
                    self.requests += 1
                    return entry
            time.sleep(pause)

    def settle(self, entry: list[float], read: int, written: int) -> None:
        """What a request took in truth; nothing where it failed."""
        with self._lock:
            self._reserved -= int(entry[1])
            entry[1] = float(read + written)
            self.read += read
            self.written += written

    def _pause(self, now: float, tokens: int) -> float:
        while self._sent and self._sent[0][0] <= now - MINUTE:
            self._sent.popleft()
        if not self._sent:  # one that is larger than a minute's tokens is sent alone
            return 0.0
        many = self.limits.requests is not None and len(self._sent) >= self.limits.requests
        total = sum(size for _, size in self._sent) + tokens
        much = self.limits.tokens is not None and total > self.limits.tokens
        return self._sent[0][0] + MINUTE - now + 1e-3 if many or much else 0.0

    def line(self, kept: int) -> str:
        """What it cost, in words; ``kept`` answers were there from before."""
        text = f"{self.requests:,} requests, {self.read:,} tokens read and {self.written:,} written"
        if kept:
            text += f", {kept:,} answers kept from before"
        if self.limits.price_in is None and self.limits.price_out is None:
            return text
        cost = (self.read * (self.limits.price_in or 0) + self.written * (self.limits.price_out or 0)) / 1e6
        return f"{text}; {cost:,.4f} at the given prices"


class Kept:
    """Answers on disk by what was asked, so that a run that is killed asks nothing twice.

    A line is one answer. One that was cut off by a kill is not read.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self._lock = folder / "asked.jsonl", threading.Lock()
        self._found: dict[str, Any] = {}
        lines = self.file.read_bytes().split(b"\n") if self.file.exists() else []
        for line in lines:
            try:
                key, answer = json.loads(line)
            except ValueError:  # the end of a killed run's file
                continue
            self._found[key] = answer
        if lines and lines[-1]:
            with open(self.file, "ab") as file:
                file.write(b"\n")

    def __len__(self) -> int:
        return len(self._found)

    def get(self, body: dict[str, Any], make: Callable[[], Any]) -> tuple[Any, bool]:
        """The answer to a request, asked for where it is not there; and whether it was."""
        key = digest(json.dumps(body, sort_keys=True))
        with self._lock:
            if key in self._found:
                return self._found[key], True
        answer = make()
        with self._lock, open(self.file, "ab") as file:
            file.write(json.dumps([key, answer]).encode() + b"\n")
            self._found[key] = answer
        return answer, False


def retry_after(value: str) -> float:
    """Seconds of a Retry-After header, which is a number of them or a date; 0 where it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_ASKED) if seconds == seconds else 0.0
