"""One batch of a decoder: whether its models go together, and replies with what they cost."""

from __future__ import annotations

from dataclasses import replace

from w2sg.data.dialogue import Chat
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders.base import Decoder
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.written import Written
from w2sg.errors import UserError


def check_vocabulary(decoder: Decoder, weak: Chat, strong: Chat) -> None:
    """Logits are added token by token, so every id must stand for the same text; equal numbers of ids say nothing.

    Args:
        decoder: one that adds logits.

    Raises:
        UserError: where they do not.
    """
    if weak.vocabulary != strong.vocabulary:
        maps = [chat.tokenizer.get_vocab() for chat in (weak, strong)]
        shared = sum(maps[1].get(token) == place for token, place in maps[0].items())
        raise UserError(
            f"decoder={decoder.kind}: {weak.name} and {strong.name} have different vocabularies ({shared:,} of "
            f"{len(maps[0]):,} and {len(maps[1]):,} tokens have the same id), so their logits cannot be added; use "
            "decoder=search (with tilt=0), best_of_n or wsd, which go by text"
        )


def write_batch(decoder: Decoder, engines: Engines, prompts: Prompts) -> list[Written]:
    """A batch's replies with what they cost: all its prompts are charged alike, since models read them together.

    Raises:
        UserError: the decoder does not write one reply to each prompt.
    """
    replies = decoder.write(engines, prompts)
    kinds = {type(reply).__name__ for reply in replies} if isinstance(replies, list) else {type(replies).__name__}
    if not isinstance(replies, list) or kinds - {Written.__name__}:
        what = f"{'a list of ' if isinstance(replies, list) else ''}{' and '.join(sorted(kinds))}"
        raise UserError(f"decoder={decoder.kind}: write returned {what}; return a list of Written, one to each prompt")
    if len(replies) != len(prompts):
        raise UserError(f"decoder={decoder.kind}: it wrote {len(replies)} replies to {len(prompts)} prompts")
    read = engines.strong_read / len(prompts), engines.guide_read / len(prompts)
    return [replace(reply, strong_read=read[0], guide_read=read[1], counted_by=engines.counted_by) for reply in replies]
