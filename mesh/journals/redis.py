"""
Durable delivery over Redis Streams, for meshes on more than one machine.

Each partition of each topic is a stream, each group a consumer group of it. The parts:
`redis_members` (who owns streams), `redis_reader` (what is handed out), `redis_consumers` (what a
consumer holds), `redis_writer` and `redis_steps` (events and steps), `redis_scripts` (what happens
inside Redis, in one transaction), `redis_views` (groups, history, dead letters), `redis_forget`
(groups that are gone for good), `redis_store` (calls that are tried again), `redis_keys`,
`redis_entries`, `redis_clock` (names, contents, order).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, Unpack

from mesh.errors import ConfigurationError
from mesh.journal import ALL_DEAD, LEASE_S, DeadQuery, Delivery, Feature
from mesh.journals import redis_forget
from mesh.journals.local import LocalJournal
from mesh.journals.redis_consumers import Consumer
from mesh.journals.redis_entries import spot_of
from mesh.journals.redis_keys import Keys
from mesh.journals.redis_members import Members
from mesh.journals.redis_reader import Reader
from mesh.journals.redis_store import Store
from mesh.journals.redis_views import Views
from mesh.journals.redis_writer import Writer
from mesh.redis_link.access import PORT
from mesh.redis_link.kept import SILENT_S
from mesh.redis_link.place import Where, place_of

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence, Set

    from mesh.deadletters import DeadLetter
    from mesh.journal import DeadCount, GroupView, Record, Size, Step, Stored

Value = TypeVar("Value")

#: Ids that are remembered at least; at most twice as many, of some 80 bytes each.
REMEMBERED_IDS = 200_000
MAX_QUEUED_BYTES = 32 * 1024 * 1024
# Consumers that leave at the end may take so long
_LEAVE_S = 2.0


class RedisJournal(LocalJournal):
    """
    A journal of Redis Streams.

    On one server a step is one transaction; on a cluster its outputs are kept first, then state and
    acks are decided together (`Feature.ATOMIC` is missing then). An id is remembered for at least
    `remembered_ids` later ones.

    Args:
        host: The server, or a node of the cluster.
        port: Its port.
        url: ``redis://``, ``rediss://`` or ``unix://``, instead of host, port and the next three.
        username: An ACL user.
        password: The user's, or that of ``requirepass``; wins over the URL's.
        db: The database.
        unix_socket_path: A socket instead of host and port.
        tls: Speak TLS and check the server's certificate.
        tls_ca: A file with the authority to trust; default: the system's.
        tls_cert: Our own certificate, where the server asks for one.
        tls_key: Its key, where it is in a file of its own.
        cluster: The server belongs to a Redis Cluster.
        sentinels: Ask these for the master, instead of host and port.
        sentinel_service: The name under which they watch it.
        sentinel_password: That of the sentinels themselves.
        mesh: The mesh's name; several can share a server.
        client_name: How the connections show in CLIENT LIST.
        connect_timeout_s: How long `connect` waits.
        silent_s: After so long without a sign of life a connection counts as lost.
        retry_s: How long a call is tried again while Redis is away, loading, full or busy.
        lease_s: How long a silent consumer keeps what it owns, by Redis's own clock.
        remembered_ids: How many ids are remembered at least, over all streams.
        max_queued_bytes: Frames on their way; beyond them, `append` waits.
        allow_volatile: Accept a Redis that may forget: without append-only file, or evicting.

    Raises:
        ConfigurationError: The arguments contradict each other, or a file cannot be used.
    """

    fabric: ClassVar[str] = "redis"
    features = frozenset({Feature.PERSISTENT, Feature.SHARED, Feature.REMOTE, Feature.ATOMIC})

    def __init__(
        self,
        host: str = "localhost",
        port: int = PORT,
        *,
        cluster: bool = False,
        mesh: str = "default",
        connect_timeout_s: float = 5.0,
        silent_s: float = SILENT_S,
        retry_s: float = 10.0,
        lease_s: float = LEASE_S,
        remembered_ids: int = REMEMBERED_IDS,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        allow_volatile: bool = False,
        **where: Unpack[Where],
    ) -> None:
        """Begin unconnected."""
        super().__init__()
        place = place_of(host, port, cluster=cluster, mesh=mesh, **where)
        if cluster:
            self.features = self.features - {Feature.ATOMIC}
        self._connect_timeout_s = connect_timeout_s
        self._allow_volatile = allow_volatile
        self._consumers: dict[tuple[str, str], Consumer] = {}
        keys = self._keys = Keys(mesh, cluster=cluster)
        store = self._store = Store(
            place,
            keys.probe(),
            self._woken,
            self._came_back,
            retry_s=retry_s,
            max_queued_bytes=max_queued_bytes,
            silent_s=silent_s,
        )
        self._members = Members(store, keys, int(lease_s * 1000))
        self._reader = Reader(store, keys, self._members)
        self._writer = Writer(store, keys, remembered_ids, self._spawn, self._members.compare)
        self._views = Views(store, keys)
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life ----------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect and log in; see whether Redis keeps what it is given."""
        if self._closed:
            self._require_open()
        if not self._connected:
            await self._store.connect(self._connect_timeout_s, allow_volatile=self._allow_volatile)
            if self._keys.cluster:
                seconds, micros = await self._store.call(self._keys.topics, "TIME")
                self._writer.clock.tell(int(seconds) * 1000 + int(micros) // 1000)
            self._connected = True

    async def close(self) -> None:
        """Let this journal's consumers leave, and disconnect."""
        if self._closed:
            return
        self._closed = True
        self._bells.ring()
        if not self._connected:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await asyncio.gather(
                    *map(self._members.leave, self._consumers.values()), return_exceptions=True
                )
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()

    async def erase(self) -> None:
        """Forget everything."""
        self._require_open()
        for prefix in self._keys.prefixes:
            await self._store.erase(prefix)

    # -- writing -------------------------------------------------------------------------------

    async def declare(self, group: str, topics: Collection[str], *, start: str = "now") -> None:
        """Make a group hear topics."""
        if start not in {"now", "earliest"}:
            raise ConfigurationError(f"start={start!r} of group {group!r}: use 'now' or 'earliest'")
        self._require_open()
        await self._members.declare(group, topics, start)
        self._bells.ring()

    async def append(self, records: Sequence[Record]) -> int:
        """Keep events; after a lost connection, the count is of what the last try kept."""
        self._require_open()
        if not records:
            return 0
        new = await self._writer.append(records)
        self._tell_others({record.topic for record in records})
        return new

    async def commit(self, group: str, consumer: str, steps: Sequence[Step]) -> list[Step]:
        """Apply steps, all in one script where that can be."""
        self._require_open()
        me = self._consumers.get((group, consumer))
        refused = await self._writer.commit(group, me, steps)
        if me is not None and (me.blocked or me.stale):
            self._bells.ring(me.topics)
        self._tell_others({record.topic for step in steps for record in step.records})
        return refused

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters."""
        self._require_open()
        await self._writer.bury(letters)

    def _tell_others(self, topics: set[str]) -> None:
        # Readers, those of this process too, are woken by Redis
        if topics and self.on_append is not None:
            self.on_append(topics)

    # -- consumers -----------------------------------------------------------------------------

    async def release(self, group: str, consumer: str, deliveries: Iterable[Delivery]) -> None:
        """Give unhandled events back."""
        self._require_open()
        if me := self._consumers.get((group, consumer)):
            await self._members.release(me, deliveries)
            self._bells.ring(me.topics)

    async def renew(self, group: str, consumer: str) -> None:
        """Prolong the lease of a consumer of this journal."""
        self._require_open()
        if me := self._consumers.get((group, consumer)):
            await self._members.renew(me)

    async def leave(self, group: str, consumer: str) -> None:
        """End a consumer of this journal in good order."""
        self._require_open()
        if me := self._consumers.pop((group, consumer), None):
            me.has_left = True
            async with me.reading:
                await self._members.leave(me)

    async def free(self, group: str, consumer: str) -> None:
        """Take everything from a dead consumer, of whichever process."""
        self._require_open()
        await self._members.free(group, consumer)

    async def free_process(self, group: str, consumer: str, pid: int) -> None:
        """Do the same, unless the consumer is of another process by now."""
        self._require_open()
        await self._members.free(group, consumer, pid)

    async def forget(self, group: str, topic: str | None = None) -> bool:
        """Forget a group without consumers, or a topic of it."""
        self._require_open()
        known = await redis_forget.forget(self._store, self._keys, group, topic)
        self._members.disown(group, topic)
        return known

    async def _look(self, group: str, consumer: str, limit: int) -> list[Delivery]:
        me = self._consumers.get((group, consumer))
        if me is None:
            me = self._consumers[group, consumer] = Consumer(group, consumer)
        # Not cancelled half-way: what Redis has noted as handed out is then given back
        looking = self._spawn(self._look_for(me, limit))
        try:
            return await asyncio.shield(looking)
        except asyncio.CancelledError:
            self._spawn(self._take_back(me, looking))
            raise

    async def _look_for(self, me: Consumer, limit: int) -> list[Delivery]:
        async with me.reading:
            if me.has_left:  # a read that was cancelled before it had begun
                return []
            if me.decided and not me.committing:
                await self._writer.settle_decided(me)
            handed = await self._reader.read(me, limit)
        if handed and self._keys.cluster:
            self._writer.clock.observe(max(spot_of(str(each.position)) for each in handed))
        return handed

    async def _take_back(self, me: Consumer, looking: asyncio.Task[list[Delivery]]) -> None:
        handed = await looking
        await self._members.release(me, handed)
        self._bells.ring(me.topics)

    def _spawn(self, work: Coroutine[Any, Any, Value]) -> asyncio.Task[Value]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    def _heard(self, group: str) -> Set[str] | None:
        for consumer in self._consumers.values():
            if consumer.group == group and consumer.topics:
                return consumer.topics
        return None

    def _came_back(self) -> None:
        for consumer in self._consumers.values():
            consumer.returns += 1
        self._bells.ring()

    def _woken(self, channel: bytes) -> None:
        self._bells.ring({self._keys.topic_of(channel)})

    # -- views ---------------------------------------------------------------------------------

    async def load_state(self, group: str) -> dict[str, bytes]:
        """Give the state of a group."""
        self._require_open()
        return await self._views.state(group)

    async def dead(self, query: DeadQuery = ALL_DEAD, limit: int = 1000) -> list[DeadLetter]:
        """Give dead letters, the newest first."""
        self._require_open()
        return await self._views.dead(query, limit)

    async def count_dead(
        self, query: DeadQuery = ALL_DEAD
    ) -> Mapping[tuple[str, str, str, str], DeadCount]:
        """Count dead letters."""
        self._require_open()
        return await self._views.count_dead(query)

    async def exhume(self, letters: Iterable[DeadLetter]) -> int:
        """Remove dead letters."""
        self._require_open()
        return await self._views.exhume(letters)

    async def groups(self) -> list[GroupView]:
        """Tell how far every group is."""
        self._require_open()
        return await self._views.groups()

    async def scan(
        self,
        topics: Collection[str] | None = None,
        *,
        after: int | str | None = None,
        limit: int = 1000,
    ) -> list[Stored]:
        """Give kept events, settled or not, the oldest first."""
        self._require_open()
        return await self._views.scan(topics, None if after is None else str(after), limit)

    async def newest(self) -> int | str | None:
        """Give the place of the newest event."""
        self._require_open()
        return await self._views.newest()

    async def size(self) -> Size:
        """Tell how much is kept, strangers' entries included."""
        self._require_open()
        return await self._views.size()

    async def trim(self, *, max_age_s: float | None = None, max_bytes: int | None = None) -> int:
        """Forget old events that every group of their topic has settled, also plain ones."""
        self._require_open()
        return await self._views.trim(max_age_s, max_bytes)
