"""
Live delivery inside one process: ready at once, for tests and local development.

Frames are encoded and decoded like on any other fabric, so a test fails where production would. A
full receiver slows its publishers (they wait) instead of losing anything.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from mesh.broker import MessageBroker
from mesh.journals.memory import MemoryJournal
from mesh.topics import check_topic

if TYPE_CHECKING:
    from collections.abc import Collection

    from mesh.broker import Receiver
    from mesh.journal import Journal


class InMemoryMessageBroker(MessageBroker):
    """A fabric of plain function calls."""

    fabric: ClassVar[str] = "memory"

    def __init__(self) -> None:
        """Make an empty fabric."""
        super().__init__()
        self._receivers: dict[str, tuple[Receiver, ...]] = {}
        self._room: asyncio.Event | None = None

    async def connect(self) -> None:
        """Do nothing: memory is always there."""
        self._require_open(connected=True)

    async def attach(self, topics: Collection[str], receiver: Receiver) -> None:
        """Deliver frames of these topics to the receiver from now on."""
        self._require_open(connected=True)
        for topic in topics:
            known = self._receivers.get(check_topic(topic), ())
            if receiver not in known:
                self._receivers[str(topic)] = (*known, receiver)

    async def detach(self, receiver: Receiver) -> None:
        """Deliver nothing more to this receiver."""
        for topic, known in list(self._receivers.items()):
            left = tuple(each for each in known if each is not receiver)
            if left:
                self._receivers[topic] = left
            else:
                del self._receivers[topic]
        self.resume(receiver)

    def resume(self, receiver: Receiver) -> None:
        """Wake the publishers that wait for room."""
        if self._room is not None:
            self._room.set()
            self._room = None

    def try_send(self, topic: str, frame: bytes) -> bool:
        """Hand the frame to every receiver, unless one of them is full."""
        if self._closed:
            self._require_open(connected=True)
        receivers = self._receivers.get(topic)
        if receivers is None:
            return True
        for receiver in receivers:
            if not receiver.has_room():
                return False
        for receiver in receivers:
            receiver.receive(topic, frame)
        return True

    async def wait_sendable(self) -> None:
        """Wait until a receiver says that it has room."""
        if self._room is None:
            self._room = asyncio.Event()
        await self._room.wait()

    def hears(self, topic: str) -> bool:
        """Say whether anybody is subscribed to a topic."""
        return topic in self._receivers

    async def synchronize(self) -> None:
        """Do nothing: there is one list of subscriptions, and everybody reads it."""

    def make_journal(self) -> Journal:
        """Give a journal in memory, as durable as this process."""
        return MemoryJournal()

    async def _close(self) -> None:
        await self._close_channels()
        self._receivers.clear()
        self.resume_all()

    def resume_all(self) -> None:
        """Let waiting publishers see that the fabric is closed."""
        if self._room is not None:
            self._room.set()
            self._room = None
