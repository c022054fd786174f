"""
How an agent speaks: `EventPublisher` makes events, checks their payloads, sends them in batches.

Batches form by themselves: events of one loop turn and type travel in one frame, which leaves at
the end of the turn, or at 64 events, or at 64 KiB. No timer is ever waited for.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from mesh import codec
from mesh.causality import current_event
from mesh.clock import SYSTEM_CLOCK
from mesh.deadletters import DeadLetters
from mesh.errors import (
    BackpressureError,
    BrokerUnavailableError,
    ClosedError,
    PayloadError,
)
from mesh.events import Event, declaration_of, new_id
from mesh.handlers import compose
from mesh.ledger import OUT_EPOCH, OUT_SEQUENCE, Ledger
from mesh.retry import RetryPolicy
from mesh.topics import PRIVATE_PREFIX, check_topic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mesh.broker import MessageBroker
    from mesh.clock import Clock
    from mesh.handlers import Middleware

_log = logging.getLogger(__name__)

#: A publisher that never waits gives the loop a turn after so many full batches.
_BATCHES_A_TURN = 4
#: How long one try of `publish_with_retry` waits for a full fabric.
_TRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherConfig:
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


@dataclass(slots=True, eq=False)
class _Outgoing:
    """The batch of one topic that is being filled."""

    topic: str
    sequence_at: int
    epoch: int
    member: str
    #: False: every event is a message of its own.
    batched: bool
    #: Checks a payload and gives what travels.
    encode: Callable[[Any], Any]
    first: int = 0
    count: int = 0
    events: bytearray = field(default_factory=bytearray)


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
        self.dead_letters = config.dead_letters or DeadLetters(config.agent_name)
        self._broker = config.broker
        self._now = config.clock.now
        self._ledger = config.ledger or Ledger.in_memory()
        self._cells = self._ledger.cells
        self._pack_into = codec.pack_into
        self._prefix = codec.batch_prefix(config.agent_name)
        self._outgoing: dict[str, _Outgoing] = {}
        self._dirty: list[_Outgoing] = []
        self._flush_scheduled = False
        self._drainer: asyncio.Task[None] | None = None
        self._full_batches = 0
        self._closed = False
        self._chain = compose(config.middleware, self._enter) if config.middleware else None

    async def publish(
        self,
        event_type: str,
        data: Any,
        correlation_id: str | None = None,
        *,
        key: str | None = None,
        expires_in_s: float | None = None,
        reply_to: str | None = None,
        causation_id: str | None = None,
        event_id: str | None = None,
    ) -> Event:
        """
        Publish an event; inside a handler it continues the handled event's correlation.

        Args:
            event_type: An `EventType`, a member of a `StrEnum` of yours, or a topic.
            data: A dict, or an instance of the type's schema.
            correlation_id: Default: the handled event's, else the event's own id.
            key: Events of one key keep their order under concurrency.
            expires_in_s: The event must not be acted upon later than this.
            reply_to: The topic on which an answer is awaited.
            causation_id: Default: the id of the handled event.
            event_id: Default: a new one.

        Returns:
            The event as it was sent.

        Raises:
            TopicError: The type breaks the topic grammar.
            PayloadError: The payload does not fit its schema, or cannot travel.
            EventTooLargeError: It is over the size limit.
            BackpressureError: The fabric stayed full for `publish_timeout_s`.
            ClosedError: The publisher or broker is closed.
            NotConnectedError: The broker is not connected.
        """
        out = self._outgoing.get(event_type)
        if out is None:
            out = self._open(event_type)
        identity = event_id or new_id()
        parent = current_event.get()
        now = self._now()
        data = out.encode(data)
        if parent is None:
            event = Event(
                out.member,
                data,
                self.agent_name,
                now,
                correlation_id or identity,
                identity,
                causation_id,
                key,
            )
        else:
            event = Event(
                out.member,
                data,
                self.agent_name,
                now,
                correlation_id or parent.correlation_id,
                identity,
                causation_id or parent.id,
                key,
                None,
                parent.traceparent,
                None,
                parent.hops + 1,
            )
        if expires_in_s is not None or reply_to is not None:
            event = _with_terms(event, expires_in_s, reply_to)
        if self._chain is not None:
            await self._chain(event)
        elif not out.batched:
            await self._send_alone(out, event)
        elif self._add(out, event):
            await self._send_full(out)
        return event

    async def publish_event(self, event: Event) -> None:
        """
        Publish an event that is complete already, for replays and bridges.

        Raises:
            PayloadError: The payload does not fit its schema, or cannot travel.
            BackpressureError: The fabric stayed full.
        """
        data = codec.payload_encoder(str(event.type))(event.data)
        await (self._chain or self._enter)(msgspec.structs.replace(event, data=data))

    async def publish_batch(self, events: Iterable[tuple[str, Any]]) -> int:
        """
        Publish many events in order.

        Args:
            events: Pairs of event type and payload.

        Returns:
            How many were published: all, unless it raises.

        Raises:
            PayloadError: One payload does not fit; none after it is published.
            BackpressureError: The fabric stayed full.
        """
        count = 0
        for event_type, data in events:
            await self.publish(event_type, data)
            count += 1
        await self.flush()
        return count

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
        for attempt in range(max_retries + 1):
            try:
                await self.publish(event_type, data, correlation_id, key=key)
                await self.flush(min(_TRY_S, self.config.publish_timeout_s))
            except BrokerUnavailableError as error:
                failure = error
            else:
                return True
            if attempt < max_retries:
                await self.config.clock.sleep(policy.delay_s(attempt + 1))
        self._give_up(event_type, data, correlation_id, failure, attempts=max_retries + 1)
        return False

    async def flush(self, timeout_s: float | None = None) -> None:
        """
        Return when everything published so far has been handed to the fabric.

        Args:
            timeout_s: How long a full fabric is waited for; default `publish_timeout_s`.

        Raises:
            BackpressureError: The fabric stayed full.
        """
        for out in list(self._dirty):
            if not self._send(out):
                await self._wait_sent(out, timeout_s)

    async def close(self) -> None:
        """Send what is batched; publishing afterwards raises. The broker stays open."""
        if self._closed:
            return
        try:
            await self.flush()
        except BrokerUnavailableError as error:
            _log.warning("%s: events were lost at close: %s", self.agent_name, error)
        finally:
            self._closed = True
            if self._drainer is not None:
                self._drainer.cancel()
                await asyncio.gather(self._drainer, return_exceptions=True)

    # -- batches -------------------------------------------------------------------------------

    def _open(self, event_type: str) -> _Outgoing:
        topic = check_topic(event_type)
        self._require_open()
        at = 0 if topic.startswith(PRIVATE_PREFIX) else self._ledger.out(topic)
        if at and not self._cells[at + OUT_EPOCH]:
            # The numbering begins with the first event: whoever was ready before hears all of it
            self._cells[at + OUT_EPOCH] = int(self.config.clock.time_s() * 1e9)
        epoch = self._cells[at + OUT_EPOCH] if at else 0
        member = declaration_of(topic).member
        batched = epoch != 0 and self.config.wire_format != "json"
        encode = codec.payload_encoder(topic)
        out = _Outgoing(topic, at + OUT_SEQUENCE, epoch, member, batched, encode)
        self._outgoing[topic] = out
        return out

    async def _enter(self, event: Event) -> None:
        """Stand at the end of the middleware chain."""
        out = self._outgoing.get(event.type) or self._open(event.type)
        if not out.batched:
            await self._send_alone(out, event)
        elif self._add(out, event):
            await self._send_full(out)

    def _add(self, out: _Outgoing, event: Event) -> bool:
        """Put an event into its batch; True when the batch is full."""
        if self._closed:
            self._require_open()
        events = out.events
        before = len(events)
        try:
            self._pack_into(event, events, -1)
        except codec.CANNOT as error:
            del events[before:]
            raise PayloadError(f"payload of {event.type!r} cannot travel: {error}") from error
        size = len(events)
        if size - before > codec.MAX_EVENT_BYTES:
            del events[before:]
            raise codec.too_large(event, size - before)
        self._cells[out.sequence_at] += 1
        out.count = count = out.count + 1
        if count == 1:
            out.first = self._cells[out.sequence_at]
            self._dirty.append(out)
            if not self._flush_scheduled:
                self._flush_scheduled = True
                asyncio.get_running_loop().call_soon(self._flush_turn)
        return count >= codec.MAX_BATCH_EVENTS or size >= codec.MAX_BATCH_BYTES

    async def _send_alone(self, out: _Outgoing, event: Event) -> None:
        """Send an event as a message of its own: private topics, and the JSON form."""
        if self._closed:
            self._require_open()
        if self.config.wire_format != "json":
            frame = codec.encode_single(event)
        elif out.epoch:
            sequence = self._cells[out.sequence_at] + 1
            frame = codec.encode_json(event, epoch=out.epoch, sequence=sequence)
            self._cells[out.sequence_at] = sequence
        else:
            frame = codec.encode_json(event)
        await self._broker.send(out.topic, frame, self.config.publish_timeout_s)

    def _send(self, out: _Outgoing) -> bool:
        """Hand a batch to the fabric; False, and nothing changed, when it takes none now."""
        if not out.count:
            return True
        frame = codec.seal_batch(self._prefix, out.epoch, out.first, out.count, out.events)
        if not self._broker.try_send(out.topic, frame):
            return False
        self._clear(out)
        return True

    def _clear(self, out: _Outgoing) -> None:
        out.count = 0
        out.events.clear()
        self._dirty.remove(out)

    def _flush_turn(self) -> None:
        """Send everything at the end of the loop turn; leave the rest to a task if that fails."""
        self._flush_scheduled = False
        for out in list(self._dirty):
            try:
                sent = self._send(out)
            except (ClosedError, BrokerUnavailableError) as error:
                self._drop(out, error)
                continue
            if not sent:
                if self._drainer is None or self._drainer.done():
                    self._drainer = asyncio.get_running_loop().create_task(
                        self._drain(), name="publisher-drain"
                    )
                return

    async def _drain(self) -> None:
        try:
            await self.flush()
        except BrokerUnavailableError as error:
            _log.warning("%s: %s", self.agent_name, error)

    async def _send_full(self, out: _Outgoing) -> None:
        if not self._send(out):
            await self._wait_sent(out)
        self._full_batches += 1
        if self._full_batches % _BATCHES_A_TURN == 0:
            await asyncio.sleep(0)

    async def _wait_sent(self, out: _Outgoing, timeout_s: float | None = None) -> None:
        limit_s = self.config.publish_timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                while not self._send(out):
                    await self._broker.wait_sendable()
        except TimeoutError:
            error = BackpressureError(
                f"{self._broker.fabric} took no event on {out.topic!r} for {limit_s:g} s;"
                " is a consumer stopped, or the fabric down?"
            )
            self._drop(out, error)
            raise error from None

    def _drop(self, out: _Outgoing, error: Exception) -> None:
        """Give a batch up. Its sequence numbers are spent, so every consumer counts the loss."""
        self._ledger.count("unsent", out.count)
        _log.warning("%s lost %d events on %s: %s", self.agent_name, out.count, out.topic, error)
        self._clear(out)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the publisher of {self.agent_name!r} is closed; make a new one")

    def _give_up(
        self,
        event_type: str,
        data: Any,
        correlation_id: str | None,
        error: Exception,
        *,
        attempts: int,
    ) -> None:
        identity = new_id()
        plain = msgspec.to_builtins(data) if not isinstance(data, dict) else data
        event = Event(
            str(event_type),
            plain,
            self.agent_name,
            self._now(),
            correlation_id or identity,
            identity,
        )
        self.dead_letters.put_event(event, "unpublished", error, attempts=attempts)
        _log.error(
            "%s could not publish %s after %d tries and keeps it as a dead letter: %s",
            self.agent_name,
            event_type,
            attempts,
            error,
        )


def _with_terms(event: Event, expires_in_s: float | None, reply_to: str | None) -> Event:
    expires_at = None if expires_in_s is None else event.timestamp + timedelta(seconds=expires_in_s)
    termed: Event = msgspec.structs.replace(event, expires_at=expires_at, reply_to=reply_to)
    return termed
