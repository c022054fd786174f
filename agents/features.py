"""
Computes rolling numbers of the market: change, fast and slow mean, volatility.

Params: ``fast`` and ``slow``, window lengths in quotes.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

from agents.payloads import Features, Quote
from agents.settings import Settings
from mesh import Agent, Event, EventType, on, run

if TYPE_CHECKING:
    from collections.abc import Callable


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


class Windows:
    """
    What is known of one symbol.

    Args:
        fast: Length of the short window.
        slow: Length of the long one.
        kept: What `to_dict` gave; go on there.
    """

    def __init__(self, fast: int, slow: int, kept: dict[str, Any] | None = None) -> None:
        """Begin empty, or where another one was."""
        self.fast, self.slow, self.changes = Window(fast), Window(slow), Window(slow)
        self.last: float | None = None
        if kept:
            self.last = kept["last"]
            self.fast.from_list(kept["fast"])
            self.slow.from_list(kept["slow"])
            self.changes.from_list(kept["changes"])

    def to_dict(self) -> dict[str, Any]:
        """Give all there is to it."""
        windows = {"fast": self.fast, "slow": self.slow, "changes": self.changes}
        return {"last": self.last, **{name: each.to_list() for name, each in windows.items()}}

    def add(self, quote: Quote) -> Features:
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


class FeatureAgent(Agent):
    """Hears quotes, says features."""

    async def setup(self) -> None:
        settings = Settings(self.params)
        self.fast = settings.whole("fast", 20, 1, 100_000)
        self.slow = settings.whole("slow", 100, 2, 100_000)
        if self.fast >= self.slow:
            settings.complain(f"param fast={self.fast}: must be below slow={self.slow}")
        settings.check()
        self.windows: dict[str, Windows] = {}

    async def restore(self) -> None:
        self.windows.clear()

    def rebalanced(self, came: Callable[[str], bool]) -> None:
        # Of what another replica took in, the windows here know nothing
        for symbol in filter(came, list(self.windows)):
            del self.windows[symbol]

    @on(EventType.MARKET_DATA_RECEIVED)
    async def on_quote(self, quote: Quote, event: Event) -> None:
        windows = self.windows_of(quote.symbol)
        features = windows.add(quote)
        if self.has_state:
            self.ctx.state[f"windows.{quote.symbol}"] = windows.to_dict()
        await self.publish(EventType.FEATURES_COMPUTED, features, key=event.key)

    def windows_of(self, symbol: str) -> Windows:
        """Go on with a symbol's windows; they are kept where quotes are durable."""
        if symbol not in self.windows:
            # A live quote that this process missed is missing anyway
            kept = self.ctx.state.get(f"windows.{symbol}") if self.has_state else None
            self.windows[symbol] = Windows(self.fast, self.slow, kept)
        return self.windows[symbol]


if __name__ == "__main__":
    run(FeatureAgent)
