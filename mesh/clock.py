"""The only door to time, so that tests can bring a clock of their own."""

from __future__ import annotations

import asyncio
import functools
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What the mesh asks of time."""

    def now(self) -> datetime:
        """Tell the wall-clock time, aware, in UTC."""
        ...

    def time_s(self) -> float:
        """Tell the wall-clock time in seconds since 1970."""
        ...

    def mono_s(self) -> float:
        """Tell the monotonic time in seconds; the same clock in all processes of a host."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Wait for `delay_s` seconds."""
        ...


class SystemClock:
    """The machine's own time."""

    __slots__ = ()

    # C functions, not methods: they are asked once an event
    now = staticmethod(functools.partial(datetime.now, UTC))
    mono_s = staticmethod(time.monotonic)

    def time_s(self) -> float:
        """Tell the wall-clock time in seconds since 1970."""
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        """Wait for `delay_s` seconds."""
        await asyncio.sleep(delay_s)


SYSTEM_CLOCK: Clock = SystemClock()
