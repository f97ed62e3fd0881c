"""Replies and pairs as rows of a model's tokens, and language models loaded for a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lightning as L
import numpy as np

from w2sg.data.completions import Completions, Encoded, encode_rows
from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.data.replies import Replies, ReplyPairs
from w2sg.data.table import digest
from w2sg.data.thoughts import split
from w2sg.errors import UserError
from w2sg.experiment.context import Context
from w2sg.models.once import told
from w2sg.models.packing import keeps_replies_apart, said_apart
from w2sg.models.policy import Policy, load_policy
from w2sg.models.source import Source
from w2sg.models.trained import Trained
from w2sg.reports.words import counted
from w2sg.training.inputs import VERSION
from w2sg.training.tokens import made

log = logging.getLogger(__name__)


def load_trained(run: Context, writer: Trained, trainable: bool = False) -> Policy:
    """A language model in memory; one that is drawn at random has the run's seed."""
    spec = writer.source.spec
    if spec.random_init and (writer.folder is None or spec.train == "lora"):  # adapters are saved without their base
        L.seed_everything(run.seed, workers=True, verbose=False)
    return load_policy(writer.source, writer.saved, trainable)


def all_empty(run: Context, name: str, replies: Replies, measure: str) -> bool:
    """Whether a system wrote nothing at all, so that no model can read its replies: which is then said.

    Args:
        measure: what there is not of them.
    """
    if any(text.strip() for text in replies.texts):
        return False
    run.reading.say(f"{name}: all {counted(len(replies), 'replies')} are empty, so there is no {measure} of them")
    return True


def encode_replies(run: Context, source: Source, data: Replies | ReplyPairs, name: str) -> Encoded:
    """Replies or pairs as rows of a model's tokens; what had to be dropped is counted under ``name``."""
    sides = [data.chosen, data.rejected] if isinstance(data, ReplyPairs) else [data]
    content = digest(*data.ids, *(s for side in sides for s in (*(p.identity for p in side.prompts), *side.texts)))
    ends = list(zip(*(side.ends(source.chat) for side in sides), strict=True))
    memory = (source.chat.fingerprint, str(source.spec.max_length), content, name, digest(str(ends)))
    if memory not in run.encoded:
        earlier = data.dropped if isinstance(data, ReplyPairs) else {}
        if not len(data):
            raise UserError(
                f"{name}: there is nothing to read or train on; left out were "
                f"{', '.join(counted(n, reason) for reason, n in earlier.items()) or 'none'}"
            )
        prompts = _prompt_ids(run, source.chat, sides[0].prompts)
        replies = list(zip(*(_unless_blank(run, side, source.chat) for side in sides), strict=True))
        finished = list(zip(*(side.finished.tolist() for side in sides), strict=True))
        _look(run, name, source.chat, sides, prompts, replies)
        encoded = encode_rows(data.ids, prompts, replies, finished, ends, source.spec.max_length)
        if not len(encoded.kept):
            raise UserError(
                f"{name}: none of {len(data)} examples can be used "
                f"({', '.join(counted(len(v), k) for k, v in encoded.dropped.items())}); raise max_length, or look at "
                "the data"
            )
        counts = {reason: len(rows) for reason, rows in encoded.dropped.items()}
        counts = {**earlier, **counts}
        if encoded.truncated:
            counts["cut to max_length (kept)"] = encoded.truncated
        run.dropped[name] = counts
        if counts:
            log.info("%s: %s", name, ", ".join(counted(n, reason) for reason, n in counts.items()))
        run.encoded[memory] = encoded
    return run.encoded[memory]


def _look(
    run: Context, name: str, chat: Chat, sides: Sequence[Replies], prompts: list[np.ndarray], replies: list[tuple]
) -> None:
    """Whether a few rows are what was given; and how many replies come with a thought that is left out."""
    reading = run.reading
    for place, side in enumerate(sides):
        texts = [row[place] for row in replies]
        reading.chats(chat, side.prompts, prompts, side.texts, texts, side.finished)
    if chat.thoughts == "strip":
        parts = [split(text) for side in sides for text in side.texts]
        reading.thoughts(name, sum(bool(s.thought) for s in parts), sum(not s.closed for s in parts))


def packed(run: Context, source: Source, completions: Completions, policy: Policy) -> Completions:
    """The rows, packed where the backbone keeps replies apart."""
    spec = source.spec
    memory = (source.folder, source.gguf, spec.attention, spec.dtype, spec.max_length, spec.share_prompt)
    if memory not in run.packs:
        run.packs[memory] = told(lambda: keeps_replies_apart(policy, spec.max_length, spec.share_prompt))
        if spec.share_prompt and not run.packs[memory]:
            log.warning("%s", said_apart(source))
    packed = run.packs[memory]
    return Completions(completions.prompts, completions.replies, completions.columns, packed)


def _prompt_ids(run: Context, chat: Chat, prompts: Sequence[Dialogue]) -> Sequence[np.ndarray]:
    key = {"version": VERSION, "chat": chat.fingerprint, "prompts": digest(*(p.identity for p in prompts))}
    size = sum(len(p.text) for p in prompts)
    return made(run.stages, "tokens-of-prompts", key, lambda: chat.prompts(prompts), size)


def _unless_blank(run: Context, replies: Replies, chat: Chat) -> list[np.ndarray]:
    """Token ids of replies; none for one without a visible character, whatever its tokens are."""
    if replies.written_by(chat):
        ids = replies.encode(chat)
    else:
        content = digest(*replies.texts, *map(str, replies.finished.tolist()))
        key = {"version": VERSION, "chat": chat.fingerprint, "replies": content}
        size = sum(map(len, replies.texts))
        ids = made(run.stages, "tokens-of-replies", key, lambda: replies.encode(chat), size)
    return [row if text.strip() else row[:0] for row, text in zip(ids, replies.texts, strict=True)]
