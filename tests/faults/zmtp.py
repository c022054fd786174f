"""
A bare ZMTP 3.0 peer over a Unix socket (rfc.zeromq.org/spec/23).

A libzmq PUB socket sends nothing that nobody subscribed to, and nothing that is no message; this
one sends whatever it is given, and says which bytes it wants to be taken for what.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_MORE, _LONG, _COMMAND = 1, 2, 4
_PATIENCE_S = 20.0
_LENGTH = struct.Struct(">Q")


def ready_command(socket_type: bytes) -> bytes:
    """Give the command that ends the handshake."""
    name = b"Socket-Type"
    body = b"\x05READY" + bytes([len(name)]) + name + struct.pack(">I", len(socket_type))
    return _frame(body + socket_type, _COMMAND)


def message(*parts: bytes) -> bytes:
    """Give the bytes of a message on the wire."""
    return b"".join(
        _frame(part, _MORE if number < len(parts) else 0) for number, part in enumerate(parts, 1)
    )


def _frame(body: bytes, flags: int) -> bytes:
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | _LONG]) + _LENGTH.pack(len(body)) + body


class Peer:
    """
    One connection; use it as an async context.

    Args:
        path: A socket that somebody has bound.
        socket_type: What we say we are: ``PUB``, ``XSUB``, ...
    """

    def __init__(self, path: Path, socket_type: str) -> None:
        self._path = path
        self._type = socket_type.encode()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._unread = bytearray()
        # A PONG must not come in between the bytes of a message
        self._sending = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, str(self._path))
        await loop.sock_sendall(self._socket, GREETING + ready_command(self._type))
        while len(self._unread) < len(GREETING):
            await self._receive()
        del self._unread[: len(GREETING)]
        self._reader = asyncio.create_task(self._read(), name="zmtp-reader")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._socket.close()

    async def send(self, messages: Iterable[bytes]) -> None:
        """
        Send messages, as `message` made them.

        Raises:
            TimeoutError: The other side does not take them.
            ConnectionError: It has hung up.
        """
        async with asyncio.timeout(_PATIENCE_S), self._sending:
            await asyncio.get_running_loop().sock_sendall(self._socket, b"".join(messages))

    async def closed(self) -> None:
        """Return when the other side has hung up."""
        assert self._reader is not None
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        """Throw away what comes, but answer PINGs: who is silent is cut off."""
        while True:
            await self._receive()
            while (found := self._take()) is not None:
                flags, body = found
                if flags & _COMMAND and body[:5] == b"\x04PING":
                    await self.send([_frame(b"\x04PONG" + body[7:], _COMMAND)])

    async def _receive(self) -> None:
        chunk = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
        if not chunk:
            raise ConnectionError(f"{self._path} hung up")
        self._unread += chunk

    def _take(self) -> tuple[int, bytes] | None:
        unread = self._unread
        if len(unread) < 2:
            return None
        flags, start, length = unread[0], 2, unread[1]
        if flags & _LONG:
            if len(unread) < 9:
                return None
            start, length = 9, _LENGTH.unpack_from(unread, 1)[0]
        if len(unread) < start + length:
            return None
        body = bytes(unread[start : start + length])
        del unread[: start + length]
        return flags, body
