"""
The one process through which all ZeroMQ traffic of a mesh passes: XSUB in, XPUB out.

Run by supervisord (``python -m mesh.brokers.forwarder``), or ad hoc by the first process that
connects where no mesh runs; an ad-hoc forwarder leaves when its last peer has gone.

It looks at the envelope only - topic grammar, first byte, header - and drops what cannot be an
event, counted by reason in its ledger. It never decodes. A plain poll loop without asyncio: one
wake-up costs a few microseconds of the two hundred that a hop takes.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import struct
import sys
import time
from typing import TYPE_CHECKING

import zmq

from mesh import process
from mesh.beats import BeatSender
from mesh.brokers.zeromq import HIGH_WATER_FRAMES
from mesh.codec import MAX_FRAME_BYTES, is_frame
from mesh.env import is_supervised, mesh_dir
from mesh.errors import EXIT_CONFIGURATION, EXIT_LOCKED, AlreadyRunningError, ConfigurationError
from mesh.ledger import STATES, Ledger
from mesh.logs import set_up_logging
from mesh.rundir import RunDir
from mesh.topics import DELIMITER, MAX_TOPIC_LENGTH, is_topic

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("mesh.forwarder")

#: Frames taken from one side before the other gets its turn.
_BUDGET = 256
_BEAT_S = 1.0
#: An ad-hoc forwarder leaves when nobody was connected for so long.
_LINGER_S = 2.0
_FIRST_PEER_S = 15.0
_MAX_KNOWN_TOPICS = 10_000
#: What the mesh says of itself need not be heard by anybody.
_OWN_TOPICS = (b"agent.", b"system.")


class Forwarder:
    """
    Forward frames from publishers to subscribers, and subscriptions the other way.

    Args:
        rundir: Where the sockets are bound.
        ledger: Where frames and drops are counted.
        adhoc: Leave when the last peer has gone.
        beat: Called about once a second.
    """

    def __init__(
        self, rundir: RunDir, ledger: Ledger, *, adhoc: bool, beat: Callable[[], None]
    ) -> None:
        """Bind both sockets."""
        self._ledger = ledger
        self._beat = beat
        self._adhoc = adhoc
        self._stopping = False
        self._peers = 0
        self._lonely_since = time.monotonic() + _FIRST_PEER_S - _LINGER_S
        self._topics: set[bytes] = set()
        self._heard: set[bytes] = set()
        self._said_unheard: set[bytes] = set()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 64)
        self._in = self._socket(zmq.XSUB)
        self._out = self._socket(zmq.XPUB)
        self._poller = zmq.Poller()
        self._monitors = [self._watch(self._in), self._watch(self._out)] if adhoc else []
        # Subscribers first: publishers must find the subscriptions when they come
        self._out.bind(f"ipc://{rundir.socket('out')}")
        self._in.bind(f"ipc://{rundir.socket('in')}")
        for socket in (self._in, self._out, *self._monitors):
            self._poller.register(socket, zmq.POLLIN)
        self._wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        self._poller.register(self._wake, zmq.POLLIN)

    def run(self) -> None:
        """Forward until `stop` is called or, ad hoc, until nobody is left."""
        next_beat = 0.0
        while not self._stopping:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + _BEAT_S
                self._beat()
                if self._is_lonely(now):
                    break
            for socket, _ in self._poller.poll(max(1, int((next_beat - now) * 1000))):
                self._serve(socket)
        self._drain()

    def stop(self) -> None:
        """Make `run` return after what has arrived is forwarded."""
        self._stopping = True

    def close(self) -> None:
        """Close the sockets; what is queued for subscribers still leaves."""
        if self._monitors:
            # Or whoever leaves later would be told of to a socket that nobody reads, for ever
            self._in.disable_monitor()
            self._out.disable_monitor()
        for socket in (*self._monitors, self._in):
            socket.close(linger=0)
        self._out.close(linger=500)
        self._context.term()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_FRAMES)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_FRAMES)
        socket.setsockopt(zmq.LINGER, 0)
        # A peer that sends more is cut off by the socket itself
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + MAX_TOPIC_LENGTH + 1)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 500)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 1500)
        return socket

    @staticmethod
    def _watch(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
        return socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)

    def _serve(self, socket: object) -> None:
        if socket is self._in:
            self._forward_frames()
        elif socket is self._out:
            self._forward_subscriptions()
        elif socket == self._wake:
            os.read(self._wake, 4096)
        else:
            self._count_peer(next(each for each in self._monitors if each is socket))

    def _forward_frames(self) -> None:
        receive, send, topics = self._in.recv, self._out.send, self._topics
        for _ in range(_BUDGET):
            try:
                message = receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            cut = message.find(DELIMITER, 0, MAX_TOPIC_LENGTH + 1)
            topic = message[:cut]
            if topic not in topics and not self._learn(topic, cut):
                continue
            if topic[:1] != b"_":
                if not is_frame(message[cut + 1 :]):
                    self._ledger.count("malformed_frame")
                    continue
                if topic not in self._heard:
                    self._say_unheard(topic)
                    continue
            # First counted: what somebody has got is in the account
            self._ledger.count("frames")
            send(message)

    def _learn(self, topic: bytes, cut: int) -> bool:
        """Check a topic seen for the first time."""
        if cut < 0 or not is_topic(topic):
            self._ledger.count("malformed_topic")
            return False
        if topic[:1] != b"_" and len(self._topics) < _MAX_KNOWN_TOPICS:
            self._topics.add(topic)
        return True

    def _say_unheard(self, topic: bytes) -> None:
        if topic.startswith(_OWN_TOPICS):
            self._ledger.count("unheard_own")
            return
        self._ledger.count("unheard_frames")
        if topic not in self._said_unheard and len(self._said_unheard) < _MAX_KNOWN_TOPICS:
            self._said_unheard.add(topic)
            _log.warning("events of type %s are said but heard by nobody", topic.decode())

    def _forward_subscriptions(self) -> None:
        for _ in range(_BUDGET):
            try:
                message = self._out.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            mark, key = message[:1], message[1:]
            if mark not in (b"\x00", b"\x01") or len(key) > MAX_TOPIC_LENGTH + 1:
                self._ledger.count("malformed_subscription")
                continue
            if not self._is_subscription(key):
                self._ledger.count("malformed_subscription")
                continue
            self._ledger.count("subscriptions")
            heard = self._heard.add if mark == b"\x01" else self._heard.discard
            heard(key[:-1])
            self._in.send(message)

    @staticmethod
    def _is_subscription(key: bytes) -> bool:
        return key[-1:] == DELIMITER and is_topic(key[:-1])

    def _count_peer(self, monitor: zmq.Socket[bytes]) -> None:
        head: bytes = monitor.recv()
        while monitor.get(zmq.RCVMORE):
            monitor.recv()
        (event,) = struct.unpack_from("H", head)
        self._peers += 1 if event == zmq.EVENT_ACCEPTED else -1
        self._lonely_since = time.monotonic()

    def _is_lonely(self, now: float) -> bool:
        return self._adhoc and self._peers <= 0 and now - self._lonely_since > _LINGER_S

    def _drain(self) -> None:
        while int(self._in.get(zmq.EVENTS)) & zmq.POLLIN:
            self._forward_frames()


def main(argv: list[str] | None = None) -> int:
    """Run a forwarder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mesh.brokers.forwarder", description=__doc__)
    parser.add_argument("--adhoc", metavar="DIR", help="serve DIR and leave with the last peer")
    options = parser.parse_args(argv)
    rundir = RunDir(options.adhoc or mesh_dir())
    try:
        rundir.ensure()
        note = "adhoc" if options.adhoc else process.SUPERVISED if is_supervised() else ""
        lock = rundir.acquire(rundir.lock("forwarder"), note=note)
    except ConfigurationError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before there is a log
        return EXIT_CONFIGURATION
    except AlreadyRunningError as error:
        print(f"forwarder in {rundir.path}: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_LOCKED
    with lock:
        return _serve(rundir, adhoc=options.adhoc is not None)


def _serve(rundir: RunDir, *, adhoc: bool) -> int:
    process.prepare(rundir, "forwarder", parent_bound=is_supervised())
    close_log = set_up_logging("forwarder", rundir.log("forwarder"))
    ledger = Ledger.open(rundir.ledger("forwarder"))
    beats = BeatSender(rundir, "forwarder")
    beats.open()

    def beat() -> None:
        ledger.set("beat_mono_ms", int(time.monotonic() * 1000))
        beats.send(beats.make(state="ready"))

    forwarder = Forwarder(rundir, ledger, adhoc=adhoc, beat=beat)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: forwarder.stop())
    ledger.set("ready_at_us", time.time_ns() // 1000)
    ledger.set("state", STATES.index("ready"))
    _log.info("forwarding in %s%s", rundir.path, " (ad hoc)" if adhoc else "")
    try:
        forwarder.run()
    finally:
        forwarder.close()
        beats.close()
        ledger.set("state", STATES.index("stopped"))
        close_log()
        process.drop_empty_stacks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
