"""
Live delivery between the processes of one host, over ZeroMQ, with nothing to install.

All processes of a mesh connect to one forwarder (`mesh.brokers.forwarder`)::

    publisher XPUB --> XSUB forwarder XPUB --> SUB consumer

One ZeroMQ message is one part: ``topic 0x00 frame``. The delimiter makes a subscription exact.

The sockets' file descriptors are watched on the loop and drained with NOBLOCK in batches:
`zmq.asyncio` costs eight times as much an event (docs/architecture.md, "Figures").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import sys
from typing import TYPE_CHECKING, ClassVar

import zmq

from mesh.broker import PUBLISH_TIMEOUT_S, MessageBroker
from mesh.codec import MAX_FRAME_BYTES
from mesh.env import is_supervised, mesh_dir
from mesh.errors import BrokerUnavailableError
from mesh.rundir import RunDir
from mesh.topics import (
    DELIMITER,
    MAX_TOPIC_LENGTH,
    PRIVATE_PREFIX,
    REPLAY_PREFIX,
    check_topic,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Collection
    from pathlib import Path

    from mesh.broker import Receiver
    from mesh.journal import Journal
    from mesh.journals.database import Synchronous

_log = logging.getLogger(__name__)

#: What a monitor socket tells: the handshake is done, or the connection is gone (a forwarder that
#: died, or was silent for HEARTBEAT_TIMEOUT).
_UP, _DOWN = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED
#: High-water mark in frames, on each leg. A frame holds 1 to 512 events (or 64 KiB of them).
HIGH_WATER_FRAMES = 2000
#: Frames taken from the socket in one go before the loop gets a turn.
_DRAIN_BUDGET = 32
_PROBE = "_probe."
#: How soon an echo is looked for by hand.
_LOOK_S = 0.02


class ZeroMQMessageBroker(MessageBroker):
    """
    A fabric of ZeroMQ sockets in a run directory.

    While the forwarder is away, frames wait in the socket as far as its high-water mark; who must
    know asks `is_away`. Connections come back by themselves, with all subscriptions.

    Args:
        directory: The mesh's run directory; default MESH_DIR.
        connect_timeout_s: How long `connect` waits for the fabric.
        synchronous: NORMAL or FULL, for the journal's file.
        journal: The journal's name within the directory; default MESH_JOURNAL.
        publish_timeout_s: How long the journal waits for a full disk.
    """

    fabric: ClassVar[str] = "zmq"

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        connect_timeout_s: float = 15.0,
        synchronous: Synchronous = "NORMAL",
        journal: str | None = None,
        publish_timeout_s: float = PUBLISH_TIMEOUT_S,
    ) -> None:
        """Begin unconnected."""
        super().__init__()
        self._rundir = RunDir(directory or mesh_dir())
        self._connect_timeout_s = connect_timeout_s
        self._synchronous = synchronous
        self._journal_name = journal
        self._publish_timeout_s = publish_timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._receivers: dict[bytes, tuple[Receiver, ...]] = {}
        self._names: dict[bytes, str] = {}
        self._probes: dict[bytes, _Probe] = {}
        self._paused = False
        self._drain_soon = False
        #: Whether the publisher's connection stands.
        self._is_up = False

    # -- life ----------------------------------------------------------------------------------

    async def connect(self) -> None:
        """
        Join the mesh of the run directory; start a forwarder when none lives there.

        Raises:
            BrokerUnavailableError: No echo came back from the forwarder in time.
            RunDirError: The run directory cannot be used.
        """
        self._require_open(connected=True)
        if self._context is not None:
            return
        self._rundir.ensure()
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 16)
        self._publisher = self._socket(zmq.XPUB)
        # Publisher leg only: EAGAIN instead of a silent drop. On the forwarder's other leg the
        # same option would let one stopped subscriber stop the mesh.
        self._publisher.setsockopt(zmq.XPUB_NODROP, 1)
        self._subscriber = self._socket(zmq.SUB)
        self._news = self._publisher.get_monitor_socket(_UP | _DOWN)
        self._publisher.connect(f"ipc://{self._rundir.socket('in')}")
        self._subscriber.connect(f"ipc://{self._rundir.socket('out')}")
        # Asking for it takes a microsecond, and it is paused and resumed with every full inbox
        self._subscriber_fd = self._subscriber.fileno()
        self._loop.add_reader(self._subscriber_fd, self._drain)
        self._loop.add_reader(self._publisher.fileno(), self._read_subscriptions)
        self._loop.add_reader(self._news.fileno(), self._read_news)
        spawned: subprocess.Popen[bytes] | None = None
        if _is_alone(self._rundir):
            spawned = await asyncio.to_thread(_spawn_forwarder, self._rundir)
        try:
            await self._barrier(self._connect_timeout_s)
        except BrokerUnavailableError:
            await self.close()
            raise
        finally:
            if spawned is not None:
                _let_go(spawned)

    def make_journal(self) -> Journal:
        """Give the journal of the run directory: one SQLite file."""
        from mesh.journals.sqlite import SQLiteJournal

        return SQLiteJournal(
            self._rundir.ensure().journal(self._journal_name),
            synchronous=self._synchronous,
            full_s=self._publish_timeout_s,
        )

    async def awaits_replay(self, group: str) -> bool:
        """Look for the mark of a replay: agents that need no SQLite do not open it to ask."""
        return self._rundir.replayed(group, self._journal_name).exists()

    def _tell_readers(self, topics: Collection[str]) -> None:
        for topic in topics:
            if topic.startswith(REPLAY_PREFIX):
                group = topic.removeprefix(REPLAY_PREFIX)
                with contextlib.suppress(OSError):
                    self._rundir.replayed(group, self._journal_name).touch(mode=0o600)
        super()._tell_readers(topics)

    async def _close(self) -> None:
        await self._close_channels()
        if self._context is None:
            return
        self._is_up = False
        for each in (self._subscriber, self._publisher, self._news):
            self._loop.remove_reader(each.fileno())
        self._subscriber.close(linger=0)
        self._publisher.disable_monitor()
        self._news.close(linger=0)
        # What was accepted shall leave, but a dead forwarder must not hold us up
        self._publisher.close(linger=1000)
        context, self._context = self._context, None
        await asyncio.to_thread(context.term)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        assert self._context is not None
        made = self._context.socket(kind)
        made.setsockopt(zmq.SNDHWM, HIGH_WATER_FRAMES)
        made.setsockopt(zmq.RCVHWM, HIGH_WATER_FRAMES)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + MAX_TOPIC_LENGTH + 1)
        made.setsockopt(zmq.RECONNECT_IVL, 50)
        made.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        # Without these a frozen forwarder raises no event at all
        made.setsockopt(zmq.HEARTBEAT_IVL, 500)
        made.setsockopt(zmq.HEARTBEAT_TIMEOUT, 1500)
        return made

    # -- readiness -----------------------------------------------------------------------------

    async def synchronize(self) -> None:
        """Return when our publisher knows every subscription that the forwarder knows by now."""
        # Subscriptions reach us in the order in which the forwarder got them: when one of our own,
        # made now, comes by, all earlier ones have come
        await self._barrier(self._connect_timeout_s)

    async def _barrier(self, timeout_s: float) -> None:
        """
        Return when an echo of our own came back through the forwarder.

        Subscriptions travel in order on each connection, and the echo is subscribed to last: when
        it returns, every earlier subscription is in force, and our publisher knows those of others.
        """
        self._require_open(connected=self._context is not None)
        probe = _Probe(f"{_PROBE}{secrets.token_hex(6)}".encode() + DELIMITER)
        self._probes[probe.topic] = probe
        self._subscriber.setsockopt(zmq.SUBSCRIBE, probe.topic)
        try:
            async with asyncio.timeout(timeout_s):
                self._check_events()
                while not probe.returned.is_set():
                    await self._await_echo(probe)
            # The connection stood before the echo could come back on the other one
            self._read_news()
        except TimeoutError:
            raise BrokerUnavailableError(
                f"no echo from the forwarder in {self._rundir.path} for {timeout_s:g} s;"
                " `mesh doctor` says what holds it up"
            ) from None
        finally:
            del self._probes[probe.topic]
            if self._context is not None:
                self._subscriber.setsockopt(zmq.UNSUBSCRIBE, probe.topic)
                self._check_events()

    async def _await_echo(self, probe: _Probe) -> None:
        while not probe.subscribed.is_set():
            # An event that leaves at the wrong moment eats the edge that tells of a subscription
            self._read_subscriptions()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await probe.subscribed.wait()
        try:
            self._publisher.send(probe.topic, zmq.NOBLOCK)
        except zmq.Again:
            await self.wait_sendable()
            return
        try:
            # Sent again only when a forwarder died with it: then it is subscribed to anew
            async with asyncio.timeout(0.5):
                await probe.returned.wait()
        except TimeoutError:
            return

    def _read_subscriptions(self) -> None:
        while self._context is not None:
            try:
                message = self._publisher.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if message[:1] == b"\x01":
                probe = self._probes.get(message[1:])
                if probe is not None:
                    probe.subscribed.set()
            elif message[:1] != b"\x00":
                _log.warning("ignored %d bytes that are no subscription", len(message))

    def _read_news(self) -> None:
        """Take in whether the publisher's connection came or went."""
        while self._context is not None:
            try:
                head, _ = self._news.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._is_up = int.from_bytes(head[:2], sys.byteorder) == _UP

    @property
    def is_connected(self) -> bool:
        """Say whether `connect` was called; whether the forwarder lives is another question."""
        return self._context is not None

    # -- receiving -----------------------------------------------------------------------------

    async def attach(self, topics: Collection[str], receiver: Receiver) -> None:
        """Subscribe; returns when the subscription is in force at the forwarder."""
        self._require_open(connected=self._context is not None)
        added = False
        for topic in topics:
            key = check_topic(topic).encode() + DELIMITER
            known = self._receivers.get(key, ())
            if receiver in known:
                continue
            self._receivers[key] = (*known, receiver)
            self._names[key] = str(topic)
            if not known:
                self._subscriber.setsockopt(zmq.SUBSCRIBE, key)
                added = True
        if added:
            await self._barrier(self._connect_timeout_s)

    async def detach(self, receiver: Receiver) -> None:
        """Unsubscribe from topics that nobody else in this process wants."""
        for key, known in list(self._receivers.items()):
            left = tuple(each for each in known if each is not receiver)
            if left:
                self._receivers[key] = left
            else:
                del self._receivers[key], self._names[key]
                if self._context is not None:
                    self._subscriber.setsockopt(zmq.UNSUBSCRIBE, key)
                    self._check_events()
        self.resume(receiver)

    def resume(self, receiver: Receiver) -> None:
        """Read on."""
        if self._paused and self._context is not None:
            self._paused = False
            self._loop.add_reader(self._subscriber_fd, self._drain)
            self._drain_later()

    def _drain_later(self) -> None:
        if not self._drain_soon:
            self._drain_soon = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Take what the socket holds; stop when somebody is full, and leave the rest to ZeroMQ."""
        self._drain_soon = False
        if self._context is None or self._paused:
            return
        receive = self._subscriber.recv
        for _ in range(_DRAIN_BUDGET):
            try:
                message = receive(zmq.NOBLOCK)
            except zmq.Again:
                return
            if not self._deliver(message):
                # The descriptor tells of edges only: without a reader nothing spins meanwhile
                self._paused = True
                self._loop.remove_reader(self._subscriber_fd)
                return
        self._drain_later()

    def _deliver(self, message: bytes) -> bool:
        """Hand one message out; False when a receiver has had enough."""
        cut = message.find(DELIMITER, 0, MAX_TOPIC_LENGTH + 1) + 1
        key = message[:cut]
        receivers = self._receivers.get(key)
        if receivers is None:
            probe = self._probes.get(key)
            if probe is not None:
                probe.returned.set()
            return True
        name = self._names[key]
        frame = message[cut:]
        room = True
        for receiver in receivers:
            receiver.receive(name, frame)
            room = receiver.has_room() and room
        return room

    def _check_events(self) -> None:
        """Look once by hand: the descriptors are edge-triggered and a socket call eats the edge."""
        self._drain_later()
        self._loop.call_soon(self._read_subscriptions)

    # -- sending -------------------------------------------------------------------------------

    def try_send(self, topic: str, frame: bytes) -> bool:
        """Queue a frame for the forwarder, unless the high-water mark is reached."""
        if self._context is None:
            self._require_open(connected=False)
        if topic.startswith(PRIVATE_PREFIX):
            # The asker's subscription may have come in this very moment; a plain send looks for
            # news only now and then
            self._read_subscriptions()
        try:
            self._publisher.send(topic.encode() + DELIMITER + frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    async def wait_sendable(self) -> None:
        """Wait a moment: XPUB always claims to be writable, so nothing could wake us."""
        await asyncio.sleep(0.002)

    @property
    def is_away(self) -> bool:
        """Say whether the forwarder is gone, or was silent for HEARTBEAT_TIMEOUT."""
        return self._context is not None and not self._is_up

    def trouble(self) -> str:
        """Say that the forwarder is away, when it is."""
        return "" if not self.is_away else f"the forwarder in {self._rundir.path} is away"


class _Probe:
    """An echo under way."""

    def __init__(self, topic: bytes) -> None:
        self.topic = topic
        self.subscribed = asyncio.Event()
        self.returned = asyncio.Event()


def _is_alone(rundir: RunDir) -> bool:
    """
    Say whether nobody forwards here, nor will.

    Where supervisord keeps the forwarder, one that is not there yet (or was killed) comes by
    itself; a second one would only take its place.
    """
    if is_supervised() or rundir.holder(rundir.lock("forwarder")) is not None:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        return door.connect_ex(str(rundir.socket("supervisor"))) != 0


def _spawn_forwarder(rundir: RunDir) -> subprocess.Popen[bytes]:
    """Start a forwarder that leaves by itself when nobody is connected any more."""
    import subprocess

    command = [sys.executable, "-m", "mesh.brokers.forwarder", "--adhoc", str(rundir.path)]
    return subprocess.Popen(  # noqa: S603 - our own module, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """It outlives us on purpose; keep the interpreter from warning about it."""
    process.returncode = 0
