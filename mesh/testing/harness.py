"""One agent on a fabric of memory, spoken to and listened to by a test."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

from mesh import codec
from mesh.agent import Agent
from mesh.brokers.memory import InMemoryMessageBroker
from mesh.clock import SYSTEM_CLOCK
from mesh.inprocess import InProcessMesh
from mesh.journals.memory import MemoryJournal
from mesh.journals.memory_store import MemoryStore
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.topics import PRIVATE_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from mesh.clock import Clock
    from mesh.config import MessageBusConfig
    from mesh.deadletters import DeadLetter
    from mesh.events import Event
    from mesh.journal import Journal, Record

_Agent = TypeVar("_Agent", bound=Agent)
#: Under this name the harness speaks.
TESTER = "test"


class AgentHarness(Generic[_Agent]):
    """
    Runs one agent; `say` events to it and `expect` what it says.

    Args:
        kind: The agent's class.
        params: Its parameters.
        config: Settings; the fabric is memory whatever they say.
        clock: Time; tests bring a `FakeClock`.
    """

    def __init__(
        self,
        kind: type[_Agent],
        *,
        params: Mapping[str, str] | None = None,
        config: MessageBusConfig | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Make the agent; nothing runs yet."""
        self._tap = _Tap()
        self.mesh = InProcessMesh(
            [kind], params=params, config=config, clock=clock, broker=self._tap
        )
        #: The agent itself.
        self.agent = cast("_Agent", next(iter(self.mesh.agents.values())))
        self._publisher = EventPublisher(
            PublisherConfig(agent_name=TESTER, broker=self._tap, clock=clock)
        )
        #: How far `expect` has come, by type.
        self._read: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        """Open the agent and let its sources speak."""
        await self.mesh.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the agent; what its source raised is raised here."""
        await self._publisher.close()
        await self.mesh.__aexit__(kind, error, trace)

    @property
    def heard(self) -> list[Event]:
        """Give all events the agent has said so far, in order."""
        return list(self._tap.events)

    @property
    def dead_letters(self) -> list[DeadLetter]:
        """Give what the agent has put aside."""
        return list(self.agent.publisher.dead_letters.newest)

    async def say(
        self,
        event_type: str,
        data: Any,
        *,
        key: str | None = None,
        correlation_id: str | None = None,
        expires_in_s: float | None = None,
    ) -> Event:
        """
        Publish an event for the agent to hear; returns when it is in the agent's inbox.

        Raises:
            PayloadError: The payload does not fit.
        """
        event = await self._publisher.publish(
            event_type, data, correlation_id, key=key, expires_in_s=expires_in_s
        )
        await self._publisher.flush()
        return event

    async def ask(self, event_type: str, data: Any, *, timeout_s: float = 5.0) -> Any:
        """Send a request; returns the payload of the reply."""
        return await self.mesh.request(event_type, data, timeout_s=timeout_s)

    async def expect(
        self,
        event_type: str,
        *,
        timeout_s: float = 5.0,
        where: Callable[[Event], bool] | None = None,
    ) -> Event:
        """
        Return the next event of a type that the agent says or has said.

        Each call goes on behind the event that the last one for this type gave.

        Args:
            event_type: What is expected.
            timeout_s: How long to wait, in real time.
            where: Skip events for which this does not hold.

        Raises:
            AssertionError: It did not come; the message tells what came instead.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    found = self._next(str(event_type), where)
                    if found is not None:
                        return found
                    await self._tap.next_event()
        except TimeoutError:
            raise AssertionError(
                f"{self.agent.name} did not say {str(event_type)!r} within {timeout_s:g} s;"
                f" {self._report()}"
            ) from None

    async def expect_nothing(self, event_type: str | None = None) -> None:
        """
        Check that all is handled and the agent said nothing that was not expected before.

        Args:
            event_type: Of this type only.

        Raises:
            AssertionError: It said something; the message tells what.
        """
        await self.quiet()
        wanted = {event_type} if event_type else {event.type for event in self._tap.events}
        unread = [
            event
            for name in sorted(wanted)
            for event in self._tap.of(str(name))[self._read.get(str(name), 0) :]
        ]
        if unread:
            listed = "; ".join(f"{event.type} {event.data}" for event in unread[:10])
            raise AssertionError(f"{self.agent.name} said {len(unread)} more: {listed}")

    async def quiet(self) -> None:
        """Return when everything said to and by the agent has been handled."""
        await self.mesh.quiet()

    def _next(self, topic: str, where: Callable[[Event], bool] | None) -> Event | None:
        for number, event in enumerate(self._tap.of(topic)):
            if number >= self._read.get(topic, 0) and (where is None or where(event)):
                self._read[topic] = number + 1
                return event
        return None

    def _report(self) -> str:
        said = ", ".join(str(event.type) for event in self._tap.events[-10:]) or "nothing"
        dead = "".join(
            f"; put aside {letter.topic}: {letter.error}" for letter in self.dead_letters[-3:]
        )
        return f"it said {said}{dead}"


class _Tap(InMemoryMessageBroker):
    """A fabric of memory that shows the test what passes, also what nobody listens to."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._by_topic: dict[str, list[Event]] = {}
        self._came = asyncio.Event()

    def try_send(self, topic: str, frame: bytes) -> bool:
        """Send, and keep what an agent has said."""
        sent = super().try_send(topic, frame)
        if sent and not topic.startswith(PRIVATE_PREFIX):
            self.note(topic, frame)
        return sent

    def make_journal(self) -> Journal:
        """Give a journal that shows what is kept."""
        return MemoryJournal(_TapStore(self.note))

    def note(self, topic: str, frame: bytes) -> None:
        """Keep what an agent has said."""
        batch = codec.decode_frame(topic, frame)
        said = [event for event in batch.events if event.source_agent not in (TESTER, "mesh")]
        if said:
            self.events += said
            self._by_topic.setdefault(topic, []).extend(said)
            self._came.set()

    def of(self, topic: str) -> list[Event]:
        """Give what was said of a type."""
        return self._by_topic.get(topic, [])

    async def next_event(self) -> None:
        """Return when something more was said."""
        self._came.clear()
        await self._came.wait()


class _TapStore(MemoryStore):
    """What a journal keeps, shown to the test."""

    def __init__(self, note: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._note = note

    def add(self, record: Record) -> bool:
        """Keep an event, and show it when it is new."""
        new = super().add(record)
        if new and not record.topic.startswith(PRIVATE_PREFIX):
            self._note(record.topic, record.frame)
        return new
