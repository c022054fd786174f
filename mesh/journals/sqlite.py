"""
Durable delivery between the processes of one host: a SQLite file in WAL mode, nothing to install.

The loop never touches the file. One thread writes: what all tasks of the process want written while
it is busy goes into its next transaction. One thread reads, beside it. What one process commits the
others see at their next look, for which `wake` (or a second) calls them.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from mesh.clock import SYSTEM_CLOCK
from mesh.errors import BrokerUnavailableError, ConfigurationError
from mesh.journal import ALL_DEAD, LEASE_S, DeadQuery, Delivery, Feature
from mesh.journals import membership, views
from mesh.journals.consumers import Consumer
from mesh.journals.database import Database
from mesh.journals.local import LocalJournal
from mesh.journals.performing import Writing, reading
from mesh.journals.retention import Sweep, forget_group
from mesh.journals.room import Room
from mesh.journals.threads import DatabaseThread, Job
from mesh.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
    from pathlib import Path

    from mesh.clock import Clock
    from mesh.deadletters import DeadLetter
    from mesh.journal import DeadCount, GroupView, Record, Size, Step, Stored
    from mesh.journals.database import Synchronous
    from mesh.journals.transaction import Inserted, Transaction

#: What may wait for the writer; then `append` and `commit` wait, and at last refuse.
MAX_QUEUED_BYTES = 32 * 1024 * 1024
#: How long they wait, and how long other processes may hold the file: longer than it takes the
#: monitor to end a process that hangs while it holds it.
TIMEOUT_S = 20.0
#: How long `append` waits for a full disk.
FULL_S = 10.0
_FULL = RetryPolicy(first_delay_s=0.02, max_delay_s=1.0, jitter=0.5)
# A record's own weight beside its frame
_RECORD_BYTES = 300


class SQLiteJournal(LocalJournal):
    """
    Durable delivery on one host.

    Args:
        path: The file of the mesh; made with mode 0600, ``-wal`` and ``-shm`` appear beside it.
        synchronous: NORMAL keeps what was accepted through the death of any process; FULL through
            a power cut as well, at the price of an fsync a transaction.
        lease_s: How long a silent consumer keeps what it owns.
        timeout_s: How long to wait for a busy writer or a locked file.
        full_s: How long `append` waits for a full disk.
        max_queued_bytes: How much may wait for the writer.
        clock: Where time comes from; asked in other threads.
    """

    fabric: ClassVar[str] = "zmq"
    features = frozenset({Feature.PERSISTENT, Feature.SHARED, Feature.ATOMIC})

    def __init__(
        self,
        path: Path,
        *,
        synchronous: Synchronous = "NORMAL",
        lease_s: float = LEASE_S,
        timeout_s: float = TIMEOUT_S,
        full_s: float = FULL_S,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Touch nothing."""
        if synchronous not in {"NORMAL", "FULL"}:
            raise ConfigurationError(
                f"synchronous={synchronous!r} of the journal {path}: use NORMAL or FULL"
            )
        super().__init__()
        self._path = path
        self._synchronous = synchronous
        self._lease_ms = int(lease_s * 1000)
        self._timeout_s = timeout_s
        self._full_s = full_s
        self._clock = clock
        self._consumers: dict[tuple[str, str], Consumer] = {}
        self._room = Room(f"the journal {path}", max_queued_bytes, timeout_s)
        self._writer: DatabaseThread
        self._reader: DatabaseThread

    async def connect(self) -> None:
        """Open the file, or make it."""
        if self._closed:
            self._require_open()
        if self._connected:
            return
        writer = self._thread("journal-writer", Writing(self._clock))
        await writer.start()
        reader = self._thread("journal-reader", reading)
        try:
            await reader.start()
        except BaseException:
            await writer.stop()
            raise
        self._writer, self._reader = writer, reader
        self._connected = True

    async def close(self) -> None:
        """Let this journal's consumers leave, write what is queued and end the threads."""
        if self._closed:
            return
        self._closed = True
        self._bells.ring()
        if not self._connected:
            return
        leaving = [
            self._submit(partial(membership.leave, consumer=each))
            for each in self._consumers.values()
        ]
        await asyncio.gather(*leaving, return_exceptions=True)
        await self._reader.stop()
        await self._writer.stop()

    async def erase(self) -> None:
        """Forget everything but the numbers of names, which this process has noted."""
        await self._do(lambda tx: tx.erase())

    async def declare(self, group: str, topics: Collection[str], *, start: str = "now") -> None:
        """Make a group hear topics."""
        if start not in {"now", "earliest"}:
            raise ConfigurationError(f"start={start!r} of group {group!r}: use 'now' or 'earliest'")
        chosen = list(topics)
        await self._do(lambda tx: tx.declare(group, chosen, start))
        self._bells.ring()

    async def append(self, records: Sequence[Record]) -> int:
        """Keep events; returns when they are in the file."""
        self._require_open()
        if not records:
            return 0
        weight = sum(len(record.frame) for record in records) + _RECORD_BYTES * len(records)
        await self._room.wait(weight)
        inserted: Inserted = await self._until_it_fits(lambda tx: tx.insert(records), weight)
        return inserted.new

    async def commit(self, group: str, consumer: str, steps: Sequence[Step]) -> list[Step]:
        """Apply steps; those of all tasks of this process may share a transaction."""
        self._require_open()
        me = self._consumers.get((group, consumer))
        weight = sum(len(record.frame) + _RECORD_BYTES for step in steps for record in step.records)
        if weight:
            await self._room.wait(weight)
        refused: list[Step] = await self._do(lambda tx: tx.commit(group, me, steps), weight)
        return refused

    async def release(self, group: str, consumer: str, deliveries: Iterable[Delivery]) -> None:
        """Give unhandled events back."""
        back = list(deliveries)
        if me := self._consumers.get((group, consumer)):
            await self._do(lambda tx: membership.release(tx, me, back))

    async def renew(self, group: str, consumer: str) -> None:
        """Prolong the lease of a consumer of this journal."""
        if me := self._consumers.get((group, consumer)):
            await self._do(lambda tx: membership.renew(tx, me, self._lease_ms))

    async def leave(self, group: str, consumer: str) -> None:
        """End a consumer of this journal in good order."""
        if me := self._consumers.pop((group, consumer), None):
            await self._do(lambda tx: membership.leave(tx, me))

    async def free(self, group: str, consumer: str) -> None:
        """Take everything from a dead consumer, of whichever process."""
        await self._do(lambda tx: membership.free(tx, group, consumer))

    async def free_process(self, group: str, consumer: str, pid: int) -> None:
        """Do the same, unless the consumer is of another process by now."""
        await self._do(lambda tx: membership.free(tx, group, consumer, pid))

    async def forget(self, group: str, topic: str | None = None) -> bool:
        """Forget a group without consumers, or a topic of it."""
        known: bool = await self._do(lambda tx: forget_group(tx, group, topic, self._lease_ms))
        return known

    async def load_state(self, group: str) -> dict[str, bytes]:
        """Give the state of a group."""
        state: dict[str, bytes] = await self._ask(
            lambda database: views.load_state(database.connection, group)
        )
        return state

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters."""
        await self._do(lambda tx: tx.bury(letters))

    async def dead(self, query: DeadQuery = ALL_DEAD, limit: int = 1000) -> list[DeadLetter]:
        """Give dead letters, the newest first."""
        letters: list[DeadLetter] = await self._ask(
            lambda database: views.dead(database.connection, query, limit)
        )
        return letters

    async def count_dead(
        self, query: DeadQuery = ALL_DEAD
    ) -> Mapping[tuple[str, str, str, str], DeadCount]:
        """Count dead letters."""
        counts: dict[tuple[str, str, str, str], DeadCount] = await self._ask(
            lambda database: views.count_dead(database.connection, query)
        )
        return counts

    async def exhume(self, letters: Iterable[DeadLetter]) -> int:
        """Remove dead letters."""
        chosen = list(letters)
        count: int = await self._do(lambda tx: tx.exhume(chosen))
        return count

    async def groups(self) -> list[GroupView]:
        """Count what is not settled; reads the index over the whole backlog."""
        now_ms = int(self._clock.time_s() * 1000)
        found: list[GroupView] = await self._ask(
            lambda database: views.group_views(database.connection, now_ms)
        )
        return found

    async def scan(
        self,
        topics: Collection[str] | None = None,
        *,
        after: int | str | None = None,
        limit: int = 1000,
    ) -> list[Stored]:
        """Give kept events."""
        chosen = None if topics is None else frozenset(topics)
        found: list[Stored] = await self._ask(
            lambda database: views.scan(database.connection, chosen, int(after or 0), limit)
        )
        return found

    async def newest(self) -> int | str | None:
        """Give the number of the newest event."""
        found: int | None = await self._ask(lambda database: views.newest(database.connection))
        return found

    async def size(self) -> Size:
        """Tell how much is kept; reads an index over all of it."""
        found: Size = await self._ask(lambda database: views.size(database.connection))
        return found

    async def trim(self, *, max_age_s: float | None = None, max_bytes: int | None = None) -> int:
        """Forget settled events, in small transactions; their ids are forgotten as well."""
        before_s = None if max_age_s is None else self._clock.time_s() - max_age_s
        sweep = Sweep(None if before_s is None else int(before_s * 1000), max_bytes)
        while not sweep.finished:
            await self._do(sweep.forget_some)
        return sweep.gone

    # -- reading -------------------------------------------------------------------------------

    async def _look(self, group: str, consumer: str, limit: int) -> list[Delivery]:
        me = self._consumers.get((group, consumer))
        if me is None:
            me = self._consumers[group, consumer] = Consumer(group, consumer)
        async with me.reading:
            for _ in range(3):  # when the group changes under it; then at the next look
                if me.stale:
                    await self._do(lambda tx: membership.join(tx, me, self._lease_ms))
                elif self._is_lease_half_over(me):
                    await self._do(lambda tx: membership.renew(tx, me, self._lease_ms))
                holding = me.holding
                if holding is None or limit <= 0:
                    return []
                if me.must_wait():
                    return []
                if any(place[1] not in holding.surplus for _, place in holding.suspects):
                    handed = await self._hand_out_suspect(me)
                else:
                    handed = await self._hand_out(me, limit)
                if handed or not me.stale:
                    return handed
        return []

    def _heard(self, group: str) -> Set[str] | None:
        for consumer in self._consumers.values():
            if consumer.group == group and consumer.holding is not None:
                return set(consumer.holding.topics.values())
        return None

    async def _hand_out(self, me: Consumer, limit: int) -> list[Delivery]:
        mono_ms = int(self._clock.mono_s() * 1000)
        future = self._put(
            self._reader,
            lambda database: views.hand_out(
                database.connection, me, limit, mono_ms, self._lease_ms
            ),
        )
        try:
            handed: list[Delivery] = await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(partial(_take_back, me))
            raise
        return handed

    async def _hand_out_suspect(self, me: Consumer) -> list[Delivery]:
        future = self._submit(lambda tx: membership.hand_out_suspect(tx, me))
        try:
            handed: Delivery | None = await asyncio.shield(future)
        except asyncio.CancelledError:
            # Behind it in the queue, so that the count is taken back as well
            self._submit(lambda tx: membership.release_alone(tx, me))
            raise
        return [] if handed is None else [handed]

    def _is_lease_half_over(self, me: Consumer) -> bool:
        if me.holding is None:
            return True
        return me.holding.lease_until_ms - self._clock.mono_s() * 1000 < self._lease_ms / 2

    # -- threads -------------------------------------------------------------------------------

    def _thread(self, name: str, perform: Callable[[Database, list[Job]], Any]) -> DatabaseThread:
        database = Database(self._path, self._synchronous, self._timeout_s)
        return DatabaseThread(name, database, perform, self._deliver)

    async def _do(self, work: Callable[[Transaction], Any], weight_bytes: int = 0) -> Any:
        self._require_open()
        return await asyncio.shield(self._submit(work, weight_bytes))

    async def _ask(self, work: Callable[[Database], Any]) -> Any:
        self._require_open()
        return await asyncio.shield(self._put(self._reader, work))

    def _submit(
        self, work: Callable[[Transaction], Any], weight_bytes: int = 0
    ) -> asyncio.Future[Any]:
        self._room.take(weight_bytes)
        return self._put(self._writer, work, weight_bytes)

    def _put(
        self, thread: DatabaseThread, work: Callable[[Any], Any], weight_bytes: int = 0
    ) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Whoever awaited it may have been cancelled; then nobody asks for the error
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        thread.put(Job(work, future, weight_bytes))
        return future

    async def _until_it_fits(self, work: Callable[[Transaction], Any], weight_bytes: int) -> Any:
        """Do it, again while the disk is full; what waits for that counts as queued."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + self._full_s
        tries = 0
        while True:
            try:
                return await self._do(work, weight_bytes)
            except BrokerUnavailableError as error:
                if not Database.may_pass(error):
                    raise
                tries += 1
                pause_s = _FULL.delay_s(tries)
                if loop.time() + pause_s > ends_s:
                    words = f"{error} (tried for {self._full_s:g} s)"
                    raise type(error)(words) from error.__cause__
            self._room.take(weight_bytes)
            try:
                await asyncio.sleep(pause_s)
            finally:
                self._room.give_back(weight_bytes)
                self._room.call_next()

    def _deliver(self, jobs: list[Job], topics: tuple[set[str], set[str]] | None) -> None:
        for job in jobs:
            self._room.give_back(job.weight_bytes)
            if not job.future.done():
                if job.error is not None:
                    job.future.set_exception(job.error)
                else:
                    job.future.set_result(job.outcome)
        self._room.call_next()
        if topics is not None:
            told, local = topics
            if local:
                self._bells.ring(local)
            self._tell(told)


def _take_back(me: Consumer, future: asyncio.Future[list[Delivery]]) -> None:
    if future.exception() is None:
        me.give_back(future.result())
