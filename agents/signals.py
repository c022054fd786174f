"""
Turns features into wishes: long when the fast mean is above the slow one, short when below.

A signal is said only when the wish changes. The band of ``band`` volatilities around the slow mean
keeps it from flickering.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agents.payloads import Features, Signal
from agents.settings import Settings
from mesh import Agent, Event, EventType, HandlerPriority, on, run

if TYPE_CHECKING:
    from collections.abc import Callable


class Signals(Agent):
    """Hears features, says signals."""

    async def setup(self) -> None:
        settings = Settings(self.params)
        self.band = settings.number("band", 0.5, 0, 1000)
        settings.check()
        #: What was said last of each symbol.
        self.targets: dict[str, int] = {}

    async def restore(self) -> None:
        self.targets.clear()

    def rebalanced(self, came: Callable[[str], bool]) -> None:
        # A wish that is said again changes nothing; one that is not said does
        for symbol in filter(came, list(self.targets)):
            del self.targets[symbol]

    @on(EventType.FEATURES_COMPUTED, priority=HandlerPriority.HIGH)
    async def on_features(self, features: Features, event: Event) -> None:
        signal = self.decide(features)
        if signal is not None:
            await self.publish(EventType.SIGNAL_GENERATED, signal, key=event.key)

    def decide(self, features: Features) -> Signal | None:
        """Give a signal when the wish changes."""
        if features.fast_mean is None or features.slow_mean is None or features.volatility is None:
            return None
        distance = features.fast_mean - features.slow_mean
        band = self.band * features.volatility * features.slow_mean
        if abs(distance) <= band:
            return None
        symbol, target = features.quote.symbol, 1 if distance > 0 else -1
        if target == self.target_of(symbol):
            return None
        self.targets[symbol] = target
        if self.has_state:
            self.ctx.state[f"target.{symbol}"] = target
        return Signal(features.quote, target, distance)

    def target_of(self, symbol: str) -> int:
        """Give what was said last; it is kept where features are durable."""
        if symbol not in self.targets:
            kept = self.ctx.state.get(f"target.{symbol}", 0) if self.has_state else 0
            self.targets[symbol] = kept
        return self.targets[symbol]


if __name__ == "__main__":
    run(Signals)
