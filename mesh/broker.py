"""
The contract of live delivery: bytes under a topic, from any process to all that subscribed.

A broker moves frames and knows nothing of handlers, retries or spans. Its members live in
`mesh.brokers`; each passes the same suite (tests/contract). The dict-level ``publish`` and
``subscribe`` are written here once, on top of the frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from mesh import codec
from mesh.cancelling import shed
from mesh.clock import SYSTEM_CLOCK
from mesh.errors import (
    BackpressureError,
    ClosedError,
    FrameError,
    HandlerSignatureError,
    MeshError,
    NotConnectedError,
)
from mesh.events import Event
from mesh.journal import Feature
from mesh.payloads import payload_encoder
from mesh.topics import (
    MAX_TOPIC_LENGTH,
    PRIVATE_PREFIX,
    REPLAY_PREFIX,
    check_topic,
    replay_topic,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
    from types import TracebackType

    from mesh.deadletters import DeadLetter
    from mesh.journal import Journal

_log = logging.getLogger(__name__)

#: How long a publisher waits for a full fabric before it gives up.
PUBLISH_TIMEOUT_S = 10.0
#: Under this and a topic's name travels the news that the journal holds more of it.
WAKE_PREFIX = f"{PRIVATE_PREFIX}kept."


class Receiver(Protocol):
    """What a broker hands frames to. Both calls come from the loop and must not block."""

    def receive(self, topic: str, frame: bytes) -> None:
        """Take a frame; anything may be in it."""
        ...

    def has_room(self) -> bool:
        """Say whether another frame is welcome; when not, the broker stops reading."""
        ...


class MessageBroker(ABC):
    """
    Live publish and subscribe.

    Promises of every member: at most once; in order per publisher and topic; a frame reaches every
    receiver that was attached when it was sent; a receiver without room slows or loses only what
    the member documents, and a loss shows as a gap in the sequence numbers.
    """

    #: The name of the fabric, as in the configuration.
    fabric: ClassVar[str]

    def __init__(self) -> None:
        """Begin unconnected."""
        self._closed = False
        self._channels: dict[str, list[_Channel]] = {}
        self._journal: Journal | None = None
        #: Whether readers in other processes need to be woken over the broker.
        self._wakes_readers = False
        self._opening = asyncio.Lock()

    # -- what a member brings ------------------------------------------------------------------

    @abstractmethod
    async def connect(self) -> None:
        """
        Join the fabric; returns when what is published from now on reaches those who listen.

        Raises:
            BrokerUnavailableError: The fabric does not answer.
        """

    @abstractmethod
    async def attach(self, topics: Collection[str], receiver: Receiver) -> None:
        """
        Deliver frames of these topics to the receiver; returns when the subscription is in force.

        Raises:
            NotConnectedError: `connect()` was not called.
            TopicError: A topic breaks the grammar.
        """

    @abstractmethod
    async def detach(self, receiver: Receiver) -> None:
        """Deliver nothing more to this receiver; unknown ones are ignored."""

    @abstractmethod
    def resume(self, receiver: Receiver) -> None:
        """Go on reading for a receiver that has room again."""

    @abstractmethod
    def try_send(self, topic: str, frame: bytes) -> bool:
        """
        Send without waiting.

        Returns:
            False when the fabric takes nothing now; then await `wait_sendable`.
        """

    @abstractmethod
    async def wait_sendable(self) -> None:
        """Return when `try_send` is worth another try."""

    @abstractmethod
    async def synchronize(self) -> None:
        """
        Return when all that is subscribed to by now, by anybody, gets what is sent from now on.

        `attach` makes sure that the fabric knows a subscription; a publisher elsewhere may learn of
        it a moment later. Sources wait here before their first event.
        """

    @abstractmethod
    def make_journal(self) -> Journal:
        """Make the journal of the same fabric, not connected: what `open_journal` opens."""

    @abstractmethod
    async def _close(self) -> None:
        """Leave the fabric."""

    # -- what all share ------------------------------------------------------------------------

    async def close(self) -> None:
        """Leave the fabric; can be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._journal is not None:
            await self._journal.close()
        await self._close()

    @property
    def has_journal(self) -> bool:
        """Say whether `open_journal` was asked for already."""
        return self._journal is not None

    async def open_journal(self) -> Journal:
        """
        Give the fabric's journal, which keeps durable events; opened when first asked for.

        It is closed with the broker. Where its readers in other processes cannot wake by
        themselves, wake-ups travel over the broker.

        Raises:
            ConfigurationError: The store cannot keep what it promises; the message says why.
            BrokerUnavailableError: It does not answer.
        """
        async with self._opening:
            if self._closed:
                self._require_open(connected=True)
            if self._journal is None:
                journal = self.make_journal()
                await journal.connect()
                self._wakes_readers = (
                    Feature.SHARED in journal.features and Feature.REMOTE not in journal.features
                )
                journal.on_append = self._tell_readers
                self._journal = journal
            return self._journal

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """
        Keep dead letters in the fabric's journal.

        Raises:
            BrokerUnavailableError: It does not answer.
        """
        await (await self.open_journal()).bury(letters)

    async def wake_on_append(self, topics: Collection[str]) -> None:
        """Let this process's journal look again when another process has appended to a topic."""
        journal = await self.open_journal()
        if self._wakes_readers:
            await self.attach([wake_topic(topic) for topic in topics], _Waker(journal))

    async def hear_replays(self, group: str, receiver: Receiver) -> None:
        """
        Give a receiver a frame, of whatever bytes, when a dead letter of a group is replayed.

        For agents that do not read the journal, and need not before that.
        """
        await self.attach([wake_topic(replay_topic(group))], receiver)

    async def awaits_replay(self, group: str) -> bool:
        """
        Say whether dead letters of a group may have been replayed while it did not listen.

        Opens no journal. Once there was a replay the answer may stay yes.
        """
        if self._journal is None:
            return False
        topic = replay_topic(group)
        return any(
            (each.group, each.topic) == (group, topic) for each in await self._journal.groups()
        )

    def _tell_readers(self, topics: Collection[str]) -> None:
        for topic in topics:
            if not self._wakes_readers and not topic.startswith(REPLAY_PREFIX):
                continue
            # A fabric that is away or full loses it; readers look once a second all the same
            with contextlib.suppress(MeshError):
                self.try_send(wake_topic(topic), b"!")

    async def send(self, topic: str, frame: bytes, timeout_s: float = PUBLISH_TIMEOUT_S) -> None:
        """
        Send a frame, waiting while the fabric is full.

        Raises:
            BackpressureError: It stayed full for `timeout_s` seconds.
        """
        if self.try_send(topic, frame):
            return
        try:
            async with asyncio.timeout(timeout_s):
                while not self.try_send(topic, frame):
                    await self.wait_sendable()
        except TimeoutError:
            why = self.trouble() or "is a consumer stopped, or the fabric down?"
            raise BackpressureError(
                f"{self.fabric} took no event on {topic!r} for {timeout_s:g} s; {why}"
            ) from None

    def trouble(self) -> str:
        """Say why nothing can be sent, where the member knows; else empty."""
        return ""

    @property
    def is_connected(self) -> bool:
        """Say whether `connect` was called; where there is nothing to connect to, always."""
        return True

    @property
    def is_away(self) -> bool:
        """Say whether the fabric is known to be gone, though the member still takes frames."""
        return False

    async def reach(self, timeout_s: float) -> None:
        """
        Return when the fabric is not away: what is sent then does not only wait in a queue.

        Raises:
            BackpressureError: It stayed away for `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self.is_away:
                    await self.wait_sendable()
        except TimeoutError:
            raise BackpressureError(f"{self.trouble()} (waited {timeout_s:g} s)") from None

    def require_connected(self) -> None:
        """
        Let nobody begin who could not go on.

        Raises:
            NotConnectedError: `connect()` was not called; says so.
            ClosedError: The broker is closed.
        """
        self._require_open(connected=self.is_connected)

    async def publish(self, channel: str, message: Mapping[str, Any]) -> None:
        """
        Send one dict on a channel, as a CloudEvent whose type is the channel.

        Args:
            channel: A topic.
            message: A JSON-like object.

        Raises:
            NotConnectedError: `connect()` was not called.
            PayloadError: The message cannot travel.
            BackpressureError: The fabric stayed full.
        """
        topic = check_topic(channel)
        data = payload_encoder(topic)(dict(message))
        event = Event(type=topic, data=data, source_agent=self.fabric, timestamp=SYSTEM_CLOCK.now())
        await self.send(topic, codec.encode_single(event))

    async def subscribe(
        self, channel: str, handler: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> None:
        """
        Call a coroutine function with each dict published on a channel, one after the other.

        Args:
            channel: A topic.
            handler: Gets the dict; what it raises is logged and does not stop the channel.

        Raises:
            HandlerSignatureError: The handler is no coroutine function.
            NotConnectedError: `connect()` was not called.
            ClosedError: The broker is closed.
        """
        topic = check_topic(channel)
        called = getattr(handler, "__call__", None)  # noqa: B004 - its kind, not whether it is there
        if not any(map(inspect.iscoroutinefunction, (inspect.unwrap(handler), called))):
            raise HandlerSignatureError(
                f"the handler of channel {channel!r}, {handler!r}, is not a coroutine function:"
                " write `async def handler(message: dict)`"
            )
        self.require_connected()
        bound = _Channel(self, handler)
        try:
            await self.attach([topic], bound)
        except BaseException:
            await self.detach(bound)
            await bound.stop()
            raise
        self._channels.setdefault(topic, []).append(bound)

    async def _close_channels(self) -> None:
        for bound in [bound for group in self._channels.values() for bound in group]:
            await self.detach(bound)
            await bound.stop()
        self._channels.clear()

    def _require_open(self, *, connected: bool) -> None:
        if self._closed:
            raise ClosedError(f"this {type(self).__name__} is closed; make a new one")
        if not connected:
            raise NotConnectedError(
                f"{type(self).__name__} is not connected; call `await broker.connect()` first"
            )

    async def __aenter__(self) -> Self:
        """Connect."""
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()


def wake_topic(topic: str) -> str:
    """Give the topic of the news that the journal holds more of another topic."""
    # Cut where a topic is too long; whoever is woken for another one's sake looks in vain once
    return (WAKE_PREFIX + topic)[:MAX_TOPIC_LENGTH]


class _Waker:
    """Hands wake-ups on to a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def receive(self, topic: str, frame: bytes) -> None:
        self._journal.wake()

    def has_room(self) -> bool:
        return True


class _Channel:
    """One dict-level subscription: a bounded queue and the task that empties it."""

    MAX_QUEUED = 1000

    def __init__(
        self, broker: MessageBroker, handler: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> None:
        self._broker = broker
        self._handler = handler
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._full = False
        self._stopped = False
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run(), name="channel")
        #: Runs nobody's code: when it is cancelled, the loop ends.
        self._sentry = loop.create_task(asyncio.Event().wait(), name="channel-sentry")

    def receive(self, topic: str, frame: bytes) -> None:
        try:
            batch = codec.decode_frame(topic, frame)
        except FrameError as error:
            _log.warning("dropped a frame on %s: %s", topic, error)
            return
        for event in batch.events:
            self._queue.put_nowait(event.data)

    def has_room(self) -> bool:
        self._full = self._queue.qsize() >= self.MAX_QUEUED
        return not self._full

    async def stop(self) -> None:
        self._stopped = True
        self._task.cancel()
        self._sentry.cancel()
        await asyncio.gather(self._task, self._sentry, return_exceptions=True)

    def _is_ending(self) -> bool:
        return self._stopped or self._sentry.done() or self._sentry.cancelling() > 0

    async def _run(self) -> None:
        while not self._is_ending():
            message = await self._queue.get()
            try:
                await self._handler(message)
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and self._is_ending():
                    raise
                _log.exception("the channel's handler failed; the channel goes on")
            if self._task.cancelling() and not self._is_ending():
                await shed(self._task)
            if self._full and self._queue.qsize() < self.MAX_QUEUED // 2:
                self._full = False
                self._broker.resume(self)


#: The owner's import paths: members can be imported from here, and load when they are asked for.
_MEMBERS = {
    "InMemoryMessageBroker": "mesh.brokers.memory",
    "RedisMessageBroker": "mesh.brokers.redis",
    "ZeroMQMessageBroker": "mesh.brokers.zeromq",
}


def __getattr__(name: str) -> Any:
    if name in _MEMBERS:
        return getattr(importlib.import_module(_MEMBERS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
