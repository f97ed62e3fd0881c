"""Limits on what a server of texts is asked, and the answers that are kept."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from w2sg.decoding import completions_limits
from w2sg.decoding.completions_limits import Kept, Limits, Meter, retry_after
from w2sg.errors import UserError


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(completions_limits, "time", clock)
    return clock


def test_retry_after_is_seconds_or_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    earlier = format_datetime(datetime.now(UTC) - timedelta(seconds=40), usegmt=True)
    assert (retry_after("7"), retry_after("1.5"), retry_after("-3")) == (7.0, 1.5, 0.0)
    assert 35 < retry_after(later) <= 40
    assert retry_after(earlier) == 0.0
    assert retry_after("100000") == completions_limits.LONGEST_ASKED
    assert [retry_after(odd) for odd in ("", "soon", "nan")] == [0.0] * 3


def test_so_many_requests_a_minute(clock):
    meter, sent = Meter(Limits(requests=3)), []
    for _ in range(7):
        meter.take(10)
        sent.append(clock.now)
    assert sent[:3] == [0.0] * 3
    assert sent[3:6] == pytest.approx([60.0] * 3, abs=0.1)
    assert sent[6] == pytest.approx(120.0, abs=0.1)


def test_so_many_tokens_a_minute(clock):
    meter = Meter(Limits(tokens=100))
    meter.settle(meter.take(90), 20, 10)  # shorter than it might have been
    meter.take(70)
    assert clock.now == 0.0
    meter.take(500)  # never fits, and goes alone
    assert clock.now == pytest.approx(60.0, abs=0.1)


def test_a_budget_is_never_passed(clock):
    meter = Meter(Limits(budget=100, price_in=1e6, price_out=2e6))
    first = meter.take(60)
    with pytest.raises(UserError, match=r"server.max_tokens: the budget of 100 tokens is spent: 0 were"):
        meter.take(60)  # while the first one is under way
    meter.settle(first, 20, 10)
    meter.settle(meter.take(60), 0, 0)  # a failure costs nothing
    meter.settle(meter.take(70), 30, 40)
    with pytest.raises(UserError, match="100 were read and written"):
        meter.take(1)
    assert meter.line(5) == (
        "3 requests, 50 tokens read and 50 written, 5 answers kept from before; 150.0000 at the given prices"
    )


def test_answers_are_kept_up_to_the_line_that_a_kill_cut_off(tmp_path):
    kept, asked = Kept(tmp_path), []

    def make(name: str):
        return lambda: asked.append(name) or [name]

    assert kept.get({"a": 1, "b": 2}, make("x")) == (["x"], False)
    assert kept.get({"a": 2}, make("y")) == (["y"], False)
    content = kept.file.read_bytes()
    kept.file.write_bytes(content[:-5])
    again = Kept(tmp_path)
    assert again.get({"b": 2, "a": 1}, make("never")) == (["x"], True)
    assert again.get({"a": 2}, make("y")) == (["y"], False)
    assert Kept(tmp_path).get({"a": 2}, make("never")) == (["y"], True)
    assert asked == ["x", "y", "y"]
