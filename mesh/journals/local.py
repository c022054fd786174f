"""What the engines of one host share: when they may be used, how reads wait, who owns what."""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from typing import TYPE_CHECKING

from mesh.errors import ClosedError, ConfigurationError, NotConnectedError
from mesh.journal import PARTITIONS, DeadCount, Journal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Set

    from mesh.deadletters import DeadLetter
    from mesh.journal import Delivery

#: A waiting read looks again so often even if nobody wakes it: wake-ups between processes travel
#: over the live fabric, which may lose one, and a lease ends in silence.
LOOK_EVERY_S = 1.0


def share_of(consumer: str, consumers: Iterable[str]) -> frozenset[int]:
    """Give the partitions that are a consumer's by right; the same answer in every process."""
    names = sorted(consumers)
    return frozenset(p for p in range(PARTITIONS) if names[p % len(names)] == consumer)


def still_lives(group: str, consumers: Iterable[str]) -> ConfigurationError:
    """Give the error for a group that cannot be forgotten."""
    return ConfigurationError(
        f"group {group!r} cannot be forgotten while it lives: {', '.join(sorted(consumers))};"
        " stop its agents first"
    )


def count_letters(
    letters: Iterable[DeadLetter],
) -> dict[tuple[str, str, str, str], DeadCount]:
    """Count dead letters as `Journal.count_dead` does."""
    moments: dict[tuple[str, str, str, str], list[float]] = {}
    for letter in letters:
        line = letter.error.partition("\n")[0]
        alike = letter.agent, letter.handler or "", letter.reason, line
        moments.setdefault(alike, []).append(letter.at_s)
    return {alike: DeadCount(len(at), min(at), max(at)) for alike, at in moments.items()}


class Bells:
    """Wakes waiting reads; belongs to one loop."""

    def __init__(self) -> None:
        """Hang no bell."""
        self._hung: dict[asyncio.Event, Set[str] | None] = {}

    @contextlib.contextmanager
    def hang(self, topics: Set[str] | None) -> Iterator[asyncio.Event]:
        """Give an event that is set when one of the topics is rung; None hears all."""
        bell = asyncio.Event()
        self._hung[bell] = topics
        try:
            yield bell
        finally:
            del self._hung[bell]

    def ring(self, topics: Collection[str] = ()) -> None:
        """Wake who waits for these topics; without any, everybody."""
        for bell, heard in self._hung.items():
            if not topics or heard is None or not heard.isdisjoint(topics):
                bell.set()


class LocalJournal(Journal):
    """
    A journal whose readers wait in this process.

    Args:
        bells: Shared by journals on one store in one process.
    """

    def __init__(self, bells: Bells | None = None) -> None:
        """Begin unconnected."""
        self._bells = bells or Bells()
        self._connected = False
        self._closed = False

    def wake(self, topics: Collection[str] = ()) -> None:
        """Let waiting reads look again."""
        self._bells.ring(topics)

    async def read(
        self, group: str, consumer: str, *, limit: int = 256, wait_s: float = 0.0
    ) -> list[Delivery]:
        """Hand out events; between two looks it waits for a bell, at most `LOOK_EVERY_S`."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + wait_s
        while True:
            self._require_open()
            # Hung before the look, or what comes in between would ring unheard
            with self._bells.hang(self._heard(group)) as bell:
                deliveries = await self._look(group, consumer, limit)
                left_s = ends_s - loop.time()
                if deliveries or left_s <= 0:
                    return deliveries
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, LOOK_EVERY_S)):
                        await bell.wait()

    @abstractmethod
    async def _look(self, group: str, consumer: str, limit: int) -> list[Delivery]:
        """Hand out what is there."""

    @abstractmethod
    def _heard(self, group: str) -> Set[str] | None:
        """Give the topics a group hears, as far as this journal knows; None when it does not."""

    def _tell(self, topics: Collection[str]) -> None:
        """Wake who waits for these topics, here and elsewhere."""
        if topics:
            self._bells.ring(topics)
            if self.on_append is not None:
                self.on_append(topics)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this {type(self).__name__} is closed; make a new one")
        if not self._connected:
            raise NotConnectedError(
                f"{type(self).__name__} is not connected; call `await journal.connect()` first"
            )
