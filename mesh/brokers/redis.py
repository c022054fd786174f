"""
Live delivery over Redis pub/sub, for meshes on more than one machine.

A topic is the channel ``legion:MESH:live:TOPIC``, a message is one frame (docs/wire.md). Two
connections a process and server: one publishes, one hears, so that a consumer that reads nothing
for a while does not hold up its own publishing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from mesh.broker import PUBLISH_TIMEOUT_S, MessageBroker
from mesh.env import DEFAULT_JOURNAL, journal_name
from mesh.errors import BrokerUnavailableError
from mesh.journals.redis_keys import Keys
from mesh.logs import Sparing
from mesh.redis_link.access import PORT
from mesh.redis_link.kept import SILENT_S
from mesh.redis_link.node import Terms
from mesh.redis_link.nodes import ClusterNodes
from mesh.redis_link.place import Where, place_of
from mesh.redis_link.resp import ReplyError
from mesh.topics import check_topic, replay_topic

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from mesh.broker import Receiver
    from mesh.journal import Journal
    from mesh.redis_link.node import Node
    from mesh.redis_link.nodes import Nodes

_SYNCHRONIZE_S = 15.0

_log = logging.getLogger(__name__)


class RedisMessageBroker(MessageBroker):
    """
    A fabric of Redis channels.

    While Redis is away nothing is accepted (`try_send` gives False), and what was on its way shows
    as a gap at those who hear; connections come back by themselves, with all subscriptions.

    Args:
        host: The server, or a node of the cluster.
        port: Its port.
        url: ``redis://``, ``rediss://`` or ``unix://``, instead of host, port and the next three.
        username: An ACL user.
        password: The user's, or that of ``requirepass``; wins over the URL's.
        db: Selected, though channels are the same in all databases.
        unix_socket_path: A socket instead of host and port.
        tls: Speak TLS and check the server's certificate.
        tls_ca: A file with the authority to trust; default: the system's.
        tls_cert: Our own certificate, where the server asks for one.
        tls_key: Its key, where it is in a file of its own.
        cluster: The server belongs to a Redis Cluster: use sharded channels.
        sentinels: Ask these for the master, instead of host and port.
        sentinel_service: The name under which they watch it.
        sentinel_password: That of the sentinels themselves.
        mesh: The mesh's name; several can share a server.
        client_name: How the connections show in CLIENT LIST.
        connect_timeout_s: How long `connect` and `attach` wait; ``math.inf``: for ever.
        silent_s: After so long without a sign of life a connection counts as lost.
        allow_volatile: Let the journal use a Redis that may forget.
        journal: Another journal of this mesh than the environment's, by name.
        publish_timeout_s: How long the journal tries a call again while Redis takes nothing.

    Raises:
        ConfigurationError: The arguments contradict each other, or a file cannot be used.
    """

    fabric: ClassVar[str] = "redis"

    def __init__(
        self,
        host: str = "localhost",
        port: int = PORT,
        *,
        cluster: bool = False,
        mesh: str = "default",
        connect_timeout_s: float = 5.0,
        silent_s: float = SILENT_S,
        allow_volatile: bool = False,
        journal: str | None = None,
        publish_timeout_s: float = PUBLISH_TIMEOUT_S,
        **where: Unpack[Where],
    ) -> None:
        """Begin unconnected."""
        super().__init__()
        self._place = place_of(host, port, cluster=cluster, mesh=mesh, **where)
        name = journal or journal_name()
        self._journal_mesh = mesh if name == DEFAULT_JOURNAL else f"{mesh}.{name}"
        options = {
            **where,
            "host": host,
            "port": port,
            "cluster": cluster,
            "mesh": self._journal_mesh,
            "connect_timeout_s": connect_timeout_s,
            "silent_s": silent_s,
            "retry_s": publish_timeout_s,
            "allow_volatile": allow_volatile,
        }
        # Not among the attributes, where whoever prints them would print the password
        self._journal_options: Callable[[], dict[str, Any]] = lambda: options
        self._cluster = cluster
        self._prefix = f"legion:{mesh}:live:"
        self._connect_timeout_s = connect_timeout_s
        self._silent_s = silent_s
        self._nodes: Nodes | None = None
        self._heard: dict[bytes, tuple[str, tuple[Receiver, ...]]] = {}
        self._routes: dict[str, tuple[Node, bytes]] = {}
        self._changed: asyncio.Future[None] | None = None

    # -- life ----------------------------------------------------------------------------------

    async def connect(self) -> None:
        """
        Connect and log in; try out the rights that are needed.

        Raises:
            AccessDeniedError: The server refuses us; says why.
            BrokerUnavailableError: It did not answer within `connect_timeout_s`; says what it met.
        """
        self._require_open(connected=True)
        if self._nodes is not None:
            return
        self._nodes = self._make_nodes()
        self._nodes.start()
        try:
            await self._within(self._nodes.wait_up(), self._connect_timeout_s)
        except BaseException:
            nodes, self._nodes = self._nodes, None
            await nodes.close()
            raise

    async def _close(self) -> None:
        await self._close_channels()
        self._routes.clear()
        self._heard.clear()
        if self._nodes is not None:
            await self._nodes.close()
            self._nodes = None
        self._wake()

    def _make_nodes(self) -> Nodes:
        terms = Terms(
            self._place.access,
            f"{self._prefix}_probe".encode(),
            self._deliver,
            self._wake,
            Sparing(logging.getLogger("mesh.redis")),
            sharded=self._cluster,
            must_lead=self._place.must_lead,
            silent_s=self._silent_s,
        )
        return self._place.nodes(terms, self._resend, self._routes.clear)

    @property
    def is_connected(self) -> bool:
        """Say whether `connect` was called; whether Redis answers just now is another question."""
        return self._nodes is not None

    def _joined(self) -> Nodes:
        self._require_open(connected=self._nodes is not None)
        assert self._nodes is not None
        return self._nodes

    async def _within(self, work: Any, limit_s: float) -> None:
        try:
            async with asyncio.timeout(None if limit_s == math.inf else limit_s):
                await work
        except TimeoutError:
            words = self.trouble() or f"redis at {self._place.address} does not answer"
            raise BrokerUnavailableError(f"{words} (waited {limit_s:g} s)") from None

    # -- hearing -------------------------------------------------------------------------------

    async def attach(self, topics: Collection[str], receiver: Receiver) -> None:
        """Subscribe; returns when Redis has confirmed it, which holds for all publishers."""
        nodes = self._joined()
        names = {self._channel(name): str(name) for name in map(check_topic, topics)}
        for channel, name in names.items():
            _, known = self._heard.get(channel, (name, ()))
            if receiver not in known:
                self._heard[channel] = (name, (*known, receiver))
        try:
            await self._within(nodes.hear(names), self._connect_timeout_s)
        except BaseException:
            await self._forget(receiver, names)
            raise

    async def detach(self, receiver: Receiver) -> None:
        """Unsubscribe from topics that nobody else in this process wants."""
        await self._forget(receiver, list(self._heard))
        self.resume(receiver)

    async def _forget(self, receiver: Receiver, channels: Collection[bytes]) -> None:
        deserted = []
        for channel in channels:
            name, known = self._heard.get(channel, ("", ()))
            left = tuple(each for each in known if each is not receiver)
            if left:
                self._heard[channel] = (name, left)
            elif known:
                del self._heard[channel]
                deserted.append(channel)
        if self._nodes is not None and deserted:
            self._nodes.unhear(deserted)

    def resume(self, receiver: Receiver) -> None:
        """Read on."""
        if self._nodes is not None:
            for node in self._nodes.all():
                node.resume()

    async def synchronize(self) -> None:
        """Return when our publishing connections answer: a confirmed subscription holds for all."""
        nodes = self._joined()

        async def ask() -> None:
            await nodes.wait_up()
            for node in nodes.all():
                while True:
                    connection = await node.publisher.wait_up()
                    with contextlib.suppress(ConnectionError):
                        await connection.call("PING")
                        break

        await self._within(ask(), max(_SYNCHRONIZE_S, self._connect_timeout_s))

    def _channel(self, topic: str) -> bytes:
        return f"{self._prefix}{topic}".encode()

    def _deliver(self, channel: bytes, payload: bytes) -> bool:
        """Hand one message out; False when a receiver has had enough."""
        heard = self._heard.get(channel)
        if heard is None:
            return True
        name, receivers = heard
        room = True
        for receiver in receivers:
            receiver.receive(name, payload)
            room = receiver.has_room() and room
        return room

    # -- sending -------------------------------------------------------------------------------

    def make_journal(self) -> Journal:
        """Give the journal of the same Redis: Streams."""
        from mesh.journals.redis import RedisJournal

        return RedisJournal(**self._journal_options())

    async def awaits_replay(self, group: str) -> bool:
        """Ask Redis whether the group was ever told to hear replays."""
        key = Keys(self._journal_mesh, cluster=self._cluster).topics_of(group)
        node = self._joined().owner(key)
        if node is None:
            return True
        try:
            connection = await node.publisher.wait_up()
            return bool(await connection.call("SISMEMBER", key, replay_topic(group)))
        except (ConnectionError, ReplyError) as error:
            # In doubt the journal is opened to see; not where we have no right to
            _log.warning("%s cannot ask for replayed dead letters: %s", group, error)
            return not str(error).startswith("NOPERM")

    def try_send(self, topic: str, frame: bytes) -> bool:
        """
        Send a frame, unless Redis is away, refuses events, or does not take them fast enough.

        Nothing is kept for a server that is away: who is told False knows that it did not leave.
        """
        route = self._routes.get(topic) or self._open_route(topic)
        if route is None or (self._cluster and self._is_moving()):
            return False
        return self._send(route, topic, frame)

    def _send(self, route: tuple[Node, bytes], topic: str, frame: bytes) -> bool:
        node, head = route
        connection = node.publisher.connection
        if connection is None or connection.is_full or node.is_refusing:
            return False
        # In a cluster a frame may come back, because its slot has moved
        token = (topic, frame) if self._cluster else None
        connection.send(b"%b%d\r\n%b\r\n" % (head, len(frame), frame), token)
        return True

    def _open_route(self, topic: str) -> tuple[Node, bytes] | None:
        nodes = self._joined()
        channel = self._channel(check_topic(topic))
        node = nodes.owner(channel)
        if node is None:
            return None
        verb = b"SPUBLISH" if self._cluster else b"PUBLISH"
        head = b"*3\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$" % (len(verb), verb, len(channel), channel)
        route = self._routes[topic] = (node, head)
        return route

    def _resend(self, token: tuple[str, bytes]) -> bool:
        route = self._routes.get(token[0]) or self._open_route(token[0])
        return route is not None and self._send(route, *token)

    def _is_moving(self) -> bool:
        return isinstance(self._nodes, ClusterNodes) and self._nodes.is_moving

    async def wait_sendable(self) -> None:
        """Return when something has changed: a connection came back, or took what it held."""
        self._joined()
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    def trouble(self) -> str:
        """Say why nothing can be sent, as far as it is known."""
        nodes = self._nodes.all() if self._nodes is not None else ()
        return "; ".join(sorted({str(node.trouble) for node in nodes if node.trouble is not None}))
