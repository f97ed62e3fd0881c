"""What is measured of a decoder's replies, as options."""

from __future__ import annotations

from pydantic import PositiveInt

from w2sg.config.option import Options, option


class DecodeEvaluation(Options):
    """What is measured, on the test split."""

    prompts: PositiveInt = option(200, "test prompts that are answered")
    traces: int = option(4, "prompts whose search is shown step by step on the page", ge=0)
    surprise: bool = option(
        True, "distance from the strong model: minus its own log-probability of the replies, per token"
    )
    tax: str | None = option(
        None,
        "alignment tax: a JSONL file of {question, choices, answer} or of {question, answer}, on which the decoder and "
        "plain samples are compared; null asks nothing",
    )
    frontier: bool = option(
        True,
        "rewards over the KL divergence of replies from the strong model, in nats, where there is one (sampling, eft, "
        "the guide; a bound for best_of_n); needs a judge that gives rewards",
    )
