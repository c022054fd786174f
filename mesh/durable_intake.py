"""
The durable side of a consumer: it reads the journal and hands events to the slots; the steps that
come back are committed by `mesh.committer`.

The state belongs to the group, and each replica knows what it has loaded. A replica that gets
partitions of another one commits what is under way and loads the state anew, before it hands out
what lies in them.

At most `MAX_UNSETTLED` events are in hand: when the journal is away, steps wait and reading stops
by itself.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from mesh.committer import Committer, Outage
from mesh.context import merge_state
from mesh.errors import BrokerUnavailableError, ClosedError, FrameError, MeshError
from mesh.journal import LEASE_S, MAX_UNSETTLED, Delivery, Journal, Step
from mesh.kept import Kept, decode_all, decode_one
from mesh.replay import read_replay
from mesh.retry import OUTAGE
from mesh.topics import REPLAY_PREFIX, replay_topic

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from mesh.broker import MessageBroker
    from mesh.clock import Clock
    from mesh.deadletters import DeadLetter
    from mesh.events import Event
    from mesh.ledger import Ledger

_log = logging.getLogger(__name__)

#: So many events a read, and a commit: half as many cost a sixth of the throughput on SQLite.
_READ_EVENTS = MAX_UNSETTLED
#: A read that waits returns this often; it is woken by every append.
_READ_WAIT_S = 5.0


_topic_of = attrgetter("topic")
_tenure_of = attrgetter("tenure")


class DurableIntake:
    """
    Reads and settles for one consumer of a group.

    Args:
        journal: Connected.
        broker: Carries wake-ups between processes.
        group: The agent's name.
        consumer: This replica's name.
        ledger: Where events are counted.
        clock: Pauses between tries.
        state: The group's state as this process knows it: committed, or about to be.
        restore: Called when the state was loaded anew.
        take: Hands events on to the slots; must not block.
        schema_of: The class in which a topic's handlers want payloads.
        bury: Makes a dead letter of bytes that are no event.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        broker: MessageBroker,
        group: str,
        consumer: str,
        ledger: Ledger,
        clock: Clock,
        state: dict[str, bytes],
        restore: Callable[[], Awaitable[None]],
        take: Callable[[Kept], None],
        schema_of: Callable[[str], type | None],
        bury: Callable[[str, str, str, bytes], DeadLetter],
    ) -> None:
        """Prepare; nothing is read yet."""
        self.journal = journal
        self.group = group
        self.consumer = consumer
        self.state = state
        self._broker = broker
        self._ledger = ledger
        self._clock = clock
        self._restore = restore
        self._take = take
        self._schema_of = schema_of
        self._bury = bury
        self._topics: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._reader: asyncio.Task[None] | None = None
        #: Read, and not handed to the slots yet.
        self._read_ahead = 0
        #: That of the last delivery: see `Delivery.tenure`.
        self._tenure: int | str | None = None
        self._dead = False
        self._outage = Outage(group, clock)
        self._committer = Committer(
            journal=journal,
            group=group,
            consumer=consumer,
            ledger=ledger,
            clock=clock,
            outage=self._outage,
            state=state,
            on_refused=self._forget_refused,
        )
        #: Commit a step soon, after all that came before it.
        self.settle = self._committer.settle

    async def open(self, topics: Collection[str], start: str) -> None:
        """
        Declare the group, load its state.

        Raises:
            ConfigurationError: `start` is neither ``now`` nor ``earliest``.
            BrokerUnavailableError: The journal does not answer.
        """
        self._topics = sorted({*topics, replay_topic(self.group)})
        await self.journal.declare(self.group, self._topics, start=start)
        self.state.update(await self.journal.load_state(self.group))
        await self._broker.wake_on_append(self._topics)

    def start(self) -> None:
        """Begin to read and to commit."""
        self._reader = asyncio.create_task(self._read(), name=f"{self.group}-journal-reader")
        renewing = asyncio.create_task(self._renew(), name=f"{self.group}-journal-lease")
        self._tasks = [self._committer.start(), renewing]
        for task in (self._reader, *self._tasks):
            task.add_done_callback(self._tell_end)

    def is_dead(self) -> bool:
        """Say whether nothing durable is heard or settled any more: only a restart helps."""
        return self._dead

    def unsettled(self) -> int:
        """Count what was handed to the slots and is not committed."""
        return self._committer.unsettled() + self._read_ahead

    async def commit(self, step: Step) -> None:
        """
        Commit a step after all that came before it; returns when it is kept.

        Raises:
            BrokerUnavailableError: It does not answer; only before `start` and after `close`.
        """
        await self._committer.commit(step)

    async def committed(self) -> None:
        """Return when all steps given so far are committed."""
        await self._committer.committed()

    async def stop_reading(self) -> None:
        """Hand nothing more out."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def close(self, limit_s: float) -> None:
        """
        Commit what is done, give back what is not, leave the group.

        Args:
            limit_s: How long the journal may take.
        """
        try:
            async with asyncio.timeout(limit_s):
                await self.committed()
        except TimeoutError:
            _log.warning(
                "%s: %d durable steps could not be committed at the end; their events come again",
                self.group,
                len(self._committer.waiting()),
            )
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(limit_s):
                await self.journal.leave(self.group, self.consumer)
        except (MeshError, TimeoutError) as error:
            _log.warning("%s could not leave its group in order: %s", self.group, error)

    async def commit_rest(self, limit_s: float) -> None:
        """
        Commit the state that was written after `close`.

        Args:
            limit_s: How long the journal may take.
        """
        steps = self._committer.loose()
        if not steps:
            return
        try:
            async with asyncio.timeout(limit_s):
                await self.journal.commit(self.group, self.consumer, steps)
        except (MeshError, TimeoutError) as error:
            _log.warning("%s: state written at its end could not be kept: %s", self.group, error)

    # -- reading -------------------------------------------------------------------------------

    async def _read(self) -> None:
        tries = 0
        while True:
            try:
                deliveries = await self.journal.read(
                    self.group, self.consumer, limit=_READ_EVENTS, wait_s=_READ_WAIT_S
                )
            except ClosedError as error:
                _log.error("%s hears no durable events any more: %s", self.group, error)
                self._dead = True
                return
            except BrokerUnavailableError as error:
                tries += 1
                await self._outage.wait(error, tries)
                continue
            tries = 0
            if not self._committer.waiting():
                self._outage.note_back()
            self._read_ahead = len(deliveries)
            for tenure, of_tenure in groupby(deliveries, key=_tenure_of):
                if tenure != self._tenure:
                    await self._begin_tenure(tenure)
                for topic, group in groupby(of_tenure, key=_topic_of):
                    self._receive(topic, list(group))
            self._read_ahead = 0

    async def _begin_tenure(self, tenure: int | str) -> None:
        """Load the state anew, for others may have changed it; what is under way goes first."""
        await self._committer.settled()
        is_first, before = self._tenure is None, dict(self.state)
        await self._load_state()
        self._tenure = tenure
        if not is_first or self.state != before:
            while not await self._restored():
                await self._clock.sleep(OUTAGE.max_delay_s)

    async def _load_state(self, *, forget: bool = False) -> None:
        """Know what is committed, and what is about to be; or forget what is in hand."""
        state = await self._outage.outlast(lambda: self.journal.load_state(self.group))
        if forget:
            # What was handed out while the state was read, too
            self._committer.forget_hand()
        self.state.clear()
        self.state.update(state)
        for step in self._committer.waiting():
            merge_state(self.state, step.state)

    async def _restored(self) -> bool:
        try:
            await self._restore()
        except Exception:  # noqa: BLE001 - the agent's own code
            _log.exception("%s could not take over the state that was loaded anew", self.consumer)
            return False
        return True

    def _receive(self, topic: str, deliveries: list[Delivery]) -> None:
        self._committer.hand_out(topic, deliveries)
        if topic.startswith(REPLAY_PREFIX):
            for each in deliveries:
                self._receive_replay(each)
            return
        events = decode_all(topic, [each.frame for each in deliveries], self._schema_of(topic))
        if events is not None:
            self._take(Kept(topic, events, deliveries))
            return
        for each in deliveries:
            event = self._decode(topic, each)
            if event is not None:
                self._take(Kept(topic, [event], [each]))

    def _decode(self, topic: str, delivery: Delivery) -> Event | None:
        """Decode one; what is no event is put aside and settled, or it would come for ever."""
        try:
            return decode_one(topic, delivery.frame)
        except FrameError as error:
            self._put_aside(delivery, error)
            return None

    def _receive_replay(self, delivery: Delivery) -> None:
        event = self._decode(delivery.topic, delivery)
        if event is None:
            return
        try:
            inner, earlier = read_replay(event)
        except FrameError as error:
            self._put_aside(delivery, error)
            return
        self._take(Kept(str(inner.type), [inner], [delivery], earlier))

    def _put_aside(self, delivery: Delivery, error: FrameError) -> None:
        self._ledger.count(error.reason)
        letter = self._bury(delivery.topic, error.reason, str(error), delivery.frame)
        self.settle(Step(acks=[delivery], dead=[letter]))

    # -- settling ------------------------------------------------------------------------------

    async def _forget_refused(self, refused: Sequence[Step]) -> None:
        """
        Take back what refused steps have changed in memory: it is not true.

        Other replicas own their events by now; or these come after such a step, and the journal
        takes nothing that may rest on it.
        """
        self._ledger.count("refused_steps", len(refused))
        _log.warning(
            "%s: %d steps were refused, for their events belong to another replica by now, or come"
            " after one that does; what is still ours is handled anew",
            self.consumer,
            len(refused),
        )
        await self._load_state(forget=any(step.state for step in refused))
        await self._restored()

    async def _renew(self) -> None:
        """Keep what handlers work on, however long they take; only a blocked loop lets it go."""
        while True:
            await self._clock.sleep(LEASE_S / 4)
            await self._outage.outlast(lambda: self.journal.renew(self.group, self.consumer))

    def _tell_end(self, task: asyncio.Task[None]) -> None:
        """Notice what ended for a reason that nobody thought of."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._dead = True
        words = "%s hears no durable events any more, for %s has failed"
        _log.critical(words, self.group, task.get_name(), exc_info=error)
