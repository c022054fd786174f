"""
Heartbeats, the monitor's side: hears every agent, and tells them when their sources may speak.

The kernel adds the sender's pid to each datagram (SO_PASSCRED), so a process cannot beat for
another one.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Self

from mesh.beats import GATE_OPEN, MAX_BEAT_BYTES, Beat, BeatSender, decode_beat

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from mesh.rundir import RunDir

__all__ = ["Beat", "BeatListener", "BeatSender"]

_CREDENTIALS = struct.Struct("iII")


class BeatListener:
    """
    The monitor's side.

    Args:
        rundir: The mesh's directory.
        heard: Called with each beat; says whether it was of use.
    """

    #: Beats read in one go before the loop gets a turn.
    _BUDGET = 256

    def __init__(self, rundir: RunDir, heard: Callable[[Beat], bool]) -> None:
        """Open nothing yet."""
        self._rundir = rundir
        self._path = rundir.socket("monitor")
        self._heard = heard
        self._socket: socket.socket | None = None
        #: Datagrams that were no beats, or came in somebody else's name.
        self.rejected = 0

    async def __aenter__(self) -> Self:
        """Bind and listen. Whoever calls holds the monitor's lock."""
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self._path))
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the socket and remove it."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            self._path.unlink(missing_ok=True)

    def open_gate(self, name: str) -> None:
        """Tell an agent that its sources may speak; an absent one asks again with its next beat."""
        self.tell(name, GATE_OPEN)

    def tell(self, name: str, word: bytes) -> None:
        """Say a word to an agent, which may be absent."""
        if self._socket is None:
            return
        try:
            self._socket.sendto(word, str(self._rundir.socket(f"{name}.ctl")))
        except OSError:
            return

    def _read(self) -> None:
        assert self._socket is not None
        for _ in range(self._BUDGET):
            try:
                raw, extra, _, _ = self._socket.recvmsg(
                    MAX_BEAT_BYTES + 1, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except OSError:
                return
            beat = self._decode(raw, extra)
            if beat is None or not self._heard(beat):
                self.rejected += 1

    @staticmethod
    def _decode(raw: bytes, extra: list[tuple[int, int, bytes]]) -> Beat | None:
        beat = decode_beat(raw)
        if beat is None:
            return None
        return beat if _sender(extra) == beat.pid else None


def _sender(extra: list[tuple[int, int, bytes]]) -> int | None:
    """Give the pid the kernel vouches for."""
    for level, kind, content in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, _, _ = _CREDENTIALS.unpack_from(content)
            return int(pid)
    return None
