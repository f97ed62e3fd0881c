"""What a plan takes for the replies of decoders: as many and as long as they may become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from w2sg.data.dialogue import Chat
from w2sg.data.replies import Prompts
from w2sg.decoding.decoders import Decoder
from w2sg.decoding.decoders import written as stored
from w2sg.decoding.decoders.written import Written
from w2sg.experiment.answers import ANSWERS
from w2sg.store.files import write_json
from w2sg.training.foreseen import Foreseen, Writing, texts


def _lengths(chat: Chat, decoder: Decoder, prompts: Prompts) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of prompts, and [P * rows] the tokens that each reply in flight may come to."""
    ids = chat.prompts(prompts.texts)
    return ids, np.full(len(ids) * decoder.in_the_making, decoder.max_new_tokens)


def written(chat: Chat, decoder: Decoder, prompts: Prompts) -> Foreseen:
    """Replies of models that write here; where several are kept of each prompt, all of them."""
    ids, lengths = _lengths(chat, decoder, prompts)
    kept = max(1, decoder.independent_samples)
    rows = texts(chat, ids, np.full(len(ids) * kept, decoder.max_new_tokens), len(decoder.kind))
    tables = []
    for p, prompt in enumerate(ids):
        read = float(decoder.in_the_making * (len(prompt) + decoder.max_new_tokens))
        replies = [
            Written(row, np.full(len(row), -2.0), strong_read=read, guide_read=read)
            for row in rows[p * kept : (p + 1) * kept]
        ]
        tables.append(stored.pack(Written(**{**vars(replies[0]), "candidates": tuple(replies[1:])})))
    tensors = {
        "values": torch.from_numpy(np.concatenate(tables)).float(),
        "sizes": torch.tensor([len(table) for table in tables]),
    }
    sizes = np.repeat([len(row) for row in ids], decoder.in_the_making)
    return Foreseen(tensors, Writing(sizes, lengths, decoder.batch_size * decoder.in_the_making))


def answers(chat: Chat, decoder: Decoder, prompts: Prompts, folder: Path) -> Foreseen:
    """Replies of a server."""
    ids = chat.prompts(prompts.texts)
    rows = texts(chat, ids, np.full(len(ids), decoder.max_new_tokens), len(decoder.kind))
    found = {
        i: stored.pack_text(Written(text=chat.text(row), counted_by="tokenizer"), lambda _, row=row: len(row), 0.0)
        for i, row in zip(prompts.ids, rows, strict=True)
    }
    (folder / ANSWERS).write_bytes(stored.to_file(found))
    return Foreseen()


def no_traces(folder: Path) -> Foreseen:
    """None are shown."""
    write_json(folder / "traces.json", [])
    return Foreseen()
