"""What W&B wrote into a run's file, read back: the run, the points of its curves, its summary."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # bytes: of a block of LevelDB's log format, and of the head of a file and of a record


@dataclass
class Written:
    """A run as W&B has it on the disk."""

    run: Any = None
    points: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ended: int | None = None

    def curve(self, stage: str, key: str) -> list[tuple[float, float]]:
        """Steps and values of a curve, in the order in which they were logged."""
        named = f"{stage}/{key}"
        return [(point[f"{stage}/step"], point[named]) for point in self.points if named in point]


def records(file: Path) -> Iterator[bytes]:
    """Each record of a file, its parts joined."""
    data, at, parts = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the end of a block is filled up
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read(folder: Path) -> Written:
    """The run of one folder ``wandb/*run-*``."""
    from wandb.proto.wandb_internal_pb2 import Record

    written = Written()
    for data in records(next(folder.glob("*.wandb"))):
        record = Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                written.run = record.run
                written.config |= {
                    i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.run.config.update
                }
            case "config":
                written.config |= {
                    i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.config.update
                }
            case "history":
                written.points.append(_items(record.history.item))
            case "summary":
                written.summary |= _items(record.summary.update)
            case "exit":
                written.ended = record.exit.exit_code
    return written


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
