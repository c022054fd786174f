"""
The order of what one journal appends to a cluster, whose nodes share no clock.

On one server Redis gives out all positions, one after another. On a cluster each partition has its
own, so an appender proposes them: Redis's time as it was told last, never behind what this process
has appended or read, so that an event also comes after those that caused it.
"""

from __future__ import annotations

import time

from mesh.journals.redis_entries import START, Spot


class ClusterClock:
    """Proposes positions."""

    def __init__(self) -> None:
        """Know no time yet."""
        self._ahead_ms = 0.0
        self._last: Spot = START

    def tell(self, now_ms: int) -> None:
        """Take Redis's time."""
        self._ahead_ms = now_ms - time.monotonic() * 1000

    def observe(self, spot: Spot) -> None:
        """Propose nothing before this from now on."""
        if spot > self._last:
            self._last = spot

    def take(self, count: int) -> Spot:
        """Give the first of so many positions in a row."""
        now_ms = int(time.monotonic() * 1000 + self._ahead_ms)
        ms, seq = (now_ms, -1) if now_ms > self._last[0] else self._last
        self._last = ms, seq + count
        return ms, seq + 1
