"""One journal fabric for a test: several journals on one store, and a way to let leases end."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from mesh.deadletters import DeadLetter
from mesh.journal import LEASE_S, PARTITIONS, Delivery, Journal, Record, Step, partition_of
from mesh.journals.memory import MemoryJournal
from mesh.journals.memory_store import MemoryStore
from mesh.journals.redis import RedisJournal
from mesh.journals.sqlite import SQLiteJournal
from mesh.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class JournalFabric(ABC):
    """Opens journals that share one store, as if each were a process."""

    def __init__(self) -> None:
        self._opened: list[Journal] = []

    @abstractmethod
    def make(self) -> Journal:
        """Give one more journal on the store, not connected."""

    @abstractmethod
    async def let_leases_end(self) -> None:
        """Let the time of a lease pass."""

    async def open(self) -> Journal:
        journal = self.make()
        await self.take(journal)
        return journal

    async def take(self, journal: Journal) -> None:
        """Connect a journal, and close it with the others."""
        self._opened.append(journal)
        await journal.connect()

    async def close(self) -> None:
        for journal in self._opened:
            await journal.close()


class MemoryFabric(JournalFabric):
    def __init__(self) -> None:
        super().__init__()
        self._clock = FakeClock()
        self._store = MemoryStore(clock=self._clock)

    def make(self) -> Journal:
        return MemoryJournal(self._store)

    async def let_leases_end(self) -> None:
        await self._clock.advance(LEASE_S + 1)


class RedisFabric(JournalFabric):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        # A server that a developer names may forget what it likes
        volatile = "LEGION_TEST_REDIS_URL" in os.environ
        self.options: dict[str, Any] = {"allow_volatile": volatile, **options}

    def make(self) -> RedisJournal:
        return RedisJournal(**self.options)

    async def let_leases_end(self) -> None:
        """Put their ends into the past: Redis's clock belongs to nobody."""
        store = (await self.open())._store  # type: ignore[attr-defined]
        for group in await store.call(
            b"legion:default:groups", "SMEMBERS", "legion:default:groups"
        ):
            members = b"legion:default:group:{%b}:members" % group
            flat = await store.call(members, "HGETALL", members)
            for name, value in zip(flat[::2], flat[1::2], strict=True):
                incarnation, _, lease = value.split(b" ")
                await store.call(members, "HSET", members, name, b"%b 1 %b" % (incarnation, lease))


class SQLiteFabric(JournalFabric):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._clock = FakeClock()
        self._path = path

    def make(self) -> Journal:
        return SQLiteJournal(self._path, clock=self._clock)

    async def let_leases_end(self) -> None:
        await self._clock.advance(LEASE_S + 1)


#: A key of each partition.
KEYS = {partition_of(f"key-{number}"): f"key-{number}" for number in range(400)}
assert len(KEYS) == PARTITIONS


def records(*names: str, topic: str = "order", key: str | None = None) -> list[Record]:
    """Events called by their ids, all of one key when it is given."""
    return [Record(topic, name, b"frame of " + name.encode(), key) for name in names]


def numbered(count: int, *, keys: int = PARTITIONS, topic: str = "order") -> list[Record]:
    """Events e0, e1, ... over so many partitions in turn."""
    return [
        Record(topic, f"e{number}", b"%d" % number, KEYS[number % keys]) for number in range(count)
    ]


def ids(deliveries: Iterable[Delivery]) -> list[str]:
    return [delivery.id for delivery in deliveries]


async def settle(
    journal: Journal, group: str, consumer: str, deliveries: Iterable[Delivery]
) -> list[Step]:
    """Acknowledge each in a step of its own; gives the refused."""
    return await journal.commit(group, consumer, [Step(acks=[each]) for each in deliveries])


async def drain(journal: Journal, group: str, consumer: str) -> list[Delivery]:
    """Read and settle until nothing is left."""
    seen: list[Delivery] = []
    while batch := await journal.read(group, consumer):
        assert await settle(journal, group, consumer, batch) == []
        seen += batch
    return seen


def letter(name: str, **changes: object) -> DeadLetter:
    """A dead letter."""
    values: dict[str, object] = {
        "id": name,
        "reason": "failed",
        "error": "ValueError: no\nmore words",
        "agent": "risk",
        "handler": "check",
        "topic": "order",
        "at_s": 5.0,
        "first_at_s": 4.0,
    }
    return DeadLetter(**(values | changes))  # type: ignore[arg-type]
