"""Large files are read once for their digest; what has changed in any way that leaves a trace is read again."""

import os
import shutil
import time
from types import SimpleNamespace

import pytest
from conftest import save_tiny_model
from model_folders import spec

from w2sg.cli import store as inventory
from w2sg.console import Plain
from w2sg.models.source import find
from w2sg.store import digests, soundness
from w2sg.store.files import hash_file, read_json, write_json
from w2sg.store.store import Store

KEY = {"seed": 0}


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Names of the files that are read for a digest. Every file is large here, and old."""
    names = []
    monkeypatch.setattr(digests, "hash_file", lambda path: names.append(path.name) or hash_file(path))
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "GRAIN", -(10**12))
    monkeypatch.setattr(digests, "_store", None)
    digests.remember_in(tmp_path / "store", make=True)
    return names


def flip(file):
    """One bit, and the time set back."""
    before, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange(file):
    """Another file of the same size and time."""
    before, other = file.stat(), file.with_name("other")
    other.write_bytes(bytes(len(file.read_bytes())))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


CHANGES = {"flipped": flip, "exchanged": exchange, "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n")}


def test_a_models_files_are_read_for_their_digests_once(tmp_path, read):
    folder = save_tiny_model(tmp_path / "model", layers=1, width=8)
    first = find(spec(name=str(folder)), "strong").identity
    assert "model.safetensors" in read
    read.clear()
    assert find(spec(name=str(folder)), "weak").identity == first
    assert read == []
    for change in (flip, lambda file: file.write_text("{}")):  # the weights are of random bits, whichever they are
        change(folder / ("model.safetensors" if change is flip else "special_tokens_map.json"))
        changed = find(spec(name=str(folder)), "strong").identity
        assert changed != first
        assert len(read) == 1
        first = changed
        read.clear()


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_read_again(change, tmp_path, read):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"0123456789")
    assert digests.of_models([file]) == digests.of_models([file]) == {file.name: hash_file(file)}
    assert read == [file.name]
    CHANGES[change](file)
    assert digests.of_models([file]) == digests.of_models([file]) == {file.name: hash_file(file)}
    assert read == [file.name] * 2


def test_what_is_known_is_believed_only_of_old_files_and_where_it_is_as_it_was_written(tmp_path, read, monkeypatch):
    monkeypatch.setattr(digests, "GRAIN", 60 * 10**9)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"0123456789")
    for _ in range(2):  # it may be changed within the tick of the clock that it was written in
        digests.of_models([file])
    assert len(read) == 2
    monkeypatch.setattr(digests, "time", SimpleNamespace(time_ns=lambda: time.time_ns() + 61 * 10**9))
    for _ in range(2):
        digests.of_models([file])
    assert len(read) == 3
    (memory,) = (tmp_path / "store" / digests.MEMORY).iterdir()
    content = read_json(memory)
    for damaged in ("{", "[]", '{"files": {}}'):
        memory.write_text(damaged)
        read.clear()
        assert digests.of_models([file]) == digests.of_models([file]) == {file.name: hash_file(file)}
        assert read == [file.name]
    content["files"][file.name][-1] = "0" * 64  # a byte that a disk has changed
    write_json(memory, content)
    assert digests.of_models([file]) == {file.name: hash_file(file)}


def test_without_a_store_a_process_knows_what_it_has_read(tmp_path, read):
    digests.remember_in(None)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"0123456789")
    assert digests.of_models([file]) == digests.of_models([file]) == {file.name: hash_file(file)}
    assert read == [file.name]
    flip(file)
    digests.remember_in(tmp_path / "store")  # as a plan does, which makes none
    assert digests.of_models([file]) == {file.name: hash_file(file)}
    assert not (tmp_path / "store").exists()


def test_the_hubs_files_are_named_by_their_digest(tmp_path, read):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_text("content")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert digests.of_models([tmp_path / "model.safetensors"]) == {"model.safetensors": blob.name}
    assert read == []


def make(root):
    with Store(root).claim("weak", KEY) as claim:
        if not claim.cached:
            (claim.part / "model.bin").write_bytes(b"weights of a model")
            claim.seal({})
    soundness.verified.clear()  # what follows is another process
    return claim.path


def test_a_stage_is_read_once_and_again_when_a_file_of_it_was_touched(tmp_path, read):
    path = make(tmp_path)
    read.clear()
    assert Store(tmp_path).find("weak", KEY) == path
    assert read == []
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))  # the same bytes in other files
    assert make(tmp_path.with_name("copy")).name == path.name
    assert sorted(read) == ["key.json", "model.bin"]
    flip(path / "model.bin")
    soundness.verified.clear()
    assert Store(tmp_path).find("weak", KEY) is None


def test_verify_finds_what_a_disk_has_changed_by_itself(tmp_path, read, capsys):
    path = make(tmp_path)
    assert inventory.verify(tmp_path, Plain())
    memory = tmp_path / digests.MEMORY / f"{path.name}.json"
    known = read_json(memory)["files"]
    flip(path / "model.bin")
    known["model.bin"][:-1] = digests.state((path / "model.bin").stat())  # as if no time had changed
    write_json(memory, {"files": known, "check": digests._check(known)})
    soundness.verified.clear()
    assert Store(tmp_path).find("weak", KEY) == path
    assert not inventory.verify(tmp_path, Plain())
    said = capsys.readouterr().out
    assert f"{path.name} is damaged: model.bin has another sha256 than when it was written" in said
    assert "0 of 1 finished stages are as they were written" in said
    read.clear()
    assert Store(tmp_path).find("weak", KEY) is None  # which needs no reading: its digest is known
    assert read == []
    make(tmp_path)
    assert inventory.verify(tmp_path, Plain())
