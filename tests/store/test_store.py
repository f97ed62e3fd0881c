"""The store under everything that happens to it: killed jobs, competing jobs, damaged files, full disks."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path

import filelock
import pytest

import w2sg
from w2sg.cli import store as inventory
from w2sg.console import Plain as Terminal
from w2sg.errors import UserError
from w2sg.store import digests, soundness, store
from w2sg.store.files import hash_file, read_json, write_json
from w2sg.store.keys import ABSENT, canonical, differences, flatten, folder_name
from w2sg.store.store import Store

KEY = {"model": {"name": "tiny"}, "optimiser": {"lr": 1e-3, "betas": [0.9, 0.99]}, "seed": 0}


def make(root, name="weak", key=KEY, text="weights", **info):
    """Claim a stage and make it unless it is there; returns its folder and whether it was there."""
    with Store(root).claim(name, key) as claim:
        cached = claim.cached
        if not cached:
            (claim.part / "sub").mkdir(exist_ok=True)
            (claim.part / "sub" / "model.bin").write_text(text)
            claim.seal({"seconds": 1.5, **info})
    return claim.path, cached


def attempt(root, act):
    """Claim the stage, write one file, and do something more."""
    with Store(root).claim("weak", KEY) as claim:
        (claim.part / "model.bin").write_text("x")
        act(claim)


def fault(error):
    def fail(*_, **__):
        raise error

    return fail


def child(code, *args, **kwargs):
    """Python in another process, with `claim` and `say` at hand; `say` reaches us at once, through its stdout."""
    head = (
        "import sys, time, logging\nfrom pathlib import Path\nfrom w2sg.store.store import Store\n"
        "logging.basicConfig(level='INFO', stream=sys.stdout, format='%(message)s')\n"
        "say = lambda text: print(text, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(w2sg.__file__).parents[1])}
    command = [sys.executable, "-c", head + code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **kwargs)


def finish(process):
    out, _ = process.communicate(timeout=15)
    assert process.returncode == 0, out
    return out


# --- keys ------------------------------------------------------------------------------------------------------------


def test_hash_is_sha256_of_sorted_compact_json():
    # printf '{"a":[1,2.5,null,true],"b":"x"}' | sha256sum
    key = {"b": "x", "a": [1, 2.5, None, True]}
    assert canonical(key) == '{"a":[1,2.5,null,true],"b":"x"}'
    assert folder_name("weak", key) == "weak-eb68bad33141c183"


def test_order_of_fields_is_irrelevant_order_of_items_and_types_are_not():
    assert folder_name("a", {"x": 1, "y": {"p": 1, "q": 2}}) == folder_name("a", {"y": {"q": 2, "p": 1}, "x": 1})
    assert folder_name("a", {"x": [1, 2]}) != folder_name("a", {"x": [2, 1]})
    assert len({folder_name("a", {"x": x}) for x in (1, 1.0, True, "1", None, [1], {"1": 1}, 0.0, -0.0)}) == 9


class Plain(StrEnum):
    A = "a"


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ({"optimiser": {"lr": float("nan")}}, UserError, r"optimiser\.lr is nan"),
        ({"optimiser": {"betas": [0.9, float("inf")]}}, UserError, r"optimiser\.betas\.1 is inf"),
        ({"data": {"path": Path("x")}}, TypeError, r"data\.path is a pathlib\.\w*Path"),
        ({"data": [{"ids": {1, 2}}]}, TypeError, r"data\.0\.ids is a builtins\.set"),
        ({"a": (1, 2)}, TypeError, r"a is a builtins\.tuple"),
        ({"a": Plain.A}, TypeError, r"a is a .*Plain"),
        ({"a": {1: 2}}, TypeError, r"a has the field name 1"),
        ({"a": {"b": "\ud800"}}, UserError, r"a\.b is not valid Unicode"),
        ([1], TypeError, r"a stage key is a dict, not \[1\]"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_field(tmp_path, key, error, message):
    with pytest.raises(error, match=message):
        canonical(key)
    with pytest.raises(error, match=message), Store(tmp_path).claim("weak", key):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a b", "-a"])
def test_names_that_would_not_be_a_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be named"):
        Store(tmp_path).peek(name, KEY)


def test_flatten_and_differences():
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": [], "e": None}) == {"a.b.0": 1, "a.b.1.c": 2, "d": [], "e": None}
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1.0, "d": 3}) == [
        ("a", 1, 1.0),
        ("d", ABSENT, 3),
        ("b.c", 2, ABSENT),
    ]


def test_the_key_is_taken_when_claimed(tmp_path):
    key = {"list": [1]}
    with Store(tmp_path).claim("weak", key) as claim:
        key["list"].append(2)
        assert read_json(claim.part / "key.json") == {"list": [1]}


def test_a_key_found_is_the_key_asked_for_even_if_hashes_collide(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store, "folder_name", lambda name, key: f"{name}-{'0' * 16}")
    make(tmp_path, key={"lr": 1.0, "seed": 0})
    assert Store(tmp_path).find("weak", {"lr": 1, "seed": 0}) is None
    assert "not the key asked for: it differs in lr" in caplog.text


# --- making, finding, sealing ----------------------------------------------------------------------------------------


def test_made_once_then_found(tmp_path):
    path, cached = make(tmp_path, tokens=7)
    assert not cached
    assert path == tmp_path / folder_name("weak", KEY)
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) == [
        "key.json",
        "manifest.json",
        "sub",
        "sub/model.bin",
    ]
    assert read_json(path / "key.json") == KEY
    files = read_json(path / "manifest.json")["files"]
    assert files["sub/model.bin"] == {"size": 7, "sha256": hash_file(path / "sub" / "model.bin")}
    assert set(files) == {"sub/model.bin", "key.json"}
    assert make(tmp_path) == (path, True)
    assert Store(tmp_path).find("weak", KEY) == path
    with Store(tmp_path).claim("weak", KEY) as claim:
        assert claim.info == {"seconds": 1.5, "tokens": 7}
        assert not claim.part.exists()
        with pytest.raises(RuntimeError, match="inside the claim that makes"):
            claim.seal({})


def test_not_there(tmp_path):
    nowhere = Store(tmp_path / "deep" / "store")
    assert nowhere.find("weak", KEY) is None
    assert not nowhere.peek("weak", KEY).cached
    assert nowhere.nearest("weak", KEY) is None
    assert not nowhere.root.exists()


def test_seal_belongs_to_an_open_claim_and_comes_once(tmp_path):
    with Store(tmp_path).claim("weak", KEY) as claim:
        claim.seal({})
        with pytest.raises(RuntimeError, match="once"):
            claim.seal({})
    with Store(tmp_path).claim("other", KEY) as claim:
        pass
    with pytest.raises(RuntimeError, match="inside the claim"):
        claim.seal({})
    with pytest.raises(RuntimeError, match="inside the claim"):
        Store(tmp_path).peek("other", KEY).seal({})


def test_an_exception_keeps_part_and_frees_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError):
        attempt(tmp_path, fault(ZeroDivisionError()))
    assert Store(tmp_path).find("weak", KEY) is None
    with Store(tmp_path).claim("weak", KEY) as claim:
        assert (claim.part / "model.bin").read_text() == "x"


def test_scratch_serves_resuming_only(tmp_path):
    with Store(tmp_path).claim("weak", KEY) as claim:
        (claim.scratch / "last.ckpt").write_text("x")
    with Store(tmp_path).claim("weak", KEY) as claim:
        assert (claim.scratch / "last.ckpt").read_text() == "x"
        (claim.part / ".model.bin.1-2.w2sg-tmp").write_text("of a write that was killed")
        claim.seal({})
    assert {p.name for p in claim.path.iterdir()} == {"key.json", "manifest.json"}


def test_scratch_left_by_a_death_just_after_the_rename_is_swept(tmp_path):
    path, _ = make(tmp_path)
    (path / "scratch").mkdir()
    assert make(tmp_path) == (path, True)
    assert not (path / "scratch").exists()


def test_links_are_not_sealed(tmp_path):
    def link(claim):
        (claim.part / "last").symlink_to(claim.part / "model.bin")
        claim.seal({})

    with pytest.raises(ValueError, match="last is a symbolic link"):
        attempt(tmp_path, link)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"seed": 1}'])
def test_part_of_another_key_is_started_afresh(tmp_path, caplog, content):
    with Store(tmp_path).claim("weak", KEY) as claim:
        (claim.part / "half").write_text("x")
    file = claim.part / "key.json"
    file.unlink() if content is None else file.write_text(content)
    with Store(tmp_path).claim("weak", KEY) as claim:
        assert not (claim.part / "half").exists()
        assert read_json(claim.part / "key.json") == KEY
    assert "started afresh" in caplog.text


@pytest.mark.parametrize("function", ["rename", "replace", "fsync"])
def test_seal_is_all_or_nothing(tmp_path, monkeypatch, function):
    """Whatever fails before the rename has happened leaves no sealed folder, and the next claim goes on."""

    def seal(claim):
        monkeypatch.setattr(store.os, function, fault(OSError(errno.EIO, "injected")))
        claim.seal({})

    with pytest.raises(UserError, match=r"disk failed .*injected"):
        attempt(tmp_path, seal)
    monkeypatch.undo()
    assert not Store(tmp_path).peek("weak", KEY).path.exists()
    with Store(tmp_path).claim("weak", KEY) as claim:
        assert not (claim.part / "manifest.json").exists()
        assert sorted(p.name for p in claim.part.iterdir()) == ["key.json", "model.bin", "scratch"]
        claim.seal({})
    assert Store(tmp_path).find("weak", KEY) == claim.path


def test_info_is_plain(tmp_path):
    with Store(tmp_path).claim("weak", KEY) as claim:
        with pytest.raises(TypeError, match=r"info\.where is a pathlib"):
            claim.seal({"where": tmp_path})
        claim.seal({"seconds": 0.1 + 0.2})
    assert claim.info == {"seconds": 0.1 + 0.2}
    assert store.problem(claim.path) is None


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_key(path):
    write_json(path, {**KEY, "seed": 1})


DAMAGE = {
    "truncated": ("sub/model.bin", lambda f: os.truncate(f, 3), "sub/model.bin has 3 bytes instead of 7"),
    "one byte": ("sub/model.bin", flip, "sub/model.bin has another sha256"),
    "deleted": ("sub/model.bin", Path.unlink, "sub/model.bin is missing"),
    "a folder": ("sub/model.bin", lambda f: (f.unlink(), f.mkdir()), "sub/model.bin is not a file"),
    "key edited": ("key.json", edit_key, "key.json is not the key asked for: it differs in seed"),
    "key deleted": ("key.json", Path.unlink, "key.json is missing"),
    "key unreadable": ("key.json", lambda f: f.write_text("{"), "key.json is not JSON"),
    "key reformatted": ("key.json", lambda f: f.write_text(json.dumps(KEY)), "key.json has"),
    "key is a list": ("key.json", lambda f: f.write_text("[]"), "key.json is not a dict"),
    "manifest deleted": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "manifest truncated": ("manifest.json", lambda f: os.truncate(f, 40), "manifest.json is not JSON"),
    "manifest binary": ("manifest.json", lambda f: f.write_bytes(b"\xff\xfe"), "manifest.json is not JSON"),
    "manifest edited": (
        "manifest.json",
        lambda f: f.write_text(f.read_text().replace("1.5", "2.5")),
        "manifest.json was changed",
    ),
}


@pytest.mark.parametrize("verified", [True, False], ids=["in the process that made it", "in another"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_mended(tmp_path, caplog, kind, verified):
    path, _ = make(tmp_path)
    assert Store(tmp_path).find("weak", KEY) == path
    if not verified:
        soundness.verified.clear()
    file, damage, message = DAMAGE[kind]
    damage(path / file)
    assert Store(tmp_path).find("weak", KEY) is None
    assert f"{path.name} is damaged: {message}" in caplog.text
    caplog.clear()
    assert make(tmp_path, text="anew") == (path, False)
    assert len(caplog.records) == 1
    assert f"{path.name} is damaged: {message}" in caplog.text
    assert (path / "sub" / "model.bin").read_text() == "anew"
    assert (tmp_path / f"{path.name}.damaged").exists()
    assert make(tmp_path) == (path, True)


def test_damaged_twice_keeps_the_last_one_aside(tmp_path):
    path, _ = make(tmp_path, text="first")
    (path / "key.json").unlink()
    make(tmp_path, text="second")
    (path / "key.json").unlink()
    make(tmp_path, text="third")
    assert (tmp_path / f"{path.name}.damaged" / "sub" / "model.bin").read_text() == "second"


def test_a_change_of_equal_size_is_noticed_by_a_process_that_did_not_hash_the_folder_before(tmp_path):
    """Sizes each time, hashes once: a fresh process must find a byte flipped with the times put back."""
    path, _ = make(tmp_path)
    file = path / "sub" / "model.bin"
    times = file.stat()
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    code = f"say(Store(sys.argv[1]).find('weak', {KEY!r}))"
    assert finish(child(code, tmp_path)).splitlines()[-1] == "None"


def test_hashes_are_compared_once_per_process_and_peek_compares_none(tmp_path, monkeypatch):
    make(tmp_path)
    hashed = []
    monkeypatch.setattr(digests, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    assert Store(tmp_path).find("weak", KEY)  # sealed by this process, so it knows the hashes
    soundness.verified.clear()
    assert Store(tmp_path).peek("weak", KEY).cached
    assert hashed == []
    for _ in range(3):
        assert Store(tmp_path).find("weak", KEY)
    assert sorted(hashed) == ["key.json", "model.bin"]


def test_peek_changes_nothing(tmp_path):
    path, _ = make(tmp_path)
    (path / "sub" / "model.bin").unlink()
    before = sorted(tmp_path.rglob("*"))
    claim = Store(tmp_path).peek("weak", KEY)
    assert (claim.cached, claim.path) == (False, path)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_the_manifest_does_not_name_are_ignored(tmp_path):
    path, _ = make(tmp_path)
    (path / ".DS_Store").write_text("x")
    assert make(tmp_path) == (path, True)


# --- several processes -----------------------------------------------------------------------------------------------


WORK = """
with Store(sys.argv[1]).claim("weak", {"seed": 0}) as claim:
    if claim.cached:
        say("cached")
    else:
        with (claim.part / "steps").open("a") as file:
            file.write("1")
        say("making")
        if sys.argv[2] == "hang":
            time.sleep(60)
        time.sleep(0.5)
        claim.seal({})
"""


def test_kill_9_keeps_part_and_the_next_claim_goes_on(tmp_path):
    process = child(WORK, tmp_path, "hang")
    assert process.stdout.readline() == "making\n"
    part = tmp_path / (folder_name("weak", {"seed": 0}) + ".part")
    assert (part / "steps").read_text() == "1"
    assert inventory.rows(tmp_path)[0].locked
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=15)
    assert not inventory.rows(tmp_path)[0].locked
    assert finish(child(WORK, tmp_path, "")) == "making\n"
    assert (Store(tmp_path).find("weak", {"seed": 0}) / "steps").read_text() == "11"


def test_two_processes_do_the_work_once(tmp_path):
    pair = [child(WORK, tmp_path, ""), child(WORK, tmp_path, "")]
    outs = sorted((finish(process) for process in pair), key=len)
    path = Store(tmp_path).find("weak", {"seed": 0})
    assert (path / "steps").read_text() == "1"
    assert outs[0] == "making\n"
    # The other one waited and said so once, unless the machine was so slow that it came when all was done.
    waited, cached = outs[1].rpartition("cached\n")[:2]
    assert cached
    assert re.fullmatch(rf"(waiting for process \d+, which has been making {path.name} for [\d.]+ s\n)?", waited)
    assert "another process" not in waited
    assert not list((tmp_path / ".locks").glob("*.holder"))


def test_waits_for_another_process(tmp_path):
    first = child(WORK, tmp_path, "")
    assert first.stdout.readline() == "making\n"
    begun = time.monotonic()
    with Store(tmp_path).claim("weak", {"seed": 0}) as claim:
        assert claim.cached
    assert time.monotonic() - begun < 10
    finish(first)


def test_different_stages_do_not_wait(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = Store(tmp_path)
    with root.claim("weak", {"seed": 0}), root.claim("weak", {"seed": 1}) as other, root.claim("strong", {"seed": 0}):
        process = child("with Store(sys.argv[1]).claim('weak', {'seed': 2}) as c: c.seal({})", tmp_path)
        assert finish(process) == ""
        other.seal({})
    assert caplog.text == ""


def test_a_cached_stage_needs_no_lock(tmp_path):
    path, _ = make(tmp_path)
    with Store(tmp_path).lock(path.name), Store(tmp_path).claim("weak", KEY) as claim:
        assert claim.cached


def test_a_claim_within_its_own_claim_is_an_error_not_a_hang(tmp_path):
    root = Store(tmp_path)
    with root.claim("weak", KEY), pytest.raises(RuntimeError, match="inside its own claim"), root.claim("weak", KEY):
        pass


# --- disks -----------------------------------------------------------------------------------------------------------


full = fault(OSError(errno.ENOSPC, "No space left on device", "somewhere"))


@pytest.mark.parametrize("function", ["rename", "replace", "fsync"])
def test_full_disk_while_sealing(tmp_path, monkeypatch, function):
    sealed, _ = make(tmp_path, name="teacher")

    def seal(claim):
        monkeypatch.setattr(store.os, function, full)
        claim.seal({})

    with pytest.raises(UserError) as caught:
        attempt(tmp_path, seal)
    monkeypatch.undo()
    message, claim = str(caught.value), Store(tmp_path).peek("weak", KEY)
    assert str(claim.part) in message
    assert "GB free" in message
    assert "store=" in message
    assert not claim.path.exists()
    assert make(tmp_path, name="teacher") == (sealed, True)
    with Store(tmp_path).claim("weak", KEY) as claim:  # the same command later
        assert (claim.part / "model.bin").read_text() == "x"
        claim.seal({})
    assert Store(tmp_path).find("weak", KEY) == claim.path


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), RuntimeError("I/O: No space left on device (28)")],
)
def test_full_disk_in_the_context(tmp_path, error):
    with pytest.raises(UserError, match="disk became full") as caught:
        attempt(tmp_path, fault(error))
    assert caught.value.__cause__ is error
    assert (Store(tmp_path).peek("weak", KEY).part / "model.bin").exists()


def test_full_disk_before_the_work_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(UserError, match="disk became full"), Store(tmp_path).claim("weak", KEY):
        pass
    monkeypatch.undo()
    assert not make(tmp_path)[1]


def test_other_errors_pass_unchanged(tmp_path):
    for error in (OSError(errno.ENOENT, "x"), PermissionError(errno.EACCES, "x"), ValueError("x"), UserError("x")):
        with pytest.raises(type(error)) as caught, Store(tmp_path).claim("weak", KEY):
            raise error
        assert caught.value is error


def test_root_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(UserError, match=r"cannot be written.*Set `store=`"), Store(root).claim("weak", KEY):
            pass
        assert inventory.rows(root) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_read_only_root_serves_what_it_has_and_explains_the_rest(tmp_path, monkeypatch, number):
    path, _ = make(tmp_path)

    def deny(self, *_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", deny)
    monkeypatch.setattr(Path, "mkdir", deny)
    assert make(tmp_path) == (path, True)
    with pytest.raises(UserError, match=r"cannot be written.*Set `store=`"):
        make(tmp_path, name="other")


def test_folders_without_permission(tmp_path):
    path, _ = make(tmp_path)
    path.chmod(0o000)
    tmp_path.chmod(0o500)
    try:
        if os.access(path, os.R_OK):
            pytest.skip("permissions do not bind this user")
        with pytest.raises(UserError, match="cannot be read"):
            Store(tmp_path).find("weak", KEY)
        with pytest.raises(UserError, match="cannot be written"):
            make(tmp_path / "store")
    finally:
        tmp_path.chmod(0o700)
        path.chmod(0o700)


def test_prune_keeps_all_whose_lock_it_may_not_try(tmp_path, monkeypatch):
    path, _ = make(tmp_path)
    monkeypatch.setattr(filelock.FileLock, "acquire", fault(PermissionError(errno.EACCES, "denied")))
    text = shown(lambda console: inventory.prune(tmp_path, set(), True, console))
    assert f"kept {path.name}, which may be being made" in text
    assert path.exists()


# --- helpers ---------------------------------------------------------------------------------------------------------


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"b": 1, "a": "ü"})
    assert file.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ü"\n}\n'
    with pytest.raises(ValueError, match="nan"):
        write_json(file, {"a": float("nan")})
    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(file, {})
    assert read_json(file) == {"b": 1, "a": "ü"}
    assert list(tmp_path.iterdir()) == [file]


def test_read_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        read_json(tmp_path / "a.json")


def test_importing_is_cheap():
    code = "import w2sg.cli.store\nsay(sorted({'torch', 'numpy', 'transformers', 'lightning'} & set(sys.modules)))"
    assert finish(child(code)) == "[]\n"


# --- inventory -------------------------------------------------------------------------------------------------------


def test_nearest(tmp_path):
    key = {"model": {"name": "a"}, "lr": 1.0, "seed": 0}
    assert Store(tmp_path).nearest("fit", key) is None
    make(tmp_path, "fit", {**key, "model": {"name": "b"}, "lr": 2.0})
    near, _ = make(tmp_path, "fit", {"model": {"name": "a"}, "lr": 1, "seed": 0})
    make(tmp_path, "fit", key)  # itself does not count
    make(tmp_path, "fit-more", {**key, "x": 1})  # another name
    with Store(tmp_path).claim("fit", {**key, "x": 1}):  # unfinished
        pass
    assert Store(tmp_path).nearest("fit", key) == (near.name, [("lr", 1, 1.0)])
    edited = read_json(near / "key.json") | {"lr": 1.0}
    write_json(near / "key.json", edited)  # no longer what it was named after
    assert Store(tmp_path).nearest("fit", key)[1] == [("model.name", "b", "a"), ("lr", 2.0, 1.0)]


@pytest.fixture
def small(tmp_path):
    """weak -> labels -> two students (one unfinished), another weak model out of use, and a damaged stage."""
    made = {"root": tmp_path}
    common = {"model": {"name": "tiny[/red]"}, "data": {"name": "hh"}}
    made["weak"] = make(tmp_path, "weak", {**common, "lr": 0.5, "seed": 0})[0].name
    made["other"] = make(tmp_path, "weak", {**common, "lr": 0.25, "seed": 0})[0].name
    made["labels"] = make(tmp_path, "labels", {"from": made["weak"], "split": "transfer"})[0].name
    key = {**common, "labels": [made["labels"]], "loss": "rkl"}
    made["student"] = make(tmp_path, "student", key)[0].name
    with Store(tmp_path).claim("student", {**key, "loss": "ce"}) as claim:
        (claim.part / "x").write_text("x" * 500)
    made["unfinished"] = claim.path.name
    broken, _ = make(tmp_path, "broken", {"n": 1})
    os.truncate(broken / "sub" / "model.bin", 2)
    made["broken"] = broken.name
    (tmp_path / "notes.txt").write_text("not a stage")
    return made


def shown(function, *args, width=160):
    console = Terminal(width=width, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        function(*args, console)
    finally:
        console.file.close()
    return console.export_text()


def test_list(small):
    states = {row.folder.name: row.state for row in inventory.rows(small["root"])}
    assert states == {
        small["weak"]: "finished",
        small["other"]: "finished",
        small["labels"]: "finished",
        small["student"]: "finished",
        small["unfinished"] + ".part": "unfinished",
        small["broken"]: "damaged",
    }
    row = next(row for row in inventory.rows(small["root"]) if row.stage == small["weak"])
    folder = small["root"] / small["weak"]
    assert row.size == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert (row.name, row.hash, row.seconds, row.summary) == ("weak", row.stage[-16:], 1.5, "tiny[/red], hh, lr=0.5")
    assert 0 <= row.age < 60
    text = shown(inventory.print_list, small["root"])
    assert "tiny[/red], hh, loss=ce" in text
    assert f"{small['broken']} is damaged: sub/model.bin has 2 bytes instead of 7" in text
    assert "4 finished, 1 unfinished, 1 damaged" in text
    assert "notes" not in text
    narrow = shown(inventory.print_list, small["root"], width=80)
    assert "\n    tiny[/red], hh, loss=ce\n" in narrow  # no column of two letters
    assert max(map(len, narrow.splitlines())) <= 80
    with Store(small["root"]).lock(small["unfinished"]):
        assert "being made" in shown(inventory.print_list, small["root"])


def test_list_of_nothing(tmp_path):
    assert "no stages" in shown(inventory.print_list, tmp_path / "none")


def test_why(small):
    text = shown(inventory.print_why, small["root"], small["unfinished"])
    assert f"{small['unfinished']} (unfinished)" in text
    assert "model.name  'tiny[/red]'" in text
    assert f"  {small['labels']} (finished)\n    {small['weak']} (finished)\n" in text
    assert f"nearest other one is {small['student']}" in text
    assert "  loss  'rkl'  'ce'" in text
    assert shown(inventory.print_why, small["root"], small["unfinished"][-16:][:12]) == text
    assert shown(inventory.print_why, small["root"], small["unfinished"] + ".part") == text
    text = shown(inventory.print_why, small["root"], "lab")
    assert "Made from:" in text
    assert "no other finished stage named labels" in text
    assert "damaged: sub/model.bin has 2 bytes" in shown(inventory.print_why, small["root"], "broken")


def test_why_says_that_an_upstream_stage_is_gone(small):
    store.remove(small["root"] / small["weak"])
    assert f"{small['weak']} (not in the store)" in shown(inventory.print_why, small["root"], "labels")


def test_why_lists_candidates(small, tmp_path):
    with pytest.raises(UserError, match="could be any") as caught:
        shown(inventory.print_why, small["root"], "wea")
    assert small["weak"] in str(caught.value)
    assert small["other"] in str(caught.value)
    assert small["student"] not in str(caught.value)
    older = time.time() - 3600
    for file in (small["root"] / small["weak"]).rglob("*"):
        os.utime(file, (older, older))
    text = shown(inventory.print_why, small["root"], "weak")
    assert "2 stages are called weak; this is the newest. The others:" in text
    assert f"  {small['weak']}  tiny[/red], hh, lr=0.5" in text
    assert f"\n{small['other']} (finished)\n" in text
    with pytest.raises(UserError, match="begins with 'nope'") as caught:
        shown(inventory.print_why, small["root"], "nope")
    assert small["student"] in str(caught.value)
    with pytest.raises(UserError, match="it has none"):
        shown(inventory.print_why, tmp_path / "none", "x")


def test_prune(small):
    root = small["root"]
    gone = {small["other"], small["unfinished"] + ".part", small["broken"]}
    before = {row.folder.name: row.size for row in inventory.rows(root)}
    text = shown(lambda console: inventory.prune(root, {small["student"]}, False, console))
    assert set(before) == {row.folder.name for row in inventory.rows(root)}
    for name in gone:
        assert f"would remove {name}" in text
    assert text.count("would remove") == len(gone)
    quiet = Terminal(quiet=True)
    assert inventory.prune(root, {small["student"]}, True, quiet) == sum(before[name] for name in gone)
    assert {row.folder.name for row in inventory.rows(root)} == set(before) - gone
    assert (root / "notes.txt").exists()
    assert inventory.prune(root, {small["student"]}, True, quiet) == 0
    inventory.prune(root, set(), True, quiet)
    assert inventory.rows(root) == []


def test_prune_keeps_what_is_being_made_and_what_it_is_made_from(small):
    with Store(small["root"]).lock(small["unfinished"]):
        text = shown(lambda console: inventory.prune(small["root"], set(), True, console))
    left = {row.folder.name for row in inventory.rows(small["root"])}
    assert left == {small["unfinished"] + ".part", small["labels"], small["weak"]}
    assert f"kept {small['unfinished']}, which is being made" in text


def test_prune_survives_keys_that_name_each_other(tmp_path):
    a, b = f"a-{'0' * 16}", f"b-{'1' * 16}"
    for stage, key in ((a, {"x": b}), (b, {"x": a})):
        (tmp_path / f"{stage}.part").mkdir()
        write_json(tmp_path / f"{stage}.part" / "key.json", key)
    inventory.prune(tmp_path, {a}, True, Terminal(quiet=True))
    assert len(inventory.rows(tmp_path)) == 2  # no key is that of its folder's name, so they are somebody else's
