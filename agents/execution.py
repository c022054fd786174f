"""
Executes approved trades on paper: buys at the ask, sells at the bid, pays fees.

Params: ``fee_bps``, basis points of the traded value.
"""

from __future__ import annotations

from agents.payloads import Approval, Fill
from agents.settings import Settings
from mesh import Agent, Event, EventType, HandlerPriority, on, run


class Execution(Agent):
    """Hears approvals, says fills."""

    async def setup(self) -> None:
        settings = Settings(self.params)
        self.fee_bps = settings.number("fee_bps", 1.0, 0, 1000)
        settings.check()

    @on(EventType.TRADE_APPROVED, priority=HandlerPriority.CRITICAL)
    async def on_approval(self, approval: Approval, event: Event) -> None:
        await self.publish(EventType.ORDER_EXECUTED, self.fill(approval), key=event.key)

    def fill(self, approval: Approval) -> Fill:
        """Fill an order at the quote it was approved with."""
        quote = approval.quote
        price = quote.ask if approval.quantity > 0 else quote.bid
        value = abs(approval.quantity) * price
        return Fill(
            order_id=approval.order_id,
            symbol=quote.symbol,
            time=quote.time,
            quantity=approval.quantity,
            price=price,
            fee_cents=round(value * self.fee_bps / 100),
            mark=quote.mid,
        )


if __name__ == "__main__":
    run(Execution)
