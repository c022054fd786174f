"""
Heartbeats, the agent's side: one datagram a second from the agent's own loop to the monitor.

They go over a Unix socket and not over the data fabric, or a dead forwarder would look like a dead
fleet. The monitor's side is `mesh.supervision.beats`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import TYPE_CHECKING, Any, Self

import msgspec

from mesh.replicas import Roster

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from mesh.rundir import RunDir

MAX_BEAT_BYTES = 4096
#: What the monitor answers when sources may speak.
GATE_OPEN = b"\x81\xa4gate\xa4open"
#: What it says when the journal has something for an agent that another one held.
LOOK = b"\x81\xa7journal\xa4look"
_pack = msgspec.msgpack.Encoder().encode


class _RosterWord(msgspec.Struct, frozen=True):
    """The monitor says who shares a group's live events."""

    roster: Roster


def roster_word(roster: Roster) -> bytes:
    """Give the word in which the monitor says a roster."""
    return _pack(_RosterWord(roster))


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent is doing."""

    name: str
    pid: int
    seq: int
    #: starting, ready, draining or stopped.
    state: str
    #: CLOCK_MONOTONIC of the sender; the same clock in all processes of a host.
    mono_s: float
    lag_ms: float = 0.0
    inflight: int = 0
    oldest_ms: float = 0.0
    handler: str | None = None
    queue: int = 0
    handled: int = 0
    failed: int = 0
    lost: int = 0
    dropped: int = 0
    #: Only a restart helps: a cancelled handler does not end, or nothing is heard any more.
    needs_restart: bool = False
    sources: str = "none"
    #: The version of the roster it acts on.
    roster: int = 0

    def facts(self) -> dict[str, Any]:
        """Give the beat as the payload of an AGENT_HEARTBEAT event."""
        facts: dict[str, Any] = msgspec.to_builtins(self)
        return facts


_unpack = msgspec.msgpack.Decoder(Beat).decode
_unpack_roster = msgspec.msgpack.Decoder(_RosterWord).decode


def decode_beat(raw: bytes) -> Beat | None:
    """Read a datagram; None when it is no beat."""
    if len(raw) > MAX_BEAT_BYTES:
        return None
    try:
        return _unpack(raw)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None


class BeatSender:
    """
    The agent's side: sends beats, never waits, and hears the monitor's word.

    Args:
        rundir: The mesh's directory.
        name: The agent's name.
    """

    def __init__(self, rundir: RunDir, name: str) -> None:
        """Open nothing yet."""
        self._name = name
        self._monitor = str(rundir.socket("monitor"))
        self._own = rundir.socket(f"{name}.ctl")
        self._socket: socket.socket | None = None
        self._sequence = 0
        #: Beats that nobody took: no monitor, or one that does not read.
        self.unsent = 0
        #: Datagrams that were no word of the monitor's.
        self.rejected = 0
        #: Set when the monitor says that all agents are READY.
        self.gate_open = asyncio.Event()
        #: Called when the monitor says that the journal has something.
        self.on_look: Callable[[], None] | None = None
        #: Called when it says who shares the live events of this agent's group.
        self.on_roster: Callable[[Roster], None] | None = None

    async def __aenter__(self) -> Self:
        """Bind the agent's own socket and listen on it."""
        self.open()
        assert self._socket is not None
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
        self.close()

    def open(self) -> None:
        """Bind without a loop, for processes that have none (the forwarder)."""
        self._own.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.bind(str(self._own))

    def close(self) -> None:
        """Close the socket and remove it; can be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._own.unlink(missing_ok=True)

    def make(self, *, state: str, **facts: Any) -> Beat:
        """Make the next beat."""
        self._sequence += 1
        return Beat(
            name=self._name,
            pid=os.getpid(),
            seq=self._sequence,
            state=state,
            mono_s=time.monotonic(),
            **facts,
        )

    def send(self, beat: Beat) -> None:
        """Send, or count the beat as unsent: a beat is never worth waiting for."""
        if self._socket is None:
            return
        try:
            self._socket.sendto(_pack(beat), self._monitor)
        except OSError:
            self.unsent += 1

    def _read(self) -> None:
        assert self._socket is not None
        try:
            word = self._socket.recv(MAX_BEAT_BYTES)
        except OSError:
            return
        if word == GATE_OPEN:
            self.gate_open.set()
        elif word == LOOK:
            if self.on_look is not None:
                self.on_look()
        else:
            self._read_roster(word)

    def _read_roster(self, word: bytes) -> None:
        try:
            roster = _unpack_roster(word).roster
        except (msgspec.MsgspecError, RecursionError, ValueError):
            self.rejected += 1
            return
        if self.on_roster is not None:
            self.on_roster(roster)
