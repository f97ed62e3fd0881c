"""What a server writes in place of the strong model, kept batch by batch: what was answered is never asked again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from w2sg import progress, stops
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders import Decoder
from w2sg.decoding.decoders.batches import write_batch
from w2sg.decoding.decoders.engines import Engines
from w2sg.decoding.decoders.written import from_file, pack_text, to_file
from w2sg.decoding.server import ServerGrower
from w2sg.store.files import remove
from w2sg.store.sealed import seal, sweep, unsound
from w2sg.store.soundness import SCRATCH

log = logging.getLogger(__name__)
ANSWERS = "answers.json.gz"


def ask(
    decoder: Decoder, prompts: Prompts, engines: Callable[[], Engines], server: ServerGrower, folder: Path
) -> dict[str, Any]:
    """Have a server write to all prompts that are not answered yet; returns what the store notes of the stage.

    Args:
        engines: makes those of a batch. folder: of the unfinished stage.
    """
    scratch = folder / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    done = _answered_before(scratch)
    todo = [k for k, i in enumerate(prompts.ids) if i not in done]
    if done and todo:
        log.info("%d of %d prompts were answered before", len(done), len(prompts))
    progress.count("asking", len(prompts), "prompts", len(done))
    for start in range(0, len(todo), decoder.batch_size):
        batch = prompts.take(todo[start : start + decoder.batch_size])
        progress.at(len(done), len(batch))
        begun = time.perf_counter()
        replies = write_batch(decoder, engines(), batch)
        seconds = (time.perf_counter() - begun) / len(batch)
        answers = {
            i: pack_text(reply, server.client.size, seconds) for i, reply in zip(batch.ids, replies, strict=True)
        }
        content = to_file(answers)
        with stops.deferred():
            seal(scratch, f"answers-{len(done):06d}", ".json.gz", lambda file, content=content: file.write(content))
        done |= answers
        progress.at(len(done))
        progress.kept(len(done))
    log.info("%s", server.client.cost)
    if server.usage.uncounted:
        log.warning("the server does not count tokens: they are counted by the tokenizer of strong=")
    (folder / ANSWERS).write_bytes(to_file(done))
    tokens = sum(candidate["tokens"] for answer in done.values() for candidate in answer["candidates"])
    seconds = sum(answer["seconds"] for answer in done.values())
    return {"examples": len(done), "tokens": tokens, "padded_tokens": tokens, "seconds": seconds}


def _answered_before(scratch: Path) -> dict[str, Any]:
    """What a server answered before the run was stopped; damaged files are deleted, and their prompts asked again."""
    sweep(scratch)
    done: dict[str, Any] = {}
    for file in sorted(scratch.glob("*.json.gz")):
        if wrong := unsound(file):
            log.warning("the answers %s cannot be used (%s); they are asked for again", file.name, wrong)
            remove(file)
        else:
            done |= from_file(file)
    return done
