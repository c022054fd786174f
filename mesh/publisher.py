"""How an agent speaks: `EventPublisher` makes events, checks their payloads and sends them."""

from __future__ import annotations

import itertools
import logging
from datetime import timedelta
from itertools import repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import msgspec

from mesh import codec
from mesh.causality import current_event
from mesh.clock import SYSTEM_CLOCK
from mesh.columns import Table
from mesh.context import current_context
from mesh.deadletters import DeadLetters
from mesh.errors import BrokerUnavailableError, PayloadError
from mesh.events import Event, Ids, is_durable, payload_of
from mesh.handlers import check_middleware, compose
from mesh.ledger import Ledger
from mesh.outbox import Outbox, Outgoing
from mesh.payloads import check_envelope, check_text
from mesh.retry import RetryPolicy, in_words
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from mesh.broker import MessageBroker
    from mesh.clock import Clock
    from mesh.handlers import Middleware

_log = logging.getLogger(__name__)

#: How long one try of `publish_with_retry` waits for a full fabric.
_TRY_S = 1.0
#: How long a timestamp serves: a tight loop's events share one.
_FRESH_S = 50e-6
_first, _second = itemgetter(0), itemgetter(1)
_PAIRS = frozenset({tuple, list})


class PublisherConfig(Value, frozen=True, kw_only=True):
    """What a publisher needs."""

    agent_name: str
    broker: MessageBroker
    clock: Clock = SYSTEM_CLOCK
    #: Where sequence numbers are kept; default: memory of its own.
    ledger: Ledger | None = None
    dead_letters: DeadLetters | None = None
    #: Around every event that leaves, the first outermost. None costs nothing.
    middleware: Sequence[Middleware] = ()
    #: ``msgpack`` (batched) or ``json`` (one readable CloudEvent a message).
    wire_format: str = "msgpack"
    #: How long `publish` waits for a full fabric.
    publish_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what is no middleware."""
        check_middleware("middleware", self.middleware)


class EventPublisher:
    """
    Publishes events under one agent's name.

    Args:
        config: Name, broker and options.
    """

    def __init__(self, config: PublisherConfig) -> None:
        """Prepare; nothing is sent yet."""
        self.config = config
        self.agent_name = config.agent_name
        self.dead_letters = config.dead_letters or DeadLetters(
            config.agent_name, config.broker.bury
        )
        self._now = config.clock.now
        self._mono_s = config.clock.mono_s
        self._stamp, self._stale_s = self._now(), 0.0
        self._ids = Ids()
        self._new_id = self._ids.one
        self._outgoing: dict[str, Outgoing] = {}
        self._outbox = Outbox(
            config.agent_name,
            config.broker,
            config.ledger or Ledger.in_memory(),
            config.clock,
            config.wire_format,
            config.publish_timeout_s,
        )
        self._add = self._outbox.add
        self._chain = compose(config.middleware, self._enter) if config.middleware else None

    async def publish(
        self,
        event_type: str,
        data: Any,
        correlation_id: str | None = None,
        *,
        key: str | None = None,
        expires_in_s: float | None = None,
    ) -> Event:
        """
        Publish an event; inside a handler it continues the handled event's correlation.

        A live event is on its way when this returns. A durable one is kept by then; inside the
        handler of a durable event it is kept when that handler's step is.

        Args:
            event_type: An `EventType`, a member of a `StrEnum` of yours, or a topic.
            data: A dict, or an instance of the type's schema.
            correlation_id: Default: the handled event's, else the event's own id.
            key: Events of one key keep their order under concurrency.
            expires_in_s: The event must not be acted upon later than this.

        Returns:
            The event as it was sent. Its timestamp is exact to 50 microseconds.

        Raises:
            TopicError: The type breaks the topic grammar.
            PayloadError: The payload does not fit its schema, or cannot travel.
            EventTooLargeError: It is over the size limit.
            BackpressureError: The fabric stayed full for `publish_timeout_s`, or the journal did.
            BrokerUnavailableError: The journal does not answer.
            ClosedError: The publisher or broker is closed.
            NotConnectedError: The broker is not connected.
        """
        out = self._outgoing.get(event_type) or self._open(event_type)
        if expires_in_s is not None or out.durable:
            event = self.make_event(
                event_type, data, correlation_id, key=key, expires_in_s=expires_in_s
            )
            if out.durable and self._chain is None:
                # Made just now, so there is nothing to check again
                await self._outbox.keep(out, (event,))
            else:
                await self.publish_event(event)
            return event
        # The fast path: what `make_event` and `_enter` do, without calls
        payload = out.encode(data)
        if correlation_id is not None:
            check_text("correlation_id", correlation_id)
        if key is not None:
            check_text("key", key)
        # Asking for the date costs four times as much as asking for the monotonic time
        mono_s = self._mono_s()
        if mono_s >= self._stale_s:
            self._stale_s = mono_s + _FRESH_S
            self._stamp = self._now()
        identity = self._new_id()
        parent = current_event.get()
        if parent is None:
            event = Event(
                out.member,
                payload,
                self.agent_name,
                self._stamp,
                correlation_id or identity,
                identity,
                None,
                key,
            )
            if key is not None or correlation_id is not None:
                out.plain = False
        else:
            out.plain = False
            event = Event(
                out.member,
                payload,
                self.agent_name,
                self._stamp,
                correlation_id or parent.correlation_id,
                identity,
                parent.id,
                key,
                None,
                parent.traceparent,
                None,
                parent.hops + 1,
            )
        if self._chain is not None:
            await self._chain(event)
        elif not out.batched:
            await self._outbox.send_alone(out, event)
        elif self._add(out, event, len(payload)):
            await self._outbox.send_full(out)
        return event

    def make_event(
        self,
        event_type: str,
        data: Any,
        correlation_id: str | None = None,
        *,
        key: str | None = None,
        expires_in_s: float | None = None,
        reply_to: str | None = None,
        causation_id: str | None = None,
    ) -> Event:
        """
        Make an event as `publish` does, without sending it; for `publish_event`.

        Args:
            event_type: As for `publish`.
            data: As for `publish`.
            correlation_id: As for `publish`.
            key: As for `publish`.
            expires_in_s: As for `publish`.
            reply_to: The topic on which an answer is awaited.
            causation_id: Default: the id of the handled event.

        Raises:
            TopicError: The type breaks the topic grammar.
            PayloadError: The payload does not fit its schema, or cannot travel.
        """
        out = self._outgoing.get(event_type) or self._open(event_type)
        for name, text in (("correlation_id", correlation_id), ("key", key)):
            if text is not None:
                check_text(name, text)
        payload = out.encode(data)
        parent = current_event.get()
        identity, now = self._identity(out), self._now()
        return Event(
            type=out.member,
            data=payload,
            source_agent=self.agent_name,
            timestamp=now,
            correlation_id=correlation_id or (parent.correlation_id if parent else identity),
            id=identity,
            causation_id=causation_id or (parent.id if parent else None),
            key=key,
            expires_at=None if expires_in_s is None else _moment_in(now, expires_in_s),
            traceparent=parent.traceparent if parent else None,
            reply_to=reply_to,
            hops=parent.hops + 1 if parent else 0,
        )

    async def publish_event(self, event: Event) -> None:
        """
        Publish an event that is complete already, for replays and bridges.

        Raises:
            PayloadError: The payload does not fit its schema, or cannot travel.
            BackpressureError: The fabric stayed full.
        """
        await (self._chain or self._enter)(event)

    async def publish_batch(self, events: Iterable[tuple[str, Any]]) -> int:
        """
        Publish many events in order.

        Args:
            events: Pairs of event type and payload.

        Returns:
            How many were published: all, unless it raises.

        Raises:
            PayloadError: One payload does not fit; then none of them is published.
            BackpressureError: The fabric stayed full.
        """
        now, groups = self._now(), self._grouped(events)
        # All of it is checked before any of it leaves
        ready = [
            (out, self._tables(out, data, now))
            if out.batched and self._chain is None
            else (out, self._events(out, data, now))
            for out, data in groups
        ]
        if self.config.wire_format == "json":
            for out, made in ready:
                for each in made:
                    codec.encode_json(each, epoch=out.epoch, sequence=out.sequence + len(made))
        for out, made in ready:
            if out.durable and self._chain is None:
                await self._outbox.keep(out, made)
                continue
            for each in made:
                if isinstance(each, Table):
                    await self._outbox.add_table(out, each)
                else:
                    await (self._chain or self._enter)(each)
        await self._outbox.flush()
        return sum(len(data) for _, data in groups)

    def _tables(self, out: Outgoing, data: list[Any], now: datetime) -> list[Any]:
        """Make the events of one live type, as tables of them."""
        name, many, parent = self.agent_name, self._ids.many, current_event.get()
        parts = self._outbox.pack(out, data)
        if parent is None:
            return [Table(out.topic, packed, name, now, many(count)) for count, packed in parts]
        return [
            Table(
                out.topic,
                packed,
                name,
                now,
                many(count),
                parent.correlation_id,
                parent.id,
                traceparent=parent.traceparent,
                hops=parent.hops + 1,
            )
            for count, packed in parts
        ]

    def _events(self, out: Outgoing, data: list[Any], now: datetime) -> list[Any]:
        """Make the events of one type."""
        parent = current_event.get()
        ids = self._identities(out, len(data))
        # One pass in C: a loop in Python would cost as much as all the rest
        return list(
            map(
                Event,
                repeat(out.member),
                out.encode_all(data),
                repeat(self.agent_name),
                repeat(now),
                repeat(parent.correlation_id) if parent else ids,
                ids,
                repeat(parent.id if parent else None),
                repeat(None),
                repeat(None),
                repeat(parent.traceparent if parent else None),
                repeat(None),
                repeat(parent.hops + 1 if parent else 0),
            )
        )

    def _grouped(self, events: Iterable[tuple[str, Any]]) -> list[tuple[Outgoing, list[Any]]]:
        """Bring together what goes out on one topic; durable events keep their order across."""
        pairs = list(events)
        if not (_PAIRS.issuperset(map(type, pairs)) and {2}.issuperset(map(len, pairs))):
            _check_pairs(pairs)
        groups: dict[str, list[Any]] = {}
        made: list[tuple[Outgoing, list[Any]]] = []
        for event_type, some in itertools.groupby(pairs, key=_first):
            data = list(map(_second, some))
            out = self._outgoing.get(event_type) or self._open(event_type)
            if not out.durable and out.topic in groups:
                groups[out.topic] += data
                continue
            groups[out.topic] = data
            made.append((out, data))
        return made

    async def publish_with_retry(
        self,
        event_type: str,
        data: Any,
        max_retries: int = 3,
        retry_delay_ms: int = 100,
        *,
        correlation_id: str | None = None,
        key: str | None = None,
    ) -> bool:
        """
        Publish, and try again while the fabric does not answer.

        Args:
            event_type: The type.
            data: The payload.
            max_retries: Tries after the first.
            retry_delay_ms: Pause before the first retry; doubles each time.
            correlation_id: As for `publish`.
            key: As for `publish`.

        Returns:
            True once published; False after the last try, with the event kept as a dead letter.

        Raises:
            PayloadError: A mistake of the caller's is not tried again.
            ClosedError: So is a closed broker.
        """
        policy = RetryPolicy(max_retries=max_retries, first_delay_s=retry_delay_ms / 1000)
        # Made once: should a try that seemed to fail have been kept, the next one changes nothing
        event = self.make_event(event_type, data, correlation_id, key=key)
        for attempt in range(max_retries + 1):
            try:
                if not is_durable(event.type):
                    await self.config.broker.reach(_TRY_S)
                await self.publish_event(event)
                await self.flush(min(_TRY_S, self.config.publish_timeout_s))
            except BrokerUnavailableError as error:
                failure = error
            else:
                return True
            if attempt < max_retries:
                await self.config.clock.sleep(policy.delay_s(attempt + 1))
        self._give_up(event, failure, attempts=max_retries + 1)
        return False

    async def flush(self, timeout_s: float | None = None) -> None:
        """
        Return when everything published so far has been handed to the fabric.

        Args:
            timeout_s: How long a full fabric is waited for; default `publish_timeout_s`.

        Raises:
            BackpressureError: The fabric stayed full.
        """
        await self._outbox.flush(timeout_s)

    def events_a_frame(self) -> float:
        """Tell how many live events shared a frame since this was asked last; none: infinite."""
        return self._outbox.events_a_frame()

    async def close(self) -> None:
        """Send what is batched; publishing afterwards raises. The broker stays open."""
        await self._outbox.close()
        await self.dead_letters.close()

    def _identity(self, out: Outgoing) -> str:
        """Give a new event's id; derived from its cause where a repeat must change nothing."""
        context = current_context.get() if out.durable else None
        if context is not None and context.is_open:
            return context.derive_id() or self._new_id()
        return self._new_id()

    def _identities(self, out: Outgoing, count: int) -> list[str]:
        if not out.durable or current_context.get() is None:
            return self._ids.many(count)
        return [self._identity(out) for _ in range(count)]

    def _open(self, event_type: str) -> Outgoing:
        out = self._outgoing[event_type] = self._outbox.open(event_type)
        return out

    async def _enter(self, event: Event) -> None:
        """Stand at the end of the middleware chain."""
        check_envelope(event)
        out = self._outgoing.get(event.type) or self._open(event.type)
        payload = out.encode(payload_of(event))
        entered = msgspec.structs.replace(event, type=out.member, data=payload)
        # A request is live whatever its type: nobody waits for the answer to an old one
        if out.durable and event.reply_to is None:
            await self._outbox.keep(out, (entered,))
        elif not out.batched:
            await self._outbox.send_alone(out, entered)
        else:
            out.plain = False
            if self._add(out, entered, len(payload)):
                await self._outbox.send_full(out)

    def _give_up(self, event: Event, error: Exception, *, attempts: int) -> None:
        self.dead_letters.put(
            self.dead_letters.letter(event, "unpublished", error, attempts=attempts)
        )
        _log.error(
            "%s could not publish %s after %s and keeps it as a dead letter: %s",
            self.agent_name,
            event.type,
            in_words(attempts),
            error,
        )


def _moment_in(now: datetime, seconds: float) -> datetime:
    try:
        return now + timedelta(seconds=seconds)
    except (TypeError, ValueError, OverflowError) as error:
        raise PayloadError(
            f"expires_in_s must be a number of seconds from now, got {seconds!r:.80}: {error}"
        ) from None


def _check_pairs(events: list[Any]) -> None:
    for each in events:
        if not isinstance(each, (tuple, list)) or len(each) != 2:
            raise PayloadError(
                "publish_batch takes pairs (event type, payload),"
                f" got {type(each).__name__}: {each!r:.80}"
            )
