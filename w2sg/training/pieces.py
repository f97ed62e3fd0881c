"""Checkpoints of models that are cut over ranks: each rank writes its part, beside training, and any number read them.

A checkpoint is a folder. torch.distributed.checkpoint decides who writes which piece and brings pieces together for
ranks that hold others. What is not cut (counts, schedules, the curve) is one file of rank 0. The folder gets its name
last, so that one of a killed write is never gone on from (`w2sg.store.sealed`).
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from w2sg.store.files import TEMPORARY, hash_file, remove
from w2sg.store.sealed import CONTENT, seal_folder

REST = "rest.pt"
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)


class Writing:
    """A checkpoint that is being written while training goes on.

    Args:
        checkpoint: nested; its sharded tensors are copied before this returns, all else too.
        group: of CPU tensors, for this alone: a thread speaks on it while the main one speaks on others.

    Attributes:
        path: of the folder, where rank 0 has put it; None elsewhere, and before.
    """

    def __init__(self, folder: Path, stem: str, suffix: str, checkpoint: Mapping[str, Any], group: dist.ProcessGroup):
        cut: dict[str, Tensor] = {}
        places: dict[str, list[str | int]] = {}
        rest = _apart(checkpoint, [], cut, places)
        written = io.BytesIO()
        if dist.get_rank() == 0:
            torch.save({"content": rest, "places": places}, written)
            folder.mkdir(parents=True, exist_ok=True)
            remove(folder / f".{stem}{suffix}{TEMPORARY}")
        self._writer = _Writer(folder, stem, suffix, written.getbuffer())
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._future: Future = dcp.async_save(
            cut, storage_writer=self._writer, planner=planner, process_group=group, no_dist=False
        )

    @property
    def path(self) -> Path | None:
        return self._writer.sealed

    def is_whole(self) -> bool:
        """Whether it is there, without waiting."""
        return self._future.done() and self._future.exception() is None

    def wait(self) -> None:
        """Until it is there.

        Raises:
            OSError: on every rank, whichever could not write.
        """
        try:
            self._future.result()
        except CheckpointException as error:
            if self._writer.main:
                remove(self._writer.path)
            causes = [cause for cause, _ in error.failures.values()]
            raise next((c for c in causes if isinstance(c, OSError)), causes[0]) from None


class _Writer(dcp.FileSystemWriter):
    """Writes hashes beside the pieces, no pickles, and gives the folder its name last."""

    def __init__(self, folder: Path, stem: str, suffix: str, rest: memoryview):
        super().__init__(folder / f".{stem}{suffix}{TEMPORARY}", single_file_per_rank=True, thread_count=1)
        self.stem, self.suffix, self.rest = stem, suffix, rest
        self.main, self.sealed = dist.get_rank() == 0, None

    def write_data(self, plan: Any, planner: Any) -> Any:
        results = super().write_data(plan, planner).value()
        files = {result.storage_data.relative_path for result in results}
        future: Any = torch.futures.Future()
        future.set_result([*results, {name: hash_file(Path(self.path) / name) for name in sorted(files)}])
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        folder = Path(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REST).write_bytes(self.rest)
        hashes = {REST: hash_file(folder / REST)}
        where = {}
        for *written, files in results:
            hashes |= files
            where |= {result.index: result.storage_data for result in written}
        tensors = {
            name: {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "size": list(tensor.size),
                "pieces": [[list(c.offsets), list(c.sizes), *_place(where, name, c)] for c in tensor.chunks],
            }
            for name, tensor in metadata.state_dict_metadata.items()
        }
        self.sealed = seal_folder(folder, self.stem, self.suffix, hashes, {"tensors": tensors})


def _place(where: Mapping[MetadataIndex, Any], name: str, chunk: ChunkStorageMetadata) -> tuple[str, int, int]:
    info = where[MetadataIndex(name, chunk.offsets)]
    return info.relative_path, info.offset, info.length


class _Reader(dcp.FileSystemReader):
    """Reads what `_Writer` has written."""

    def read_metadata(self) -> Metadata:
        content = json.loads((Path(self.path) / CONTENT).read_text(encoding="utf-8"))
        tensors, where = {}, {}
        for name, tensor in content["tensors"].items():
            chunks = []
            for offsets, sizes, file, offset, length in tensor["pieces"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                where[MetadataIndex(name, torch.Size(offsets))] = _StorageInfo(file, offset, length)
            properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["size"]), chunks)
        return Metadata(tensors, storage_data=where)


def rest_of(folder: Path) -> dict[str, Any]:
    """All of a checkpoint but its sharded tensors, in whose places None stands."""
    return torch.load(folder / REST, map_location="cpu", weights_only=True)["content"]


def read(
    folder: Path,
    like: Callable[[list[str | int], torch.dtype], Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """A whole checkpoint, in host memory; or of its sharded tensors this rank's parts.

    Args:
        like: the tensor to read into, given the keys that lead to its place, and its dtype; None for whole ones.
        group: of the ranks that read together; None reads for this rank alone.
    """
    kept = torch.load(folder / REST, map_location="cpu", weights_only=True)
    metadata = _Reader(folder).read_metadata().state_dict_metadata
    state = {}
    for name, place in kept["places"].items():
        size, dtype = metadata[name].size, metadata[name].properties.dtype
        state[name] = torch.empty(size, dtype=dtype) if like is None else like(place, dtype)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        if state:
            dcp.load(state, storage_reader=_Reader(folder), planner=planner, process_group=group, no_dist=group is None)
    content = kept["content"]
    for name, (*path, last) in kept["places"].items():
        inside = content
        for key in path:
            inside = inside[key]
        inside[last] = state[name]
    return content


def _apart(value: Any, place: list[str | int], cut: dict[str, Tensor], places: dict[str, list[str | int]]) -> Any:
    """Nested state with None for its sharded tensors, which are put aside by a name made of their place."""
    if isinstance(value, Mapping):
        return {key: _apart(inside, [*place, key], cut, places) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_apart(inside, [*place, i], cut, places) for i, inside in enumerate(value))
    if isinstance(value, DTensor):
        name = "/".join(map(str, place))
        cut[name], places[name] = value.detach(), place
        return None
    return value
