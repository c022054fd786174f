"""
How an agent listens: `EventConsumer` receives frames, keeps the loss ledger, and runs handlers.

One event, one path: frame -> decode -> gap check -> inbox lane -> slot -> handler -> settled.
A slot is a task that runs handlers one after the other; there is no task per event.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from mesh import codec
from mesh.causality import current_event
from mesh.clock import SYSTEM_CLOCK
from mesh.deadletters import DeadLetters
from mesh.errors import ClosedError, FrameError, PayloadError
from mesh.handlers import EventHandlerRegistry, Handler, HandlerPriority, own_copy
from mesh.inbox import OVERFLOWS, Arrival, Inbox, make_inbox
from mesh.ledger import (
    IN_DROPPED,
    IN_EPOCH,
    IN_LAST,
    IN_LOST,
    IN_RECEIVED,
    IN_SETTLED,
    Ledger,
)
from mesh.logs import say_once
from mesh.retry import RetryPolicy
from mesh.topics import check_topic
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.broker import MessageBroker
    from mesh.clock import Clock
    from mesh.events import Event

_log = logging.getLogger(__name__)

_LANE_OF = {priority: lane for lane, priority in enumerate(HandlerPriority)}
#: Handlers that never wait give the loop a turn after so many events.
_EVENTS_A_TURN = 256
#: A cancelled handler that is still there after this long holds the agent up for good.
CANCEL_GRACE_S = 5.0
_UNNUMBERED = "(unnumbered)"
_FRAMES, _REJECTED_FRAMES = Ledger.at("frames"), Ledger.at("rejected_frames")
#: Links whose place in the ledger is remembered; anybody can make up names of publishers.
_MAX_LINKS = 10_000


class ConsumerConfig(Value, frozen=True, kw_only=True):
    """What a consumer needs."""

    agent_name: str
    broker: MessageBroker
    handler_registry: EventHandlerRegistry
    subscribed_events: Sequence[str] = ()
    #: How many events may wait in the inbox before reading stops.
    buffer_size: int = 1000
    max_retries: int = 3
    retry_delay_ms: float = 100.0
    #: ``block``: stop reading; ``drop_oldest``; ``latest``: keep the newest per type and key.
    overflow: str = "block"
    #: Handlers that may run at the same time; order is kept per key.
    concurrency: int = 1
    #: A handler is cancelled after so many seconds.
    handler_timeout_s: float = 30.0
    #: How long `stop` lets handlers finish.
    drain_timeout_s: float = 8.0
    clock: Clock = SYSTEM_CLOCK
    ledger: Ledger | None = None
    dead_letters: DeadLetters | None = None
    #: Log every event that is handled (DEBUG level).
    log_events: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name in ("buffer_size", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if self.overflow not in OVERFLOWS:
            raise ValueError(
                f"overflow must be one of {', '.join(OVERFLOWS)}, was {self.overflow!r}"
            )


class _Slot:
    """One handler at a time; what the watch sees of it."""

    __slots__ = (
        "age_s",
        "event",
        "handler",
        "inbox",
        "pausing",
        "retries",
        "seen",
        "task",
        "timed_out",
    )

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox
        self.task: asyncio.Task[None] | None = None
        self.event: Event | None = None
        self.handler: Handler | None = None
        #: What the watch saw last: the same event and try again is one that is still running.
        self.seen: tuple[Event | None, int] = (None, 0)
        self.retries = 0
        self.age_s = 0.0
        self.timed_out = False
        self.pausing = False


class _Route(NamedTuple):
    """Where the events of a topic go in this agent."""

    handlers: tuple[Handler, ...]
    lane: int
    #: The class that all handlers want the payload in, when they agree.
    schema: type[Any] | None


def _route(handlers: tuple[Handler, ...]) -> _Route:
    if not handlers:
        return _Route(handlers, 0, None)
    schemas = {handler.schema for handler in handlers}
    schema = handlers[0].schema if len(schemas) == 1 else None
    return _Route(handlers, _LANE_OF[handlers[0].priority], schema)


class EventConsumer:
    """
    Base class of agents that consume: register handlers in `initialize`, then `start` and `stop`.

    Args:
        config: Name, broker, registry and options.
    """

    def __init__(self, config: ConsumerConfig) -> None:
        """Prepare; nothing is heard yet."""
        self.config = config
        self.agent_name = config.agent_name
        self.registry = config.handler_registry
        self.broker = config.broker
        self.ledger = config.ledger or Ledger.in_memory()
        self.dead_letters = config.dead_letters or DeadLetters(config.agent_name)
        self._cells = self.ledger.cells
        self._retry = RetryPolicy(
            max_retries=config.max_retries, first_delay_s=config.retry_delay_ms / 1000
        )
        self._links: dict[tuple[str, str], int] = {}
        self._routes: dict[str, _Route] = {}
        self._slots: list[_Slot] = []
        self._watch_task: asyncio.Task[None] | None = None
        self._blocked = False
        self._idle: asyncio.Event | None = None
        self._started_at_s = 0.0
        self._stopped = False

    async def initialize(self) -> None:
        """Override: register handlers on `self.registry` under `self.agent_name`."""

    async def start(self) -> None:
        """
        Begin to hear `subscribed_events` and every type a handler is registered for.

        Raises:
            NotConnectedError: The broker is not connected.
            ClosedError: The consumer was stopped; make a new one.
        """
        if self._stopped:
            raise ClosedError(f"consumer {self.agent_name!r} was stopped; make a new one")
        if self._slots:
            return
        config = self.config
        for number in range(config.concurrency):
            slot = _Slot(make_inbox(config.buffer_size, config.overflow))
            slot.task = asyncio.create_task(
                self._work(slot), name=f"{self.agent_name}-slot-{number}"
            )
            self._slots.append(slot)
        self._watch_task = asyncio.create_task(self._watch(), name=f"{self.agent_name}-watch")
        topics = {check_topic(name) for name in config.subscribed_events}
        topics.update(self.registry.topics_of(self.agent_name))
        await self.broker.attach(sorted(topics), self)
        self._started_at_s = config.clock.time_s()
        if not self.ledger.get("ready_at_us"):
            # The first incarnation's moment stays: what a successor misses meanwhile is a loss
            self.ledger.set("ready_at_us", int(self._started_at_s * 1e6))

    async def stop(self) -> None:
        """Hear nothing more, let running and waiting handlers finish, end; can be called twice."""
        if self._stopped:
            return
        self._stopped = True
        await self.broker.detach(self)
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                await self.drained()
        except TimeoutError:
            _log.warning(
                "%s: %d events were not finished within %g s and are counted as lost",
                self.agent_name,
                self.unsettled(),
                self.config.drain_timeout_s,
            )
        tasks = [slot.task for slot in self._slots if slot.task is not None]
        if self._watch_task is not None:
            tasks.append(self._watch_task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._slots.clear()

    async def drained(self) -> None:
        """Return when no event waits and no handler runs."""
        while any(slot.inbox.size or slot.event is not None for slot in self._slots):
            self._idle = asyncio.Event()
            await self._idle.wait()

    # -- what others ask -----------------------------------------------------------------------

    def queued(self) -> int:
        """Count the events that wait."""
        return sum(slot.inbox.size for slot in self._slots)

    def unsettled(self) -> int:
        """Count the events that wait or are being handled."""
        cells = self._cells
        places = set(self._links.values())
        return sum(cells[at + IN_RECEIVED] - cells[at + IN_SETTLED] for at in places)

    def in_flight(self) -> tuple[int, float, str | None]:
        """Tell how many handlers run, the age of the oldest in seconds, and its id."""
        busy = [slot for slot in self._slots if slot.event is not None]
        if not busy:
            return 0, 0.0, None
        oldest = max(busy, key=lambda slot: slot.age_s)
        return len(busy), oldest.age_s, oldest.handler.id if oldest.handler else None

    def is_stuck(self) -> bool:
        """Say whether a handler was cancelled and is still there: only a restart helps."""
        return any(
            slot.timed_out and slot.age_s > self._limit_s(slot) + CANCEL_GRACE_S
            for slot in self._slots
        )

    # -- receiving -----------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Say whether the inbox takes more; the broker stops reading when not."""
        for slot in self._slots:
            if not slot.inbox.has_room():
                self._blocked = True
                return False
        return True

    def receive(self, topic: str, frame: bytes) -> None:
        """Take a frame from the fabric. Whatever is in it, nothing is raised."""
        self._cells[_FRAMES] += 1
        route = self._routes.get(topic)
        handlers = self.registry.handlers_of(topic, self.agent_name)
        if route is None or route.handlers is not handlers:
            route = self._routes[topic] = _route(handlers)
        try:
            batch = codec.decode_frame(topic, frame, route.schema)
        except FrameError as error:
            self._cells[_REJECTED_FRAMES] += 1
            self._reject(topic, error.reason, str(error), frame)
            return
        at = self._links.get((batch.publisher, topic))
        if at is None:
            at = self.ledger.link(batch.publisher or _UNNUMBERED, topic)
            if len(self._links) < _MAX_LINKS:
                self._links[batch.publisher, topic] = at
        arrived = len(batch.events) + len(batch.rejected or ())
        if batch.epoch:
            arrived = self._check_sequence(at, batch)
        cells = self._cells
        cells[at + IN_RECEIVED] += arrived
        if batch.rejected:
            for reason, words, raw in batch.rejected:
                self._reject(topic, reason, words, raw)
            cells[at + IN_SETTLED] += arrived - len(batch.events)
        if not handlers:
            self.registry.say_unheard(topic)
            cells[at + IN_SETTLED] += len(batch.events)
        elif batch.events:
            self._put(Arrival(batch.events, handlers, route.lane, at))

    def _check_sequence(self, at: int, batch: codec.Batch) -> int:
        """Count what is missing before this batch; gives how many numbers it covers."""
        cells = self._cells
        last = cells[at + IN_LAST]
        if cells[at + IN_EPOCH] != batch.epoch:
            if batch.epoch < cells[at + IN_EPOCH]:
                return batch.count  # a second publisher of the same name, older than the one known
            # Who was listening before the numbering began was meant to get it from 1 on
            listened = 0 < self._listening_since_ns() < batch.epoch
            last = 0 if listened else batch.first - 1
            cells[at + IN_EPOCH] = batch.epoch
        missing = batch.first - last - 1
        if missing > 0:
            # The frame claims it, whoever sent it: a sum that fits whatever is claimed
            cells[at + IN_LOST] = min(cells[at + IN_LOST] + missing, codec.MAX_SEQUENCE)
            _log.warning(
                "%s lost %d events of %s on %s (numbers %d to %d)",
                self.agent_name,
                missing,
                batch.publisher,
                batch.topic,
                last + 1,
                batch.first - 1,
            )
        newest = batch.first + batch.count - 1
        if newest > last:
            cells[at + IN_LAST] = newest
        return batch.count

    def _listening_since_ns(self) -> int:
        return self.ledger.get("ready_at_us") * 1000

    def _put(self, arrival: Arrival) -> None:
        if len(self._slots) == 1:
            dropped = self._slots[0].inbox.put(arrival)
        else:
            dropped = self._spread(arrival)
        if dropped:
            self._count_dropped(dropped)

    def _spread(self, arrival: Arrival) -> list[tuple[int, int]]:
        """Give each key to one slot, so that its order is kept."""
        groups: dict[int, list[Event]] = {}
        for event in arrival.events:
            # crc32, not hash(): the same key goes to the same slot in every process and run
            number = zlib.crc32((event.key or event.id).encode()) % len(self._slots)
            groups.setdefault(number, []).append(event)
        dropped: list[tuple[int, int]] = []
        for number, events in groups.items():
            part = Arrival(events, arrival.handlers, arrival.lane, arrival.link)
            dropped += self._slots[number].inbox.put(part)
        return dropped

    def _count_dropped(self, dropped: list[tuple[int, int]]) -> None:
        cells = self._cells
        for at, amount in dropped:
            cells[at + IN_DROPPED] += amount
            cells[at + IN_SETTLED] += amount
        self.ledger.count("overflow", sum(amount for _, amount in dropped))
        say_once(
            _log,
            f"overflow-{self.agent_name}",
            "%s is slower than its input: overflow=%s drops events, counted (said once)",
            self.agent_name,
            self.config.overflow,
        )

    def _reject(self, topic: str, reason: str, words: str, raw: bytes) -> None:
        self.ledger.count(reason)
        self.dead_letters.put_frame(topic, reason, words, raw)
        say_once(
            _log,
            f"reject-{self.agent_name}-{reason}",
            "%s put aside a frame on %s: %s (said once per reason, all counted)",
            self.agent_name,
            topic,
            words,
        )

    # -- handling ------------------------------------------------------------------------------

    async def _work(self, slot: _Slot) -> None:
        inbox = slot.inbox
        since_turn = 0
        while True:
            arrival = inbox.take()
            if arrival is None:
                self._tell_idle()
                await inbox.wait()
                since_turn = 0
                continue
            since_turn += arrival.left()
            await self._run(slot, arrival)
            if self._blocked and inbox.size <= self.config.buffer_size // 2:
                self._blocked = False
                self.broker.resume(self)
            if since_turn >= _EVENTS_A_TURN:
                since_turn = 0
                await asyncio.sleep(0)

    async def _run(self, slot: _Slot, arrival: Arrival) -> None:
        """Handle the events of an arrival, until something more urgent comes."""
        cells, settled_at = self._cells, arrival.link + IN_SETTLED
        handlers, events, inbox, lane = arrival.handlers, arrival.events, slot.inbox, arrival.lane
        only = handlers[0] if len(handlers) == 1 else None
        run = handlers[0].run
        slot.handler = only
        set_current = current_event.set
        begun = position = arrival.position
        failed = 0
        for event in events[position:] if position else events:
            slot.event = event
            position += 1
            set_current(event)
            if event.expires_at is not None and self._is_expired(event):
                failed += 1
            elif only is not None:
                try:
                    await run(event)
                except BaseException as error:  # noqa: BLE001 - sorted out in `_failed`
                    failed += 1
                    await self._failed(slot, only, event, error)
            else:
                await self._run_each(slot, handlers, event)
            cells[settled_at] += 1
            if inbox.urgent < lane:
                break
        if position < len(events):
            arrival.position = position
            inbox.put_back(arrival)
        slot.event = None
        set_current(None)
        if only is not None:
            only.calls += position - begun - failed
        self._note_latency(event)

    async def _run_each(self, slot: _Slot, handlers: tuple[Handler, ...], event: Event) -> None:
        for position, handler in enumerate(handlers):
            slot.handler = handler
            mine = own_copy(event) if position else event
            current_event.set(mine)
            try:
                await handler.run(mine)
                handler.calls += 1
            except BaseException as error:  # noqa: BLE001 - sorted out in `_failed`
                await self._failed(slot, handler, mine, error)

    async def _failed(
        self, slot: _Slot, handler: Handler, event: Event, error: BaseException
    ) -> None:
        """Try a handler again, or put the event aside; cancellation from outside passes through."""
        retries = self._retry.max_retries if handler.max_retries is None else handler.max_retries
        attempt = 1
        while True:
            failure = self._as_failure(slot, handler, error)
            final = isinstance(failure, (TimeoutError, PayloadError)) or attempt > retries
            if final:
                break
            handler.failed(failure)
            # The pause is not the handler's time
            slot.pausing = True
            await self.config.clock.sleep(self._retry.delay_s(attempt))
            slot.pausing = False
            slot.retries += 1
            attempt += 1
            try:
                await handler.run(event)
            except BaseException as again:  # noqa: BLE001 - sorted out above
                error = again
            else:
                handler.calls += 1
                return
        handler.failed(failure)
        self._cells[Ledger.at("failed")] += 1
        reason = _reason(failure)
        self.ledger.count(f"handler_{reason}")
        self.dead_letters.put_event(event, reason, failure, handler=handler.id, attempts=attempt)
        _log.error(
            "handler %s of %s failed on %s %s after %d tries and the event was put aside: %s",
            handler.id,
            self.agent_name,
            event.type,
            event.id,
            attempt,
            failure or type(failure).__name__,
            exc_info=failure,
        )

    def _as_failure(self, slot: _Slot, handler: Handler, error: BaseException) -> BaseException:
        """Tell a handler's failure from the cancellation of the consumer."""
        if not isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            return error
        task = slot.task
        if slot.timed_out and task is not None:
            slot.timed_out = False
            task.uncancel()
            return TimeoutError(
                f"{handler.id} ran longer than {self._limit_s(slot):g} s and was cancelled"
            )
        if isinstance(error, GeneratorExit) or task is None or task.cancelling():
            raise error
        return error

    def _is_expired(self, event: Event) -> bool:
        assert event.expires_at is not None
        if event.expires_at > self.config.clock.now():
            return False
        self.ledger.count("expired")
        self.dead_letters.put_event(event, "expired", f"it expired at {event.expires_at}")
        return True

    def _note_latency(self, event: Event) -> None:
        late_s = self.config.clock.time_s() - event.timestamp.timestamp()
        self.ledger.record_latency(late_s * 1e6)
        if self.config.log_events:
            _log.debug("%s handled %s %s", self.agent_name, event.type, event.id)

    def _tell_idle(self) -> None:
        if self._idle is not None:
            self._idle.set()
            self._idle = None

    # -- time limits ---------------------------------------------------------------------------

    def _limit_s(self, slot: _Slot) -> float:
        handler = slot.handler
        if handler is not None and handler.timeout_s is not None:
            return handler.timeout_s
        return self.config.handler_timeout_s

    async def _watch(self) -> None:
        """
        Cancel handlers over their limit.

        One look at a counter a tick replaces a timer per event, which would cost more than the
        handler itself.
        """
        clock = self.config.clock
        while True:
            tick_s = self._tick_s()
            before = clock.mono_s()
            await clock.sleep(tick_s)
            elapsed_s = clock.mono_s() - before
            for slot in self._slots:
                self._look_at(slot, elapsed_s)

    def _tick_s(self) -> float:
        limits = [self.config.handler_timeout_s]
        for topic in self.registry.topics_of(self.agent_name):
            limits += [
                handler.timeout_s
                for handler in self.registry.handlers_of(topic, self.agent_name)
                if handler.timeout_s is not None
            ]
        return min(1.0, max(0.02, min(limits) / 5))

    def _look_at(self, slot: _Slot, elapsed_s: float) -> None:
        event, retries = slot.seen
        if slot.event is None or slot.pausing or slot.event is not event or slot.retries != retries:
            slot.seen = (slot.event, slot.retries)
            slot.age_s = 0.0
            return
        slot.age_s += elapsed_s
        if slot.age_s > self._limit_s(slot) and not slot.timed_out and slot.task is not None:
            slot.timed_out = True
            slot.task.cancel()


def _reason(failure: BaseException) -> str:
    if isinstance(failure, TimeoutError):
        return "timeout"
    return "invalid" if isinstance(failure, PayloadError) else "failed"
