"""
Computes rolling numbers of the market: change, fast and slow mean, volatility.

Params: ``fast`` and ``slow``, window lengths in quotes.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from agents.payloads import Features, Quote
from agents.settings import Settings
from mesh import Agent, Event, EventType, on, run


class Window:
    """
    Mean and deviation of the last values.

    The sums are made anew from the values at each turn of the window, so that rounding errors do
    not pile up however long the agent runs.

    Args:
        length: How many values.
    """

    def __init__(self, length: int) -> None:
        """Begin empty."""
        self._values: deque[float] = deque(maxlen=length)
        self._length = length
        self._sum = 0.0
        self._squares = 0.0
        self._turned = 0

    def to_list(self) -> list[Any]:
        """Give all there is to it: `from_list` goes on to the last bit as this one would."""
        return [list(self._values), self._sum, self._squares, self._turned]

    def from_list(self, kept: list[Any]) -> None:
        """Go on where another window was."""
        values, self._sum, self._squares, self._turned = kept
        self._values.extend(values)

    def add(self, value: float) -> None:
        """Take in a value; the oldest leaves a full window."""
        if len(self._values) == self._length:
            oldest = self._values[0]
            self._sum -= oldest
            self._squares -= oldest * oldest
        self._values.append(value)
        self._sum += value
        self._squares += value * value
        self._turned += 1
        if self._turned >= self._length:
            self._turned = 0
            self._sum = math.fsum(self._values)
            self._squares = math.fsum(each * each for each in self._values)

    @property
    def is_full(self) -> bool:
        """Say whether enough values have come."""
        return len(self._values) == self._length

    @property
    def mean(self) -> float:
        """Give the mean."""
        return self._sum / len(self._values)

    @property
    def deviation(self) -> float:
        """Give the standard deviation."""
        variance = self._squares / len(self._values) - self.mean**2
        return math.sqrt(max(0.0, variance))


class FeatureAgent(Agent):
    """Hears quotes, says features."""

    async def setup(self) -> None:
        settings = Settings(self.params)
        fast = settings.whole("fast", 20, 1, 100_000)
        slow = settings.whole("slow", 100, 2, 100_000)
        if fast >= slow:
            settings.complain(f"param fast={fast}: must be below slow={slow}")
        settings.check()
        self.fast, self.slow, self.changes = Window(fast), Window(slow), Window(slow)
        self.last: float | None = None
        # Kept where quotes are durable: a live one that this process missed is missing anyway
        if self.has_state and (kept := self.ctx.state.get("windows")):
            self.last = kept["last"]
            for name, window in self._windows().items():
                window.from_list(kept[name])

    def _windows(self) -> dict[str, Window]:
        return {"fast": self.fast, "slow": self.slow, "changes": self.changes}

    @on(EventType.MARKET_DATA_RECEIVED)
    async def on_quote(self, quote: Quote, event: Event) -> None:
        features = self.compute(quote)
        if self.has_state:
            windows = {name: window.to_list() for name, window in self._windows().items()}
            self.ctx.state["windows"] = {"last": self.last, **windows}
        await self.publish(EventType.FEATURES_COMPUTED, features, key=event.key)

    def compute(self, quote: Quote) -> Features:
        """Take in a quote and give the features of now."""
        mid = quote.mid
        change = 0.0 if self.last is None else mid / self.last - 1
        self.last = mid
        self.fast.add(mid)
        self.slow.add(mid)
        self.changes.add(change)
        return Features(
            quote=quote,
            change=change,
            fast_mean=self.fast.mean if self.fast.is_full else None,
            slow_mean=self.slow.mean if self.slow.is_full else None,
            volatility=self.changes.deviation if self.changes.is_full else None,
        )


if __name__ == "__main__":
    run(FeatureAgent)
