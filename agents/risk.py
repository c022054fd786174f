"""
Lets trades pass, or not: position, order rate and loss are limited.

Params: ``size`` (units a position), ``max_position`` (units), ``max_orders`` an hour of *market*
time, ``max_loss`` (quote currency; once lost, only closing trades pass).
"""

from __future__ import annotations

from collections import deque
from datetime import datetime, timedelta

from agents.payloads import Approval, Breach, Quote, Rejection, Signal
from agents.settings import Settings
from mesh import Agent, Event, EventType, HandlerPriority, on, run

_HOUR = timedelta(hours=1)


class Risk(Agent):
    """Hears signals, says approvals, rejections and breaches."""

    max_replicas = 1  # limits hold over all symbols

    async def setup(self) -> None:
        settings = Settings(self.params)
        self.size = settings.whole("size", 1, 1, 10**9)
        self.max_position = settings.whole("max_position", 10, 1, 10**9)
        self.max_orders = settings.whole("max_orders", 60, 1, 10**9)
        self.max_loss = settings.number("max_loss", 1e6, 0, 1e15)
        settings.check()
        kept = self.ctx.state.get("limits", {})
        #: What is held if everything approved was filled: the money path has no way back to here.
        self.position: int = kept.get("position", 0)
        self.cash: float = kept.get("cash", 0.0)
        self.order_times = deque(map(datetime.fromisoformat, kept.get("order_times", ())))
        self.halted: bool = kept.get("halted", False)
        self.orders: int = kept.get("orders", 0)

    def keep(self) -> None:
        """Keep what limits are used, together with the signal that used them."""
        self.ctx.state["limits"] = {
            "position": self.position,
            "cash": self.cash,
            "order_times": [time.isoformat() for time in self.order_times],
            "halted": self.halted,
            "orders": self.orders,
        }

    @on(EventType.SIGNAL_GENERATED, priority=HandlerPriority.CRITICAL)
    async def on_signal(self, signal: Signal, event: Event) -> None:
        quote = signal.quote
        quantity = signal.target * self.size - self.position
        if not quantity:
            return
        if self._breaks_loss(quote):
            breach = Breach(quote, "max_loss", -self.worth(quote), self.max_loss)
            await self.publish(EventType.RISK_LIMIT_BREACHED, breach, key=event.key)
            self.keep()
        reason = self.objection(quote, quantity)
        if reason is not None:
            rejection = Rejection(quote, quantity, reason)
            await self.publish(EventType.TRADE_REJECTED, rejection, key=event.key)
            return
        approval = self.approve(quote, quantity)
        self.keep()
        await self.publish(EventType.TRADE_APPROVED, approval, key=event.key)

    def objection(self, quote: Quote, quantity: int) -> str | None:
        """Say why a trade must not be, or None."""
        after = self.position + quantity
        if abs(after) > self.max_position:
            return f"position {after} would be over {self.max_position}"
        now = datetime.fromisoformat(quote.time)
        while self.order_times and now - self.order_times[0] >= _HOUR:
            self.order_times.popleft()
        if len(self.order_times) >= self.max_orders:
            return f"{len(self.order_times)} orders within the hour, allowed {self.max_orders}"
        if self.halted and abs(after) > abs(self.position):
            return f"halted: the loss is over {self.max_loss:g}"
        return None

    def approve(self, quote: Quote, quantity: int) -> Approval:
        """Book a trade as if it were filled at the quote."""
        self.order_times.append(datetime.fromisoformat(quote.time))
        self.orders += 1
        self.position += quantity
        self.cash -= quantity * (quote.ask if quantity > 0 else quote.bid)
        return Approval(quote, f"{quote.symbol}-{quote.number}-{self.orders}", quantity)

    def worth(self, quote: Quote) -> float:
        """Give profit (or, negative, loss) at a quote."""
        return self.cash + self.position * quote.mid

    def _breaks_loss(self, quote: Quote) -> bool:
        """Notice the moment the loss limit is crossed; it stays crossed."""
        if self.halted or -self.worth(quote) <= self.max_loss:
            return False
        self.halted = True
        return True


if __name__ == "__main__":
    run(Risk)
