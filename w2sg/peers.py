"""Connections between the ranks of a run, by which each hears the signals of the others, and their end."""

from __future__ import annotations

import contextlib
import secrets
import socket

LEFT = 255  # sent by a rank that is about to end
SILENT = {
    "TCP_KEEPIDLE": 60,
    "TCP_KEEPINTVL": 15,
    "TCP_KEEPCNT": 8,
}  # a machine that is silent for three minutes is gone


class Peers:
    """A connection between the ranks of a run that needs no collective. One byte is one signal.

    Args:
        address: of rank 0.
        port, token: on which rank 0 listens, and what it expects; see `listen`.
    """

    def __init__(self, address: str, port: int, token: bytes):
        self.lines = [socket.create_connection((address, port), timeout=60)]
        _watch(self.lines[0])
        self.lines[0].sendall(token)
        self.left = False

    @classmethod
    def listen(cls) -> tuple[socket.socket, bytes]:
        """Open rank 0's socket, before the other ranks learn its address."""
        server = socket.create_server(("", 0))
        server.settimeout(60)
        return server, secrets.token_bytes(16)

    @classmethod
    def accept(cls, server: socket.socket, token: bytes, count: int) -> Peers:
        """Rank 0's side, once ``count`` other ranks have connected. Raises TimeoutError if one does not."""
        peers = cls.__new__(cls)
        peers.lines, peers.left = [], False
        with server:
            while len(peers.lines) < count:
                line, _ = server.accept()
                line.settimeout(60)
                _watch(line)
                if line.recv(len(token), socket.MSG_WAITALL) == token:
                    peers.lines.append(line)
        return peers

    def hear(self, line: socket.socket) -> list[int]:
        """Read signals from a connection and forward them. A closed connection means that a rank has left."""
        try:
            heard = list(line.recv(64))
        except OSError:
            heard = []
        if not heard:
            with contextlib.suppress(ValueError):  # `close` came first
                self.lines.remove(line)
            line.close()
            heard = [LEFT]
        for byte in heard:
            self.tell(byte, but=line)
        self.left = self.left or LEFT in heard
        return [byte for byte in heard if byte != LEFT]

    def tell(self, byte: int, but: socket.socket | None = None) -> None:
        for line in self.lines:
            if line is not but:
                with contextlib.suppress(OSError):
                    line.sendall(bytes([byte]))

    def close(self) -> None:
        for line in self.lines:
            line.close()
        self.lines = []


def _watch(line: socket.socket) -> None:
    """Let the kernel ask now and then whether the other machine still lives; a rank may wait for it for days."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SILENT.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
