"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import UTC, datetime, timedelta

_START = datetime(2024, 1, 1, tzinfo=UTC)
_MONO_START_S = 1000.0
#: Turns of the loop after each wake-up: enough for what was woken to come to its next wait.
_TURNS = 25


class FakeClock:
    """
    Time under a test's control; give it as ``clock=`` to harness, mesh, consumer or publisher.

    Args:
        start: What the clock shows first; aware.
    """

    def __init__(self, start: datetime = _START) -> None:
        """Stand still."""
        self._start = start
        self._elapsed_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._came = asyncio.Event()

    def now(self) -> datetime:
        """Tell the wall-clock time."""
        return self._start + timedelta(seconds=self._elapsed_s)

    def time_s(self) -> float:
        """Tell the wall-clock time in seconds since 1970."""
        return self._start.timestamp() + self._elapsed_s

    def mono_s(self) -> float:
        """Tell the monotonic time."""
        return _MONO_START_S + self._elapsed_s

    async def sleep(self, delay_s: float) -> None:
        """Wait until a test has advanced the clock by `delay_s` seconds."""
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # The number keeps those of one moment in the order in which they came
        heapq.heappush(self._sleepers, (self._elapsed_s + delay_s, next(self._numbers), waiter))
        self._came.set()
        await waiter

    @property
    def sleepers(self) -> int:
        """Count those who wait for the clock."""
        return sum(not waiter.done() for _, _, waiter in self._sleepers)

    async def until_sleepers(self, count: int) -> None:
        """Return when at least so many wait for the clock."""
        while self.sleepers < count:
            self._came.clear()
            await self._came.wait()

    async def advance(self, seconds: float) -> None:
        """
        Move on, waking everybody whose moment comes, in order, each at its own moment.

        Whoever falls asleep again for a moment within the span is woken again.
        """
        ends_s = self._elapsed_s + seconds
        await _turn()
        while self._sleepers and self._sleepers[0][0] <= ends_s:
            due_s, _, waiter = heapq.heappop(self._sleepers)
            if waiter.done():
                continue  # cancelled
            self._elapsed_s = max(self._elapsed_s, due_s)
            waiter.set_result(None)
            await _turn()
        self._elapsed_s = ends_s
        await _turn()


async def _turn() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)
