"""
What an agent has published and the fabric has not taken yet: one batch a topic, numbered.

Batches form by themselves. The first event of a loop turn leaves at once; those that follow in the
same turn travel together, one frame a type, which leaves at the end of the turn, or at 512 events,
or at 64 KiB. No timer is ever waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any

from mesh import codec
from mesh.context import current_context
from mesh.errors import BackpressureError, BrokerUnavailableError, ClosedError, ConfigurationError
from mesh.events import declaration_of, is_durable
from mesh.journal import Record, cannot_keep
from mesh.ledger import OUT_BEGAN, OUT_EPOCH, OUT_SEQUENCE
from mesh.logs import Sparing
from mesh.payloads import payload_encoder, payloads_encoder, payloads_packer
from mesh.topics import PRIVATE_PREFIX, check_topic
from mesh.values import State, field

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mesh.broker import MessageBroker
    from mesh.clock import Clock
    from mesh.columns import Table
    from mesh.events import Event
    from mesh.journal import Journal
    from mesh.ledger import Ledger

_log = logging.getLogger(__name__)

#: A publisher that never waits gives the loop a turn after so many full batches.
_BATCHES_A_TURN = 4


class Outgoing(State, eq=False):
    """What goes out on one topic, and the batch of it that is being filled."""

    topic: str
    #: What `event.type` shows.
    member: str
    #: Checks a payload and gives what travels.
    encode: Callable[[Any], Any]
    encode_all: Callable[[Sequence[Any]], list[Any]]
    pack_all: Callable[[Sequence[Any]], Any]
    #: When the numbering began (ns since 1970); 0: private topics are not numbered.
    epoch: int
    #: Where the ledger keeps the number of the last event.
    sequence_at: int
    sequence: int
    #: False: every event is a message of its own.
    batched: bool
    #: The journal keeps it; it never enters a batch.
    durable: bool = False
    #: Bytes of payload in the batch.
    size: int = 0
    #: Its events have nothing that most have not: see `columns.tabulate`.
    plain: bool = True
    events: list[Event] = field(default_factory=list)
    #: Batches that are closed and older than `events`: how many events, and the frame.
    closed: deque[tuple[int, bytes]] = field(default_factory=deque)


class Outbox:
    """
    The batches of one publisher.

    Args:
        agent_name: In whose name they leave.
        broker: Where they go.
        ledger: Where they are numbered.
        clock: When numbering begins.
        wire_format: ``msgpack`` or ``json``.
        timeout_s: How long a full fabric is waited for.
    """

    def __init__(
        self,
        agent_name: str,
        broker: MessageBroker,
        ledger: Ledger,
        clock: Clock,
        wire_format: str,
        timeout_s: float,
    ) -> None:
        """Begin empty."""
        self._agent_name = agent_name
        self._broker = broker
        self._journal: Journal | None = None
        self._try_send = broker.try_send
        self._ledger = ledger
        self._cells = ledger.cells
        self._clock = clock
        self._json = wire_format == "json"
        self._timeout_s = timeout_s
        self._batcher = codec.Batcher(agent_name)
        #: What has something to send, in order.
        self._dirty: dict[Outgoing, None] = {}
        #: True from the first event of a loop turn to the end of the turn.
        self._in_turn = False
        self._drainer: asyncio.Task[None] | None = None
        self._full_batches = 0
        #: Events and frames that left since `events_a_frame` was asked last, and its answer.
        self._sent, self._frames, self._density = 0, 0, math.inf
        self._closed = False
        self._sparing = Sparing(_log)

    def open(self, event_type: str) -> Outgoing:
        """
        Make what is needed to publish on a topic.

        Raises:
            TopicError: The type breaks the topic grammar.
            ClosedError: The publisher or the broker is closed.
            NotConnectedError: The broker is not connected; nothing is numbered or kept.
        """
        topic = check_topic(event_type)
        self._require_open()
        self._broker.require_connected()
        encode, encode_all = payload_encoder(topic), payloads_encoder(topic)
        pack_all = payloads_packer(topic)
        member = declaration_of(topic).member
        if topic.startswith(PRIVATE_PREFIX) or is_durable(topic):
            durable = not topic.startswith(PRIVATE_PREFIX)
            return Outgoing(
                topic, member, encode, encode_all, pack_all, 0, 0, 0, batched=False, durable=durable
            )
        at, cells = self._ledger.out(topic), self._cells
        if not cells[at + OUT_EPOCH]:
            # The numbering begins with the first event: whoever was ready before hears all of it
            cells[at + OUT_EPOCH] = cells[at + OUT_BEGAN] = int(self._clock.time_s() * 1e9)
        sequence_at = at + OUT_SEQUENCE
        return Outgoing(
            topic,
            member,
            encode,
            encode_all,
            pack_all,
            cells[at + OUT_EPOCH],
            sequence_at,
            cells[sequence_at],
            batched=not self._json,
        )

    def add(self, out: Outgoing, event: Event, size: int) -> bool:
        """
        Put an event into its batch.

        Args:
            out: What its topic's `open` gave.
            event: Its payload comes from `out.encode`.
            size: Bytes of its payload.

        Returns:
            True when the batch is full: then await `send_full`.

        Raises:
            ClosedError: The publisher or the broker is closed.
            BrokerUnavailableError: The fabric cannot be reached; the event is counted as lost.
        """
        events = out.events
        events.append(event)
        out.size += size
        self._cells[out.sequence_at] = out.sequence = out.sequence + 1
        if len(events) == 1:
            self._begin(out)
            return out.size >= codec.MAX_BATCH_BYTES
        return len(events) >= codec.MAX_BATCH_EVENTS or out.size >= codec.MAX_BATCH_BYTES

    def _begin(self, out: Outgoing) -> None:
        """Look after a batch with its first event; at the start of a turn it leaves at once."""
        if self._closed:
            self._empty(out)
            self._require_open()
        self._dirty[out] = None
        if self._in_turn:
            return
        self._in_turn = True
        asyncio.get_running_loop().call_soon(self._end_turn)
        try:
            self._send(out)
        except (ClosedError, BrokerUnavailableError) as error:
            self._drop(out, error)
            raise

    def pack(self, out: Outgoing, payloads: list[Any]) -> list[tuple[int, Any]]:
        """
        Check many payloads and encode them, as many together as a batch may hold.

        Args:
            out: What their topic's `open` gave.
            payloads: Of that topic.

        Returns:
            How many, and their encoded list, for the ``data`` of a table.

        Raises:
            PayloadError: One payload does not fit, or cannot travel.
            EventTooLargeError: One is over the size limit.
        """
        parts: list[tuple[int, Any]] = []
        for begun in range(0, len(payloads), codec.MAX_BATCH_EVENTS):
            some = payloads[begun : begun + codec.MAX_BATCH_EVENTS]
            packed = out.pack_all(some)
            if packed is not None and len(packed) <= codec.MAX_BATCH_BYTES:
                parts.append((len(some), packed))
                continue
            held: list[Any] = []
            size = 0
            for each in out.encode_all(some):
                if held and size + len(each) > codec.MAX_BATCH_BYTES:
                    parts.append((len(held), held))
                    held, size = [], 0
                held.append(each)
                size += len(each)
            parts.append((len(held), held))
        return parts

    async def add_table(self, out: Outgoing, table: Table) -> None:
        """
        Send many events of one topic, in a batch of their own.

        Args:
            out: What their topic's `open` gave.
            table: Its payloads come from `pack`.

        Raises:
            ClosedError: The publisher or the broker is closed.
            BackpressureError: The fabric stayed full.
        """
        self._require_open()
        if out.events:
            self._close_batch(out)
        self._dirty[out] = None
        count = len(table.id)
        frame = self._batcher.encode_table(table, out.epoch, out.sequence + 1)
        self._cells[out.sequence_at] = out.sequence = out.sequence + count
        out.closed.append((count, frame))
        await self.send_full(out)

    async def send_alone(self, out: Outgoing, event: Event) -> None:
        """Send an event as a message of its own: private topics, and the JSON form."""
        if self._closed:
            self._require_open()
        if not self._json:
            frame = codec.encode_single(event)
        elif out.epoch:
            frame = codec.encode_json(event, epoch=out.epoch, sequence=out.sequence + 1)
            self._cells[out.sequence_at] = out.sequence = out.sequence + 1
        else:
            frame = codec.encode_json(event)
        self._count_sent(1)
        await self._broker.send(out.topic, frame, self._timeout_s)

    async def keep(self, out: Outgoing, events: Sequence[Event]) -> None:
        """
        Give durable events to the journal; returns when they are kept.

        Inside the handler of a durable event they become part of its step instead, and are kept
        together with the settling of that event.

        Args:
            out: What their topic's `open` gave.
            events: Their payloads come from `out.encode`.

        Raises:
            ClosedError: The publisher or the broker is closed.
            BackpressureError: The journal stayed full, or its lock was held too long.
            BrokerUnavailableError: It does not answer.
            ConfigurationError: It cannot keep what durable types promise.
        """
        self._require_open()
        encode_all = _encode_in_json if self._json else codec.encode_singles
        records = [
            Record(out.topic, event.id, frame, event.key)
            for event, frame in zip(events, encode_all(events), strict=True)
        ]
        context = current_context.get()
        if context is not None:
            if context.is_open:
                context.records += records
                return
            context.require_not_failed()
        if self._journal is None:
            try:
                self._journal = await self._broker.open_journal()
            except ConfigurationError as error:
                raise cannot_keep([out.topic], self._broker.fabric, error) from None
        await self._journal.append(records)
        self._ledger.count_said(out.topic, len(records), self._clock.time_s())

    async def send_full(self, out: Outgoing) -> None:
        """
        Send a full batch; now and then give the loop a turn.

        Raises:
            BackpressureError: The fabric stayed full; the batch is counted as lost.
        """
        if not self._send(out):
            await self._wait_sent(out, self._timeout_s)
        self._full_batches += 1
        if self._full_batches % _BATCHES_A_TURN == 0:
            await asyncio.sleep(0)

    async def flush(self, timeout_s: float | None = None) -> None:
        """
        Return when everything so far has been handed to the fabric.

        Raises:
            BackpressureError: The fabric stayed full.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        for out in list(self._dirty):
            if not self._send(out):
                await self._wait_sent(out, limit_s)

    async def close(self) -> None:
        """Send what is batched; adding afterwards raises."""
        if self._closed:
            return
        try:
            await self.flush()
        except BrokerUnavailableError as error:
            _log.warning("%s: events were lost at close: %s", self._agent_name, error)
        finally:
            self._closed = True
            if self._drainer is not None:
                self._drainer.cancel()
                await asyncio.gather(self._drainer, return_exceptions=True)

    def events_a_frame(self) -> float:
        """Tell how many live events shared a frame since this was asked last; none: infinite."""
        if self._frames:
            self._density = self._sent / self._frames
            self._sent = self._frames = 0
        return self._density

    def _count_sent(self, events: int) -> None:
        self._sent += events
        self._frames += 1

    def _send(self, out: Outgoing) -> bool:
        """Hand all to the fabric; False, with the rest still here, when it takes no more now."""
        closed = out.closed
        while closed:
            # Nothing that is being sent stays here meanwhile: the fabric of memory runs handlers at
            # once, and those may publish the same type
            batch, sent = closed.popleft(), False
            try:
                sent = self._try_send(out.topic, batch[1])
            finally:
                if not sent:
                    closed.appendleft(batch)
            if not sent:
                return False
            self._count_sent(batch[0])
        if out.events and not self._send_open(out):
            return False
        if not out.events and not closed:
            self._dirty.pop(out, None)
        return True

    def _send_open(self, out: Outgoing) -> bool:
        """Send the batch that was being filled."""
        frame, events, size, plain = self._frame_of(out), out.events, out.size, out.plain
        if len(frame) > codec.MAX_FRAME_BYTES:
            self._close_batch(out)
            return self._send(out)
        self._empty(out)
        sent = False
        try:
            sent = self._try_send(out.topic, frame)
        finally:
            if not sent:
                out.events, out.size, out.plain = events, size, plain
        if sent:
            self._count_sent(len(events))
        return sent

    def _frame_of(self, out: Outgoing) -> bytes:
        events = out.events
        first = out.sequence - len(events) + 1
        return self._batcher.encode(out.topic, out.epoch, first, events, plain=out.plain)

    def _close_batch(self, out: Outgoing) -> None:
        """Let nothing more into a batch, for something younger leaves in another."""
        self._close_part(out, out.sequence - len(out.events) + 1, out.events)
        self._empty(out)

    def _close_part(self, out: Outgoing, first: int, events: list[Event]) -> None:
        """Close a part of a batch; keys and correlation ids can weigh more than the payloads."""
        frame = self._batcher.encode(out.topic, out.epoch, first, events, plain=out.plain)
        if len(frame) <= codec.MAX_FRAME_BYTES:
            out.closed.append((len(events), frame))
            return
        half = len(events) // 2
        self._close_part(out, first, events[:half])
        self._close_part(out, first + half, events[half:])

    def _clear(self, out: Outgoing) -> None:
        self._empty(out)
        out.closed.clear()
        self._dirty.pop(out, None)

    @staticmethod
    def _empty(out: Outgoing) -> None:
        out.events = []
        out.size, out.plain = 0, True

    def _end_turn(self) -> None:
        """Send everything at the end of the loop turn; leave the rest to a task if that fails."""
        self._in_turn = False
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
        # What was given up is said by `_drop`
        with contextlib.suppress(BrokerUnavailableError):
            await self.flush()

    async def _wait_sent(self, out: Outgoing, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                while not self._send(out):
                    await self._broker.wait_sendable()
        except TimeoutError:
            why = self._broker.trouble() or "is a consumer stopped, or the fabric down?"
            error = BackpressureError(
                f"{self._broker.fabric} took no event on {out.topic!r} for {limit_s:g} s; {why}"
            )
            self._drop(out, error)
            raise error from None

    def _drop(self, out: Outgoing, error: Exception) -> None:
        """Give a batch up. Its sequence numbers are spent, so every consumer counts the loss."""
        lost = len(out.events) + sum(count for count, _ in out.closed)
        if not lost:
            return  # somebody who waited for the same batch has given it up, or sent it
        self._ledger.count("unsent", lost)
        # Beats alone are one a second, and an outage can be long
        words = f"{self._agent_name} lost {lost} events on {out.topic}: {error}"
        self._sparing.say(out.topic, logging.WARNING, words)
        self._clear(out)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the publisher of {self._agent_name!r} is closed; make a new one")


def _encode_in_json(events: Sequence[Event]) -> list[bytes]:
    return [codec.encode_json(event) for event in events]
