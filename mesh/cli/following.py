"""Durable events as they are kept, for `mesh tail`: read from the journal, in nobody's group."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

from mesh import codec
from mesh.broker import wake_topic
from mesh.errors import BrokerUnavailableError, FrameError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from types import TracebackType

    from mesh.broker import MessageBroker
    from mesh.events import Event
    from mesh.journal import Journal

#: The journal is looked at so often at least: a wake-up may be lost, and not every fabric has them.
_LOOK_S = 0.5
#: More topics are looked for among all that is kept.
_MAX_TOPICS = 100


class Follower:
    """
    Shows what the journal keeps from now on.

    Args:
        broker: Connected; carries wake-ups.
        topics: What to show.
        show: Called with each event.
    """

    def __init__(
        self,
        broker: MessageBroker,
        topics: Collection[str],
        show: Callable[[Event], Awaitable[None]],
    ) -> None:
        """Look at nothing yet."""
        self._broker = broker
        self._topics = frozenset(topics)
        self._show = show
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin; what is kept from now on is shown."""
        journal = await self._broker.open_journal()
        place = await journal.newest()
        await self._broker.attach([wake_topic(topic) for topic in self._topics], self)
        self._task = asyncio.create_task(self._follow(journal, place), name="follow-the-journal")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""
        await self._broker.detach(self)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def receive(self, topic: str, frame: bytes) -> None:
        """Take a wake-up."""
        self._woken.set()

    def has_room(self) -> bool:
        """Say yes: wake-ups do not pile up."""
        return True

    async def _follow(self, journal: Journal, place: int | str | None) -> None:
        wanted = self._topics if len(self._topics) <= _MAX_TOPICS else None
        while True:
            self._woken.clear()
            # A journal that is away comes back, or the agents' own logs tell why not
            with contextlib.suppress(BrokerUnavailableError):
                while page := await journal.scan(wanted, after=place):
                    place = page[-1].position
                    for stored in page:
                        if stored.topic in self._topics:
                            await self._tell(stored.topic, stored.frame)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._woken.wait()

    async def _tell(self, topic: str, frame: bytes) -> None:
        # Whoever hears it puts aside what is no event
        with contextlib.suppress(FrameError):
            for event in codec.decode_frame(topic, frame).events:
                await self._show(event)
