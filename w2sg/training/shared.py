"""Whether the ranks of a run, on whatever machines, see one and the same store."""

from __future__ import annotations

import secrets
from pathlib import Path
from socket import gethostname

from w2sg.errors import UserError
from w2sg.store import files
from w2sg.store.store import Store
from w2sg.training.devices import Devices

REMEDY = "set `store=` to a folder on a file system that all machines share"


def check_shared(store: Store, devices: Devices) -> None:
    """Let every rank look for a file that rank 0 has just written. A store that cannot be written is not checked.

    Raises:
        UserError: one does not see it: the store is on a disk of one machine.
    """
    if devices.world == 1 or devices.imagined:
        return
    name = devices.first(lambda: _leave_token(store))
    if name is None:
        return
    file = store.root / ".locks" / name
    there = devices.everyone((gethostname(), str(store.root), files.seen(file)))
    devices.first(lambda: _compare(there, file))


def _leave_token(store: Store) -> str | None:
    name = f"{secrets.token_hex(8)}.seen"
    try:
        (store.root / ".locks").mkdir(parents=True, exist_ok=True)
        (store.root / ".locks" / name).touch()
    except OSError:
        return None
    return name


def _compare(there: list[tuple[str, str, bool]], token: Path) -> None:
    token.unlink(missing_ok=True)
    apart = dict.fromkeys(f"{root} on {host}" for host, root, found in there if not found)
    if apart:
        host, root, _ = there[0]
        raise UserError(f"store: what is written to {root} on {host} is not seen in {', '.join(apart)}; {REMEDY}")


def see(path: Path, devices: Devices) -> None:
    """Wait until this rank's machine sees what rank 0 has made on its own.

    Raises:
        UserError: it does not.
    """
    if not devices.main and not files.seen(path):
        raise UserError(
            f"store: {path}, made on another machine, is not seen on {gethostname()} after {files.SEEN:g} seconds; "
            f"{REMEDY}"
        )
