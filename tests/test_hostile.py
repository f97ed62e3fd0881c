"""A hostile cluster: kills and signals at random moments, damage to every file, full disks, broken locks, two sweeps.

After each, the same command ends as if nothing had been. A small part runs with the tests; the whole for any time:
``python tests/test_hostile.py --minutes 10``.
"""

import errno
import json
import os
from pathlib import Path

import pytest

from w2sg import inventory, sealed
from w2sg import store as stores
from w2sg.console import Plain as Terminal
from w2sg.errors import UserError
from w2sg.store import Store, read_json, write_json

KEY = {"seed": 0}
CONTENT = {
    "model/weights.bin": b"weights" * 40,
    "model/config.json": b"{}",
    "values.bin": b"values",
    "ids.json": b"[1]",
}


def make(root, remade=None) -> Path:
    """A stage of several files, made unless it is there and sound."""
    with Store(root).claim("weak", KEY) as claim:
        if not claim.cached:
            if remade is not None:
                remade.append(1)
            for name, content in CONTENT.items():
                (claim.part / name).parent.mkdir(exist_ok=True)
                (claim.part / name).write_bytes(content)
            claim.seal({"seconds": 1.5})
    return claim.path


def is_whole(path) -> bool:
    return all((path / name).read_bytes() == content for name, content in CONTENT.items())


# -- damage to sealed stages ------------------------------------------------------------------------------------------


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def flip_and_set_the_time_back(file):
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def to_fifo(file):
    file.unlink()
    os.mkfifo(file)


def to_link(file):
    copy = file.parents[3 if file.parent.name == "model" else 2] / f"copy-{file.name}"
    file.rename(copy)
    file.symlink_to(copy)


DAMAGE = {
    "flipped": flip,
    "flipped, its time set back": flip_and_set_the_time_back,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "gone": Path.unlink,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": to_fifo,
    "a link": to_link,
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "deep JSON": lambda file: file.write_text("[" * 200_000),
    "binary": lambda file: file.write_bytes(os.urandom(64)),
}


@pytest.mark.parametrize("verified", [True, False], ids=["in the process that made it", "in another"])
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [*CONTENT, "key.json", "manifest.json"])
def test_damage_to_any_file_of_a_stage_is_noticed_and_mended(name, kind, verified, tmp_path, monkeypatch, caplog):
    path, remade = make(tmp_path), []
    if not verified:
        monkeypatch.setattr(stores, "_verified", {})
    DAMAGE[kind](path / name)
    harmless = name == "manifest.json" and kind == "longer"  # the same JSON
    inventory.print_list(tmp_path, Terminal(quiet=True))
    assert is_whole(make(tmp_path, remade))
    assert bool(remade) != harmless
    assert ("is damaged: " in caplog.text) != harmless


def test_any_flipped_bit_of_a_manifest_or_key_is_noticed_or_changes_nothing(tmp_path, monkeypatch):
    path = make(tmp_path)
    monkeypatch.setattr(stores, "_verified", {})
    for name in ("manifest.json", "key.json"):
        data = (path / name).read_bytes()
        for place in range(0, len(data), 3):
            changed = bytearray(data)
            changed[place] ^= 1 << (place % 8)
            (path / name).write_bytes(changed)
            if stores.problem(path) is None:  # between two words of JSON
                assert json.loads(changed) == json.loads(data)
        (path / name).write_bytes(data)


def forge(path, change):
    manifest = read_json(path / "manifest.json")
    manifest.pop("check")
    change(manifest)
    write_json(path / "manifest.json", {**manifest, "check": stores._digest(manifest)})


FORGED = {
    "no files": lambda m: m.update(files={}),
    "no key among its files": lambda m: m["files"].pop("key.json"),
    "a file left out": lambda m: m["files"].pop("values.bin"),
    "another size": lambda m: m["files"]["values.bin"].update(size=1),
    "another hash": lambda m: m["files"]["values.bin"].update(sha256="0" * 64),
    "a file elsewhere": lambda m: m["files"].update({"../outside": {"size": 0, "sha256": ""}}),
    "files are a list": lambda m: m.update(files=list(m["files"])),
    "files are numbers": lambda m: m.update(files=dict.fromkeys(m["files"], 1)),
    "no files at all": lambda m: m.pop("files"),
    "no info": lambda m: m.pop("info"),
    "info is a list": lambda m: m.update(info=[]),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_manifest_is_not_believed(kind, tmp_path, monkeypatch):
    path, remade = make(tmp_path), []
    monkeypatch.setattr(stores, "_verified", {})
    forge(path, FORGED[kind])
    inventory.print_list(tmp_path, Terminal(quiet=True))
    assert is_whole(make(tmp_path, remade))
    assert remade


def test_a_file_that_was_put_into_a_stage_is_noticed(tmp_path):
    """What loads a model may read it: adapter_config.json makes another model of a folder."""
    path, remade = make(tmp_path), []
    (path / "model" / ".DS_Store").write_text("of an operating system")
    make(tmp_path, remade)
    assert not remade
    (path / "model" / "adapter_config.json").write_text("{}")
    make(tmp_path, remade)
    assert remade


# -- sealed files of unfinished stages --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in DAMAGE if not k.startswith("a link") and k != "gone"])
def test_damage_to_a_sealed_file_is_noticed(kind, tmp_path):
    file = sealed.seal(tmp_path / "a" / "b", "fit-1", ".ckpt", lambda f: f.write(b"content" * 9))
    assert sealed.unsound(file) is None
    DAMAGE[kind](file)
    assert sealed.unsound(file) is not None


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_file_before_it_and_nothing_else(call, error, tmp_path, monkeypatch):
    """Nor does it touch $TMPDIR."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    before = sealed.seal(tmp_path / "x", "fit-1", ".ckpt", lambda f: f.write(b"one"))

    def fail(*_):
        raise error

    monkeypatch.setattr(sealed.os, call, fail)
    with pytest.raises(type(error)):
        sealed.seal(tmp_path / "x", "fit-2", ".ckpt", lambda f: f.write(b"two"))
    assert list((tmp_path / "x").iterdir()) == [before]
    assert sealed.unsound(before) is None
    assert not (tmp_path / "elsewhere").exists()


# -- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch):
    import fcntl

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"The store .* cannot be locked .*Set `store=` to a folder on a local disk"):
        make(tmp_path)


def test_a_folder_in_place_of_a_lock_is_named(tmp_path):
    path = make(tmp_path)
    (path / "values.bin").unlink()
    lock = tmp_path / ".locks" / f"{path.name}.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with pytest.raises(UserError, match=r"should be an empty file, the lock of a stage.* remove it"):
        make(tmp_path)


# -- what prune leaves alone ------------------------------------------------------------------------------------------


def test_prune_leaves_what_only_looks_like_a_stage(tmp_path):
    root, said = tmp_path / "store", []
    path = make(root)
    names = [f"experiment-{'0' * 16}", f"weak-{'1' * 16}.part", f"model-{'2' * 16}.damaged"]
    for name in names:
        (root / name).mkdir()
        (root / name / "thesis.tex").write_text("three years of work")
    write_json(root / names[0] / "key.json", {"mine": True})
    (root / f"link-{'3' * 16}").symlink_to(tmp_path)
    console = Terminal(quiet=True)
    console.say = lambda line, *_: said.append(line)
    inventory.prune(root, set(), True, console)
    assert not path.exists()
    assert sorted(p.name for p in root.iterdir() if p.name != ".locks") == sorted([*names, f"link-{'3' * 16}"])
    assert sum("has a stage's name and is none" in line for line in said) == 4
